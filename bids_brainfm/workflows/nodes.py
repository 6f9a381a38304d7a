"""All nodes of the graph: each calls one function of the rooms below."""

from typing import Any

from nipype.interfaces import base
from nipype.interfaces.base import traits

from bids_brainfm import stopping


class _Outputs(base.TraitedSpec):
    outcome = traits.Any(desc='Outcome')
    outcomes = traits.Any(desc='list of Outcome')
    report = traits.Any(desc='path of the report')


class _Node(base.SimpleInterface):
    """What all our nodes have in common: `_make` gives the output named `_output`."""

    output_spec = _Outputs
    _output = 'outcomes'
    # What is done is known from the outputs, which may have been deleted, not from the work folder
    _always_run = True

    def run(self, *args: Any, **kwargs: Any) -> base.InterfaceResult:
        """Run as Nipype does, but do not let it take a wish to stop for a fault of this node."""
        result = super().run(*args, **kwargs)
        stopping.check()
        return result

    def _run_interface(self, runtime: base.Bunch) -> base.Bunch:
        self._results[self._output] = self._make(self.inputs)
        return runtime

    def _make(self, inputs: Any) -> Any:
        raise NotImplementedError


class _SeriesSpec(base.BaseInterfaceInputSpec):
    run = traits.Any(mandatory=True, desc='BoldRun')
    task = traits.Any(mandatory=True, desc='SeriesTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')


class MakeSeries(_Node):
    """Write the parcel series of one run."""

    input_spec = _SeriesSpec
    _output = 'outcome'

    def _make(self, inputs: Any) -> Any:
        from bids_brainfm.outputs.series import make_series

        return make_series(inputs.run, inputs.task, inputs.stop)


class _EncodeSpec(base.BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    series = traits.List(traits.Any(), desc='Outcome of the parcel series that were made now')
    task = traits.Any(mandatory=True, desc='ModelTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')


class EncodeRuns(_Node):
    """Write the embeddings of many runs by one model."""

    input_spec = _EncodeSpec

    def _make(self, inputs: Any) -> Any:
        from bids_brainfm.outputs.encoding import encode_all

        return encode_all(inputs.runs, inputs.task, inputs.stop, inputs.series or [])


class _NetworksSpec(base.BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    tasks = traits.List(traits.Any(), mandatory=True, desc='NetworksTask of each source')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')
    after = traits.List(traits.Any(), desc='what has to be written before')


class MakeNetworks(_Node):
    """Write the networks of one participant."""

    input_spec = _NetworksSpec

    def _make(self, inputs: Any) -> Any:
        from bids_brainfm.outputs.networks import make_networks

        return make_networks(inputs.runs, inputs.tasks, inputs.stop)


class _ReportSpec(base.BaseInterfaceInputSpec):
    output = traits.Any(mandatory=True, desc='output dataset')
    subject = traits.Str(mandatory=True)
    software = traits.Dict()
    after = traits.List(traits.Any(), desc='what has to be written before')


class WriteReport(_Node):
    """Write the report of one participant."""

    input_spec = _ReportSpec
    _output = 'report'

    def _make(self, inputs: Any) -> Any:
        from bids_brainfm.outputs.reporting import report

        return report(inputs.output, inputs.subject, inputs.software)
