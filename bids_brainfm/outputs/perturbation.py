"""``--outputs perturbation``: parcels clamped, and what the model makes of the others."""

import numpy as np

from bids_brainfm.analyses.perturb import ENOUGH, perturb
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.context import Context, image_path, table_path
from bids_brainfm.signals.windows import cover

NAME = 'perturbation'
PICTURES = ('perturbation',)
SETTINGS = (
    'target_name',
    'target',
    'k_sd',
    'mask_ratio',
    'seed',
)


def paths(run: BoldRun, task) -> list:
    """Files of a run; the first one's sidecar is written last."""
    table = table_path(run, task, 'boldmap', 'perturbation')
    return [table, image_path(run, table)]


def pattern(task) -> str:
    """Glob of the first file of every run."""
    return f'*_stat-perturbation_desc-{task.spec.label}_boldmap.tsv'


def text(task) -> str:
    """Sentences for the methods."""
    asked = task.analyses
    return (
        f'In the first window of each run {asked.target_name} was held at its mean '
        f'{asked.k_sd:+g} SD, and the other parcels were reconstructed by '
        f'{task.spec.card.name} under masks ({asked.mask_ratio:.0%} of the tokens a pass) with '
        'and without this; the change is given beside that of sham targets, the same pattern '
        'moved along the parcels.'
    )


def write(context: Context) -> None:
    """Write the map of changes: table, image, figure, sidecar."""
    from bids_brainfm.reports import analysis_figures as figures

    run, task, data, asked = context.run, context.task, context.data, context.asked
    atlas = context.atlas
    named = np.isin(atlas.names, asked.target)
    target = named & data.own
    if not target.any():
        raise BrainfmError(
            f'the perturbation target {asked.target_name} has no signal in this run: name '
            f'another one with --perturb.'
        )
    windows, samples = cover(data.data, task.spec.card.window)
    mean, sd = data.data.mean(axis=0), data.data.std(axis=0)
    found = perturb(
        context.exact, windows[0], target, mean, sd, asked.k_sd, asked.mask_ratio, asked.seed,
        eligible=data.own, recorded=samples[0] >= 0,
    )  # fmt: skip
    change, p, spread = (context.own(x) for x in (found.change, found.p, found.null_sd))
    # one SD of the model's units in those of the run
    unit = data.scaling.undo(sd[None])[0] - data.scaling.undo(0 * sd[None])[0]
    shown = np.where(target, asked.k_sd, change)
    table = table_path(run, task, 'boldmap', 'perturbation')
    columns = {
        'change': change,
        'change_bold': change * unit,
        'p': p,
        'sham_sd': spread,
        'shams': found.n_shams,
        'target': target.astype(int),
    }
    context.write_map(table, columns, shown)
    names = list(atlas.names)
    context.save_figure(
        figures.perturbation(atlas.xyz, change, target, p, spread, names, asked.k_sd),
        'perturbation',
    )
    shared = int((~np.isfinite(found.change) & ~target).sum())
    warnings = []
    if lost := int((named & ~target).sum()):
        warnings.append(f'{lost} parcels of {asked.target_name} have no signal and were not set.')
    if shared:
        warnings.append(
            f'{shared} parcels share tokens of {task.spec.label} with the perturbed '
            f'{asked.target_name}, so they cannot be reconstructed without it and are n/a.'
        )
    context.write_sidecar(
        table,
        {
            'Description': f'Change of the reconstruction of each parcel by {task.spec.card.name} '
            f'when {asked.target_name} is held at its mean {asked.k_sd:+g} SD throughout the '
            'first window, mean over the window. In the image the target holds what was set.',
            'Target': asked.target_name,
            'TargetParcels': [atlas.names[i] for i in np.flatnonzero(target)],
            'SD': asked.k_sd,
            'MaskRatio': asked.mask_ratio,
            'Seed': asked.seed,
            'NumberOfShams': len(found.null),
            'ParcelsSharingTokens': shared,
            'ParcelsBelow05': int((p <= 0.05).sum()),
            'ParcelsTested': int(np.isfinite(p).sum()),
            'Warnings': warnings,
            'Node': {'Description': f'Parcel of {atlas.name}'},
            'change': {'Description': 'In SD of the parcel over the run'},
            'change_bold': {'Description': 'In BOLD units'},
            'p': {
                'Description': 'Share of sham targets that change the parcel at least as much, '
                'the target itself counted; not corrected for the number of parcels; n/a with '
                f'fewer than {ENOUGH} shams'
            },
            'shams': {
                'Description': 'Sham targets that tell of the parcel, because they share no token '
                'with it'
            },
            'sham_sd': {'Description': 'Root mean square of the sham changes, in SD'},
            'target': {'Description': '1 for the parcels that were set'},
        },
        exact=True,
    )
