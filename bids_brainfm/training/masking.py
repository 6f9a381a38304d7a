"""The spatiotemporal masks with which Brain-JEPA is pretrained.

Dong, Li et al. 2024 (NeurIPS), section 3.2. From a block (some parcels, a stretch of time) a
network predicts other parcels at the same times (Cross-ROI), the same parcels at other times
(Cross-Time), and other parcels at other times (Double-Cross).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bids_brainfm.errors import BrainfmError

RECIPES = ('fixed', 'official')
REGIONS = ('cross_roi', 'cross_time', 'double_cross')
# Proportions of parcels and of time patches (paper, table 6)
OBSERVED_PARCELS, OBSERVED_PATCHES = (0.84, 1.0), (0.84, 1.0)
ACROSS_PARCELS, ACROSS_PATCHES = (0.45, 0.6), (0.2, 0.6)
BEYOND_PARCELS, BEYOND_PATCHES = (0.15, 0.3), (0.0, 0.4)
OFFICIAL_PATCHES = 10


@dataclass(frozen=True)
class Blocks:
    """Masks of a batch of windows; tokens are patches × parcel + patch, int64.

    Regions of the official masks: Cross-ROI for all of the block α; for the two at the sides,
    whose names in the released code are not what they do, Cross-Time where the parcel is left in
    the context (before the cut to equal numbers) and Double-Cross elsewhere.
    """

    context: Tensor  # (B, K), tokens that the encoder sees, ascending
    target: Tensor  # (B, M), tokens to predict
    region: Tensor  # (B, M), number in REGIONS of each target


def draw_blocks(
    windows: int, parcels: int, patches: int, recipe: str, generator: torch.Generator
) -> Blocks:
    """Draw masks for a batch of windows of so many parcels and time patches.

    The recipe ``official`` is what the released code does, with its quirks (specification,
    section 4): the last time patch is never seen, the last placement of a block never taken, and
    the windows of a batch are brought to equal numbers of tokens by keeping the first ones, so
    that late parcels are rarely seen. ``fixed`` follows the paper: all placements, and a
    random choice instead; a token is a target once. A recipe that does not exist, or does not
    work for windows of this size, is refused.
    """
    if recipe not in RECIPES:
        raise BrainfmError(f'The masks {recipe!r} are not known; choose {", ".join(RECIPES)}.')
    if recipe == 'official' and patches != OFFICIAL_PATCHES:
        raise BrainfmError(
            f'The official masks are for windows of {OFFICIAL_PATCHES} time patches, and this '
            f'model has {patches}: take the recipe fixed.'
        )
    if parcels < 4 or patches < 3:
        raise BrainfmError(
            f'A window of {parcels} parcels × {patches} time patches is too small to be masked: '
            'it takes at least 4 × 3.'
        )
    draw = _official if recipe == 'official' else _fixed
    return draw(windows, parcels, patches, generator)


def _fixed(windows: int, parcels: int, patches: int, generator: torch.Generator) -> Blocks:
    """Masks as the paper describes them.

    The context is a clean block: parcels that are not to be predicted at any of the times, at
    times that are not predicted from others. So the position of a target gives its region.
    """
    uniform = lambda limits: _uniform(limits, generator)
    # Sizes are common to the batch, so that its windows have about the same number of tokens.
    # From 4 parcels and 3 patches on, none is zero and some of the observation is always left.
    observed = min(parcels - 1, round(parcels * uniform(OBSERVED_PARCELS)))
    long = round(patches * uniform(OBSERVED_PATCHES))
    across = round(parcels * uniform(ACROSS_PARCELS))
    brief = round(patches * uniform(ACROSS_PATCHES))
    beyond = [(uniform(BEYOND_PARCELS), uniform(BEYOND_PATCHES)) for _ in range(2)]
    side = max(1, 3 * patches // 10)
    everywhere = torch.ones(parcels, dtype=torch.bool)
    contexts, targets, regions = [], [], []
    for _ in range(windows):
        seen = _some(everywhere, observed, generator)
        other = _some(everywhere, across, generator)
        start = _integer(patches - long + 1, generator)
        times = _span(patches, start, long)
        same = _span(patches, start + _integer(long - brief + 1, generator), brief)
        kept = seen & ~other
        target = other[:, None] & same
        late_or_early = torch.zeros(patches, dtype=torch.bool)
        for first, (proportion, stretch) in zip((patches - side, 0), beyond, strict=True):
            chosen = _some(_span(patches, first, side), int(patches * stretch), generator)
            late_or_early |= chosen
            for pool in (kept, ~kept):
                some = _some(pool, int(proportion * pool.sum()), generator)
                target |= some[:, None] & chosen
        contexts.append(_marked(kept[:, None] & times & ~late_or_early))
        targets.append(_marked(target))
        region = torch.where(kept[:, None], 1, 2 * late_or_early.long())
        regions.append(region.flatten()[targets[-1]])
    left, asked = _even(contexts, generator), _even(targets, generator)
    choose = lambda rows, places: torch.stack([x[i] for x, i in zip(rows, places, strict=True)])
    return Blocks(choose(contexts, left), choose(targets, asked), choose(regions, asked))


def _official(windows: int, parcels: int, patches: int, generator: torch.Generator) -> Blocks:
    """Masks as the released code draws them (specification, section 4), quirks and all."""
    uniform = lambda limits: _uniform(limits, generator)
    across = int(parcels * uniform(ACROSS_PARCELS))
    brief = int(patches * uniform(ACROSS_PATCHES))
    observed = int(parcels * uniform(OBSERVED_PARCELS))
    long = int(patches * uniform(OBSERVED_PATCHES))
    everywhere = torch.ones(parcels, dtype=torch.bool)
    contexts, targets, regions = [], [], []
    for _ in range(windows):
        seen = _some(everywhere, observed, generator)
        start = _integer(patches - long, generator)  # one placement too few
        context = seen[:, None] & _span(patches, start, long)
        other = _some(everywhere, across, generator)
        same = _span(patches, start + _integer(long - brief, generator), brief)  # again
        context &= ~other[:, None]
        blocks = [(other[:, None] & same, torch.zeros(parcels, dtype=torch.long))]
        removed = seen & other
        region = torch.where(seen & ~other, 1, 2)  # what it is in effect, not by name
        for first in (patches - 3, 0):
            proportion, stretch = uniform(BEYOND_PARCELS), uniform(BEYOND_PATCHES)
            some = _some(removed, int(proportion * removed.sum()), generator)
            some |= _some(~removed, int(proportion * (~removed).sum()), generator)
            times = _some(_span(patches, first, 3), int(patches * stretch), generator)
            blocks.append((some[:, None] & times, region))
            context &= ~times  # for all parcels, not only those to predict
        tokens = [(_marked(target), of) for target, of in blocks]
        contexts.append(_marked(context))
        targets.append(torch.cat([x for x, _ in tokens]))
        regions.append(torch.cat([of[x // patches] for x, of in tokens]))
    # the first ones are kept: the context loses the last parcels, targets the left side
    cut = lambda rows: torch.stack([row[: min(map(len, rows))] for row in rows])
    return Blocks(cut(contexts), cut(targets), cut(regions))


def _marked(tokens: Tensor) -> Tensor:
    """Numbers of marked tokens (P, K), ascending."""
    return tokens.flatten().nonzero()[:, 0]


def _even(rows: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Choose as many places of each row as the shortest has, at random, ascending."""
    shortest = min(map(len, rows))
    return [torch.randperm(len(row), generator=generator)[:shortest].sort().values for row in rows]


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(stop: int, generator: torch.Generator) -> int:
    """Draw a whole number from 0 to below `stop`."""
    return int(torch.randint(stop, (), generator=generator))


def _span(n: int, start: int, length: int) -> Tensor:
    """Mark `length` of n places from `start` on, (n,) bool."""
    place = torch.arange(n)
    return (place >= start) & (place < start + length)


def _some(pool: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Mark n of the marked places, at random."""
    places = pool.nonzero()[:, 0]
    chosen = torch.zeros_like(pool)
    chosen[places[torch.randperm(len(places), generator=generator)[:n]]] = True
    return chosen
