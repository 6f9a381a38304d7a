"""Masks of Brain-JEPA's pretraining: the official ones as measured, and the ones that are meant.

Numbers are those of section 4 of the specification, measured with the released code in 300 batches
of 16 windows and 3000 of one. Tolerances of the official masks are three standard errors of the
difference between those and ours: 3.6 times the standard deviation of each number between samples
as large as ours, found by resampling 1200 and 6000 other batches.
"""

from functools import cache

import pytest
import torch

from bids_brainfm.errors import BrainfmError
from bids_brainfm.training import masking
from bids_brainfm.training.masking import REGIONS, draw_blocks

PARCELS, PATCHES = 450, 10
ERRORS = 3.6
BATCHES = {1: 1200, 16: 150}
CROSS_ROI, CROSS_TIME, DOUBLE_CROSS = range(3)
SIZES = [(p, t) for p in (4, 5, 6, 7, 9, 12) for t in (3, 4, 5, 6, 9, 10, 11)]
SIZES += [(4, 40), (100, 3), (424, 10), (450, 10), (400, 18), (30, 20)]


def draw(windows, recipe, seed=0, parcels=PARCELS, patches=PATCHES):
    return draw_blocks(windows, parcels, patches, recipe, torch.Generator().manual_seed(seed))


@cache
def drawn(recipe, windows):
    """Many batches of full size."""
    generator = torch.Generator().manual_seed(windows)
    return [
        draw_blocks(windows, PARCELS, PATCHES, recipe, generator) for _ in range(BATCHES[windows])
    ]


@cache
def frequency(recipe, windows, kind='context'):
    """How often each token is in the context, or a target: (parcels, patches)."""
    tokens = torch.cat([getattr(blocks, kind).flatten() for blocks in drawn(recipe, windows)])
    count = torch.bincount(tokens, minlength=PARCELS * PATCHES).view(PARCELS, PATCHES)
    return count / (windows * BATCHES[windows])


def counts(tokens):
    """How often each token of a window is among these: (B, parcels, patches)."""
    count = torch.zeros(len(tokens), PARCELS * PATCHES, dtype=torch.int64)
    return count.scatter_add_(1, tokens, torch.ones_like(tokens)).view(-1, PARCELS, PATCHES)


def first_to_last(share):
    """How often the first 50 parcels are taken for one time that the last 50 are."""
    return float(share[:50].mean() / share[-50:].mean())


def is_block(tokens, patches=PATCHES):
    """Whether tokens are some parcels at some times, each with each."""
    return len(tokens) == len((tokens // patches).unique()) * len((tokens % patches).unique())


def pieces(blocks):
    """Context and the three groups of targets of an official batch of one window."""
    context, target, region = blocks.context[0], blocks.target[0], blocks.region[0]
    beside = target[region != CROSS_ROI]
    late = beside % PATCHES >= 7
    return context, target[region == CROSS_ROI], beside[late], beside[~late]


# --- official: what the released code does ---------------------------------------------------


@pytest.mark.parametrize(
    ('windows', 'kind', 'share', 'sd_share', 'median', 'sd_median'),
    [
        (16, 'context', 0.184, 0.0023, 808, 13),
        (16, 'target', 0.192, 0.0049, 849, 36),
        (1, 'context', 0.275, 0.0019, 1218, 11),
        (1, 'target', 0.251, 0.0020, 1130, 13),
    ],
)
def test_official_numbers_of_tokens(windows, kind, share, sd_share, median, sd_median):
    found = torch.tensor([getattr(b, kind).shape[1] for b in drawn('official', windows)]).float()
    assert float(found.mean()) / (PARCELS * PATCHES) == pytest.approx(share, abs=ERRORS * sd_share)
    assert float(found.median()) == pytest.approx(median, abs=ERRORS * sd_median)


@pytest.mark.parametrize(
    ('windows', 'kind', 'least', 'most'),
    [
        (16, 'context', 600, 1236),
        (16, 'target', 404, 1505),
        (1, 'context', 620, 2133),
        (1, 'target', 408, 2073),
    ],
)
def test_official_extremes(windows, kind, least, most):
    """They depend on the number of batches, which was larger for the table."""
    found = [getattr(blocks, kind).shape[1] for blocks in drawn('official', windows)]
    assert min(found) == pytest.approx(least, rel=0.08)
    assert max(found) == pytest.approx(most, rel=0.12)


@pytest.mark.parametrize(
    ('windows', 'expected', 'total'),
    [
        (16, [58, 73, 71, 166, 166, 166, 166, 74, 61, 0], 1001),  # measured
        # exact: columns at the sides are removed every second time, and the first and the ninth
        # are observed 13 times in 16
        (1, [13, 16, 16, 32, 32, 32, 32, 16, 13, 0], 202),
    ],
)
def test_official_context_by_patch(windows, expected, total):
    share = frequency('official', windows).sum(0)
    off = (share / share.sum() - torch.tensor(expected) / total).abs()
    sd = torch.tensor([2.1, 2.1, 2.1, 1, 1, 1, 1, 2.1, 2.1, 0]) / 1000
    assert (off <= ERRORS * sd).all()


@pytest.mark.parametrize(('windows', 'ratio', 'sd'), [(16, 11.1, 0.62), (1, 1, 0.007)])
def test_official_context_by_parcel(windows, ratio, sd):
    """In a batch the first tokens are kept, so that late parcels are rarely seen."""
    found = first_to_last(frequency('official', windows))
    assert found == pytest.approx(ratio, abs=ERRORS * sd)


@pytest.mark.parametrize(('windows', 'share', 'sd'), [(16, 0.003, 0.0004), (1, 0.027, 0.0011)])
def test_official_targets_that_are_there_twice(windows, share, sd):
    found = [
        (counts(blocks.target) - 1).clamp(min=0).sum((1, 2)) / blocks.target.shape[1]
        for blocks in drawn('official', windows)
    ]
    assert float(torch.cat(found).mean()) == pytest.approx(share, abs=ERRORS * sd)


@pytest.mark.parametrize('recipe', ['official', 'fixed'])
@pytest.mark.parametrize('windows', [1, 16])
def test_context_and_targets_are_apart(recipe, windows):
    for blocks in drawn(recipe, windows):
        assert blocks.context.dtype == blocks.target.dtype == blocks.region.dtype == torch.int64
        assert blocks.target.shape == blocks.region.shape
        assert len(blocks.context) == len(blocks.target) == windows
        assert (blocks.context.diff() > 0).all()
        if recipe == 'fixed':
            assert (blocks.target.diff() > 0).all()
        assert not (counts(blocks.context) * counts(blocks.target)).any()
        assert set(blocks.region.unique().tolist()) <= set(range(len(REGIONS)))


def test_official_sizes_and_starts():
    """All that are possible occur, and no others: the last placement is never taken."""
    places, parcels, left, right, observed = set(), set(), [], [], []
    first, last, middle = [], [], []
    for blocks in drawn('official', 1):
        context, other, late, early = pieces(blocks)
        assert is_block(context)
        assert is_block(other)
        patches = (other % PATCHES).unique()
        assert (patches.diff() == 1).all()
        places.add((len(patches), int(patches[0])))
        middle.append(float(patches[0]) + len(patches) / 2)
        n = len(other) // len(patches)
        parcels.add(n)
        observed.append(len((context // PATCHES).unique()) / (PARCELS - n))
        seen = (context % PATCHES).unique()
        for tokens, counts, kept in ((late, right, last), (early, left, first)):
            assert is_block(tokens)
            counts.append(len((tokens % PATCHES).unique()))
            if len(tokens) == 0:
                kept.append(int(seen[0 if kept is first else -1]))
            else:
                assert 65 <= len((tokens // PATCHES).unique()) <= 135
            assert not torch.isin(tokens % PATCHES, seen).any()
        assert (late % PATCHES >= 7).all()
        assert (early % PATCHES <= 2).all()
    assert places == {(long, start) for long in (2, 3, 4, 5) for start in range(9 - long)}
    assert min(parcels) in range(202, 206)
    assert max(parcels) in range(266, 270)
    for counts in (left, right):  # 0 to 3 patches, each as often
        shares = torch.bincount(torch.tensor(counts), minlength=4) / len(counts)
        torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)
    # eight patches from the first or second on (3 of 8), or nine from the first on
    assert set(first) == {0, 1}
    assert set(last) == {7, 8}
    assert sum(first) / len(first) == pytest.approx(0.1875, abs=0.06)
    assert last.count(7) / len(last) == pytest.approx(0.1875, abs=0.06)
    # placed in the observation, not in the window: else 3.81
    assert sum(middle) / len(middle) == pytest.approx(4, abs=0.1)
    # 378 to 449 parcels are observed, and those to be predicted are taken from them
    assert torch.tensor(observed).mean() == pytest.approx(0.919, abs=0.005)
    assert min(observed) > 0.75
    assert max(observed) <= 1


def test_official_regions_are_what_they_are_in_effect():
    names = []
    for blocks in drawn('official', 1):
        context, target, region = blocks.context[0], blocks.target[0], blocks.region[0]
        n = int((region == CROSS_ROI).sum())
        assert (region[:n] == CROSS_ROI).all()  # first of all
        assert (target[:n].diff() > 0).all()
        assert not torch.isin(target[:n] // PATCHES, context // PATCHES).any()
        seen = torch.isin(target[n:] // PATCHES, context // PATCHES)
        assert torch.equal(region[n:], torch.where(seen, CROSS_TIME, DOUBLE_CROSS))
        names += region[n:].tolist()
        late = target[n:] % PATCHES >= 7
        assert not late.diff().any() or (late.long().diff() <= 0).all()  # right before left
    share = names.count(CROSS_TIME) / len(names)
    assert share == pytest.approx(0.919 * (1 - 0.525), abs=0.02)  # no more than their part


def test_official_parcels_beside_are_drawn_from_two_pools():
    """Those taken out of the observation, and all others: the share of those kept varies."""
    away = []
    for blocks in drawn('official', 1):
        context, _, late, early = pieces(blocks)
        kept = (context // PATCHES).unique()
        for tokens in (late, early):
            parcels = (tokens // PATCHES).unique()
            if len(parcels):
                found = int(torch.isin(parcels, kept).sum())
                away.append(found - len(parcels) * len(kept) / PARCELS)
    assert torch.tensor(away).mean() == pytest.approx(0, abs=0.3)
    assert 1.8 < torch.tensor(away).std() < 3.2  # 0.6 from pools of kept and others, 4.4 from one


def test_official_batches_keep_the_first_tokens():
    """The first window of a batch is drawn as if it were alone, and then cut."""
    for seed in range(20):
        alone, batch = draw(1, 'official', seed), draw(16, 'official', seed)
        for name in ('context', 'target', 'region'):
            whole, cut = getattr(alone, name)[0], getattr(batch, name)[0]
            assert torch.equal(cut, whole[: len(cut)])
        n = (batch.region == CROSS_ROI).sum(1)
        assert (n == n[0]).all()  # sizes are common, and these targets come first
        assert n[0] == (alone.region == CROSS_ROI).sum()


def test_official_targets_lose_the_left_side_first():
    early, late = 0, 0
    for blocks in drawn('official', 16):
        beside = blocks.target[blocks.region != CROSS_ROI] % PATCHES
        early, late = early + int((beside <= 2).sum()), late + int((beside >= 7).sum())
    assert 0 < early < 0.6 * late


# --- fixed: what the paper means -------------------------------------------------------------


@pytest.mark.parametrize('windows', [16, 1])
@pytest.mark.parametrize('kind', ['context', 'target'])
def test_fixed_reaches_all_parcels_alike(windows, kind):
    share = frequency('fixed', windows, kind)
    assert first_to_last(share) == pytest.approx(1, abs=0.05)
    of_parcel = share.mean(1) / share.mean()
    assert of_parcel.min() > 0.75
    assert of_parcel.max() < 1.25


@pytest.mark.parametrize('windows', [16, 1])
def test_fixed_reaches_all_patches(windows):
    """From both ends alike: a window has no end that is never seen."""
    for kind in ('context', 'target'):
        share = frequency('fixed', windows, kind).mean(0)
        assert (share > 0.05).all()
        torch.testing.assert_close(share, share.flip(0), atol=0.05, rtol=0)


def test_fixed_takes_all_placements():
    """Of what is predicted at the times of the context, also the last."""
    starts, longest, last = set(), 0, False
    for blocks in drawn('fixed', 1):
        context, target, region = blocks.context[0], blocks.target[0], blocks.region[0]
        assert is_block(context)
        patches = (target[region == CROSS_ROI] % PATCHES).unique()
        if len(patches):
            starts.add(int(patches[0]))
            last |= 9 in patches
        longest = max(longest, len((context % PATCHES).unique()))
    assert starts >= set(range(PATCHES - 1))
    assert last
    assert longest == PATCHES


def test_fixed_predicts_other_parcels_observed_or_not():
    """0.45 to 0.6 of all parcels, at up to six times of the context."""
    parcels, patches = set(), set()
    for blocks in drawn('fixed', 1):
        tokens = blocks.target[blocks.region == CROSS_ROI]
        assert is_block(tokens)
        if len(tokens):
            parcels.add(len((tokens // PATCHES).unique()))
            patches.add(len((tokens % PATCHES).unique()))
    assert min(parcels) in range(202, 206)
    assert max(parcels) in range(266, 271)
    assert patches == {1, 2, 3, 4, 5, 6}


def test_fixed_predicts_other_times_of_all_parcels():
    """Of those in the context and of the others the same share, 0.15 to 0.3."""
    shares = []
    for blocks in drawn('fixed', 1)[:400]:
        context, target, region = blocks.context[0], blocks.target[0], blocks.region[0]
        kept = len((context // PATCHES).unique())
        for patch in (target[region == CROSS_TIME] % PATCHES).unique():
            there = region[target % PATCHES == patch]
            seen, unseen = (int((there == kind).sum()) for kind in (CROSS_TIME, DOUBLE_CROSS))
            share = seen / kept
            assert 0.14 < share <= 0.3
            shares.append(share)
            assert unseen >= share * (PARCELS - kept) - 2  # more where it is a time of the others
            assert (there != CROSS_ROI).all()
    assert min(shares) < 0.16
    assert max(shares) > 0.29


def test_fixed_numbers_of_tokens():
    """About as many as of the official masks of one window, and hardly fewer in a batch."""
    for windows in (1, 16):
        for kind, share in (('context', 0.28), ('target', 0.26)):
            assert float(frequency('fixed', windows, kind).mean()) == pytest.approx(
                share, abs=0.03
            )


@pytest.mark.parametrize('windows', [16, 1])
def test_fixed_regions_follow_from_geometry(windows):
    shares, unseen, n = torch.zeros(len(REGIONS)), 0, 0
    for blocks in drawn('fixed', windows):
        seen, target, region = counts(blocks.context) > 0, blocks.target, blocks.region
        parcel = seen.any(2).gather(1, target // PATCHES)
        patch = seen.any(1).gather(1, target % PATCHES)
        assert not (parcel & patch).any()
        assert torch.equal(region == CROSS_ROI, patch)
        assert (region[parcel] == CROSS_TIME).all()
        unseen += int(((region == CROSS_TIME) & ~parcel).sum())
        n += region.numel()
        shares += torch.bincount(region.flatten(), minlength=3)
    shares /= n
    assert (shares > 0.08).all()
    assert shares[CROSS_ROI] > 0.4
    # where a batch is brought to one length, a parcel may lose all its tokens
    assert unseen / n <= (0 if windows == 1 else 1e-4)


def test_fixed_batches_are_cut_at_random():
    for seed in range(10):
        alone, batch = draw(1, 'fixed', seed), draw(16, 'fixed', seed)
        for name in ('context', 'target'):
            whole, cut = getattr(alone, name)[0], getattr(batch, name)[0]
            assert torch.isin(cut, whole).all()
            if len(cut) < 0.9 * len(whole):
                assert not torch.equal(cut, whole[: len(cut)])
                assert cut.double().mean() == pytest.approx(float(whole.double().mean()), rel=0.15)


@pytest.mark.parametrize(('parcels', 'patches'), SIZES)
def test_fixed_masks_of_any_size(parcels, patches):
    side = max(1, 3 * patches // 10)
    for seed in range(12):
        windows = (1, 1, 3)[seed % 3]
        blocks = draw(windows, 'fixed', seed, parcels, patches)
        assert blocks.context.shape[1] > 0
        assert blocks.target.shape[1] > 0
        assert (blocks.context.diff() > 0).all()
        assert (blocks.target.diff() > 0).all()
        for context, target, region in zip(
            blocks.context, blocks.target, blocks.region, strict=True
        ):
            everything = torch.cat([context, target])
            assert len(everything.unique()) == len(everything)
            assert everything.min() >= 0
            assert everything.max() < parcels * patches
            late = target[region == CROSS_TIME] % patches
            assert ((late < side) | (late >= patches - side)).all()
            if windows == 1:
                assert is_block(context, patches)
                rows = torch.isin(target // patches, context // patches)
                times = torch.isin(target % patches, context % patches)
                assert torch.equal(region == CROSS_TIME, rows)
                assert torch.equal(region == CROSS_ROI, times)


def test_something_is_left_at_the_extremes(monkeypatch):
    """The least observation, and the most that can be taken from it."""
    monkeypatch.setattr(masking, '_uniform', lambda limits, _: limits[limits[0] < 0.8])
    for parcels in range(4, 20):
        for patches in (*range(3, 13), 20, 40):
            blocks = draw(1, 'fixed', parcels, parcels, patches)
            assert blocks.context.numel() > 0
            assert blocks.target.numel() > 0


# --- both ------------------------------------------------------------------------------------


def test_all_regions_occur_in_the_shortest_window():
    found = {int(r) for seed in range(60) for r in draw(1, 'fixed', seed, 40, 3).region.unique()}
    assert found == set(range(len(REGIONS)))


@pytest.mark.parametrize('recipe', ['official', 'fixed'])
def test_masks_follow_from_the_seed(recipe):
    torch.manual_seed(1)
    one = draw(4, recipe, 7)
    torch.manual_seed(2)
    same, other = draw(4, recipe, 7), draw(4, recipe, 8)
    for name in ('context', 'target', 'region'):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(one.context[0], one.context[1])  # windows have masks of their own
    assert not torch.equal(one.target[0], one.target[1])


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(BrainfmError, match="'paper' are not known; choose fixed, official"):
        draw(1, 'paper')
    for patches in (9, 11, 18):
        with pytest.raises(BrainfmError, match=f'this model has {patches}: take the recipe fixed'):
            draw(1, 'official', patches=patches)
    for parcels, patches in ((3, 10), (450, 2)):
        with pytest.raises(BrainfmError, match=f'{parcels} parcels × {patches} .* too small'):
            draw(1, 'fixed', parcels=parcels, patches=patches)
