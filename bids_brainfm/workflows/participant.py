"""The graph of the participant level.

A node per run and atlas makes parcel series, in parallel. A node per model encodes all runs with
one load of the weights, and makes what else is asked of it. A node per participant and atlas finds
networks, and a node per participant writes the report. Nodes hand on outcomes, and the
data go through the derivatives themselves, so that a run killed anywhere goes on where it was.
"""

from nipype.interfaces.utility import Merge
from nipype.pipeline import engine as pe
from niworkflows.engine.workflows import LiterateWorkflow

from bids_brainfm.outputs.embedding import BLOCKS, latent_name
from bids_brainfm.outputs.model_outputs import analyses_of, analysis_name
from bids_brainfm.outputs.networks import (
    networks_name,
    networks_text,
    source_text,
)
from bids_brainfm.outputs.series import FILL_RULE
from bids_brainfm.workflows.nodes import EncodeRuns, MakeNetworks, MakeSeries, WriteReport
from bids_brainfm.workflows.plan import AtlasPlan, ModelPlan, Plan

# In the form of the citations of atlas cards
NETWORK_REFERENCES = [
    'Yeo et al. 2011, Journal of Neurophysiology 106:1125-1165, doi:10.1152/jn.00338.2011',
    'Wagner & Dray 2015, Methods Ecol. Evol. 6:1169-1178, doi:10.1111/2041-210X.12407',
]


def node_name(*parts: str) -> str:
    """Name of a node: letters, digits and underscores only.

    >>> node_name('series', 'sub-01_task-rest')
    'series_sub_01_task_rest'
    """
    return '_'.join(''.join(c if c.isalnum() else '_' for c in part) for part in parts)


def init_participant_wf(plan: Plan, software: dict) -> LiterateWorkflow:
    """Build the graph of everything that is left to do.

    Parameters
    ----------
    plan : Plan
    software : dict of str to str
        Versions, for the reports.

    Returns
    -------
    LiterateWorkflow
        It carries the methods text, see :func:`describe`.
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
    all_done = {}
    for atlas in plan.atlases:
        for subject, runs in atlas.network_runs.items():
            find = pe.Node(
                MakeNetworks(runs=runs, task=atlas.networks, stop=settings.stop_on_first_crash),
                name=node_name('networks', atlas.name, subject),
                mem_gb=0.5,
            )
            workflow.connect(all_encoded, 'out', find, 'after')
            all_done.setdefault(subject, []).append((find, 'outcomes'))
    for subject in plan.subjects:
        report = pe.Node(
            WriteReport(output=settings.output_dir, subject=subject, software=software),
            name=node_name('report', subject),
            run_without_submitting=True,
        )
        before = all_done.get(subject, [(all_encoded, 'out')])
        merge = _gather(node_name('all_done', subject), before, workflow)
        workflow.connect(merge, 'out', report, 'after')
    return workflow


def _gather(name: str, ends: list[tuple], workflow: LiterateWorkflow) -> pe.Node:
    """Add a node that waits for the outputs of others, given as (node, output)."""
    merge = pe.Node(Merge(len(ends)), name, run_without_submitting=True)
    for i, (node, output) in enumerate(ends, 1):
        workflow.connect(node, output, merge, f'in{i}')
    return merge


def describe(workflow: LiterateWorkflow, plan: Plan) -> dict[str, tuple[str, list[str]]]:
    """Methods text that the graph carries, and what to cite, for each kind of output."""
    parts = {}
    for atlas in plan.atlases:
        text = workflow.get_node(series_name(atlas)).visit_desc()
        parts[f'atlas-{atlas.name}'] = text, list(atlas.citation)
        for model in atlas.models:
            text = workflow.get_node(encode_name(model)).visit_desc()
            spec = model.task.spec
            parts[f'desc-{spec.label}'] = text, list(spec.card.citation)
            if model.task.block:
                parts[latent_name(spec.label)] = latent_text(model.task), []
            for analysis in analyses_of(model.task):
                parts[analysis_name(analysis, spec.label)] = analysis.text(model.task), []
        if atlas.networks is not None:
            name = networks_name(atlas.name)
            parts[name] = networks_text(atlas.networks), NETWORK_REFERENCES
            for source in atlas.networks.sources:
                parts[f'{name}_desc-{source.label}'] = source_text(source, atlas.networks), []
    return parts


def series_name(atlas: AtlasPlan) -> str:
    """Name of the graph that makes the parcel series of one atlas."""
    return node_name('series', atlas.name, 'wf')


def encode_name(model: ModelPlan) -> str:
    """Name of the graph that encodes with one model."""
    return node_name('encode', model.task.spec.label, 'wf')


def init_series_wf(atlas: AtlasPlan, plan: Plan) -> LiterateWorkflow:
    """Build the graph that makes the parcel series of one atlas."""
    from bids_brainfm.signals.denoise import load_preset

    settings = plan.settings
    preset = load_preset(atlas.task.denoise)
    steady = 'Volumes before the steady state, as found by fMRIPrep, were left out. '
    dropped = '' if preset.touches_nothing else steady
    workflow = LiterateWorkflow(series_name(atlas))
    workflow.__desc__ = (
        'Preprocessed BOLD series were taken from fMRIPrep (Esteban et al. 2019) derivatives and '
        f'passed through bids_brainfm {plan.version}, which is built on Nipype (Gorgolewski et '
        'al. 2011), PyBIDS (Yarkoni et al. 2019), NiBabel and PyTorch.\n\n'
        f'The mean BOLD signal of each parcel of the {atlas.name} atlas was computed over the '
        'voxels (or grayordinates) of the parcel that vary over the run. Atlas and data were '
        'matched by their affines: each voxel took the label nearest to it or, where the data are '
        'too coarse for that, each voxel of the atlas took the voxel of the data nearest to it. '
        'Parcels with less than '
        f'{settings.min_coverage:.0%} of their volume in the field of view were set to n/a. '
        f'{dropped}{preset.description.strip()} '
        'Functional connectivity (Pearson correlation between the denoised parcel series) was '
        'computed as the baseline to compare embeddings with.\n\n'
    )
    outcomes = pe.Node(Merge(max(1, len(atlas.todo))), 'outcomes', run_without_submitting=True)
    workflow.add_nodes([outcomes])
    for i, run in enumerate(atlas.todo, 1):
        make = pe.Node(
            MakeSeries(run=run, task=atlas.task, stop=settings.stop_on_first_crash),
            name=node_name('series', run.name),
            mem_gb=0.5,
        )
        workflow.connect(make, 'outcome', outcomes, f'in{i}')
    return workflow


def init_encode_wf(model: ModelPlan, settings) -> LiterateWorkflow:
    """Build the graph that encodes the runs with one model."""
    task, card = model.task, model.task.spec.card
    weights = '' if task.spec.trained else ' with random, untrained weights'
    workflow = LiterateWorkflow(encode_name(model))
    table = task.spec.gradients
    placed = ''
    if table is not None:
        digest = table.sha256[:12]
        placed = (
            f' Parcels were placed by the brain gradients {table.path.name} (sha256 {digest}).'
        )
    predicting = ''
    if task.spec.predicted:
        predicting = f' Its head predicted {card.config["head"]["target"]} from each window.'
    workflow.__desc__ = (
        f'For {card.name} ({card.description}), parcels without signal were filled with '
        f'{FILL_RULE}. Series {_windows_text(task.contract)} Every window was encoded '
        f'without masking by {card.name}{weights}; its embedding is the {task.spec.pooling} after '
        f'the last normalisation.{predicting}{placed}\n\n'
    )
    encode = pe.Node(
        EncodeRuns(runs=model.todo, task=task, stop=settings.stop_on_first_crash),
        name='encode',
        n_procs=settings.omp_nthreads,
        mem_gb=4,
        # In this process: weights are loaded once, and progress is seen. A cluster's plugin
        # sends it to a compute node instead.
        run_without_submitting=settings.use_plugin is None,
    )
    workflow.add_nodes([encode])
    return workflow


def _scaling_text(contract) -> str:
    """How series were scaled, from "Series" on."""
    text = {
        'none': 'were not scaled',
        'run-robust': 'were scaled for each run (whole-brain mean to 10000, each parcel demeaned '
        'and divided by its interquartile range, and clipped)',
        'global-z': 'were standardised with one mean and standard deviation for the whole run',
        'parcel-z': 'were standardised for each parcel',
        'cohort': 'were scaled by statistics fitted on a cohort',
        'cohort-means': 'were scaled for each parcel by the median and interquartile range of its '
        'temporal mean over a cohort',
    }[contract.scaling]
    divided = contract.scaling != 'none' and contract.divide_by != 1
    return f'{text} and divided by {contract.divide_by:g}' if divided else text


def _windows_text(contract) -> str:
    """How series became windows, from "Series" on."""
    scaling, filling = _scaling_text(contract), 'the mean of each parcel'
    if contract.temporal == 'official':
        filling = 'its last volume'
        text = (
            f'{scaling}, and windows of {contract.window} samples were taken from them as in the '
            f'official code, spread evenly over {contract.official_volumes} volumes'
        )
    else:
        text = (
            f'were resampled to {contract.tr:g} s with an anti-aliasing filter where their '
            f'repetition time differs, {scaling}, and cut into windows of {contract.window} '
            f'samples ({contract.window * contract.tr:.1f} s)'
        )
    text += f', one every {contract.stride or contract.window} samples.'
    if contract.short_runs == 'tile':
        return f'{text} Where a run ended before its last window, it was repeated from its start.'
    if contract.short_runs == 'pad':
        return f'{text} Where a run ended before its last window, {filling} was continued.'
    if contract.min_real < 1:
        text += (
            f' Where a run ended before its last window, but no more than '
            f'{1 - contract.min_real:.0%} of it was missing, {filling} was continued.'
        )
    return text


def latent_text(task) -> str:
    """Sentence on latent prediction."""
    return (
        f'As a check of quality, the latents of a block of each window ({BLOCKS[task.block]}) '
        f'were predicted by the predictor of {task.spec.card.name} and compared with those of the '
        f'target encoder (smooth L1 error), beside the mean latent of the context as a guess '
        f'without a model.'
    )
