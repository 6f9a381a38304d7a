"""From a BOLD file to the derivatives of its parcel series."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import write_matrix, write_table
from bids_brainfm.bids.freshness import input_fingerprints, is_current, write_sidecar
from bids_brainfm.bids.naming import derivative_path, own_uri
from bids_brainfm.bids.reading import repetition_time
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.connectome import LABEL, connectome, connectome_vector
from bids_brainfm.outputs.outcome import Outcome, attempt

FILL_RULE = (
    'the series of the nearest parcel (by centroid, and of the same structure where the atlas '
    'tells cortex from subcortex) with enough coverage'
)
# First columns of every table with one row a window, as sidecars describe them
WINDOW_COLUMNS = {
    'window': {'Description': 'Number of the window, from 0'},
    'onset': {'Description': "Start of the window since the run's start", 'Units': 's'},
    'duration': {'Description': 'Recorded signal in the window', 'Units': 's'},
    'real': {'Description': 'Share of samples that were recorded'},
    'flagged': {'Description': 'Share of recorded samples from flagged volumes'},
}


@dataclass(frozen=True)
class SeriesTask:
    """How parcel series are made, for all runs of one atlas.

    Attributes
    ----------
    name : str
        Name of the atlas.
    atlas : str
        The same, or the path of its card.
    home : Path
        Where fetched atlases are kept.
    denoise : str
        Name or file of the denoising preset.
    min_coverage : float
        Share of a parcel below which it is n/a.
    output : Path
        The output dataset.
    version : str
        Version of this program, for the sidecars.
    """

    name: str
    atlas: str
    home: Path
    denoise: str
    min_coverage: float
    output: Path
    version: str


def series_paths(output: Path, run: BoldRun, atlas: str) -> dict[str, Path]:
    """Paths of the derivatives that come from the parcel series of a run."""

    def path(suffix, **entities):
        return derivative_path(output, run, suffix, '.tsv', atlas=atlas, **entities)

    return {
        'coverage': path('bold', stat='coverage'),
        'relmat': path('relmat', stat='pearsoncorrelation'),
        'connectome': path('embedding', desc=LABEL),
        # last, since what is made from the series looks for it
        'series': path('timeseries', stat='mean'),
    }


def report_name(run: BoldRun, atlas: str) -> str:
    """What the report calls a run: its name, space and atlas."""
    return f'{run.name}_space-{run.space}_atlas-{atlas}'


def series_step(atlas: str) -> str:
    """What making the series of an atlas is called in the log folder."""
    return f'atlas-{atlas}'


def series_current(output: Path, run: BoldRun, atlas: str) -> bool:
    """Whether all derivatives of the parcel series stand and fit the inputs."""
    inputs = input_fingerprints(run)
    return all(is_current(path, inputs) for path in series_paths(output, run, atlas).values())


@dataclass(frozen=True)
class SeriesResult:
    """Parcel series of one run, and what is to be told of how they came about.

    Attributes
    ----------
    run : BoldRun
    tr : float
        Repetition time in seconds.
    atlas : Atlas
    image : AtlasImage
        The image of the atlas that was used.
    preset : Preset
        The denoising.
    found : Parcellation
        The series before denoising.
    names : tuple of str
        Confounds that were regressed out.
    flagged : (T,) bool
        Outliers among the volumes that were kept.
    dummy : int
        Volumes left out at the start.
    series : (T, P) float32
        Denoised series; NaN for parcels without enough coverage.
    relmat : (P, P) float32
        Functional connectivity.
    """

    run: BoldRun
    tr: float
    atlas: object
    image: object
    preset: object
    found: object
    names: tuple[str, ...]
    flagged: np.ndarray
    dummy: int
    series: np.ndarray
    relmat: np.ndarray

    @property
    def assessed(self) -> bool:
        """Whether confounds were read, so that outliers are known."""
        return bool(self.preset.outliers)

    @property
    def uncovered(self) -> list[str]:
        """Names of the parcels that are n/a."""
        missing = np.flatnonzero(np.isnan(self.series).all(axis=0))
        return [self.atlas.names[i] for i in missing]

    def warnings(self, min_coverage: float) -> list[str]:
        """What is out of the ordinary, one sentence each."""
        found, sentences = self.found, []
        if found.header_tr and abs(found.header_tr - self.tr) > 1e-3 * self.tr:
            sentences.append(
                f'The header gives a repetition time of {found.header_tr:g} s, the sidecar '
                f'{self.tr:g} s; the sidecar was used.'
            )
        if found.n_nonfinite:
            sentences.append(
                f'{found.n_nonfinite} voxels hold NaN or infinite values and were left out.'
            )
        if self.uncovered:
            sentences.append(
                f'{len(self.uncovered)} of {self.atlas.n_parcels} parcels have less than '
                f'{min_coverage:.0%} of their volume in the field of view, or none, and are n/a: '
                f'{_some(self.uncovered)}.'
            )
        if self.dummy:
            sentences.append(f'{self.dummy} non-steady-state volumes at the start were left out.')
        return sentences


def make_series(run: BoldRun, task: SeriesTask, stop: bool = False) -> Outcome:
    """Write the parcel series of one run; `stop` raises a failure after it was recorded."""
    step = series_step(task.name)
    return attempt(task.output, run, step, lambda: write_series(run, task), stop)


def write_series(run: BoldRun, task: SeriesTask) -> None:
    """Parcellate and denoise one run and write what comes from it.

    Raises
    ------
    BrainfmError
        The run's files are missing, damaged or contradict each other.
    """
    from bids_brainfm.atlases.export import export_atlas

    made = compute_series(run, task)
    paths = series_paths(task.output, run, made.atlas.name)
    sources = [run.uri(path) for path in run.companions().values()]
    sources.append(own_uri(task.output, export_atlas(task.output, made.atlas, made.image)))
    _write_tables(paths, made)
    _draw(made, task)
    series_uri = own_uri(task.output, paths['series'])
    for name, content in _describe(made, task.min_coverage).items():
        own = [] if name in ('series', 'coverage') else [series_uri]
        common = {
            'Sources': own + sources,
            'InputFiles': input_fingerprints(run),
            'SoftwareVersion': task.version,
        }
        write_sidecar(paths[name], content | common)


def compute_series(run: BoldRun, task: SeriesTask) -> SeriesResult:
    """Parcellate and denoise one run.

    Raises
    ------
    BrainfmError
        The run's files are missing, damaged or contradict each other.
    """
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.signals.denoise import denoise, load_preset, read_confounds
    from bids_brainfm.signals.parcellate import parcellate

    tr = repetition_time(run)
    preset = load_preset(task.denoise)
    if run.mask is None and not run.is_cifti:
        raise BrainfmError(
            f'{run.name}: the brain mask of {run.bold.name} (desc-brain_mask) is missing: copy it '
            f'from the fMRIPrep output.'
        )
    if run.confounds is None and not preset.touches_nothing:
        raise BrainfmError(
            f'{run.name}: there is no desc-confounds_timeseries.tsv, which denoising '
            f'"{preset.name}" needs: copy it from the fMRIPrep output, or use --denoise none.'
        )
    atlas = load_atlas(task.atlas, task.home)
    image = atlas.image_for(run.space, voxel_size(run.bold))
    found = parcellate(run.bold, image.path, atlas.n_parcels, run.mask)
    confounds = read_confounds(run.confounds, run.confounds_json, preset, len(found.data))
    data = denoise(found.data, confounds)
    covered = (found.coverage >= task.min_coverage) & np.isfinite(data).all(axis=0)
    series = np.where(covered, data, np.nan).astype(np.float32)
    return SeriesResult(
        run=run,
        tr=tr,
        atlas=atlas,
        image=image,
        preset=preset,
        found=found,
        names=tuple(confounds.names),
        flagged=confounds.flagged[confounds.dummy :],
        dummy=confounds.dummy,
        series=series,
        relmat=connectome(series),
    )


def _describe(made: SeriesResult, min_coverage: float) -> dict[str, dict]:
    """Sidecars of the tables, by the names of :func:`series_paths`, but for their sources."""
    atlas, warnings = made.atlas, made.warnings(min_coverage)
    return {
        'coverage': {
            'Description': 'Share of each parcel inside the field of view of this run.',
            'Node': {'Description': f'Parcel of {atlas.name}'},
            'coverage': {'Description': 'Share of the parcel with signal', 'Units': 'arbitrary'},
        },
        'relmat': {
            'Description': 'Functional connectivity between parcels.',
            'RelationshipMeasure': 'Pearson correlation',
            'Weighted': True,
            'Directed': False,
            'ValidDiagonal': True,
            'StorageFormat': 'Full',
        },
        'connectome': {
            'Description': 'Functional connectivity as an embedding of the whole run: the '
            'baseline to compare model embeddings with.',
            'Model': {
                'Name': LABEL,
                'Description': 'Pearson correlations of all pairs of parcels',
            },
            'Pooling': 'upper triangle of the relmat, row by row, without the diagonal',
            'Warnings': warnings,
        },
        'series': {
            'Description': f'Mean BOLD signal of each parcel of {atlas.name}, in BOLD units.',
            'RepetitionTime': made.tr,
            'SamplingFrequency': 1 / made.tr,
            'StartTime': made.dummy * made.tr,
            'NumberOfVolumes': len(made.found.data),
            'NumberOfVolumesDiscardedByNonsteadyStatesDetector': made.dummy,
            'NumberOfVolumesFlagged': int(made.flagged.sum()) if made.assessed else None,
            'FlaggedVolumes': np.flatnonzero(made.flagged),
            'FlaggedVolumesInterpolated': made.assessed,
            'Denoising': {
                'Name': made.preset.name,
                'Description': made.preset.description,
                'ConfoundRegressors': made.names,
                'DegreesOfFreedomLost': len(made.names) + 1 if made.names else 0,
                'MeanAddedBack': bool(made.names),
            },
            'Atlas': {
                'Name': atlas.name,
                'Image': made.image.path.name,
                'Provenance': made.image.provenance,
                'License': atlas.licence,
                'Citation': ' '.join(atlas.citation),
            },
            'Space': made.run.space,
            'Resolution': made.run.entities.get('res'),
            'Sampling': made.found.sampling,
            'BrainMean': made.found.brain_mean,
            'MinimumCoverage': min_coverage,
            'ParcelsBelowMinimumCoverage': made.uncovered,
            'Warnings': warnings,
        },
    }


def _write_tables(paths: dict[str, Path], made: SeriesResult) -> None:
    names = list(made.atlas.names)
    write_table(paths['coverage'], {'Node': names, 'coverage': made.found.coverage})
    write_matrix(paths['relmat'], made.relmat, ['Node', *names], names)
    vector = connectome_vector(made.relmat)
    share_flagged = made.flagged.mean() if made.assessed else np.nan
    index = window_rows(
        [made.dummy * made.tr], [len(made.series) * made.tr], [1.0], [share_flagged]
    )
    header = [*WINDOW_COLUMNS, *dimension_names(len(vector))]
    write_matrix(paths['connectome'], vector[None], header, index)
    write_matrix(paths['series'], made.series, names)


def _draw(made: SeriesResult, task: SeriesTask) -> None:
    from bids_brainfm.reports import figures
    from bids_brainfm.reports.report import figure_path

    order, label = display_order(made.atlas.xyz)
    before, start = made.found.data[made.dummy :], made.dummy * made.tr
    pictures = {
        'carpet': figures.carpet(
            before, made.series, made.tr, made.flagged, order, order_label=label, start=start
        ),
        'coverage': figures.coverage(made.atlas.xyz, made.found.coverage, task.min_coverage),
        'connectivity': figures.connectivity(made.relmat, order, order_label=label),
    }
    name = report_name(made.run, made.atlas.name)
    for what, figure in pictures.items():
        figures.save(figure, figure_path(task.output, name, what))


def display_order(xyz: np.ndarray) -> tuple[np.ndarray, str]:
    """Order in which pictures show parcels, from their centres (P, 3) in mm, and its name."""
    return np.lexsort((xyz[:, 1], xyz[:, 0] > 0)), 'left then right, back to front'


def window_rows(onset, duration, real, flagged) -> list[str]:
    """First columns of a table with one row a window: those of `WINDOW_COLUMNS`.

    >>> window_rows([0.0], [147.0], [1.0], [0.05])
    ['0\\t0\\t147\\t1\\t0.05']
    """
    rows = zip(onset, duration, real, flagged, strict=True)
    text = lambda value: 'n/a' if np.isnan(value) else f'{value:.7g}'
    return ['\t'.join([str(i), *map(text, row)]) for i, row in enumerate(rows)]


def dimension_names(size: int) -> list[str]:
    """Columns of an embedding.

    >>> dimension_names(10)[:2]
    ['dim00', 'dim01']
    """
    return [f'dim{i:0{len(str(size))}d}' for i in range(size)]


def voxel_size(bold: Path) -> float | None:
    """Geometric mean of the voxel's edges in mm, None for grayordinates."""
    import nibabel as nib

    if bold.name.endswith('.dtseries.nii'):
        return None
    try:
        return float(np.prod(nib.load(bold).header.get_zooms()[:3]) ** (1 / 3))
    except Exception:  # the reader of the volumes says better what is wrong with the file
        return None


def _some(names: list[str], most: int = 5) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' * (len(names) > most))
