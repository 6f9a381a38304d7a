"""What carries out the nodes of a graph: worker processes here, or jobs of a cluster.

Nipype's own plugins wait for ever for a worker that was killed, and overlook what a scheduler
refuses. These keep what was wrong as ``lost``. They also look for signals while they wait: Python
drops the KeyboardInterrupt of a signal that comes while garbage is collected, as Nipype does
between any two looks at its workers.
"""

import importlib
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.pipeline.plugins.base import GraphPluginBase, PluginBase
from nipype.pipeline.plugins.linear import LinearPlugin
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, process_initializer
from nipype.pipeline.plugins.slurm import SLURMPlugin

from bids_brainfm import stopping, surroundings
from bids_brainfm.config import Settings
from bids_brainfm.documents import read_yaml
from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from networkx import DiGraph
    from nipype.pipeline import engine as pe

Callback = Callable[..., None]
LOGGER = logging.getLogger('bids_brainfm')


def choose_plugin(settings: Settings, status_callback: Callback, n_jobs: int) -> PluginBase:
    """Plugin of ``--use-plugin``, or workers on this machine, or none for one CPU or one job.

    `status_callback` is given a node and what became of it; `n_jobs` could run side by side.
    Raises BrainfmError where the file of ``--use-plugin`` cannot be used here.
    """
    if settings.use_plugin is not None:
        return from_file(settings, settings.use_plugin, status_callback)
    args = {'status_callback': status_callback}
    if settings.nprocs == 1 or n_jobs <= 1 or not _workers_can_be():
        return LinearPlugin(args)
    return MultiProc(_workers(settings) | args)


def _workers(settings: Settings) -> dict[str, Any]:
    """Arguments of worker processes on this machine."""
    # workers start clean (forkserver): no lock, thread or CUDA state of this process comes along
    args = {'n_procs': settings.nprocs, 'raise_insufficient': False, 'mp_context': 'forkserver'}
    return args if settings.mem is None else args | {'memory_gb': settings.mem}


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
    if not surroundings.place_sockets():
        LOGGER.warning(
            'Runs are processed one after another, since there is no folder with a short path '
            '(such as /tmp) for the sockets of worker processes: set TMPDIR to one.'
        )
        return False
    return True


def from_file(settings: Settings, file: Path, status_callback: Callback) -> PluginBase:
    """Return the plugin that a YAML file names."""
    try:
        content = read_yaml(file)
        name, args = content['plugin'], dict(content.get('plugin_args') or {})
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrainfmError(
            f'--use-plugin {file} is not YAML with plugin and plugin_args '
            f'({error}): see docs/hpc.md.'
        ) from None
    args = args | {'status_callback': status_callback}
    if name == 'MultiProc':
        return MultiProc(_workers(settings) | args)
    if name == 'SLURM':
        return Slurm(args, file)
    plugin = getattr(importlib.import_module('nipype.pipeline.plugins'), f'{name}Plugin', None)
    # plugins of whole graphs submit jobs and do not wait for them
    if plugin is None or issubclass(plugin, GraphPluginBase):
        raise BrainfmError(
            f'--use-plugin {file} names {name!r}, which is no Nipype plugin that '
            f'waits for its jobs: use MultiProc, Linear or SLURM.'
        )
    return plugin(plugin_args=args)


class MultiProc(MultiProcPlugin):
    """Nipype's plugin, which waits for ever for a worker that was killed; this one does not."""

    lost: Exception | None = None

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        surroundings.place_sockets()
        super().__init__(plugin_args)
        context = multiprocessing.get_context(plugin_args.get('mp_context'))
        if context.get_start_method() == 'forkserver':
            _start_fork_server()
        self.pool = ProcessPoolExecutor(  # no worker of the first pool has been started yet
            self.processors, context, _prepare_worker, (self._cwd,)
        )

    def _async_callback(self, args: Future[Any]) -> None:
        try:
            super()._async_callback(args)
        except BrokenProcessPool:
            self.lost = BrainfmError(
                'a worker process was killed, most often because memory ran out: ask for more '
                'memory, or lower --nprocs; what is written is kept.'
            )
        except Exception as error:  # whatever it is, this worker's result will never come
            self.lost = error

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        stopping.check()
        if self.lost is not None:
            raise self.lost
        return super()._get_result(taskid)


def _start_fork_server() -> None:
    """Start the parent of the workers deaf to SIGTERM, which Slurm sends to all processes.

    The parent reports when a worker has ended; without it, one that is still writing would
    count as gone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(folder: str) -> None:
    """Leave signals to the process that gives the work, and end with it, however it ends."""
    surroundings.forgive_streams()
    process_initializer(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def end_workers() -> None:
    """Kill the worker processes that are left; there are none but after a fault or a signal."""
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


class Slurm(SLURMPlugin):
    """Nipype's plugin, which overlooks that sbatch or squeue failed; this one says so.

    A job that ended without a result is reported, and no job is left behind in the queue.
    """

    lost: BrainfmError | None = None

    def __init__(self, plugin_args: dict[str, Any], file: Path) -> None:
        if shutil.which('sbatch') is None:
            raise BrainfmError(
                f'--use-plugin {file}: there is no sbatch here, as in a container: submit whole '
                f'runs instead (docs/hpc.md), or use an installation outside containers.'
            )
        super().__init__(plugin_args=plugin_args)
        self.file = file

    def run(self, graph: 'DiGraph', config: dict[str, Any], updatehash: bool = False) -> None:
        try:
            super().run(graph, config, updatehash)
        finally:
            if self._pending:
                subprocess.run(['scancel', *map(str, self._pending)], check=False)

    def _submit_batchtask(self, scriptfile: str, node: 'pe.Node') -> int:
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

    def _is_pending(self, taskid: int) -> bool:
        ended = _ask('squeue', '--noheader', f'--jobs={taskid}')
        # a scheduler that is too busy to answer does not mean that the job is gone
        silent = ended.returncode != 0 and 'Invalid job id' not in ended.stderr
        return silent or bool(ended.stdout.strip())

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        stopping.check()
        result = super()._get_result(taskid)
        if result and result.get('hostname') == 'unknown':  # so Nipype marks what it made up
            self.lost = BrainfmError(
                f'the Slurm job {taskid} ended without its result, most often because memory or '
                f'time ran out (or the work folder shows files late here): ask for more in the '
                f'sbatch_args of {self.file} and start again; '
                f'what is written is kept.'
            )
        return result


def _ask(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)
