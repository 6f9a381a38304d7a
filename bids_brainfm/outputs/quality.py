"""Quality metrics of a run: one row, for the report and for the decision to exclude it."""

from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm.bids.files import write_table
from bids_brainfm.outputs.words import as_number
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.order import nearness
from bids_brainfm.signals.quality import distance_dependence, motion

if TYPE_CHECKING:
    from bids_brainfm.outputs.series_context import SeriesContext

NAME = 'quality'
FIGURES: dict[str, Figure] = {}
COLUMNS = {
    'mean_fd': {
        'Description': 'Mean framewise displacement, of the volumes after those dropped',
        'Units': 'mm',
    },
    'median_fd': {'Description': 'Median framewise displacement', 'Units': 'mm'},
    'max_fd': {'Description': 'Largest framewise displacement', 'Units': 'mm'},
    'mean_std_dvars': {'Description': 'Mean standardised DVARS'},
    'num_volumes': {'Description': 'Volumes after those dropped at the start'},
    'num_censored_volumes': {'Description': 'Volumes of these that are flagged as outliers'},
    'minutes_retained': {'Description': 'Time of unflagged data', 'Units': 'min'},
    'num_regressors': {'Description': 'Confounds that were regressed out'},
    'degrees_of_freedom': {
        'Description': 'Unflagged volumes minus the rank of the regressors, with the mean and the '
        'band-pass filter'
    },
    'median_tsnr': {
        'Description': 'Median over parcels of the temporal signal-to-noise ratio before denoising'
    },
    'min_coverage': {'Description': 'Lowest coverage of a parcel'},
    'fc_distance_r': {
        'Description': 'Pearson r of functional connectivity (Fisher z) with the distance of the '
        'parcels'
    },
    'order_r': {
        'Description': 'Pearson r of connectivity with the closeness of the parcels, drifts and '
        'global signal removed: near 0 where the parcels are not in the order of the atlas'
    },
}  # fmt: skip


def metrics(context: 'SeriesContext') -> dict[str, float]:
    """Measure the quality of a run; by column of the table, NaN where something is unknown."""
    series, xyz = context.series, context.atlas.xyz
    kept = ~series.flagged
    near = nearness(series.data[kept], xyz)
    return motion(context.run.confounds, series.dummy, series.dummy + len(kept)) | {
        'num_volumes': len(kept),
        'num_censored_volumes': np.count_nonzero(~kept) if context.assessed else np.nan,
        'minutes_retained': np.count_nonzero(kept) * series.tr / 60,
        'num_regressors': np.nan if context.task.denoised else len(series.names),
        'degrees_of_freedom': context.degrees_of_freedom,
        'median_tsnr': np.nanmedian(series.tsnr),
        'min_coverage': series.coverage.min(),
        'fc_distance_r': distance_dependence(context.relmat, xyz),
        'order_r': np.nan if near is None else near.as_read,
    }


def compute(context: 'SeriesContext') -> dict[str, float]:
    """Quality metrics of the run, by column."""
    return context.quality


def write(context: 'SeriesContext', result: dict[str, float]) -> None:
    """Write table and sidecar."""
    table = context.task.place.table(context.run, NAME)
    write_table(table, {name: [result[name]] for name in COLUMNS})
    content = {'Description': 'Quality metrics of the run and of its parcel series.'} | COLUMNS
    context.write_sidecar(table, content)


def lines(found: dict[str, float | None]) -> dict[str, str]:
    """Lines of the report, from what the sidecar of the series holds."""
    text = {name: as_number(value) for name, value in found.items()}
    return {
        'Motion': f'framewise displacement {text["mean_fd"]} mm (mean), {text["median_fd"]} mm '
        f'(median), {text["max_fd"]} mm (maximum); standardised DVARS {text["mean_std_dvars"]} '
        '(mean)',
        'Signal': f'temporal signal-to-noise ratio {text["median_tsnr"]} (median of the parcels), '
        f'lowest coverage {text["min_coverage"]}',
        'Connectivity': f'correlation with the distance of parcels {text["fc_distance_r"]}, with '
        f'their closeness after removal of drifts and global signal {text["order_r"]}',
    }
