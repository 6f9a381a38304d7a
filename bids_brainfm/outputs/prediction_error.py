"""Prediction error: of the latents of a block of each window, predicted from the rest."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids.files import write_table
from bids_brainfm.config import Settings
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import Context, display_order, known_mean
from bids_brainfm.outputs.registry import BLOCKS
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.outputs.words import as_words, described
from bids_brainfm.reports.report import Figure

NAME = 'prediction_error'
FIGURES = {'latent': Figure('Prediction error',
    'Error of the predicted latents of the masked block of a window (mean over the windows '
    'that are not excluded), compared with the error of the mean latent of the context, which '
    'needs no model. Grey cells were the context. The error does not measure the quality of the '
    'data: noise can have a lower error than a good run.')}  # fmt: skip
DESCRIBED = {
    'cross-time': 'the last time patches of all parcels, from the patches before',
    'cross-roi': 'every second parcel, from the others at the same times',
    'double-cross': 'every second parcel at the last time patches, from the others before',
}


@dataclass(frozen=True)
class Parameters:
    """Block of each window that is predicted from the rest."""

    latent_prediction: str


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters | None:
    """Settle the block; None where no map of the error is wanted."""
    block = settings.options.get('latent_prediction') or BLOCKS[0]
    return None if block == 'none' else Parameters(block)


def methods(task: ModelTask) -> str:
    """Sentence on the prediction and its baseline."""
    return (
        'The prediction error is the smooth L1 error of the latents of a block of each window '
        f'({DESCRIBED[task.parameters[NAME].latent_prediction]}) as predicted by the predictor '
        f'of {task.spec.card.name}, relative to the latents of the target encoder. The baseline '
        'is the error of the mean latent of the context.'
    )


def compute(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Error and baseline of each window, parcel and time patch, (W, P, K); NaN in the context."""
    error, baseline = context.encoding.latent_error, context.encoding.latent_baseline
    assert error is not None  # asked for with this product
    assert baseline is not None
    return error, baseline


def write(context: Context, result: tuple[np.ndarray, np.ndarray]) -> None:
    """Write table, figure and sidecar."""
    from bids_brainfm.reports.figures import prediction_error as figures

    error, baseline = result
    atlas, spec = context.atlas, context.task.spec
    block = context.task.parameters[NAME].latent_prediction
    n_windows, n_parcels, n_patches = error.shape
    kept = ~context.windows.excluded
    columns = {
        'window': np.repeat(np.arange(n_windows), n_parcels),
        'Node': list(atlas.names) * n_windows,
        **{f'patch{k:02d}': error[:, :, k].ravel() for k in range(n_patches)},
        'error': known_mean(error, axis=2).ravel(),
        'baseline': known_mean(baseline, axis=2).ravel(),
    }
    table = context.table(NAME)
    write_table(table, columns)
    order, label = display_order(atlas.xyz)
    if kept.any():
        shown = error[kept], baseline[kept], np.flatnonzero(kept)
        context.save_figure(figures.latent_error(*shown, order, order_label=label), 'latent')
    content = {
        'Description': f'Prediction error of {spec.card.name} for the latents of a block of '
        f'each window: {DESCRIBED[block]}. Smooth L1 error (beta 1), mean over dimensions, of '
        'the predicted latents relative to the layer-normalised target latents. It does not '
        'measure the quality of the data.',
        'Block': block,
        'MeanError': known_mean(error[kept].ravel(), axis=0),
        'MeanBaseline': known_mean(baseline[kept].ravel(), axis=0),
    } | described({
        'window': 'Number of the window, from 0', 'Node': f'Parcel of {atlas.name}',
        'patch*': 'Error at each time patch, n/a where it was the context',
        'error': "Mean over the parcel's patches",
        'baseline': "Error of the mean target latent of the window's context, which needs no "
        'model',
    })  # fmt: skip
    context.write_sidecar(table, content)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Mean error, and that of the baseline."""
    return {
        'Prediction error': f'{sidecar["Block"]}: mean {as_words(sidecar["MeanError"])}, baseline '
        f'{as_words(sidecar["MeanBaseline"])}'
    }
