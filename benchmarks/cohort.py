"""Overhead of the command by the number of runs; its time and memory must grow linearly.

Each participant has one run, links to the same files. Four phases, each in a process of its own:

- planning: finding the runs and what is left to do, with nothing done;
- scheduling: the graph, with nodes that do nothing;
- all done: the whole command where every output exists, with the time to import libraries;
- reports: all pages, as with ``--reports-only``.

Limits at 2,000 runs: 5 ms a run to plan, 5 ms a run to schedule, 15 s for an all-done command, and
600 MB. Time and memory per run are printed as ratios to those of the first number of runs.

    python benchmarks/cohort.py DATA [--runs 100 1000 10000]

DATA is a dataset as ``bids_brainfm_demo`` writes it; its first participant is copied.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = 'brainlm-demo'


def write_inputs(data: Path, subject: str, labels: list[str], folder: Path) -> None:
    """Write a dataset whose participants are links to the files of one."""
    folder.mkdir()
    description = 'dataset_description.json'
    (folder / description).write_text((data / description).read_text())
    for label in labels:
        func = folder / f'sub-{label}' / 'func'
        func.mkdir(parents=True)
        for file in (data / f'sub-{subject}' / 'func').iterdir():
            link = func / file.name.replace(f'sub-{subject}', f'sub-{label}')
            link.symlink_to(file.resolve())


def write_outputs(first: str, labels: list[str], out: Path) -> None:
    """Write outputs of all participants as those of the first: sidecars copied, data linked."""
    from bids_brainfm.bids.files import write_json
    from bids_brainfm.bids.freshness import sealed

    own = [path for path in (out / f'sub-{first}').rglob('*') if path.is_file()]
    for label in labels:
        for path in own:
            name = str(path.relative_to(out)).replace(f'sub-{first}', f'sub-{label}')
            copy = out / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == '.json':
                text = path.read_text().replace(f'sub-{first}', f'sub-{label}')
                write_json(copy, sealed(json.loads(text)))
            else:
                os.link(path, copy)


def arguments(data: Path, out: Path, work: Path, *more: str) -> list[str]:
    """Return the arguments of the command."""
    return [str(data), str(out), 'participant', '--model', MODEL, '-w', str(work), *more]


def run(*options: str) -> None:
    """Run the command in a process of its own."""
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', *options]
    subprocess.run(command, check=True, capture_output=True)


def measured(work, *options) -> dict[str, float]:
    """Seconds and peak memory in MB of a function in a process of its own, imports left out."""
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=_measure, args=(queue, work, options))
    process.start()
    found = queue.get()
    process.join()
    return found


def _measure(queue, work, options) -> None:
    from bids_brainfm.cli.run import import_libraries

    import_libraries()
    from bids_brainfm.workflows import execution, participant  # noqa: F401

    logging.disable(logging.CRITICAL)
    before = _memory()
    started = time.perf_counter()
    seconds = work(*options)
    seconds = time.perf_counter() - started if seconds is None else seconds
    queue.put({'s': seconds, 'MB': _memory(), 'base': before})


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _plan(data: Path, out: Path, work: Path, nprocs: int = 2):
    from bids_brainfm.cli.parser import parse_settings
    from bids_brainfm.cli.run import prepare_work_dir
    from bids_brainfm.workflows.plan import make_plan

    settings = parse_settings(arguments(data, out, work, '--nprocs', str(nprocs)))
    folder = prepare_work_dir(settings, f'of-{os.getpid()}')
    return make_plan(settings, {'preprocessed': data}, folder, '0')


def plan(data: Path, out: Path, work: Path) -> None:
    """Plan."""
    _plan(data, out, work)


def schedule(data: Path, out: Path, work: Path) -> float:
    """Carry out a plan of which no node does anything; returns the seconds of that alone."""
    from bids_brainfm.outputs import encoding, series
    from bids_brainfm.outputs.outcome import Outcome
    from bids_brainfm.workflows import execution
    from bids_brainfm.workflows.participant import init_participant_wf

    found = _plan(data, out, work, nprocs=1)
    series.make_series = lambda run, task, stop: Outcome(run.name, 'none')
    encoding.encode_all = lambda runs, task, stop: []
    started = time.perf_counter()
    execution.execute(init_participant_wf(found), found)
    return time.perf_counter() - started


def all_done(data: Path, out: Path, work: Path) -> dict[str, float]:
    """Seconds and peak memory in MB of the command, which finds that nothing is to do."""
    command = [sys.executable, '-m', 'bids_brainfm.cli.run', *arguments(data, out, work)]
    log = out.with_suffix('.log')
    started = time.perf_counter()
    with log.open('w') as file:
        process = subprocess.Popen(command, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0
    assert 'report written' not in log.read_text()
    return {'s': seconds, 'MB': usage.ru_maxrss / 1024}


def reports(data: Path, out: Path, work: Path) -> None:
    """Write all reports."""
    from bids_brainfm.cli.run import main

    assert main(arguments(data, out, work, '--reports-only')) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('--runs', type=int, nargs='+', default=[100, 1000, 10000])
    options = parser.parse_args()
    subject = min(options.data.glob('sub-*/')).name.removeprefix('sub-')
    first: dict[str, tuple[float, float]] = {}
    print('phase       runs   seconds  ms a run  ratio  peak MB  kB a run')
    for number in options.runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data, out, work = folder / 'data', folder / 'out', folder / 'work'
            labels = [f'{i:05d}' for i in range(number)]
            write_inputs(options.data, subject, labels, data)
            found = {
                'planning': measured(plan, data, folder / 'none', work),
                'scheduling': measured(schedule, data, folder / 'none', work),
            }
            run(*arguments(data, out, work, '--participant-label', labels[0], '--nprocs', '1'))
            write_outputs(labels[0], labels[1:], out)
            found['reports'] = measured(reports, data, out, work)
            run(*arguments(data, out, work))  # the record of the methods is of all runs now
            found['all done'] = all_done(data, out, work)
        for phase, cost in found.items():
            each = 1000 * cost['s'] / number
            ratio = each / first.setdefault(phase, each)
            memory = 1024 * (cost['MB'] - found['planning']['base']) / number
            print(
                f'{phase:10s} {number:5d} {cost["s"]:9.2f} {each:9.2f} {ratio:6.2f} '
                f'{cost["MB"]:8.0f} {memory:9.1f}',
                flush=True,
            )
        print(json.dumps({'runs': number, **found}), file=sys.stderr)


if __name__ == '__main__':
    main()
