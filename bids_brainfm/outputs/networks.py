"""``--outputs networks``: functional networks out of parcel features, for runs and participants.

Features come from the derivatives: connectivity, attention of a class token, or an embedding for
each parcel. What they give is held against reference networks.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import read_relmat, write_table
from bids_brainfm.bids.freshness import (
    input_fingerprints,
    is_current,
    is_whole,
    read_sidecar,
    write_sidecar,
)
from bids_brainfm.bids.naming import derivative_path, own_uri
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.models.connectome import LABEL as CONNECTOME
from bids_brainfm.outputs.outcome import Outcome, attempt
from bids_brainfm.outputs.series import report_name, series_paths, voxel_size
from bids_brainfm.reports.report import figure_path

AUTO = 'auto'
PICTURES = ('networks', 'knn')
# Kinds of features, and the files that hold them ({}: label of the model)
FEATURES = {
    CONNECTOME: "each parcel's connectivity with all others (Fisher z)",
    'attention': 'attention of the class token to each parcel at each time patch, mean over '
    'windows',
    'parcels': "mean of each parcel's tokens, mean over windows",
}
ENDINGS = {
    CONNECTOME: '_stat-pearsoncorrelation_relmat.tsv',
    'attention': '_stat-attention_desc-{}_boldmap.tsv',
    'parcels': '_desc-{}_embedding.h5',
}


@dataclass(frozen=True)
class Source:
    """What features come from.

    Attributes
    ----------
    label : str
        BIDS label of the model, or the baseline's.
    kind : str
        A key of `FEATURES`.
    gradients : Path or None
        Table by which the model is told where parcels lie.
    """

    label: str
    kind: str
    gradients: Path | None = None


@dataclass(frozen=True)
class NetworkTask:
    """How networks are found, for all runs of one atlas.

    Attributes
    ----------
    name, atlas : str
        Name of the atlas, and the same or the path of its card.
    home : Path
        Where fetched atlases are kept.
    sources : tuple of Source
        What features come from.
    n_clusters : str or None
        Number of clusters, or ``auto`` for the best silhouette; None: as many as there are
        reference networks.
    reference : Path or None
        Table of reference networks; None: the atlas's own.
    seed : int
    output : Path
        The output dataset.
    version : str
        Version of this program, for the sidecars.
    """

    name: str
    atlas: str
    home: Path
    sources: tuple[Source, ...]
    n_clusters: str | None
    reference: Path | None
    seed: int
    output: Path
    version: str

    @cached_property
    def loaded(self):
        """The atlas."""
        from bids_brainfm.atlases.atlas import load_atlas

        return load_atlas(self.atlas, self.home)

    @cached_property
    def networks(self) -> tuple[str, ...] | None:
        """Reference network of each parcel, None where nothing is known."""
        from bids_brainfm.atlases.reference import reference_networks

        return reference_networks(self.loaded, self.reference)

    @property
    def clusters(self) -> int | None:
        """Number of clusters to make, None for the best silhouette."""
        from bids_brainfm.atlases.reference import NONE

        if self.n_clusters not in (None, AUTO):
            return int(self.n_clusters)
        if self.n_clusters == AUTO or self.networks is None:
            return None
        return len(set(self.networks) - {NONE})


def networks_name(atlas: str) -> str:
    """What finding the networks of an atlas is called among settings, methods and failures."""
    return f'atlas-{atlas}_networks'


def networks_step(of: BoldRun, source: Source, task: NetworkTask) -> str:
    """What finding the networks of a run, or of a participant in a space, is called in the log."""
    whose = '' if 'task' in of.entities else f'-{of.space}'
    return f'{networks_name(task.name)}{whose}_desc-{source.label}'


def source_text(source: Source, task: NetworkTask) -> str:
    """Sentence for the methods on what networks were found from."""
    return f'Networks of {task.name} were found from {source.label}: {FEATURES[source.kind]}.'


def networks_text(task: NetworkTask) -> str:
    """Sentences for the methods."""
    k = 'with the best mean silhouette' if task.clusters is None else f'{task.clusters}'
    text = (
        f'Functional networks of the parcels of {task.name} were sought without labels, from '
        f'features of each parcel: k-means on rows of unit length, number of clusters {k}, '
        f'confidence by silhouette.'
    )
    if task.networks is None:
        return text
    return (
        f'{text} Clusters were matched to reference networks by overlap. Beside it stands the '
        'zero-shot protocol: k-nearest neighbours with held-out parcels, against the largest '
        'network, the place of the parcels alone, shuffled labels, and surrogates of the features '
        'with the same spatial autocorrelation (Moran spectral randomisation).'
    )


def whole_participant(run: BoldRun) -> BoldRun:
    """What stands for all runs of a participant in one space, in names of outputs."""
    entities = {key: run.entities[key] for key in ('sub', 'space')}
    return dataclasses.replace(run, name=f'sub-{run.subject}', entities=entities)


def paths(of: BoldRun, label: str, task: NetworkTask) -> dict[str, Path]:
    """Files of a run or participant and a source of features."""

    def path(suffix, extension='.tsv', **entities):
        return derivative_path(
            task.output, of, suffix, extension, atlas=task.name, desc=label, **entities
        )

    found = {
        'parcels': path('boldmap', stat='network'),
        'image': path('dseg', '.dlabel.nii' if of.is_cifti else '.nii.gz'),
        'table': path('dseg'),
    }
    return found | ({} if task.networks is None else {'knn': path('knn')})


@dataclass(frozen=True)
class Member:
    """A run whose derivatives stand.

    Attributes
    ----------
    stem : Path
        What the names of its derivatives begin with, up to the atlas.
    inputs : dict
        Fingerprints of what they were made from.
    """

    stem: Path
    inputs: dict

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.stem.name.partition('_space-')[0]

    def file(self, kind: str, label: str = '') -> Path:
        """Where features of a kind, a key of `FEATURES`, are read from."""
        return self.stem.with_name(self.stem.name + ENDINGS[kind].format(label))

    def has(self, source: Source) -> bool:
        """Whether features stand that were made from the same inputs."""
        file = self.file(source.kind, source.label)
        return is_current(file, self.inputs)


def members_of(runs: list[BoldRun], task: NetworkTask) -> list[tuple[BoldRun, list[Member]]]:
    """What networks are found of: each run, and what stands of the participant in each space.

    The participant's runs are all that the output holds, also those of other commands.
    """
    relmat = lambda run: series_paths(task.output, run, task.name)['relmat']
    stem = lambda path: path.with_name(path.name.removesuffix(ENDINGS[CONNECTOME]))
    live = {stem(relmat(run)): input_fingerprints(run) for run in runs}
    found = [
        (run, [Member(s, inputs)]) for run, (s, inputs) in zip(runs, live.items(), strict=True)
    ]
    for space, run in {run.space: run for run in reversed(runs)}.items():
        pattern = f'**/func/*_space-{space}_atlas-{task.name}{ENDINGS[CONNECTOME]}'
        standing = {}
        for path in sorted((task.output / f'sub-{run.subject}').glob(pattern)):
            sidecar = read_sidecar(path.with_suffix('.json'))
            if sidecar is not None:
                standing[stem(path)] = sidecar['InputFiles']
        members = [Member(s, live.get(s, inputs)) for s, inputs in standing.items()]
        found.append((whole_participant(run), members))
    return found


def features_of(member: Member, source: Source) -> np.ndarray:
    """Features (P, F) of a run, read from its derivatives; NaN where there is none."""
    import h5py
    import pandas as pd

    from bids_brainfm.analyses.networks import fisher_z

    file = member.file(source.kind, source.label)
    if source.kind == 'attention':
        table = pd.read_csv(file, sep='\t', na_values='n/a')
        return table.filter(like='patch').to_numpy(float)
    connectivity = fisher_z(read_relmat(member.file(CONNECTOME)))
    if source.kind == CONNECTOME:
        return connectivity
    with h5py.File(file) as arrays:
        features = arrays['parcels'][:].mean(axis=0).astype(float)
    features[np.isnan(connectivity).all(axis=1)] = np.nan  # these were filled from others
    return features


def mean_features(features: list[np.ndarray]) -> np.ndarray:
    """Mean over runs of what each parcel has; 0 where only that is missing in all of them.

    >>> nan = np.nan
    >>> mean_features([np.array([[1.0, 2], [nan, nan]]), np.array([[3.0, nan], [5, nan]])])
    array([[2., 2.],
           [5., 0.]])
    """
    from bids_brainfm.analyses.networks import fill_gaps

    known = np.isfinite(features)
    total = np.where(known, features, 0).sum(axis=0)
    count = known.sum(axis=0)
    return fill_gaps(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def participant_current(runs: list[BoldRun], task: NetworkTask) -> bool:
    """Whether all networks of a participant stand and fit what they are made from."""
    return all(
        _current(of, source.label, used, task)
        for of, members in members_of(runs, task)
        for source in task.sources
        if (used := [member for member in members if member.has(source)])
    )


def _inputs(members: list[Member]) -> dict:
    return {uri: state for member in members for uri, state in member.inputs.items()}


def _current(of: BoldRun, label: str, used: list[Member], task: NetworkTask) -> bool:
    files = paths(of, label, task)
    whole = all(is_whole(path) for path in files.values())
    return whole and is_current(files['parcels'], _inputs(used))


def make_networks(runs: list[BoldRun], task: NetworkTask, stop: bool = False) -> list[Outcome]:
    """Find the networks of each run of a participant, and of all its runs together.

    Parameters
    ----------
    runs : list of BoldRun
        Of one participant.
    task : NetworkTask
    stop : bool
        Whether the first failure is raised.
    """
    from threadpoolctl import threadpool_limits

    known: dict = {}
    with threadpool_limits(1):  # other participants are done beside this one
        return [
            attempt(
                task.output,
                of,
                networks_step(of, source, task),
                partial(_find_and_write, of, members, source, task, known),
                stop,
            )
            for of, members in members_of(runs, task)
            for source in task.sources
        ]


def _find_and_write(
    of: BoldRun, members: list[Member], source: Source, task: NetworkTask, known: dict
) -> None:
    """Write what is not current; what was found is kept in `known`, for one run may be all."""
    # a run that failed has been told of, and has nothing to add
    used = [member for member in members if member.has(source)]
    if not used or _current(of, source.label, used, task):
        return
    key = source.label, *(member.stem for member in used)
    if key not in known:
        features = mean_features([features_of(member, source) for member in used])
        known[key] = find_networks(features, source, task)
    draw = 'task' in of.entities or len(used) > 1
    write_networks(of, used, source, known[key], task, draw)


def remove_stale(output: Path, run: BoldRun, atlas: str) -> None:
    """Remove networks that were found from inputs that are no more, of a run and its participant.

    Those who ask for networks get them anew; to others the old ones would look like new.
    """
    live = input_fingerprints(run)
    for of in (run, whole_participant(run)):
        start = f'{report_name(of, atlas)}_stat-network_desc-'
        for sidecar in (output / f'sub-{run.subject}').glob(f'**/func/{start}*_boldmap.json'):
            recorded = (read_sidecar(sidecar) or {}).get('InputFiles', {})
            if all(recorded.get(uri, state) == state for uri, state in live.items()):
                continue
            label = sidecar.name.removeprefix(start).removesuffix('_boldmap.json')
            stem = report_name(of, atlas)
            sidecar.unlink()
            for ending in (f'stat-network_desc-{label}_*', f'desc-{label}_dseg.*',
                           f'desc-{label}_knn.*'):  # fmt: skip
                for path in sidecar.parent.glob(f'{stem}_{ending}'):
                    path.unlink()
            for what in PICTURES:
                figure_path(output, stem, what, label).unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """Networks that were found, and how they fare.

    Attributes
    ----------
    clusters : Clusters
    names : list of str
        What each cluster is called: the reference network that it was matched to.
    agreement : dict or None
        With the reference, None where there is none.
    knn : KnnResult or None
    """

    clusters: object
    names: list[str]
    agreement: dict | None
    knn: object | None


def find_networks(features: np.ndarray, source: Source, task: NetworkTask) -> Found:
    """Cluster features (P, F) and hold them against the reference."""
    from bids_brainfm.analyses.networks import (
        agreement,
        cluster_parcels,
        knn_protocol,
        match_networks,
    )
    from bids_brainfm.models.gradient_table import read_gradients

    given = {}
    if source.gradients is not None:
        given['gradient table'] = read_gradients(source.gradients)
    clusters, reference = cluster_parcels(features, task.clusters, task.seed), task.networks
    if reference is None:
        names = [f'cluster {k + 1}' for k in range(clusters.n_clusters)]
        return Found(clusters, names, None, None)
    names = match_networks(clusters.labels, reference)
    # in the order of the reference, so that a number means the same network in all maps
    order = sorted(range(clusters.n_clusters), key=lambda k: (names[k], k))
    rank = np.argsort(order) + 1
    clusters = dataclasses.replace(clusters, labels=np.append(0, rank)[clusters.labels])
    return Found(
        clusters,
        [names[k] for k in order],
        agreement(clusters.labels, reference),
        knn_protocol(features, reference, task.loaded.xyz, seed=task.seed, given=given),
    )


def write_networks(
    of: BoldRun, used: list[Member], source: Source, found: Found, task: NetworkTask, draw: bool
) -> None:
    """Write clusters as table and image, the protocol's scores, figures and sidecars.

    Parameters
    ----------
    of : BoldRun
        The run, or what stands for the participant.
    used : list of Member
        What features are the mean of.
    source : Source
    found : Found
    task : NetworkTask
    draw : bool
        Whether the report shows it.
    """
    from bids_brainfm.reports import analysis_figures as drawing
    from bids_brainfm.reports import figures
    from bids_brainfm.signals.paint import paint_labels

    atlas, reference, label = task.loaded, task.networks, source.label
    files = paths(of, label, task)
    files['parcels'].with_suffix('.json').unlink(missing_ok=True)
    common = {
        'Features': FEATURES[source.kind],
        'Runs': [member.name for member in used],
        'Seed': task.seed,
        'InputFiles': _inputs(used),
        'SoftwareVersion': task.version,
        'Sources': [own_uri(task.output, member.file(source.kind, label)) for member in used],
    }
    clusters, names, knn = found.clusters, found.names, found.knn
    numbers = list(range(1, clusters.n_clusters + 1))
    image = atlas.image_for(of.space, voxel_size(of.bold)).path
    paint_labels(files['image'], image, clusters.labels, names, f'networks {label}')
    write_table(
        files['table'],
        {
            'index': numbers,
            'name': names,
            'parcels': [int((clusters.labels == k).sum()) for k in numbers],
        },
    )
    write_sidecar(
        files['table'],
        {
            'Description': f'Clusters of parcels by {label}, in the order of the names of the '
            'reference networks that they were matched to; without a reference, by size',
            'index': {'Description': 'Label in the image'},
            'name': {'Description': 'Reference network that the cluster was matched to'},
            'parcels': {'Description': 'Number of parcels'},
        }
        | common,
    )
    pictures = {
        'networks': drawing.networks(
            atlas.xyz, clusters.labels, names, reference, clusters.confidence, found.agreement
        )
    }
    if knn is not None:
        _write_knn(files['knn'], knn, label, common)
        pictures['knn'] = drawing.knn(knn.scores, knn.null)
    for what, figure in pictures.items():
        path = figure_path(task.output, report_name(of, task.name), what, label)
        if draw:
            figures.save(figure, path)
        else:
            path.unlink(missing_ok=True)
    columns = {'cluster': clusters.labels}
    if reference is not None:
        columns['network'] = ['n/a' if k == 0 else names[k - 1] for k in clusters.labels]
    columns['confidence'] = clusters.confidence
    if reference is not None:
        columns['reference'] = list(reference)
    write_table(files['parcels'], {'Node': list(atlas.names)} | columns)
    write_sidecar(
        files['parcels'],
        {
            'Description': f'Network of each parcel as found by clustering {label}.',
            'NumberOfClusters': clusters.n_clusters,
            'Silhouette': clusters.silhouette,
            'Agreement': found.agreement,
            'KNN': knn and {name: score.accuracy for name, score in knn.scores.items()},
            'KNNp': knn and knn.scores['features'].p,
            'Node': {'Description': f'Parcel of {task.name}'},
            'cluster': {'Description': 'Number of the cluster, 0 for a parcel without features'},
            'network': {'Description': 'Reference network that the cluster was matched to'},
            'confidence': {'Description': 'Silhouette of the parcel, -1 to 1'},
            'reference': {'Description': 'Reference network of the parcel'},
        }
        | common,
    )


def _write_knn(path: Path, knn, label: str, common: dict) -> None:
    """Write the scores of the protocol."""
    rows = list(knn.scores.items())
    write_table(
        path,
        {
            'features': [name for name, _ in rows],
            'accuracy': [score.accuracy for _, score in rows],
            'balanced_accuracy': [score.balanced_accuracy for _, score in rows],
            'p': [score.p for _, score in rows],
        },
    )
    write_sidecar(
        path,
        {
            'Description': 'k-nearest neighbours with held-out parcels (a fifth at a time, '
            f'stratified) against reference networks, from {label}.',
            'NumberOfNeighbours': knn.n_neighbours,
            'NumberOfSurrogates': len(knn.null),
            'SpatialNull': knn.null,
            'LeftAside': knn.left_aside,
            'features': {
                'Description': 'What the classifier is given: features; majority, always the '
                "largest network; xyz, the parcels' centres; gradient table, what the model is "
                'told of the place of parcels; shuffled, the features with '
                'shuffled labels; spatial null, surrogates of the features with the same '
                'spatial autocorrelation (Wagner & Dray 2015)'
            },
            'accuracy': {'Description': 'Share of held-out parcels'},
            'balanced_accuracy': {'Description': 'Mean over networks'},
            'p': {'Description': 'Share of surrogates that do at least as well'},
        }
        | common,
    )
