"""Where the attention of a model falls: the first part of ``--outputs networks``."""

import numpy as np

from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.context import Context, image_path, table_path

NAME = 'networks'
PICTURES = ('attention',)
SETTINGS = ()


def paths(run: BoldRun, task) -> list:
    """Files of a run; the first one's sidecar is written last."""
    table = table_path(run, task, 'boldmap', 'attention')
    return [table, image_path(run, table)]


def token_note(task) -> str | None:
    """What to say of a model without a token for each parcel."""
    if task.spec.per_parcel:
        return None
    patch = task.spec.card.config['patch_size']
    return (
        f'A token of {task.spec.card.name} spans {patch} parcels (neighbours from back to front) '
        f'and {patch} time points. These parcels are given equal parts of its attention, so the '
        'map tells where along that axis the model attends, and cannot tell networks apart.'
    )


def pattern(task) -> str:
    """Glob of the first file of every run."""
    return f'*_stat-attention_desc-{task.spec.label}_boldmap.tsv'


def text(task) -> str:
    """Sentences for the methods."""
    whose = 'class token' if task.spec.pooling == 'class token' else 'mean over tokens'
    return (
        f'Attention maps of {task.spec.card.name} show the share of attention (last layer, mean '
        f'over heads, {whose}) that falls on each parcel. {token_note(task) or ""}'
    ).strip()


def write(context: Context) -> None:
    """Write the attention map: table, image, figure, sidecar."""
    from bids_brainfm.reports import analysis_figures as figures

    task, note = context.task, token_note(context.task)
    profile = context.own(context.encoding.attention_profile.mean(axis=0))
    share = profile.sum(axis=1)
    table = table_path(context.run, task, 'boldmap', 'attention')
    columns = {'attention': share}
    columns |= {f'patch{k:02d}': profile[:, k] for k in range(profile.shape[1])}
    context.write_map(table, columns, share)
    relative = share / np.nanmean(share)
    context.save_figure(figures.attention(context.atlas.xyz, relative, profile, note), 'attention')
    context.write_sidecar(
        table,
        {
            'Description': f'Share of the attention of {task.spec.card.name} that falls on each '
            'parcel: last layer, mean over heads and windows; '
            + (
                'of the class token.'
                if context.encoder.network.has_class_token
                else 'mean over all tokens.'
            ),
            'TokenSpan': note,
            'Node': {'Description': f'Parcel of {context.atlas.name}'},
            'attention': {'Description': 'Sum over time patches'},
            'patch*': {'Description': 'At each time patch'},
        },
    )
