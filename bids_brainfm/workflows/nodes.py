"""All nodes of the graph: each calls one function of the rooms below, often for many runs."""

import time
from pathlib import Path
from typing import Any

from nipype.interfaces import base
from nipype.interfaces.base import traits

from bids_brainfm import stopping
from bids_brainfm.workflows.journal import Journal


class _Outputs(base.TraitedSpec):
    done = traits.Bool(desc='what the next nodes wait for; results are on disk')


class _Node(base.SimpleInterface):
    """What all our nodes have in common."""

    output_spec = _Outputs
    # What is done is known from the outputs, which may have been deleted, not from the work folder
    _always_run = True

    def run(self, *args: Any, **kwargs: Any) -> base.InterfaceResult:
        """Run as Nipype does, but do not let it take a wish to stop for a fault of this node."""
        result = super().run(*args, **kwargs)
        stopping.check()
        return result

    def _run_interface(self, runtime: base.Bunch) -> base.Bunch:
        self._make()
        self._results['done'] = True
        return runtime

    def _make(self) -> None:
        raise NotImplementedError


class _EachSpec(base.BaseInterfaceInputSpec):
    items = traits.List(traits.Any(), mandatory=True, desc='what is done one after the other')
    task = traits.Any(desc='how: a task, several, or versions of software')
    stop = traits.Bool(False, usedefault=True, desc='raise at the first failure')
    journal = traits.Any(mandatory=True, desc='folder of journals')
    after = traits.List(traits.Any(), desc='what has to be written before')


class Each(_Node):
    """The same for each of many items; where one raises, the others are still done."""

    input_spec = _EachSpec
    what, unit = '', 'participant'  # what is made, and of what, in words

    def _make(self) -> None:
        raised = None
        with Journal(Path(self.inputs.journal), self.what, self.unit) as journal:
            for item in self.inputs.items:
                stopping.check()
                started, sentence = time.monotonic(), None
                try:
                    sentence = self._do(item)
                except Exception as error:
                    if self.inputs.stop:
                        raise
                    raised, sentence = raised or error, str(error)
                journal.write(self._name(item), sentence, time.monotonic() - started)
        if raised is not None:
            raise raised

    def _do(self, item: Any) -> str | None:
        """Do it; returns the reason in one sentence where it failed."""
        raise NotImplementedError

    def _name(self, item: Any) -> str:
        return str(item)


class MakeSeries(Each):
    """Write the parcel series of runs (items: BoldRun, task: SeriesTask)."""

    what, unit = 'parcel series', 'run'

    def _do(self, item: Any) -> str | None:
        from bids_brainfm.outputs.series import make_series

        return make_series(item, self.inputs.task, self.inputs.stop).error


class MakeNetworks(Each):
    """Write the networks of participants (items: runs of each; task: NetworksTask by source)."""

    what = 'networks'

    def _do(self, item: Any) -> str | None:
        from bids_brainfm.outputs.networks import make_networks

        outcomes = make_networks(item, self.inputs.task, self.inputs.stop)
        return next((outcome.error for outcome in outcomes if outcome.error), None)

    def _name(self, item: Any) -> str:
        return f'sub-{item[0].subject}'


class WriteReports(Each):
    """Write the reports of participants (items: (output dataset, label), task: versions)."""

    what = 'report'

    def _do(self, item: Any) -> str | None:
        from bids_brainfm.outputs.reporting import report

        output, subject = item
        report(output, subject, self.inputs.task)
        return None

    def _name(self, item: Any) -> str:
        return f'sub-{item[1]}'


class _EncodeSpec(base.BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    task = traits.Any(mandatory=True, desc='ModelTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')
    journal = traits.Any(mandatory=True, desc='folder of journals')
    after = traits.List(traits.Any(), desc='what has to be written before')


class EncodeRuns(_Node):
    """Write the embeddings of many runs by one model."""

    input_spec = _EncodeSpec

    def _make(self) -> None:
        from bids_brainfm.outputs.encoding import encode_all

        with Journal(Path(self.inputs.journal)):
            encode_all(self.inputs.runs, self.inputs.task, self.inputs.stop)
