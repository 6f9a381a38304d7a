"""The graph of the participant level.

A node per run and atlas makes parcel series, one per model encodes all runs with one load of the
weights, one per participant and atlas finds networks, and one per participant writes the report.
They hand on outcomes; data go through the derivatives, so that a killed run goes on where it was.
"""

from collections.abc import Sequence

from nipype.interfaces.utility import Merge
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow

from bids_brainfm.bids.inputs import adapter
from bids_brainfm.config import Settings
from bids_brainfm.outputs import networks, series
from bids_brainfm.outputs.products import module_of, record_name
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.outputs.tasks import ModelTask, SeriesTask
from bids_brainfm.workflows.nodes import EncodeRuns, MakeNetworks, MakeSeries, WriteReport
from bids_brainfm.workflows.plan import AtlasPlan, ModelPlan, Plan


def node_name(*parts: str) -> str:
    """Name of a node: letters, digits and underscores only.

    >>> node_name('series', 'sub-01_task-rest')
    'series_sub_01_task_rest'
    """
    return '_'.join(''.join(c if c.isalnum() else '_' for c in part) for part in parts)


def init_participant_wf(plan: Plan, software: dict[str, str]) -> LiterateWorkflow:
    """Build the graph of everything that is left to do.

    It carries the methods text, see :func:`describe`; `software` are versions, for the reports.
    """
    settings = plan.settings
    workflow = LiterateWorkflow('bids_brainfm_wf', base_dir=str(plan.work))
    ends = []
    for atlas in plan.atlases:
        series_wf = init_series_wf(atlas, plan)
        workflow.add_nodes([series_wf])
        for model in atlas.models:
            encode_wf = init_encode_wf(model, settings)
            workflow.connect(series_wf, 'outcomes.out', encode_wf, 'encode.series')
            ends.append((encode_wf, 'encode.outcomes'))
        if not atlas.models:
            ends.append((series_wf, 'outcomes.out'))
    all_encoded = _gather('all_encoded', ends, workflow)
    all_done: dict[str, list[tuple[pe.Node, str]]] = {}
    for atlas in plan.atlases:
        for subject, runs in atlas.network_runs.items():
            name = node_name('networks', atlas.name, subject)
            make = MakeNetworks(runs=runs, tasks=atlas.networks, stop=settings.stop_on_first_crash)
            find = pe.Node(make, name, mem_gb=0.5)
            workflow.connect(all_encoded, 'out', find, 'after')
            all_done.setdefault(subject, []).append((find, 'outcomes'))
    for subject in plan.subjects:
        write = WriteReport(output=settings.output_dir, subject=subject, software=software)
        report = pe.Node(write, node_name('report', subject), run_without_submitting=True)
        before = all_done.get(subject, [(all_encoded, 'out')])
        merge = _gather(node_name('all_done', subject), before, workflow)
        workflow.connect(merge, 'out', report, 'after')
    return workflow


def _gather(name: str, ends: list[tuple[pe.Node, str]], workflow: LiterateWorkflow) -> pe.Node:
    """Add a node that waits for the outputs of others, given as (node, output)."""
    merge = pe.Node(Merge(max(1, len(ends))), name, run_without_submitting=True)
    workflow.add_nodes([merge])
    for i, (node, output) in enumerate(ends, 1):
        workflow.connect(node, output, merge, f'in{i}')
    return merge


def describe(workflow: LiterateWorkflow, plan: Plan) -> dict[str, tuple[str, list[str]]]:
    """Methods text that the graph carries, and what to cite, for each kind of output."""
    parts: dict[str, tuple[str, list[str]]] = {}
    for atlas in plan.atlases:
        if not atlas.runs:
            continue
        tasks: list[tuple[str, SeriesTask | ModelTask, Sequence[str]]] = [
            (node_name('series', atlas.name, 'wf'), atlas.task, atlas.citation)
        ]
        for spec, encoding in ((model.task.spec, model.task) for model in atlas.models):
            tasks.append((node_name('encode', spec.label, 'wf'), encoding, spec.card.citation))
        for name, task, citation in tasks:
            recorded = [BY_NAME[each] for each in task.parameters if BY_NAME[each].record]
            for product in recorded:
                text = module_of(product).methods(task)
                parts[record_name(product, task.place)] = text, []
            # of the first, with what the graph says of the data
            text = workflow.get_node(name).visit_desc()
            parts[record_name(recorded[0], task.place)] = text, list(citation)
        for source in atlas.networks:
            name = record_name(BY_NAME['networks'], source.place)
            parts[name] = networks.methods(source), networks.REFERENCES
            parts[f'{name}_desc-{source.place.label}'] = networks.source_methods(source), []
    return parts


def init_series_wf(atlas: AtlasPlan, plan: Plan) -> LiterateWorkflow:
    """Build the graph that makes the parcel series of one atlas."""
    pipelines = dict.fromkeys(run.pipeline for run in atlas.runs)
    sources = ' and '.join(adapter(name).SOURCE for name in pipelines)
    workflow = LiterateWorkflow(node_name('series', atlas.name, 'wf'))
    workflow.__desc__ = (
        f'Preprocessed BOLD series were taken from {sources} and '
        f'passed through bids_brainfm {plan.version}, which is built on Nipype (Gorgolewski et '
        'al. 2011), PyBIDS (Yarkoni et al. 2019), NiBabel and PyTorch.\n\n'
    ) + series.methods(atlas.task)
    stop, ends = plan.settings.stop_on_first_crash, []
    for run in atlas.todo:
        make = MakeSeries(run=run, task=atlas.task, stop=stop)
        node = pe.Node(make, name=node_name('series', run.name), mem_gb=0.5)
        ends.append((node, 'outcome'))
    _gather('outcomes', ends, workflow)
    return workflow


def init_encode_wf(model: ModelPlan, settings: Settings) -> LiterateWorkflow:
    """Build the graph that encodes the runs with one model."""
    workflow = LiterateWorkflow(node_name('encode', model.task.spec.label, 'wf'))
    workflow.__desc__ = module_of(BY_NAME['embedding']).methods(model.task)
    encode = pe.Node(
        EncodeRuns(runs=model.todo, task=model.task, stop=settings.stop_on_first_crash),
        name='encode',
        n_procs=settings.omp_nthreads,
        mem_gb=4,
        # In this process: weights are loaded once, and progress is seen. A cluster's plugin
        # sends it to a compute node instead.
        run_without_submitting=settings.use_plugin is None,
    )
    workflow.add_nodes([encode])
    return workflow
