"""Run a graph: which Nipype plugin, how progress is told, what happens when a worker is killed."""

import errno
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from nipype.pipeline.plugins.linear import LinearPlugin
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer

from bids_brainfm import stopping
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.workflows.plan import Plan

LOGGER = logging.getLogger('bids_brainfm')


class _MultiProc(MultiProcPlugin):
    """Nipype's plugin, which waits for ever for a worker that was killed; this one does not."""

    lost: Exception | None = None

    def __init__(self, plugin_args):
        super().__init__(plugin_args)
        self.pool = ProcessPoolExecutor(  # no worker of the first pool has been started yet
            self.processors,
            multiprocessing.get_context(plugin_args.get('mp_context')),
            _prepare_worker,
            (self._cwd,),
        )

    def _async_callback(self, args):
        try:
            super()._async_callback(args)
        except Exception as error:  # whatever it is, this worker's result will never come
            self.lost = error

    def _get_result(self, taskid):
        if self.lost is not None:
            raise self.lost
        return super()._get_result(taskid)


def _prepare_worker(folder: str) -> None:
    """Leave signals to the process that gives the work, and end with it, however it ends."""
    process_initializer(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


class Progress:
    """Tell on the log, node by node, how far the parcel series are."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started: dict[str, float] = {}

    def __call__(self, node, status: str) -> None:
        """Take Nipype's report on a node."""
        stopping.check()  # Nipype says of an interrupted node that it has ended
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
    workflow.config['execution'] = {
        'crashdump_dir': str(settings.output_dir / 'logs'),
        'crashfile_format': 'txt',
        'stop_on_first_crash': str(settings.stop_on_first_crash).lower(),
        'poll_sleep_duration': '0.1',  # the default of 2 s a node is most of a short job
        'check_version': 'false',
    }
    progress = Progress(sum(len(atlas.todo) for atlas in plan.atlases))
    n_networks = sum(len(atlas.network_runs) for atlas in plan.atlases)
    run(workflow, _plugin(settings, progress, max(progress.total, n_networks)))


def run(workflow, plugin) -> None:
    """Run a graph by a plugin, and say what was wrong where that is known.

    Raises
    ------
    BrainfmError
        A worker was killed, its folder was taken away, a disk is full, or a node said it.
    """
    try:
        workflow.run(plugin=plugin)
    except Exception as error:
        lost = getattr(plugin, 'lost', None)
        if known := _known(lost or error, workflow.base_dir):
            raise known from None
        if isinstance(lost, BrokenProcessPool):
            raise BrainfmError(
                'a worker process was killed, most often because memory ran out: ask for more '
                'memory, or lower --nprocs; what is written is kept.'
            ) from None
        if lost is not None:
            raise BrainfmError(
                f'a worker ended without its result ({lost}), as when another job empties the '
                f'work folder: start again; what is written is kept.'
            ) from None
        raise
    finally:
        _end_workers()  # there are none but after a fault or a signal


def _known(error: Exception, work: str) -> BrainfmError | None:
    """What a node's error comes down to: a sentence of ours, or a full disk; None if neither.

    Nipype hands on nothing but text.
    """
    text = ''.join(traceback.format_exception(error))
    if said := re.search(
        rf'{BrainfmError.__module__}\.{BrainfmError.__name__}: (.+?)(\\n|\n)', text
    ):
        return BrainfmError(said[1])
    for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
        if reason in text:
            return BrainfmError(
                f'the disk of the work folder {work}, or of {tempfile.gettempdir()}, is full '
                f'({reason}): make space there, or name another work folder with --work-dir; '
                f'what is written is kept.'
            )
    return None


def _plugin(settings: Settings, progress: Progress, n_jobs: int):
    """Plugin of ``--use-plugin``, or workers on this machine, or none for one CPU or one job."""
    if settings.use_plugin is not None:
        return _from_file(settings, progress)
    args = {'status_callback': progress}
    if settings.nprocs == 1 or n_jobs <= 1 or not _workers_can_be():
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


def _workers_can_be() -> bool:
    """Whether processes can share a lock; in a container ``/dev/shm`` may not be writable."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        LOGGER.warning(
            'One run is done after the other, since this machine gives no shared memory to '
            'worker processes (/dev/shm: %s).', error.strerror,
        )  # fmt: skip
        return False
    return True


def _from_file(settings: Settings, progress: Progress):
    import importlib

    import yaml

    try:
        content = yaml.safe_load(settings.use_plugin.read_text())
        name, args = content['plugin'], content.get('plugin_args') or {}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BrainfmError(
            f'--use-plugin {settings.use_plugin} is not YAML with plugin and plugin_args '
            f'({error}): see docs/usage.md.'
        ) from None
    plugins = importlib.import_module('nipype.pipeline.plugins')
    if name == 'MultiProc':
        return _MultiProc(args | {'status_callback': progress})
    plugin = getattr(plugins, f'{name}Plugin', None)
    if plugin is None:
        raise BrainfmError(
            f'--use-plugin {settings.use_plugin} names {name!r}, which is no Nipype plugin: use '
            f'MultiProc, Linear or SLURM.'
        )
    return plugin(plugin_args=args | {'status_callback': progress})
