"""Run a graph, show its progress, and explain why it stopped early."""

import errno
import os
import re
import tempfile
import traceback
from collections import Counter

from nipype.pipeline import engine as pe
from nipype.pipeline.plugins.base import PluginBase

from bids_brainfm import stopping
from bids_brainfm.errors import BrainfmError
from bids_brainfm.workflows.journal import Follower
from bids_brainfm.workflows.nodes import Each
from bids_brainfm.workflows.participant import JOURNAL
from bids_brainfm.workflows.plan import Plan
from bids_brainfm.workflows.plugins import choose_plugin, end_workers


def execute(workflow: pe.Workflow, plan: Plan) -> None:
    """Run the graph to its end; raises as :func:`run`, or RuntimeError where a node crashed."""
    settings = plan.settings
    workflow.config['execution'] = {
        'crashdump_dir': str(settings.output_dir / 'logs'),
        'crashfile_format': 'txt',
        'stop_on_first_crash': str(settings.stop_on_first_crash).lower(),
        'poll_sleep_duration': '0.1',  # the default of 2 s a node is most of a short job
        'check_version': 'false',
        # Nipype would take the path of the work folder for a pattern ([a], *), and find nothing
        'remove_unnecessary_outputs': 'false',
        # seconds until a job's result is seen: shared folders show files late (default: 5)
        'job_finished_timeout': '60',
    }
    nodes = [workflow.get_node(name) for name in workflow.list_node_names()]
    totals, side_by_side = Counter[str](), Counter[str]()
    for node in (node for node in nodes if isinstance(node.interface, Each)):
        totals[node.interface.what] += len(node.inputs.items)
        side_by_side[node.interface.what] += not node.run_without_submitting
    journal = plan.work / JOURNAL
    journal.mkdir()
    with Follower(journal, totals):
        run(workflow, choose_plugin(settings, _listen, max(side_by_side.values(), default=0)))


def _listen(node: pe.Node, status: str) -> None:
    """Raise KeyboardInterrupt after a signal: Nipype reports an interrupted node as ended."""
    stopping.check()


def run(workflow: pe.Workflow, plugin: PluginBase) -> None:
    """Run a graph by a plugin, and say what was wrong where that is known.

    Raises BrainfmError where a worker was killed, its folder was taken away, a scheduler takes no
    jobs, a disk is full, or a node raised it.
    """
    try:
        workflow.run(plugin=plugin)
    except Exception as error:
        lost = getattr(plugin, 'lost', None)
        if isinstance(lost, BrainfmError):
            raise lost from None
        if known := _known(lost or error, workflow.base_dir):
            raise known from None
        if lost is not None:
            raise BrainfmError(
                f'a worker ended without its result ({lost}), as when another job empties the '
                f'work folder: start again; what is written is kept.'
            ) from None
        raise
    finally:
        end_workers()


def _known(error: Exception, work: str) -> BrainfmError | None:
    """What a node's error comes down to: a sentence of ours, or a folder gone or full; else None.

    Nipype hands on nothing but text.
    """
    text = ''.join(traceback.format_exception(error))
    if sentence := re.search(
        rf'{BrainfmError.__module__}\.{BrainfmError.__name__}: (.+?)(\\n|\n)', text
    ):
        return BrainfmError(sentence[1])
    if f'{os.strerror(errno.ENOENT)}: {repr(work)[:-1]}' in text:
        return BrainfmError(
            f'the work folder {work} was removed or emptied while the command ran: start again; '
            f'what is written is kept.'
        )
    for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
        if reason in text:
            return BrainfmError(
                f'the disk of the work folder {work}, or of {tempfile.gettempdir()}, is full '
                f'({reason}): make space there, or name another work folder with --work-dir; '
                f'what is written is kept.'
            )
    return None
