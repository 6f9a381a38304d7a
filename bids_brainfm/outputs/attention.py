"""Where the attention of a model falls: the first part of ``--outputs networks``."""

from typing import Any

import numpy as np

from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.outputs.words import described
from bids_brainfm.reports.report import Figure

FIGURES = {'attention': Figure('Attention',
    'Share of attention in the last layer that falls on each parcel, relative to equal '
    'shares.')}  # fmt: skip


def token_note(task: ModelTask) -> str | None:
    """What to say of a model without a token for each parcel."""
    parcels, points = task.spec.capabilities.token_span
    if task.spec.capabilities.patches is not None:
        return None
    return (
        f'A token of {task.spec.card.name} spans {parcels} parcels (neighbours from back to '
        f'front) and {points} time points. These parcels are given equal parts of its attention, '
        'so the map tells where along that axis the model attends, and cannot tell networks apart.'
    )


def methods(task: ModelTask) -> str:
    """Sentences on the map."""
    return (
        f'Attention maps of {task.spec.card.name} show the share of attention (last layer, mean '
        f'over heads, {task.spec.capabilities.pooling}) that falls on each parcel. '
        f'{token_note(task) or ""}'
    ).strip()


def compute(context: Context) -> np.ndarray:
    """Proportion of attention on each parcel and time patch, (P, K), mean over windows."""
    profile = context.encoding.attention_profile
    assert profile is not None  # asked for with this product
    return context.own(context.mean_of_windows(profile))


def write(context: Context, result: np.ndarray) -> None:
    """Write the map: table, image, figure, sidecar."""
    from bids_brainfm.reports.figures import attention as figures

    spec, note = context.task.spec, token_note(context.task)
    proportion, table = result.sum(axis=1), context.table('attention')
    patches = {f'patch{k:02d}': column for k, column in enumerate(result.T)}
    context.write_map(table, {'attention': proportion} | patches, proportion)
    relative = proportion / np.nanmean(proportion)
    context.save_figure(figures.attention(context.atlas.xyz, relative, result, note), 'attention')
    whose = 'of the class token.' if spec.capabilities.class_token else 'mean over all tokens.'
    content = {
        'Description': f'Share of the attention of {spec.card.name} that falls on each '
        f'parcel: last layer, mean over heads and windows; {whose}',
        'TokenSpan': note,
    } | described({
        'Node': f'Parcel of {context.atlas.name}', 'attention': 'Sum over time patches',
        'patch*': 'At each time patch',
    })  # fmt: skip
    context.write_sidecar(table, content)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """What a token spans, where that matters."""
    return {'Tokens': sidecar['TokenSpan']} if sidecar.get('TokenSpan') else {}
