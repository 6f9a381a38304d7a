"""The graph of the participant level.

Nodes make the parcel series of many runs each, one per model encodes all runs with one load of the
weights, further ones find the networks of many participants each, and one writes the reports.
Nothing but their order goes through the graph; data and failures go through the derivatives, so
that a killed run goes on where it was.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from nipype.interfaces.utility import Merge
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow

from bids_brainfm.bids.inputs import adapter
from bids_brainfm.config import Settings
from bids_brainfm.outputs import networks, series
from bids_brainfm.outputs.products import module_of, record_name
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.outputs.tasks import ModelTask, SeriesTask
from bids_brainfm.workflows.nodes import EncodeRuns, MakeNetworks, MakeSeries, WriteReports
from bids_brainfm.workflows.plan import AtlasPlan, ModelPlan, Plan

T = TypeVar('T')
JOURNAL = 'journal'  # folder in the work folder, where nodes report what they have done
END = 'all_done'  # name of the node before the reports
NODES_PER_WORKER = 4
MOST_ITEMS = 50  # of a node: what is lost of the time of a job that does not end
JOBS = 16  # of a cluster at once, as far as it matters for the number of nodes


def node_name(*parts: str) -> str:
    """Name of a node: letters, digits and underscores only.

    >>> node_name('series', 'my-atlas', 'wf')
    'series_my_atlas_wf'
    """
    return '_'.join(''.join(c if c.isalnum() else '_' for c in part) for part in parts)


def portions(items: Sequence[T], settings: Settings) -> list[list[T]]:
    """Split work over nodes: some for each worker, so that none waits long for the last one.

    On a cluster a node is a job, which must end within the time that is allowed to jobs.
    """
    workers = settings.nprocs if settings.use_plugin is None else JOBS
    size = min(max(1, math.ceil(len(items) / (NODES_PER_WORKER * workers))), MOST_ITEMS)
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def init_participant_wf(plan: Plan) -> LiterateWorkflow:
    """Build the graph of everything that is left to do, except the reports.

    It carries the methods text, see :func:`describe`.
    """
    settings, journal = plan.settings, plan.work / JOURNAL
    stop = settings.stop_on_first_crash
    workflow = LiterateWorkflow('bids_brainfm_wf', base_dir=str(plan.work))
    ends = []
    for atlas in plan.atlases:
        series_wf = init_series_wf(atlas, plan)
        workflow.add_nodes([series_wf])
        for model in atlas.models:
            encode_wf = init_encode_wf(model, plan)
            workflow.connect(series_wf, 'series_done.out', encode_wf, 'encode.after')
            ends.append((encode_wf, 'encode.done'))
        if not atlas.models:
            ends.append((series_wf, 'series_done.out'))
    encoded = _gather('encoded', ends, workflow)
    found = [(encoded, 'out')]
    for atlas in plan.atlases:
        people = list(atlas.network_runs.values())
        for number, own in enumerate(portions(people, settings)):
            name = node_name('networks', atlas.name, str(number))
            make = MakeNetworks(items=own, task=atlas.networks, stop=stop, journal=journal)
            node = pe.Node(make, name, mem_gb=0.5)
            workflow.connect(encoded, 'out', node, 'after')
            found.append((node, 'done'))
    _gather(END, found, workflow)
    return workflow


def add_reports(
    workflow: LiterateWorkflow, plan: Plan, subjects: Sequence[str], software: dict[str, str]
) -> None:
    """Add nodes that write the reports of participants; `software` are versions, for these.

    A few reports take less time in this process than a worker takes to start.
    """
    settings, few = plan.settings, len(subjects) <= MOST_ITEMS
    items = [(settings.output_dir, subject) for subject in subjects]
    for number, own in enumerate([items] if few else portions(items, settings)):
        write = WriteReports(
            items=own, task=software, stop=settings.stop_on_first_crash,
            journal=plan.work / JOURNAL,
        )  # fmt: skip
        name = node_name('reports', str(number))
        node = pe.Node(write, name, mem_gb=0.5, run_without_submitting=few)
        workflow.connect(workflow.get_node(END), 'out', node, 'after')


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
        'al. 2011), NiBabel and PyTorch.\n\n'
    ) + series.methods(atlas.task)
    settings, ends = plan.settings, []
    for number, runs in enumerate(portions(atlas.todo, settings)):
        make = MakeSeries(
            items=runs, task=atlas.task, stop=settings.stop_on_first_crash,
            journal=plan.work / JOURNAL,
        )  # fmt: skip
        node = pe.Node(make, name=node_name('series', str(number)), mem_gb=0.5)
        ends.append((node, 'done'))
    _gather('series_done', ends, workflow)
    return workflow


def init_encode_wf(model: ModelPlan, plan: Plan) -> LiterateWorkflow:
    """Build the graph that encodes the runs with one model."""
    settings = plan.settings
    workflow = LiterateWorkflow(node_name('encode', model.task.spec.label, 'wf'))
    workflow.__desc__ = module_of(BY_NAME['embedding']).methods(model.task)
    encode = pe.Node(
        EncodeRuns(
            runs=model.todo,
            task=model.task,
            stop=settings.stop_on_first_crash,
            journal=plan.work / JOURNAL,
        ),
        name='encode',
        n_procs=settings.omp_nthreads,
        mem_gb=4,
        # In this process: weights are loaded once, and progress is seen. A cluster's plugin
        # sends it to a compute node instead.
        run_without_submitting=settings.use_plugin is None,
    )
    workflow.add_nodes([encode])
    return workflow
