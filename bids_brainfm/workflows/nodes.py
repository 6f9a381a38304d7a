"""All nodes of the graph: each calls one function of the rooms below."""

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    SimpleInterface,
    TraitedSpec,
    traits,
)

from bids_brainfm import stopping


class _Node(SimpleInterface):
    """What all our nodes have in common."""

    # What is done is known from the outputs, which may have been deleted, not from the work folder
    _always_run = True

    def run(self, *args, **kwargs):
        """Run as Nipype does, but do not let it take a wish to stop for a fault of this node."""
        result = super().run(*args, **kwargs)
        stopping.check()
        return result


class _OutcomeSpec(TraitedSpec):
    outcome = traits.Any(desc='Outcome')


class _OutcomesSpec(TraitedSpec):
    outcomes = traits.Any(desc='list of Outcome')


class _SeriesSpec(BaseInterfaceInputSpec):
    run = traits.Any(mandatory=True, desc='BoldRun')
    task = traits.Any(mandatory=True, desc='SeriesTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')


class MakeSeries(_Node):
    """Write the parcel series of one run."""

    input_spec = _SeriesSpec
    output_spec = _OutcomeSpec

    def _run_interface(self, runtime):
        from bids_brainfm.outputs.series import make_series

        self._results['outcome'] = make_series(self.inputs.run, self.inputs.task, self.inputs.stop)
        return runtime


class _EncodeSpec(BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    series = traits.List(traits.Any(), desc='Outcome of the parcel series that were made now')
    task = traits.Any(mandatory=True, desc='EncodeTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')


class EncodeRuns(_Node):
    """Write the embeddings of many runs by one model."""

    input_spec = _EncodeSpec
    output_spec = _OutcomesSpec

    def _run_interface(self, runtime):
        from bids_brainfm.outputs.encoding import encode_all

        inputs = self.inputs
        self._results['outcomes'] = encode_all(
            inputs.runs, inputs.task, inputs.stop, inputs.series or []
        )
        return runtime


class _NetworksSpec(BaseInterfaceInputSpec):
    runs = traits.List(traits.Any(), mandatory=True, desc='BoldRun of each run')
    task = traits.Any(mandatory=True, desc='NetworkTask')
    stop = traits.Bool(False, usedefault=True, desc='raise where a run fails')
    after = traits.List(traits.Any(), desc='what has to be written before')


class MakeNetworks(_Node):
    """Write the networks of one participant."""

    input_spec = _NetworksSpec
    output_spec = _OutcomesSpec

    def _run_interface(self, runtime):
        from bids_brainfm.outputs.networks import make_networks

        inputs = self.inputs
        self._results['outcomes'] = make_networks(inputs.runs, inputs.task, inputs.stop)
        return runtime


class _ReportSpec(BaseInterfaceInputSpec):
    output = traits.Any(mandatory=True, desc='output dataset')
    subject = traits.Str(mandatory=True)
    software = traits.Dict()
    after = traits.List(traits.Any(), desc='what has to be written before')


class _ReportResult(TraitedSpec):
    report = traits.Any(desc='path of the report')


class WriteReport(_Node):
    """Write the report of one participant."""

    input_spec = _ReportSpec
    output_spec = _ReportResult

    def _run_interface(self, runtime):
        from bids_brainfm.outputs.reporting import report

        inputs = self.inputs
        self._results['report'] = report(inputs.output, inputs.subject, inputs.software)
        return runtime
