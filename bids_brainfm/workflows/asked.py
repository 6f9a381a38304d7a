"""What ``--outputs`` asks for beside embeddings, settled before anything starts."""

import logging

import numpy as np

from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.settings import claim_settings
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.context import AnalysisSettings
from bids_brainfm.outputs.embedding import EncodeTask
from bids_brainfm.outputs.networks import (
    CONNECTOME,
    NetworkTask,
    Source,
    networks_name,
    participant_current,
)

LOGGER = logging.getLogger('bids_brainfm')
# What is perturbed by default, since its response is the best known: in mm (MNI)
LEFT_V1_MM = (-10.0, -85.0, 2.0)


def analyses_asked(settings: Settings, spec, atlas) -> AnalysisSettings:
    """What is computed with one model beside its embeddings, of all that was asked for."""
    everything = 'all' in settings.outputs
    can = ('networks',)
    if spec.reconstructs:
        can += ('reconstruction', 'forecast', 'perturbation')
    outputs = tuple(name for name in can if everything or name in settings.outputs)
    chosen = {
        'mask_ratio': settings.mask_ratio or spec.card.config.get('mask_ratio'),
        'aggregate': settings.aggregate,
        'bold': settings.write_bold,
        'points': settings.forecast_points,
        'mode': settings.forecast_mode,
        'k_sd': settings.perturb_sd,
        'seed': settings.random_seed,
    }
    if 'perturbation' in outputs:
        name, parcels = _target(settings, atlas)
        chosen |= {'target_name': name, 'target': parcels}
    given = {name: value for name, value in chosen.items() if value is not None}
    return AnalysisSettings(outputs=outputs, **given)


def _target(settings: Settings, atlas) -> tuple[str, tuple[str, ...]]:
    """What is perturbed, and the names of its parcels.

    Raises
    ------
    BrainfmError
        The atlas has no such parcel or network.
    """
    import difflib

    from bids_brainfm.atlases.reference import reference_for, reference_networks

    name = settings.perturb
    if name is None:
        distance = np.linalg.norm(atlas.xyz - np.array(LEFT_V1_MM), axis=1)
        name = atlas.names[int(distance.argmin())]
    if name in atlas.names:
        return name, (name,)
    networks = reference_networks(atlas, reference_for(atlas, settings.reference_networks)) or ()
    parcels = tuple(
        n for n, network in zip(atlas.names, networks, strict=False) if network == name
    )
    if not parcels:
        known = [*atlas.names, *sorted(set(networks))]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise BrainfmError(
            f'--perturb {name}: the atlas {atlas.name} has no such parcel or network; did you '
            f'mean {", ".join(near)}?'
        )
    return name, parcels


def check_outputs(settings: Settings, tasks: list[EncodeTask]) -> None:
    """See that every output that was named can be had of some model, and how."""
    given = {'embeddings', 'all'}.union(*(task.analyses.outputs for task in tasks))
    lacking = [name for name in settings.outputs if name not in given]
    if lacking:
        raise BrainfmError(
            f'--outputs {" ".join(lacking)}: {", ".join(settings.model)} has no decoder, as '
            f'BrainLM has: leave it out, or add a BrainLM with --model.'
        )
    _check_references(settings, tasks)
    for task in tasks:
        _check_masks(task)
        clusters = settings.network_clusters or ''
        if clusters.isdigit() and int(clusters) >= task.spec.n_parcels:
            raise BrainfmError(
                f'--network-clusters {clusters}: the atlas {task.atlas} has {task.spec.n_parcels} '
                f'parcels; ask for fewer clusters than that.'
            )


def _check_references(settings: Settings, tasks: list[EncodeTask]) -> None:
    """See that every table of networks is of some model's atlas; tell what it leaves out."""
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.atlases.reference import NONE, reference_for, reference_networks

    atlases = {task.atlas: load_atlas(task.spec.card.atlas, task.home) for task in tasks}
    for path in settings.reference_networks:
        of = [atlas for atlas in atlases.values() if reference_for(atlas, (path,))]
        if not of:
            raise BrainfmError(
                f'--reference-networks {path} names no parcel of {" or ".join(atlases)}: give a '
                f'table of the atlas of a model that is run.'
            )
        for atlas in of:
            unnamed = reference_networks(atlas, path).count(NONE)
            if unnamed:
                LOGGER.warning(
                    '%s names no network of %d parcels of %s.', path, unnamed, atlas.name
                )


def _check_masks(task: EncodeTask) -> None:
    """See that a model can hide what is to be hidden."""
    import torch

    from bids_brainfm.analyses.forecast import hidden_points
    from bids_brainfm.analyses.perturb import others_left
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.models.encoder import ascending_y
    from bids_brainfm.models.masking import leave_out
    from bids_brainfm.models.weights import build

    asked, network = task.analyses, build(task.spec.card.config)
    atlas = load_atlas(task.spec.card.atlas, task.home)
    if 'forecast' in asked.outputs:
        hidden_points(network, asked.points, asked.mode, task.spec.card.name)
    if {'reconstruction', 'perturbation'} & set(asked.outputs):
        leave_out(network.tokens, asked.mask_ratio, torch.Generator())
    if 'perturbation' in asked.outputs:
        target = np.isin(atlas.names, asked.target)
        by_y = task.spec.card.parcel_order == 'ascending-y'
        if not others_left(network, target, ascending_y(atlas.xyz) if by_y else None):
            raise BrainfmError(
                f'--perturb {asked.target_name}: each token of {task.spec.card.name} holds one of '
                f'its {target.sum()} parcels, so there is nothing to reconstruct; name fewer, or '
                f'take brainlm-13m, which has a token for each parcel.'
            )


def networks_asked(settings, version, home, atlas_name, tasks) -> NetworkTask | None:
    """How networks are found in one atlas, None where they are not asked for."""
    if not {'networks', 'all'} & set(settings.outputs):
        return None
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.atlases.reference import reference_for

    kind = lambda spec: 'attention' if spec.pooling == 'class token' else 'parcels'
    table = lambda spec: spec.gradients and spec.gradients.path
    specs = [task.spec for task in tasks if task.spec.per_parcel]
    sources = [Source(CONNECTOME, CONNECTOME)]
    sources += [Source(spec.label, kind(spec), table(spec)) for spec in specs]
    networks = NetworkTask(
        name=tasks[0].atlas,
        atlas=atlas_name,
        home=home,
        sources=tuple(sources),
        n_clusters=settings.network_clusters,
        reference=reference_for(load_atlas(atlas_name, home), settings.reference_networks),
        seed=settings.random_seed,
        output=settings.output_dir,
        version=version,
    )
    if networks.networks is None:
        LOGGER.warning(
            'No reference networks of the atlas %s are on this machine: clusters are not named '
            'and the k-NN protocol is left out (see --reference-networks).', networks.name,
        )  # fmt: skip
    return networks


def networks_to_find(runs, todo, models, networks) -> dict[str, list[BoldRun]]:
    """Runs of each participant of which networks are to be found."""
    if networks is None:
        return {}
    remade = {run.name for run in todo}.union(
        *({run.name for run in model.todo} for model in models)
    )
    by_subject = {}
    for run in runs:
        by_subject.setdefault(run.subject, []).append(run)
    return {
        subject: own
        for subject, own in by_subject.items()
        if remade & {run.name for run in own} or not participant_current(own, networks)
    }


def claim_networks(task: NetworkTask) -> None:
    """Hold found networks to one way of finding them."""
    from bids_brainfm.resources import sha256_of

    own = task.reference and f'sha256 {sha256_of(task.reference)}'
    claim_settings(
        task.output,
        networks_name(task.name),
        {'clusters': task.clusters, 'reference': own, 'seed': task.seed},
        f'*_atlas-{task.name}_stat-network_*.tsv',
    )
