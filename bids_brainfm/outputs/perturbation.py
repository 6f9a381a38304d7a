"""``--outputs perturbation``: parcels clamped, and what the model makes of the others."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.atlases.reference import reference_for, reference_networks
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.reconstruction import mask_ratio, network_of
from bids_brainfm.outputs.tasks import ModelTask
from bids_brainfm.outputs.words import described
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.windows import cover

if TYPE_CHECKING:
    from bids_brainfm.analyses.perturb import Perturbation

NAME = 'perturbation'
# What is perturbed by default, since its response is the best known: in mm (MNI)
LEFT_V1_MM = (-10.0, -85.0, 2.0)
FIGURES = {'perturbation': Figure('Perturbation',
    'Change of the reconstruction of the other parcels when the marked ones are clamped, '
    'against sham targets, the same pattern moved along the parcels. Those of one model rise '
    'and fall together, so the number beyond chance is a guide only. It tells what the model '
    'has learnt of the dependence between parcels, and nothing about causes in the brain.')
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """What is perturbed, and how."""

    target_name: str  # a parcel or a network
    target: tuple[str, ...]  # its parcels
    k_sd: float  # distance from the mean, in SD
    mask_ratio: float  # proportion of tokens that a pass hides
    seed: int  # of masks and sham targets


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters:
    """Settle target and masks; refuse a target that leaves nothing to reconstruct."""
    from bids_brainfm.analyses.perturb import others_left
    from bids_brainfm.models.encoder import row_order

    (name, target), ratio = _target(settings, atlas), mask_ratio(settings, spec)
    order = row_order(spec.card.parcel_order, atlas.xyz)
    chosen = np.isin(atlas.names, target)
    if not others_left(network_of(spec), chosen, order):
        raise BrainfmError(
            f'--perturb {name}: each token of {spec.card.name} holds one of '
            f'its {chosen.sum()} parcels, so there is nothing to reconstruct; name fewer, or '
            f'take brainlm-13m, which has a token for each parcel.'
        )
    k_sd = settings.options.get('perturb_sd') or 2.0
    return Parameters(name, target, k_sd, ratio, settings.random_seed)


def _target(settings: Settings, atlas: Atlas) -> tuple[str, tuple[str, ...]]:
    """What is perturbed, and the names of its parcels; refuse what the atlas does not have."""
    name = settings.options.get('perturb')
    if name is None:
        distance = np.linalg.norm(atlas.xyz - np.array(LEFT_V1_MM), axis=1)
        name = atlas.names[int(distance.argmin())]
    if name in atlas.names:
        return name, (name,)
    tables = settings.options.get('reference_networks') or ()
    networks = reference_networks(atlas, reference_for(atlas, tables)) or ()
    pairs = zip(atlas.names, networks, strict=False)
    parcels = tuple(parcel for parcel, network in pairs if network == name)
    if not parcels:
        known = [*atlas.names, *sorted(set(networks))]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise BrainfmError(
            f'--perturb {name}: the atlas {atlas.name} has no such parcel or network; did you '
            f'mean {", ".join(near)}?'
        )
    return name, parcels


def methods(task: ModelTask) -> str:
    """Sentence on target, masks and sham targets."""
    asked = task.parameters[NAME]
    return (
        f'In the first window of each run {asked.target_name} was held at its mean '
        f'{asked.k_sd:+g} SD, and the other parcels were reconstructed by {task.spec.card.name} '
        f'under masks ({asked.mask_ratio:.0%} of the tokens a pass) with and without this; the '
        'change is given beside that of sham targets, the same pattern moved along the parcels.'
    )


@dataclass(frozen=True)
class Result:
    """Changes of all parcels, and which ones were set; SD in the units of the model."""

    found: 'Perturbation'
    named: np.ndarray
    target: np.ndarray
    sd: np.ndarray


def compute(context: Context) -> Result:
    """Clamp the target in the first window, in float32."""
    from bids_brainfm.analyses.perturb import perturb

    data, asked = context.data, context.task.parameters[NAME]
    named = np.isin(context.atlas.names, asked.target)
    target = named & data.own
    if not target.any():
        raise BrainfmError(
            f'the perturbation target {asked.target_name} has no signal in this run: name '
            f'another one with --perturb.'
        )
    windows, samples = cover(data.data, context.task.spec.card.window)
    mean, sd = data.data.mean(axis=0), data.data.std(axis=0)
    found = perturb(
        context.model.exact, windows[0], target, mean, sd, asked.k_sd, asked.mask_ratio,
        asked.seed, eligible=data.own, recorded=samples[0] >= 0,
    )  # fmt: skip
    return Result(found, named, target, sd)


def write(context: Context, result: Result) -> None:
    """Write the map of changes: table, image, figure, sidecar."""
    from bids_brainfm.reports.figures import perturbation as figures

    found, target, sd = result.found, result.target, result.sd
    k_sd, scaling = context.task.parameters[NAME].k_sd, context.data.scaling
    change, p, spread = (context.own(x) for x in (found.change, found.p, found.null_sd))
    # one SD of the model's units in those of the run
    unit = scaling.undo(sd[None])[0] - scaling.undo(0 * sd[None])[0]
    table = context.table(NAME)
    columns = {
        'change': change, 'change_bold': change * unit, 'p': p, 'sham_sd': spread,
        'shams': found.n_shams, 'target': target.astype(int),
    }  # fmt: skip
    context.write_map(table, columns, np.where(target, k_sd, change))
    atlas, shown = context.atlas, (change, target, p, spread)
    figure = figures.perturbation(atlas.xyz, *shown, list(atlas.names), k_sd)
    context.save_figure(figure, 'perturbation')
    context.write_sidecar(table, _describe(context, result, p), exact=True)


def _describe(context: Context, result: Result, p: np.ndarray) -> dict[str, Any]:
    """Sidecar of the map."""
    from bids_brainfm.analyses.perturb import ENOUGH

    spec, asked = context.task.spec, context.task.parameters[NAME]
    found, target, atlas = result.found, result.target, context.atlas
    shared = int((~np.isfinite(found.change) & ~target).sum())
    warnings = []
    if lost := int((result.named & ~target).sum()):
        warnings.append(f'{lost} parcels of {asked.target_name} have no signal and were not set.')
    if shared:
        warnings.append(
            f'{shared} parcels share tokens of {spec.label} with the perturbed '
            f'{asked.target_name}, so they cannot be reconstructed without it and are n/a.'
        )
    return {
        'Description': f'Change of the reconstruction of each parcel by {spec.card.name} '
        f'when {asked.target_name} is held at its mean {asked.k_sd:+g} SD throughout the '
        'first window, mean over the window. In the image the target holds what was set.',
        'Target': asked.target_name,
        'TargetParcels': [atlas.names[i] for i in np.flatnonzero(target)], 'SD': asked.k_sd,
        'MaskRatio': asked.mask_ratio, 'Seed': asked.seed, 'NumberOfShams': len(found.null),
        'ParcelsSharingTokens': shared, 'ParcelsBelow05': int((p <= 0.05).sum()),
        'ParcelsTested': int(np.isfinite(p).sum()), 'Warnings': warnings,
    } | described(
        Node=f'Parcel of {atlas.name}', change='In SD of the parcel over the run',
        change_bold='In BOLD units',
        p='Share of sham targets that change the parcel at least as much, the target itself '
        f'counted; not corrected for the number of parcels; n/a with fewer than {ENOUGH} shams',
        shams='Sham targets that tell of the parcel, because they share no token with it',
        sham_sd='Root mean square of the sham changes, in SD',
        target='1 for the parcels that were set',
    )  # fmt: skip


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """How many parcels change."""
    return {
        'Perturbation': f'{sidecar["Target"]} at {sidecar["SD"]:+g} SD: '
        f'{sidecar["ParcelsBelow05"]} of {sidecar["ParcelsTested"]} parcels change more than '
        f'under 95% of sham targets'
    }
