"""What the analyses of a run share: what was asked for, where files go, what sidecars say."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import write_table
from bids_brainfm.bids.freshness import read_sidecar, write_sidecar
from bids_brainfm.bids.naming import derivative_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.series import report_name, series_paths, voxel_size


@dataclass(frozen=True)
class AnalysisSettings:
    """What is computed with an encoder beside its embeddings.

    Attributes
    ----------
    outputs : tuple of str
        Those that this model gives: ``networks``, ``reconstruction``, ``forecast``,
        ``perturbation``.
    mask_ratio : float
        Share of tokens that a pass hides.
    aggregate : str
        See :func:`bids_brainfm.analyses.reconstruct.reconstruct`.
    bold : bool
        Whether the reconstruction is written as BOLD, too.
    points : int
        Time points to forecast.
    mode : str
        See :func:`bids_brainfm.analyses.forecast.forecast`.
    target : tuple of str
        Parcels that are perturbed.
    target_name : str
        What they are called: a parcel or a network.
    k_sd : float
        How far, in SD.
    seed : int
        Of masks, sham targets and clusters.
    """

    outputs: tuple[str, ...] = ()
    mask_ratio: float = 0.75
    aggregate: str = 'first'
    bold: bool = False
    points: int = 20
    mode: str = 'predict_last_pixel'
    target: tuple[str, ...] = ()
    target_name: str = ''
    k_sd: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class Context:
    """One run in the hands of one encoder.

    Attributes
    ----------
    run : BoldRun
    task : EncodeTask
    atlas : Atlas
    data : ModelInput
        The run in the model's units.
    encoder : Encoder
    exact : Encoder
        The same in float32.
    encoding : Encoding
        Of its windows.
    common : dict
        What all sidecars of the run say.
    """

    run: BoldRun
    task: object
    atlas: object
    data: object
    encoder: object
    exact: object
    encoding: object
    common: dict

    @cached_property
    def image(self) -> Path:
        """Image of the atlas in the run's space."""
        return self.atlas.image_for(self.run.space, voxel_size(self.run.bold)).path

    @property
    def asked(self) -> AnalysisSettings:
        return self.task.analyses

    @property
    def scored(self) -> np.ndarray:
        """Samples of the run and parcels that were measured, (S, P) bool.

        Flagged volumes were interpolated, and parcels without signal filled from others.
        """
        return ~self.data.flagged[:, None] & self.data.own

    def own(self, values: np.ndarray) -> np.ndarray:
        """Values (P, ...) with NaN for the parcels that were filled from others."""
        shown = np.array(values, dtype=float)
        shown[~self.data.own] = np.nan
        return shown

    def save_figure(self, figure, what: str) -> None:
        """Put a figure where the report finds it."""
        from bids_brainfm.reports import figures

        figures.save(figure, picture_path(self.run, self.task, what))

    def write_sidecar(self, path: Path, content: dict, exact: bool = False) -> None:
        """Write what is said of a table beside it; the last file of an analysis.

        `exact` tells that the encoder in float32 was used.
        """
        model = model_metadata(self.task, (self.exact if exact else self.task).precision)
        write_sidecar(path, content | model | self.common)

    def write_map(self, path: Path, columns: dict, values: np.ndarray) -> None:
        """Write a table with a row a parcel, and one of its columns as an image."""
        from bids_brainfm.signals.paint import paint_map

        write_table(path, {'Node': list(self.atlas.names)} | columns)
        name = path.name.partition('_stat-')[2].partition('_boldmap')[0].replace('_desc-', ' ')
        paint_map(image_path(self.run, path), self.image, values, name)


def table_path(run: BoldRun, task, suffix: str, stat: str | None = None) -> Path:
    """Path of a table of a run and model."""
    stats = {} if stat is None else {'stat': stat}
    return derivative_path(
        task.output, run, suffix, '.tsv', atlas=task.atlas, desc=task.spec.label, **stats
    )


def image_path(run: BoldRun, table: Path) -> Path:
    """Path of the image of a map, beside its table."""
    return table.with_suffix('.dscalar.nii' if run.is_cifti else '.nii.gz')


def picture_path(run: BoldRun, task, what: str) -> Path:
    """Path of a figure of a run and model."""
    from bids_brainfm.reports.report import figure_path

    return figure_path(task.output, report_name(run, task.atlas), what, task.spec.label)


def model_metadata(task, precision: str) -> dict:
    """What a sidecar says of the model that made a table, and how it was computed."""
    spec = task.spec
    model = {'Name': spec.card.name, 'Trained': spec.trained, 'Weights': spec.weights}
    return {'Model': model, 'Precision': precision, 'Device': task.device}


def series_metadata(run: BoldRun, task) -> dict:
    """What a sidecar takes over from the parcel series, for a table with the same rows."""
    source = source_sidecar(run, task)
    names = ('RepetitionTime', 'SamplingFrequency', 'StartTime', 'Atlas')
    return {name: source[name] for name in names}


def score_metadata(pooled: dict) -> dict:
    """Pooled scores (name to Score) as a sidecar has them."""
    return {
        name: {'R2': float(found.r2), 'r': float(found.r), 'MSE': float(found.mse)}
        for name, found in pooled.items()
    }


def source_sidecar(run: BoldRun, task) -> dict:
    """Sidecar of the run's parcel series."""
    series = series_paths(task.output, run, task.atlas)['series']
    return read_sidecar(series.with_suffix('.json'))
