"""How well a model predicts the latents of a block of each window from the rest."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids.files import write_table
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.config import Settings
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import Context, display_order, known_mean
from bids_brainfm.outputs.registry import BLOCKS
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.outputs.words import described
from bids_brainfm.reports.report import Figure

NAME = 'prediction_error'
FIGURES = {'latent': Figure('Latent prediction',
    'Error with which the model predicts the latents of the masked block of a window from '
    'the rest (mean over windows), against a guess without a model, the mean latent of what '
    'it saw. Cells in grey were the context. Parcels with a high error are unlike what the '
    'model was trained on.')}  # fmt: skip
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
    """Settle the block; None where no prediction is wanted."""
    block = settings.options.get('latent_prediction') or BLOCKS[0]
    return None if block == 'none' else Parameters(block)


def methods(task: ModelTask) -> str:
    """Sentence on the prediction and its baseline."""
    return (
        'As a check of quality, the latents of a block of each window '
        f'({DESCRIBED[task.parameters[NAME].latent_prediction]}) were predicted by the predictor '
        f'of {task.spec.card.name} and compared with those of the target encoder (smooth L1 '
        'error), beside the mean latent of the context as a guess without a model.'
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
    context.save_figure(figures.latent_error(error, baseline, order, order_label=label), 'latent')
    content = {
        'Description': f'How well {spec.card.name} predicts the latents of a block of '
        f'each window: {DESCRIBED[block]}. Smooth L1 error (beta 1), mean over '
        f'dimensions, of the predicted against the layer-normalised target latents.',
        'Model': {'Name': spec.card.name, 'Weights': spec.weights}, 'Block': block,
        'MeanError': float(np.nanmean(error)), 'MeanBaseline': float(np.nanmean(baseline)),
    } | described({
        'window': 'Number of the window, from 0', 'Node': f'Parcel of {atlas.name}',
        'patch*': 'Error at each time patch, n/a where it was the context',
        'error': "Mean over the parcel's patches",
        'baseline': 'The same for a guess without a model: the mean target latent of the '
        "window's context",
    })  # fmt: skip
    write_sidecar(table, content | context.common)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Mean error, and that of the baseline."""
    return {
        'Latent prediction': f'{sidecar["Block"]}: mean error {sidecar["MeanError"]:.3f}, of a '
        f'guess without a model {sidecar["MeanBaseline"]:.3f}'
    }
