"""Where the attention of a model falls: the first part of ``--outputs networks``."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.outputs.words import described
from bids_brainfm.reports.report import Figure

FIGURES = {'attention': Figure('Attention',
    'Attention in the last layer to the token of each parcel, mean over time, as a multiple of '
    'uniform attention: 1 is what every token would receive if attention did not distinguish '
    'between them. Tokens of padding count, too, so all parcels may lie above or below 1.'
)}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Attention of a run, mean over windows, as a multiple of uniform attention."""

    relative: np.ndarray  # (P, K) float, of parcels and time patches; NaN for filled parcels
    token: np.ndarray  # (P,) int, tokens that share parcels are numbered from 0 in model order
    padding: int  # number of tokens that hold only padding
    to_padding: float  # proportion of the attention that they receive


def token_note(task: ModelTask) -> str | None:
    """Explain the resolution of the map for a model whose tokens span several parcels."""
    parcels, points = task.spec.capabilities.token_span
    if task.spec.capabilities.patches is not None:
        return None
    return (
        f'A token of {task.spec.card.name} spans {parcels} parcels (neighbours from posterior to '
        f'anterior) and {points} time points. All parcels of a token show its value, so the map '
        'resolves the position along this axis only and cannot distinguish networks.'
    )


def methods(task: ModelTask) -> str:
    """Sentences on the map."""
    return (
        f'Attention maps of {task.spec.card.name} show the attention (last layer, mean over '
        f'heads, {task.spec.capabilities.pooling}) to the token of each parcel as a multiple of '
        'uniform attention, the attention to a token divided by one over the number of tokens '
        f'(without the class token). {token_note(task) or ""}'
    ).strip()


def compute(context: Context) -> Result:
    """Average attention over windows."""
    profile = context.encoding.attention_profile
    assert profile is not None  # asked for with this product
    relative, encoder = context.mean_of_windows(profile), context.model.encoder
    tokens = encoder.parcel_tokens
    _, first, row = np.unique(tokens[:, 0], return_index=True, return_inverse=True)
    shown, total = tokens[first].size, encoder.network.tokens
    to_padding = 1 - relative[first].sum() / total
    return Result(context.own(relative), row, total - shown, to_padding)


def write(context: Context, result: Result) -> None:
    """Write the map: table, image, figure, sidecar."""
    from bids_brainfm.reports.figures import attention as figures

    spec, note, table = context.task.spec, token_note(context.task), context.table('attention')
    mean = result.relative.mean(axis=1)
    columns = {'token': result.token, 'attention': mean}
    columns |= {f'patch{k:02d}': column for k, column in enumerate(result.relative.T)}
    context.write_map(table, columns, mean)
    figure = figures.attention(context.atlas.xyz, result.relative, result.token, note)
    context.save_figure(figure, 'attention')
    source = 'of the class token' if spec.capabilities.class_token else 'mean over all tokens'
    content = {
        'Description': f'Attention of {spec.card.name} to the token of each parcel: last layer, '
        f'{source}, mean over heads and windows, as a multiple of uniform attention over all '
        'tokens but the class token (1 is uniform)',
        'NumberOfTokens': context.model.encoder.network.tokens,
        'TokensInPadding': result.padding,
        'AttentionToPadding': result.to_padding if result.padding else None,
        'TokenSpan': note,
    } | described({
        'Node': f'Parcel of {context.atlas.name}',
        'token': 'Number of the token that holds the parcel, the same at all time patches; '
        'parcels with the same number share a token and its values',
        'attention': 'Mean over time patches, multiple of uniform attention',
        'patch*': 'At each time patch, multiple of uniform attention',
    })  # fmt: skip
    context.write_sidecar(table, content)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Span of a token, and attention to padding, where that matters."""
    lines = {'Tokens': sidecar['TokenSpan']} if sidecar.get('TokenSpan') else {}
    if (attention := sidecar.get('AttentionToPadding')) is not None:
        uniform = sidecar['TokensInPadding'] / sidecar['NumberOfTokens']
        lines['Attention to padding'] = (
            f'{attention:.0%} of it falls on tokens that hold no data ({uniform:.0%} if it were '
            'uniform)'
        )
    return lines
