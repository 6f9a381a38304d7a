"""``--outputs perturbation``: parcels are perturbed, and the model reconstructs the others."""

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
from bids_brainfm.outputs.words import as_number, described
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.windows import cover

if TYPE_CHECKING:
    from bids_brainfm.analyses.perturb import Perturbation

NAME = 'perturbation'
# The default target, because responses to visual input are the best known; in mm (MNI)
LEFT_V1_MM = (-10.0, -85.0, 2.0)
FIGURES = {'perturbation': Figure('Perturbation',
    'Change of the reconstruction of the other parcels when the marked ones are perturbed, '
    'compared with sham targets at matched distance. p values are not corrected for the number of '
    'parcels; the title gives the number expected below .05 by chance. Changes of parcels are '
    'correlated, so the observed number can differ much from it by chance: compare it with the '
    'numbers of the sham targets. The map shows which '
    'dependence between parcels the model has learnt, not causal effects in the brain.')
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """What is perturbed, and how."""

    target_name: str  # a parcel or a network
    target: tuple[str, ...]  # its parcels
    k_sd: float  # size of the perturbation in SD
    mode: str  # pulse or clamp
    mask_ratio: float  # proportion of tokens that a pass hides
    seed: int  # of masks and sham targets

    @property
    def action(self) -> str:
        """What is done to the target, in words."""
        if self.mode == 'pulse':
            return f'changed by {self.k_sd:+g} SD for the length of one token'
        return f'held at its mean {self.k_sd:+g} SD'


def parameters(settings: Settings, spec: ModelSpec, atlas: Atlas) -> Parameters:
    """Settle target and masks; refuse a target that leaves nothing to reconstruct."""
    from bids_brainfm.analyses.perturb import MODES, others_left
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
    k_sd = settings.options.get('perturb_sd') or 1.0
    mode = settings.options.get('perturb_mode') or MODES[0]
    return Parameters(name, target, k_sd, mode, ratio, settings.random_seed)


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
    """Sentences on target, masks and sham targets."""
    from bids_brainfm.analyses.perturb import PULSES, SHAMS

    asked, where = task.parameters[NAME], 'throughout the first window of each run'
    kept = ' that is not excluded for its flagged volumes' * (task.contract.max_flagged < 1)
    if asked.mode == 'pulse':
        where = f'at up to {PULSES} times spread over the first window of each run'
    return (
        f'{asked.target_name} was {asked.action} {where}{kept}, and the other parcels were '
        f'reconstructed by {task.spec.card.name} with and without this perturbation under the '
        f'same masks ({asked.mask_ratio:.0%} of the tokens in each pass). The change of the '
        'reconstruction during the perturbation, in SD of each parcel, was compared with the '
        f'changes under up to {SHAMS} sham targets (the target moved along the order of the '
        'parcels) in parcels as far from the sham as the parcel is from the target, relative to '
        'the root mean square change of each parcel over all targets. p values were not corrected '
        'for the number of parcels.'
    )


@dataclass(frozen=True)
class Result:
    """Changes of all parcels, and which ones were perturbed."""

    found: 'Perturbation'
    named: np.ndarray  # (P,) bool, parcels that were asked for
    sd: np.ndarray  # (P,) of each parcel in the units of the model
    onset: float  # of the window, in seconds since the run's start
    departure: float  # of the perturbed stretches from the run, see analyses.perturb.departure


def compute(context: Context) -> Result:
    """Perturb the target in the first window that is not excluded, in float32."""
    from bids_brainfm.analyses.perturb import departure, perturb, stimuli

    data, asked = context.data, context.task.parameters[NAME]
    named = np.isin(context.atlas.names, asked.target)
    target = named & data.own
    if not target.any():
        raise BrainfmError(
            f'the perturbation target {asked.target_name} has no signal in this run: name '
            f'another one with --perturb.'
        )
    windows, samples = cover(data.data, context.task.spec.card.window)
    number = first_kept(samples, data.flagged, context.task.contract.max_flagged)
    window, samples = windows[number], samples[number]
    mean, sd = data.data.mean(axis=0), data.data.std(axis=0)
    found = perturb(
        context.model.exact, window, target, mean, sd, context.atlas.xyz, asked.k_sd,
        asked.mask_ratio, asked.mode, asked.seed, eligible=data.own, recorded=samples >= 0,
    )  # fmt: skip
    given = stimuli(window, target, found.times, mean, sd, asked.k_sd, asked.mode)
    onset = data.series.start + samples[0] * data.tr
    return Result(found, named, sd, onset, departure(data.data, given, target, found.times))


def first_kept(samples: np.ndarray, flagged: np.ndarray, limit: float) -> int:
    """Number of the first window whose proportion of flagged samples is not above a limit.

    `samples` (W, T) int are as of :func:`bids_brainfm.signals.windows.cover`, `flagged` is (S,)
    bool. It is 0 where all are above.

    >>> first_kept(np.array([[0, 1], [2, 3]]), np.array([True, True, False, True]), 0.5)
    1
    """
    recorded = samples >= 0
    marked = (recorded & flagged[samples]).sum(axis=1) / recorded.sum(axis=1)
    return int(np.argmax(marked <= limit))


def write(context: Context, result: Result) -> None:
    """Write the map of changes: table, image, figure, sidecar."""
    from bids_brainfm.reports.figures import perturbation as figures

    found, asked, scaling = result.found, context.task.parameters[NAME], context.data.scaling
    change, target = found.change, found.target
    # one SD of the model's units in those of the run
    unit = scaling.undo(result.sd[None])[0] - scaling.undo(0 * result.sd[None])[0]
    table = context.table(NAME)
    columns = {'change': change, 'change_bold': change * unit}
    columns |= dict(zip(('change_before', 'change_after'), found.response[1:], strict=False))
    columns |= {'p': found.p, 'sham_rms': found.null_rms, 'target': target.astype(int)}
    context.write_map(table, columns, np.where(target, asked.k_sd, change))
    figure = figures.perturbation(
        context.atlas.xyz, change, target, found.p, found.null_rms, list(context.atlas.names),
        asked.action, found.expected,
    )  # fmt: skip
    context.save_figure(figure, 'perturbation')
    context.write_sidecar(table, _describe(context, result), exact=True)


def _describe(context: Context, result: Result) -> dict[str, Any]:
    """Sidecar of the map."""
    from bids_brainfm.analyses.perturb import SHAMS

    spec, asked, tr = context.task.spec, context.task.parameters[NAME], context.windows.tr
    found, atlas, target = result.found, context.atlas, result.found.target
    sharing = int((~np.isfinite(found.change) & ~target & context.data.own).sum())
    warnings = []
    if lost := int((result.named & ~target).sum()):
        warnings.append(
            f'{lost} parcels of {asked.target_name} have no signal and were not perturbed.'
        )
    if sharing:
        warnings.append(
            f'{sharing} parcels share tokens of {spec.label} with the perturbed '
            f'{asked.target_name}, so they cannot be reconstructed without it and are n/a.'
        )
    content = {
        'Description': f'Change of the reconstruction of each parcel by {spec.card.name} when '
        f'{asked.target_name} is {asked.action}, mean over the time of the perturbation. In the '
        'image the target holds the size of the perturbation. Onsets are in seconds from the '
        'start of the window; ParcelsBelow05OfShams is the count of each sham target, tested as '
        'if it were the target.',
        'Target': asked.target_name,
        'TargetParcels': [atlas.names[i] for i in np.flatnonzero(target)],
        'Mode': asked.mode, 'SD': asked.k_sd, 'NumberOfStimuli': len(found.times),
        'WindowOnset': result.onset, 'StimulusOnsets': found.times.argmax(axis=1) * tr,
        'StimulusDuration': found.times[0].sum() * tr,
        'DepartureFromData': result.departure,
        'MaskRatio': asked.mask_ratio, 'Seed': asked.seed, 'NumberOfShams': len(found.null),
        'MedianDistanceMismatch': found.mismatch, 'ParcelsSharingTokens': sharing,
        'ParcelsBelow05': int(found.significant.sum()),
        'ParcelsExpectedByChance': found.expected, 'ParcelsBelow05OfShams': found.sham_counts,
        'ParcelsTested': int(np.isfinite(found.p).sum()), 'Warnings': warnings,
    }  # fmt: skip
    columns = described(
        Node=f'Parcel of {atlas.name}', change='In SD of the parcel over the run',
        change_bold='In BOLD units',
        p='Proportion of targets, shams and this one, that change a parcel at this distance at '
        f'least as much; not corrected for the number of parcels; n/a with fewer than {SHAMS} '
        'shams',
        sham_rms='Root mean square of the changes under sham targets at matched distance, in SD',
        target='1 for the parcels that were perturbed',
    )  # fmt: skip
    if asked.mode == 'pulse':
        columns |= described(
            change_before='One token before the pulse, in SD',
            change_after='One token after the pulse, in SD',
        )
    return content | columns


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """How many parcels change, and how far the stimulus lies outside the data."""
    departure, count = sidecar['DepartureFromData'], sidecar['ParcelsBelow05']
    shams = sidecar['ParcelsBelow05OfShams']
    return {
        'Perturbation': f'{sidecar["Target"]}, {sidecar["Mode"]} of {sidecar["SD"]:+g} SD: '
        f'{count} of {sidecar["ParcelsTested"]} parcels with p ≤ .05 '
        f'({sidecar["ParcelsExpectedByChance"]:.1f} expected by chance; at least as many for '
        f'{sum(n >= count for n in shams)} of {len(shams)} sham targets)',
        'Perturbed means': f'{as_number(departure)} SD from the means of equally long stretches '
        'of the run',
    }
