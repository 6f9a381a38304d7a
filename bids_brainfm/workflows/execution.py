"""Run a graph: which Nipype plugin, how progress is told, what happens when a worker is killed."""

import importlib
import logging
import shlex
import shutil
import subprocess
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from nipype.pipeline.plugins.base import GraphPluginBase
from nipype.pipeline.plugins.linear import LinearPlugin
from nipype.pipeline.plugins.multiproc import MultiProcPlugin
from nipype.pipeline.plugins.slurm import SLURMPlugin

from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.workflows.plan import Plan

LOGGER = logging.getLogger('bids_brainfm')


class _MultiProc(MultiProcPlugin):
    """Nipype's plugin, which waits for ever for a worker that was killed; this one does not."""

    lost: BrainfmError | None = None

    def _async_callback(self, args):
        try:
            super()._async_callback(args)
        except BrokenProcessPool:
            self.lost = BrainfmError(
                'a worker process was killed, most often because memory ran out: ask for more '
                'memory, or lower --nprocs; what is written is kept.'
            )
        except Exception as error:  # whatever it is, this worker's result will never come
            self.lost = BrainfmError(
                f'a worker ended without its result ({error}), as when another job empties the '
                f'work folder: start again; what is written is kept.'
            )

    def _get_result(self, taskid):
        if self.lost is not None:
            raise self.lost
        return super()._get_result(taskid)


class _Slurm(SLURMPlugin):
    """Nipype's plugin, which overlooks that sbatch or squeue failed; this one says so.

    A job that ended without a result is told in a sentence, and none is left behind in the queue.
    """

    lost: BrainfmError | None = None

    def __init__(self, plugin_args: dict, file: Path):
        if shutil.which('sbatch') is None:
            raise BrainfmError(
                f'--use-plugin {file}: there is no sbatch here, as in a container: submit whole '
                f'runs instead (docs/hpc.md), or use an installation outside containers.'
            )
        super().__init__(plugin_args=plugin_args)
        self.file = file

    def run(self, graph, config, updatehash=False):
        try:
            super().run(graph, config, updatehash)
        finally:
            if self._pending:
                subprocess.run(['scancel', *map(str, self._pending)], check=False)

    def _submit_batchtask(self, scriptfile, node):
        log = Path(scriptfile).with_suffix('.log')
        asked = shlex.split(self._sbatch_args or '')
        names = [f'--job-name={node.name}', f'--output={log}']
        ended = _ask('sbatch', '--parsable', *names, *asked, scriptfile)
        if ended.returncode != 0:
            self.lost = BrainfmError(
                f'sbatch took no job ({" ".join(ended.stderr.split())}): check the sbatch_args of '
                f'{self.file}.'
            )
            raise self.lost
        job = int(ended.stdout.partition(';')[0])
        self._pending[job] = node.output_dir()
        return job

    def _is_pending(self, taskid):
        ended = _ask('squeue', '--noheader', f'--jobs={taskid}')
        # a scheduler that is too busy to answer has not said that the job is gone
        silent = ended.returncode != 0 and 'Invalid job id' not in ended.stderr
        return silent or bool(ended.stdout.strip())

    def _get_result(self, taskid):
        result = super()._get_result(taskid)
        if result and result.get('hostname') == 'unknown':  # so Nipype marks what it made up
            self.lost = BrainfmError(
                f'the Slurm job {taskid} ended without its result, most often because memory or '
                f'time ran out: ask for more in the sbatch_args of {self.file} and start again; '
                f'what is written is kept.'
            )
        return result


def _ask(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Progress:
    """Tell on the log, node by node, how far the parcel series are."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started: dict[str, float] = {}

    def __call__(self, node, status: str) -> None:
        """Take Nipype's report on a node."""
        if node.name.startswith('networks_') and status == 'end':
            LOGGER.info('%s: networks found', node.name.removeprefix('networks_'))
        if not node.name.startswith('series_'):
            return
        if status == 'start':
            self.started[node.name] = time.monotonic()
            return
        self.done += 1
        run = node.inputs.run.name
        outcome = node.result.outputs.outcome if status == 'end' else None
        head = f'[{self.done}/{self.total}]'
        if outcome is None:
            LOGGER.error('%s %s: parcel series failed', head, run)
        elif outcome.error:
            LOGGER.error('%s %s', head, outcome.error)
        else:
            took = time.monotonic() - self.started[node.name]
            LOGGER.info('%s %s: parcel series written (%.1f s)', head, run, took)


def execute(workflow, plan: Plan) -> None:
    """Run the graph to its end.

    Raises
    ------
    BrainfmError
        A worker was killed.
    RuntimeError
        A node crashed where the settings ask to stop.
    """
    settings = plan.settings
    progress = Progress(sum(len(atlas.todo) for atlas in plan.atlases))
    n_networks = sum(len(atlas.network_runs) for atlas in plan.atlases)
    plugin = _plugin(settings, progress, max(progress.total, n_networks))
    here = isinstance(plugin, LinearPlugin | MultiProcPlugin)
    workflow.config['execution'] = {
        'crashdump_dir': str(settings.output_dir / 'logs'),
        'crashfile_format': 'txt',
        'stop_on_first_crash': str(settings.stop_on_first_crash).lower(),
        # the default of 2 s a node is most of a short job; a scheduler is not to be asked so often
        'poll_sleep_duration': '0.1' if here else '2',
        # a shared file system may show another node's files late
        'job_finished_timeout': '20',
        'check_version': 'false',
    }
    run(workflow, plugin)


def run(workflow, plugin) -> None:
    """Run a graph by a plugin, and say so where a worker was lost.

    Raises
    ------
    BrainfmError
        A worker was killed, or its folder was taken away; or a scheduler takes no jobs.
    """
    try:
        workflow.run(plugin=plugin)
    except Exception:
        lost = getattr(plugin, 'lost', None)
        if lost is not None:
            raise lost from None
        raise


def _plugin(settings: Settings, progress: Progress, n_jobs: int):
    """Plugin of ``--use-plugin``, or workers on this machine, or none for one CPU or one job."""
    if settings.use_plugin is not None:
        return _from_file(settings, progress)
    args = {'status_callback': progress}
    if settings.nprocs == 1 or n_jobs <= 1:
        return LinearPlugin(args)
    args |= {
        'n_procs': settings.nprocs,
        'raise_insufficient': False,
        # workers start clean: no lock, thread or CUDA state of this process comes along
        'mp_context': 'forkserver',
    }
    if settings.mem is not None:
        args['memory_gb'] = settings.mem
    return _MultiProc(args)


def _from_file(settings: Settings, progress: Progress):
    import yaml

    try:
        content = yaml.safe_load(settings.use_plugin.read_text())
        name, args = content['plugin'], content.get('plugin_args') or {}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BrainfmError(
            f'--use-plugin {settings.use_plugin} is not YAML with plugin and plugin_args '
            f'({error}): see docs/usage.md.'
        ) from None
    args = args | {'status_callback': progress}
    if name == 'MultiProc':
        return _MultiProc(args)
    if name == 'SLURM':
        return _Slurm(args, settings.use_plugin)
    plugin = getattr(importlib.import_module('nipype.pipeline.plugins'), f'{name}Plugin', None)
    # plugins of whole graphs submit jobs and do not wait for them
    if plugin is None or issubclass(plugin, GraphPluginBase):
        raise BrainfmError(
            f'--use-plugin {settings.use_plugin} names {name!r}, which is no Nipype plugin that '
            f'waits for its jobs: use MultiProc, Linear or SLURM.'
        )
    return plugin(plugin_args=args)
