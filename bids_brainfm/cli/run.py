"""The main command: ``bids_brainfm bids_dir output_dir participant``."""

import gc
import logging
import os
import shutil
import sys
import time
import uuid
from datetime import datetime
from importlib import import_module
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING

from bids_brainfm import stopping, surroundings
from bids_brainfm.cli import scratch
from bids_brainfm.cli.parser import named_files, parse_settings
from bids_brainfm.config import Settings, split_name
from bids_brainfm.errors import BrainfmError, abridge
from bids_brainfm.signals.strategy import GSR

if TYPE_CHECKING:
    from nipype.pipeline import engine as pe

    from bids_brainfm.workflows.plan import Plan

LOGGER = logging.getLogger('bids_brainfm')
FORM = logging.Formatter('%(asctime)s %(levelname)s %(message)s', '%Y-%m-%d %H:%M:%S')
MOST_REPORTS = 10  # that are named at the end
# Keeps libraries from looking for anything on the network; workers inherit it
OFFLINE = {'HF_HUB_OFFLINE': '1', 'TEMPLATEFLOW_AUTOUPDATE': 'off'}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0: everything is written; 1: some runs failed (named at the end), the others are written; 2:
    nothing could be run (one sentence on standard error says why); 130, 143: stopped by Ctrl-C,
    by SIGTERM.
    """
    try:
        with surroundings.explained(), stopping.listening():
            if argv is None:
                surroundings.prepare()
            code = run(parse_settings(argv))
            stopping.check()  # a library may have swallowed the signal
            return code
    except BrainfmError as error:
        LOGGER.debug('Traceback', exc_info=True)
        print(f'bids_brainfm: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        LOGGER.error('bids_brainfm was stopped; the same command goes on from here.')
        return stopping.exit_code()
    finally:
        gc.freeze()  # else the interpreter looks through all objects before it ends: 0.8 s


def run(settings: Settings) -> int:
    """Do what the settings say; returns the exit code."""
    from bids_brainfm.bids.dataset import check_participants
    from bids_brainfm.bids.inputs import find_datasets

    listen(settings)
    if settings.offline:
        os.environ |= OFFLINE
    # one folder per process, for logs and for work: others may be running at the same time
    name = f'{datetime.now():%Y%m%d-%H%M%S}_{uuid.uuid4().hex[:8]}'
    if settings.analysis_level == 'group':
        return run_group(settings, name)
    if settings.reports_only:
        return write_reports(settings, name)
    datasets = find_datasets(settings.bids_dir, settings.derivatives)
    check_places(settings, datasets)
    check_participants(datasets, settings.participant_label)
    work = prepare_work_dir(settings, name)
    import_libraries()
    from importlib.metadata import version

    from bids_brainfm.bids import claims
    from bids_brainfm.workflows.plan import make_plan

    code = 2
    try:
        plan = make_plan(settings, datasets, work, version('bids-brainfm'))
        start_log(settings, name)
        code = carry_out(plan)
    finally:
        claims.withdraw(settings.output_dir)
        if code != 1:  # nothing goes on from there, so it is of use only where something failed
            shutil.rmtree(work, ignore_errors=True)
    return code


def check_places(settings: Settings, datasets: dict[str, Path]) -> None:
    """Refuse to write into a dataset that is read, or to empty a folder with something needed."""
    written = {
        'output folder': settings.output_dir,
        'work folder': settings.work_dir,
    }
    read, raw = [root.resolve() for root in datasets.values()], settings.bids_dir.resolve()
    for what, path in written.items():
        if path is None:
            continue
        place = path.resolve()
        # <raw dataset>/derivatives/<name> is where BIDS wants an output
        nested = what == 'output folder' and place.is_relative_to(raw / 'derivatives')
        inside = [root for root in (*read, *[raw] * (not nested)) if place.is_relative_to(root)]
        if inside:
            where = f'{path} lies inside the input {inside[0]}'
            raise BrainfmError(f'The {what} {where}: choose one outside it.')
    if settings.clean_workdir:
        from bids_brainfm.resources import home

        files: list[Path | None] = [path for _, path in named_files(settings)]
        files += map(Path, (settings.denoise.removesuffix(GSR), *settings.model))
        files += [*(split_name(model)[1] for model in settings.model), home()]
        kept = [*read, raw, settings.output_dir.resolve()]
        kept += [path.resolve() for path in files if path is not None and path.exists()]
        for path in kept:
            if path.is_relative_to(settings.work_dir.resolve()):
                loss = f'delete {path}, which lies inside the work folder {settings.work_dir}'
                raise BrainfmError(f'--clean-workdir would {loss}: name another work folder.')


def write_reports(settings: Settings, name: str) -> int:
    """Write the reports again, from what is in the output folder."""
    from bids_brainfm.outputs.reporting import report
    from bids_brainfm.progress import track

    known = sorted(p.name.removeprefix('sub-') for p in settings.output_dir.glob('sub-*/'))
    subjects = settings.participant_label or known
    unknown = sorted(set(subjects) - set(known))
    if unknown or not known:
        lack = f'{settings.output_dir} has no outputs of {", ".join(unknown) or "any participant"}'
        raise BrainfmError(f'{lack} to report on: run without --reports-only first.')
    with scratch.passing(start_log(settings, name)):
        versions = software()
        for subject in track(subjects, 'Reports', 'participant'):
            LOGGER.info('Report: %s', report(settings.output_dir, subject, versions))
    return 0


def run_group(settings: Settings, name: str) -> int:
    """Make the product of the group level that is asked for."""
    from importlib.metadata import version

    from bids_brainfm.bids.dataset import select_participants
    from bids_brainfm.outputs.products import group_modules

    dataset = settings.bids_dir
    if dataset.resolve() != settings.output_dir.resolve():
        command = f'bids_brainfm {dataset} {dataset} group'
        raise BrainfmError(f'The group level writes into the dataset that it reads: {command}.')
    people = settings.participant_label
    if settings.participants_file is not None:
        people = select_participants(dataset, settings.participants_file, settings.part)
    filters = {
        'sub': people, 'ses': settings.session_label,
        'task': settings.task_id, 'run': settings.run_id,
        'space': (settings.space,) if settings.space else (),
    }  # fmt: skip
    for product in group_modules():
        if product.wanted(settings):
            found = product.find(dataset, filters, settings)
            with scratch.passing(start_log(settings, name)):
                product.write(found, dataset, settings, version('bids-brainfm'))
    return 0


def software() -> dict[str, str]:
    """Versions for the report."""
    from importlib.metadata import version

    return {name: version(name) for name in ('bids_brainfm', 'torch', 'nipype', 'nibabel')}


def import_libraries() -> None:
    """Import what every run needs, in 4/5 of the time: the garbage collector rests meanwhile."""
    gc.disable()
    for name in ('matplotlib.figure', 'torch'):
        import_module(name)
    gc.freeze()
    gc.enable()


def prepare_work_dir(settings: Settings, name: str) -> Path:
    """Make this process's work folder, with a configuration for Nipype in it.

    That keeps Nipype's own log off the terminal, here and in its workers (it has crash files), and
    its files out of the home folder. Nipype reads it when it is imported, so it is written before.
    """
    work = settings.work_dir / name
    level = 'INFO' if settings.verbose else 'CRITICAL'
    lines = [f'{logger}_level = {level}' for logger in ('workflow', 'interface', 'utils')]
    try:
        if settings.clean_workdir and settings.work_dir.is_dir():
            for entry in settings.work_dir.iterdir():
                is_folder = entry.is_dir() and not entry.is_symlink()
                shutil.rmtree(entry) if is_folder else entry.unlink()
        work.mkdir(parents=True)
        (work / 'nipype.cfg').write_text('\n'.join(['[logging]', *lines]) + '\n')
    except OSError as error:
        problem = f'The work folder {settings.work_dir} cannot be written ({error.strerror})'
        raise BrainfmError(f'{problem}: name another one with --work-dir.') from None
    os.environ['NIPYPE_CONFIG_DIR'] = str(work)
    # not in the folder of this process, which is gone before the libraries have tidied up
    scratch.keep_in(settings.work_dir)
    return work


def listen(settings: Settings) -> None:
    """Send the log to stderr, and keep it until it is known that there is to be a file."""
    LOGGER.setLevel(logging.DEBUG if settings.verbose else logging.INFO)
    LOGGER.propagate = False
    LOGGER.handlers = [_Terminal(), MemoryHandler(1000, flushLevel=logging.CRITICAL + 1)]


def start_log(settings: Settings, name: str) -> Path:
    """Open this run's folder of logs, with its settings, and send there what was and is logged."""
    from bids_brainfm.bids.files import write_text

    folder = settings.output_dir / 'logs' / name
    write_text(folder / 'bids_brainfm.toml', settings.to_toml())
    file = _LogFile(folder / 'bids_brainfm.log', encoding='utf-8', errors='backslashreplace')
    file.setFormatter(FORM)
    for kept in [handler for handler in LOGGER.handlers if isinstance(handler, MemoryHandler)]:
        kept.setTarget(file)
        kept.close()
        LOGGER.removeHandler(kept)
    LOGGER.addHandler(file)
    return folder


class _LogFile(logging.FileHandler):
    """A log file that hides its own write errors, so that a full disk is reported only once."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Terminal(logging.Handler):
    """Write log lines to standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(FORM.format(record), file=sys.stderr)


def carry_out(plan: 'Plan') -> int:
    """Write the dataset's own files, run the graph, and report the outcome."""
    from bids_brainfm.bids.description import write_dataset_files
    from bids_brainfm.bids.files import remove_leftovers
    from bids_brainfm.outputs.registry import SUFFIXES
    from bids_brainfm.reports.methods import write_methods
    from bids_brainfm.workflows.execution import execute
    from bids_brainfm.workflows.participant import add_reports, describe, init_participant_wf

    settings, started = plan.settings, time.monotonic()
    write_dataset_files(settings.output_dir, plan.version, plan.datasets, SUFFIXES)
    workflow = init_participant_wf(plan)
    record = not settings.boilerplate_only
    citation = write_methods(settings.output_dir, describe(workflow, plan), record)
    if settings.boilerplate_only:
        LOGGER.info('Methods text written: %s', citation)
        return 0
    announce(plan)
    remove_leftovers(settings.output_dir, plan.subjects)
    plan.record_failures()
    plan.remove_stale()
    add_reports(workflow, plan, changed_reports(plan), software())
    if settings.write_graph:
        write_graph(workflow, settings.work_dir)
    crashed = None
    try:
        execute(workflow, plan)
    except Exception as error:  # what is written is kept, and listed all the same
        crashed = error
        LOGGER.debug('Traceback', exc_info=True)
    finally:
        remove_leftovers(settings.output_dir, plan.subjects)  # of workers that were killed
    return conclude(plan, crashed, time.monotonic() - started)


def changed_reports(plan: 'Plan') -> list[str]:
    """Participants whose reports will not fit what is in the output folder."""
    from bids_brainfm.outputs.reporting import out_of_date

    busy = plan.busy
    idle = [subject for subject in plan.subjects if subject not in busy]
    changed = busy | set(out_of_date(plan.settings.output_dir, idle, software()))
    return [subject for subject in plan.subjects if subject in changed]


def write_graph(workflow: 'pe.Workflow', folder: Path) -> None:
    """Write the graph as a DOT file, and as SVG where Graphviz is installed."""
    path = folder / 'graph.dot'
    if shutil.which('dot'):
        workflow.write_graph(str(path), graph2use='colored', format='svg', simple_form=True)
        path = path.with_suffix('.svg')
    else:
        edges = workflow._create_flat_graph().edges
        lines = dict.fromkeys(f'  "{a.fullname}" -> "{b.fullname}";' for a, b in edges)
        path.write_text('\n'.join(['digraph {', *lines, '}']) + '\n')
    LOGGER.info('Graph written: %s', path)


def announce(plan: 'Plan') -> None:
    """Say what is about to happen."""
    from bids_brainfm.reports.fragments import count

    for atlas in plan.atlases:
        people = count(len({run.subject for run in atlas.runs}), 'participant')
        form = '%s of %s in atlas %s, %d parcel series to make'
        LOGGER.info(form, count(len(atlas.runs), 'run'), people, atlas.name, len(atlas.todo))
        for model in atlas.models:
            spec, where = model.task.spec, (model.task.device, model.task.precision)
            form = '%s: %s to encode on %s in %s; weights: %s'
            LOGGER.info(form, spec.card.name, count(len(model.todo), 'run'), *where, spec.weights)


def conclude(plan: 'Plan', crashed: Exception | None, seconds: float) -> int:
    """Say what is written and what failed; returns the exit code."""
    from bids_brainfm.reports.fragments import count

    output = plan.settings.output_dir
    failures = plan.read_failures()
    if crashed is None and (removed := plan.removed()):
        names = abridge([str(path) for path in removed], 1)
        crashed = BrainfmError(f'{names} were removed while the command ran: start it again.')
    for sentence in failures:
        LOGGER.error('Failed: %s', sentence)
    if crashed is not None:
        reason = str(crashed)
        if not isinstance(crashed, BrainfmError):
            reason = reason.strip().rpartition('\n')[2].strip()
            reason = f'unexpected {type(crashed).__name__}: {reason}'
            reason += f' (crash files are in {output}/logs)'
        LOGGER.error('Stopped: %s', reason)
    pages = [output / f'sub-{subject}.html' for subject in plan.subjects]
    reports = [page for page in pages if page.is_file()]
    for report in reports[:MOST_REPORTS]:
        LOGGER.info('Report: %s', report)
    if len(reports) > MOST_REPORTS:
        LOGGER.info('and %d more reports in %s', len(reports) - MOST_REPORTS, output)
    runs = {run.name for atlas in plan.atlases for run in atlas.runs}
    counts = count(len(runs), 'run'), count(len(failures), 'failure')
    end = 'Finished' if crashed is None else 'Stopped'
    LOGGER.info('%s after %.1f s: %s, %s; outputs in %s', end, seconds, *counts, output)
    return 1 if failures or crashed else 0


if __name__ == '__main__':
    sys.exit(main())
