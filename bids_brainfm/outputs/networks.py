"""``--outputs networks``: functional networks out of parcel features, for runs and participants.

Features come from the derivatives: connectivity, attention of a class token, or an embedding for
each parcel. What they give is compared with reference networks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.analyses import networks as analysis
from bids_brainfm.analyses.knn import KnnResult, knn_protocol
from bids_brainfm.bids import freshness
from bids_brainfm.bids.dataset import find_failure, iterate_records
from bids_brainfm.bids.files import read_relmat, write_table
from bids_brainfm.bids.naming import own_uri
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.settings import SETTINGS
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.outputs.outcome import Outcome, attempt
from bids_brainfm.outputs.products import (
    agreed_settings,
    known_mean,
    product_current,
    remove,
    save_figure,
)
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.outputs.tasks import NetworksTask, Place
from bids_brainfm.outputs.words import as_number, described
from bids_brainfm.reports.report import Figure
from bids_brainfm.resources import sha256_of
from bids_brainfm.signals.connectome import LABEL as CONNECTOME

PRODUCT = BY_NAME['networks']
FIGURES = {
    'networks': Figure('Networks',
        'Clusters of parcels found without labels from the features of this model (or '
        'connectivity), in the colours of the reference networks they overlap most, next to the '
        'reference. Confidence is the silhouette of a parcel. Under a heading without a task '
        'is the map of all runs of the participant, where there are several.'),
    'knn': Figure('Networks of held-out parcels',
        'Proportion of held-out parcels whose reference network is predicted correctly from their '
        'nearest neighbours in the features, compared with the largest network, the positions of '
        'the parcels alone, and shuffled labels. Dots are surrogates of the features with '
        'the same spatial autocorrelation.'),
}  # fmt: skip
# In the form of the citations of atlas cards
REFERENCES = [
    'Yeo et al. 2011, Journal of Neurophysiology 106:1125-1165, doi:10.1152/jn.00338.2011',
    'Wagner & Dray 2015, Methods Ecol. Evol. 6:1169-1178, doi:10.1111/2041-210X.12407',
]
# Kinds of features, in words
FEATURES = {
    CONNECTOME: "each parcel's connectivity with all others (Fisher z)",
    'attention': 'attention of the class token to each parcel at each time patch, mean over '
    'windows',
    'parcels': "mean of each parcel's tokens, mean over windows",
}


def whole_participant(run: BoldRun) -> BoldRun:
    """Return what names outputs of all runs of a participant in one space."""
    entities = {key: run.entities[key] for key in ('sub', 'space')}
    return dataclasses.replace(run, name=f'sub-{run.subject}', entities=entities)


@dataclass(frozen=True)
class Member:
    """A run whose derivatives exist, with the fingerprints of what they were made from."""

    run: BoldRun
    inputs: dict[str, Any]


def members_of(runs: Sequence[BoldRun], place: Place) -> list[tuple[BoldRun, list[Member]]]:
    """List what networks are found of: each run, and each participant's runs in a space.

    A participant's runs are all that the output holds, also those of other commands.
    """
    connectome = BY_NAME['connectome']
    live = {(run.name, run.space): Member(run, freshness.input_fingerprints(run)) for run in runs}
    found = [(run, [live[run.name, run.space]]) for run in runs]
    for space, run in {run.space: run for run in reversed(runs)}.items():
        records = iterate_records(
            place.output, connectome.suffix, subjects=[run.subject], space=space,
            atlas=place.atlas, stat=connectome.stat,
        )  # fmt: skip
        members = []
        for record in records:
            if record.sidecar is not None:
                other = dataclasses.replace(run, name=record.name, entities=record.entities)
                stored = Member(other, record.sidecar['InputFiles'])
                members.append(live.get((record.name, space), stored))
        found.append((whole_participant(run), members))
    return found


def sources(
    runs: Sequence[BoldRun], tasks: Sequence[NetworksTask]
) -> Iterator[tuple[BoldRun, NetworksTask, list[Member]]]:
    """Yield what networks are found of, how, and the runs with features of the same inputs.

    Where too many volumes of a run, or of all windows of a model, are flagged, its features are
    excluded: they have no networks and add to none.
    """
    for of, members in members_of(runs, tasks[0].place):
        for task in tasks:
            yield of, task, [member for member in members if _usable(member, task)]


def _usable(member: Member, task: NetworksTask) -> bool:
    """Whether the features of a run fit its inputs as they are now, and are not excluded."""
    file, version = task.features_file(member.run), BY_NAME[task.feature_product].results_version
    sidecar, place = freshness.read_sidecar(freshness.sidecar_path(file)) or {}, task.place
    if find_failure(place.output, member.run.name, place.atlas, place.label) is not None:
        return False
    return freshness.is_current(file, member.inputs, version) and not sidecar.get('Excluded')


def features_of(run: BoldRun, task: NetworksTask) -> np.ndarray:
    """Features (P, F) of a run, read from its derivatives; NaN where there is none."""
    import h5py
    import pandas as pd

    file, connectome = task.features_file(run), task.place.of_series.table(run, 'connectome')
    freshness.check_contents(file, *[connectome] * (task.kind == 'parcels'))
    if task.kind == 'attention':
        return pd.read_csv(file, sep='\t', na_values='n/a').filter(like='patch').to_numpy(float)
    connectivity = analysis.fc_rows(read_relmat(connectome))
    if task.kind == CONNECTOME:
        return connectivity
    with h5py.File(file) as arrays:
        kept = ~arrays['excluded'][:]
        features = arrays['parcels'][:][kept].mean(axis=0).astype(float)
    features[np.isnan(connectivity).all(axis=1)] = np.nan  # these were filled from others
    return features


def companions(of: BoldRun, place: Place, task: NetworksTask | None = None) -> list[Path]:
    """Image and table of the clusters and, where there is a reference, scores of the protocol."""
    image = place.path(of, 'dseg', extension='.dlabel.nii' if of.is_cifti else '.nii.gz')
    scores = [place.path(of, 'knn')] if task is None or task.search.networks is not None else []
    return [image, place.path(of, 'dseg'), *scores]


def settings(task: NetworksTask) -> dict[str, Any]:
    """Clusters, reference and seed."""
    search = task.search
    reference = search.reference and f'sha256 {sha256_of(search.reference)}'
    return {'clusters': search.clusters, 'reference': reference, 'seed': search.seed}


def methods(task: NetworksTask) -> str:
    """Sentences on clusters and the protocol."""
    search, atlas = task.search, task.place.atlas
    k = 'with the best mean silhouette' if search.clusters is None else f'{search.clusters}'
    text = (
        f'Functional networks of the parcels of {atlas} were sought without labels, from features '
        f'of each parcel: k-means on rows of unit length, number of clusters {k}, confidence by '
        f'silhouette.'
    )
    if search.networks is None:
        return text
    return (
        f'{text} Clusters were matched to reference networks by overlap. In addition, the '
        'zero-shot protocol was run: k-nearest neighbours with held-out parcels, against the '
        'largest network, the positions of the parcels alone, shuffled labels, and surrogates '
        'of the features with the same spatial autocorrelation (Moran spectral randomisation).'
    )


def source_methods(task: NetworksTask) -> str:
    """Sentence on what networks are found from."""
    place = task.place
    return f'Networks of {place.atlas} were found from {place.label}: {FEATURES[task.kind]}.'


def participant_current(runs: Sequence[BoldRun], tasks: Sequence[NetworksTask]) -> bool:
    """Whether all networks of a participant exist and fit what they are made from."""
    found = (each for each in sources(runs, tasks) if each[2])
    return all(product_current(PRODUCT, of, task, _inputs(used)) for of, task, used in found)


def _inputs(members: Sequence[Member]) -> dict[str, Any]:
    return {uri: state for member in members for uri, state in member.inputs.items()}


def make_networks(
    runs: Sequence[BoldRun], tasks: Sequence[NetworksTask], stop: bool = False
) -> list[Outcome]:
    """Find the networks of each run of a participant, and of all its runs together.

    There is a task for each source of features, all of one atlas; `stop` raises the first failure.
    """
    from threadpoolctl import threadpool_limits

    known: dict[Any, Found] = {}
    with threadpool_limits(1):  # other participants are worked on at the same time
        return [
            attempt(
                task.place.output, of, task.step(of),
                partial(_find_and_write, of, task, used, known), stop,
            )
            for of, task, used in sources(runs, tasks)
        ]  # fmt: skip


def _find_and_write(
    of: BoldRun, task: NetworksTask, used: Sequence[Member], known: 'dict[Any, Found]'
) -> None:
    """Write what is not current; what was found is kept in `known`, for one run may be all."""
    # a run that failed has been reported, and has nothing to add
    if not used or product_current(PRODUCT, of, task, _inputs(used)):
        return
    key = task.place.label, *(member.run.name for member in used)
    if key not in known:
        features = known_mean([features_of(member.run, task) for member in used], axis=0)
        # what all runs lack of a parcel that has features is 0
        known[key] = find_networks(analysis.fill_gaps(features), task)
    write_networks(of, used, known[key], task, draw='task' in of.entities or len(used) > 1)


def remove_stale(run: BoldRun, place: Place) -> None:
    """Remove networks of a run and its participant that were found from inputs of the past.

    Those who ask for networks get them anew; to others the old ones would look like new.
    """
    live = freshness.input_fingerprints(run)
    for of in (run, whole_participant(run)):
        records = iterate_records(
            place.output, PRODUCT.suffix, subjects=[run.subject], extension='.json',
            stat=PRODUCT.stat, space=run.space, atlas=place.atlas,
        )  # fmt: skip
        for record in [record for record in records if record.name == of.name]:
            sidecar = freshness.read_sidecar(record.path) or {}
            inputs, version = sidecar.get('InputFiles', {}), sidecar.get('ResultsVersion')
            changed = any(inputs.get(uri, state) != state for uri, state in live.items())
            if changed or version != PRODUCT.results_version:
                remove(PRODUCT, of, dataclasses.replace(place, label=record.entities['desc']))


@dataclass(frozen=True)
class Found:
    """Networks that were found, and how they compare with the reference, where there is one."""

    clusters: analysis.Clusters
    names: list[str]  # of clusters: the reference networks that they were matched to
    agreement: dict[str, Any] | None
    knn: KnnResult | None


def find_networks(features: np.ndarray, task: NetworksTask) -> Found:
    """Cluster features (P, F) and compare them with the reference."""
    search, table = task.search, task.gradients
    given = {'gradient table': read_gradients(table)} if table else {}
    clusters = analysis.cluster_parcels(features, search.clusters, search.seed)
    reference = search.networks
    if reference is None:
        names = [f'cluster {k + 1}' for k in range(clusters.n_clusters)]
        return Found(clusters, names, None, None)
    names = analysis.match_networks(clusters.labels, reference)
    # in the order of the reference, so that a number means the same network in all maps
    order = sorted(range(clusters.n_clusters), key=lambda k: (names[k], k))
    rank = np.argsort(order) + 1
    clusters = dataclasses.replace(clusters, labels=np.append(0, rank)[clusters.labels])
    return Found(
        clusters, [names[k] for k in order], analysis.agreement(clusters.labels, reference),
        knn_protocol(features, reference, search.atlas.xyz, seed=search.seed, given=given),
    )  # fmt: skip


def write_networks(
    of: BoldRun, used: Sequence[Member], found: Found, task: NetworksTask, draw: bool
) -> None:
    """Write clusters as table and image, the protocol's scores, figures and sidecars.

    They are of the run, or the participant, that `of` names, and features were the mean of those
    of the runs `used`; with `draw` the report shows them.
    """
    from bids_brainfm.reports.figures import networks as figures
    from bids_brainfm.signals.bold import voxel_size
    from bids_brainfm.signals.paint import paint_labels

    atlas, reference, label = task.search.atlas, task.search.networks, task.place.label
    table = task.place.table(of, PRODUCT.name)
    image, groups, *scores = companions(of, task.place, task)
    freshness.sidecar_path(table).unlink(missing_ok=True)
    common = {
        'Features': FEATURES[task.kind], 'Runs': [member.run.name for member in used],
        'Seed': task.search.seed, 'InputFiles': _inputs(used), 'SoftwareVersion': task.version,
        'ResultsVersion': PRODUCT.results_version, SETTINGS: agreed_settings(PRODUCT, task),
        'Sources': [own_uri(task.place.output, task.features_file(m.run)) for m in used],
    }  # fmt: skip
    clusters, names, knn = found.clusters, found.names, found.knn
    atlas_image = atlas.image_for(of.space, voxel_size(of.bold)).path
    paint_labels(image, atlas_image, clusters.labels, names, f'networks {label}')
    _write_groups(groups, found, label, common)
    shown = clusters.labels, names, reference, clusters.confidence, found.agreement
    plots = {'networks': figures.networks(atlas.xyz, *shown)}
    if knn is not None:
        _write_knn(scores[0], knn, label, common)
        plots['knn'] = figures.knn(knn.scores, knn.null)
    for name, figure in plots.items():
        path = task.place.figure(of, name)
        if draw:
            save_figure(figure, path)
        else:
            path.unlink(missing_ok=True)
    columns = {
        'cluster': clusters.labels,
        'network': reference and ['n/a' if k == 0 else names[k - 1] for k in clusters.labels],
        'confidence': clusters.confidence,
        'reference': reference and list(reference),
    }
    given = {name: values for name, values in columns.items() if values is not None}
    write_table(table, {'Node': list(atlas.names)} | given)
    content = {
        'Description': f'Network of each parcel as found by clustering {label}.',
        'NumberOfClusters': clusters.n_clusters, 'Silhouette': clusters.silhouette,
        'Agreement': found.agreement,
        'KNN': knn and {name: score.accuracy for name, score in knn.scores.items()},
        'KNNp': knn and knn.scores['features'].p,
    } | described(
        Node=f'Parcel of {task.place.atlas}',
        cluster='Number of the cluster, 0 for a parcel without features',
        network='Reference network that the cluster was matched to',
        confidence='Silhouette of the parcel, -1 to 1',
        reference='Reference network of the parcel',
    )  # fmt: skip
    freshness.write_sidecar(table, content | common)


def _write_groups(path: Path, found: Found, label: str | None, common: dict[str, Any]) -> None:
    """Write the table of clusters that belongs to the image."""
    numbers = list(range(1, found.clusters.n_clusters + 1))
    counts = [int((found.clusters.labels == k).sum()) for k in numbers]
    write_table(path, {'index': numbers, 'name': found.names, 'parcels': counts})
    content = {
        'Description': f'Clusters of parcels by {label}, in the order of the names of the '
        'reference networks that they were matched to; without a reference, by size',
    } | described(
        index='Label in the image',
        name='Reference network that the cluster was matched to', parcels='Number of parcels',
    )  # fmt: skip
    freshness.write_sidecar(path, content | common)


def _write_knn(path: Path, knn: KnnResult, label: str | None, common: dict[str, Any]) -> None:
    """Write the scores of the protocol."""
    scores = list(knn.scores.values())
    measures = ('accuracy', 'balanced_accuracy', 'p')
    columns = {name: [getattr(s, name) for s in scores] for name in measures}
    write_table(path, {'features': list(knn.scores)} | columns)
    content = {
        'Description': 'k-nearest neighbours with held-out parcels (a fifth at a time, '
        f'stratified) against reference networks, from {label}.',
        'NumberOfNeighbours': knn.n_neighbours, 'NumberOfSurrogates': len(knn.null),
        'SpatialNull': knn.null, 'LeftAside': knn.left_aside,
    } | described(
        features='What the classifier is given: features; majority, always the largest network; '
        "xyz, the parcels' centres; gradient table, the positions that the model is given of "
        'parcels; shuffled, the features with shuffled labels; spatial null, surrogates of the '
        'features with the same spatial autocorrelation (Wagner & Dray 2015)',
        accuracy='Proportion of held-out parcels', balanced_accuracy='Mean over networks',
        p='Proportion of surrogates that do at least as well',
    )  # fmt: skip
    freshness.write_sidecar(path, content | common)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Number of clusters, agreement with the reference, scores of the protocol."""
    text = f'{sidecar["NumberOfClusters"]} clusters'
    if sidecar.get('Agreement'):
        index = sidecar['Agreement']['AdjustedRandIndex']
        text += f', adjusted Rand index {as_number(index)} with the reference'
    lines = {'Networks': text}
    if sidecar.get('KNN'):
        scores = ', '.join(f'{as_number(s)} ({name})' for name, s in sidecar['KNN'].items())
        lines['Networks, held-out parcels'] = f'accuracy {scores}; p = {sidecar["KNNp"]:.2g}'
    return lines
