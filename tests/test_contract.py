"""From one run's parcel series to windows: what is taken, what is refused and how that is said."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.contract import Contract, prepare_input
from bids_brainfm.signals.contract import windows_of as cut_windows
from bids_brainfm.signals.scale import fit_scaling
from bids_brainfm.signals.series import ParcelSeries

BRAINLM = Contract(tr=0.735, window=200, scaling='run-robust')
BRAIN_JEPA = Contract(
    tr=2.2142, window=160, scaling='global-z', official_volumes=480, min_real=0.9
)
OFFICIAL = replace(BRAIN_JEPA, temporal='official')
P = 5


def run(n, tr):
    rng = np.random.default_rng(n)
    data = (9000 + 300 * np.arange(P) + rng.normal(0, 80, (n, P))).astype(np.float32)
    flagged = np.arange(n) == 7
    return ParcelSeries(data, tr, np.ones(P), flagged, brain_mean=9000.0, start=tr)


def windows_of(n, tr, contract, **changes):
    contract = replace(contract, **changes)
    return cut_windows(prepare_input(run(n, tr), contract, np.zeros((P, 3)), 'Toy'), contract)


@pytest.mark.parametrize(
    ('tr', 'n', 'real'), [(0.735, 490, 1.0), (2.0, 200, 1.0), (2.0, 178, 1.0), (0.8, 420, 0.95)]
)
def test_runs_that_brain_jepa_takes(tr, n, real):
    """152 of 160 samples are enough; the lacking ones are each parcel's mean and on record."""
    windows = windows_of(n, tr, BRAIN_JEPA)
    assert windows.data.shape == (1, P, 160)
    assert windows.real.tolist() == [real]
    assert windows.tr == 2.2142
    assert windows.onset.tolist() == [tr]
    assert windows.duration[0] == pytest.approx(real * 160 * 2.2142)
    completed = windows.data[0, :, round(real * 160) :]
    recorded = windows.data[0, :, : round(real * 160)].mean(axis=1)
    np.testing.assert_allclose(completed - recorded[:, None], 0, atol=1e-5)


@pytest.mark.parametrize(
    ('tr', 'n', 'contract', 'said'),
    [
        (2.0, 150, BRAIN_JEPA, r'150 volumes \(300.0 s\).* takes 178 \(356.0 s\), 160 \(320.0'),
        (2.0, 150, replace(BRAIN_JEPA, min_real=1.0), r'takes 178 \(356.0 s\): choose'),
        (2.0, 70, BRAINLM, r'70 volumes \(140.0 s\) and one window takes 75 \(150.0 s\): choose'),
        (0.735, 300, OFFICIAL, r'300 volumes .*takes 480 \(352.8 s\), 431 '),
        (0.735, 300, replace(OFFICIAL, min_real=1.0), r'takes 480 \(352.8 s\): choose'),
    ],
)
def test_short_runs_are_refused_with_the_volumes_that_are_needed(tr, n, contract, said):
    with pytest.raises(BrainfmError, match=said) as caught:
        windows_of(n, tr, contract)
    assert str(caught.value).endswith('--short-runs pad or tile, or leave the run out.')
    for short in ('pad', 'tile'):
        windows = windows_of(n, tr, contract, short_runs=short)
        assert len(windows.data) == 1
        assert windows.real[0] < contract.min_real


@pytest.mark.parametrize('tr', [0.3, 0.72, 0.7349, 0.735, 0.8, 2.0, 2.2142, 3.0])
@pytest.mark.parametrize('contract', [BRAINLM, BRAIN_JEPA, OFFICIAL])
def test_the_numbers_of_the_refusal_are_true(tr, contract):
    """The least that it names is taken and one volume less is not; the whole needs no filling."""
    with pytest.raises(BrainfmError) as caught:
        windows_of(20, tr, contract)
    numbers = [int(n) for n in re.findall(r'(\d+) (?:volumes )?\([\d.]+ s\)', str(caught.value))]
    _, needed, *least = numbers
    assert windows_of(needed, tr, contract).real[0] == 1
    assert (windows_of(needed - 1, tr, contract, short_runs='pad').real < 1).all()
    assert bool(least) == (contract.min_real < 1)
    enough = least[0] if least else needed
    assert windows_of(enough, tr, contract).real[0] >= contract.min_real
    with pytest.raises(BrainfmError, match='one window takes'):
        windows_of(enough - 1, tr, contract)


def test_padding_says_how_much_was_recorded():
    windows = windows_of(150, 2.0, BRAIN_JEPA, short_runs='pad')
    assert windows.real.tolist() == [135 / 160]


def test_official_scales_the_whole_run_and_then_picks():
    """490 volumes: those that are not picked count in the mean and the SD."""
    series = run(490, 0.735)
    series.data[480:] += 5000
    windows = cut_windows(prepare_input(series, OFFICIAL, np.zeros((P, 3)), 'Toy'), OFFICIAL)
    known = series.data[~series.flagged]
    z = fit_scaling(known, 'global-z', 9000.0).apply(series.data)
    np.testing.assert_array_equal(windows.data[0, :, 80], z[241])
    np.testing.assert_array_equal(windows.data[0, :, 159], z[479])
    assert windows.tr == pytest.approx(0.735 * 479 / 159)
    assert windows.onset.tolist() == [0.735]
    assert windows.flagged.tolist() == [0]  # volume 7 is not picked


def test_official_does_not_mind_the_repetition_time():
    fast, slow = (windows_of(490, tr, OFFICIAL) for tr in (0.735, 2.0))
    np.testing.assert_array_equal(fast.data, slow.data)
    assert slow.tr == pytest.approx(2.0 * 479 / 159)


def test_contracts_that_cannot_be():
    with pytest.raises(BrainfmError, match=r'official_volumes.*--temporal resample'):
        replace(BRAINLM, temporal='official')
    with pytest.raises(BrainfmError, match='resample, official'):
        replace(BRAINLM, temporal='linear')


def test_a_run_without_subcortex_is_refused_by_name():
    series = run(200, 2.0)
    series.data[:, :2] = np.nan
    structures = ('subcortex', 'subcortex', 'cortex', 'cortex', 'cortex')
    with pytest.raises(BrainfmError, match='none of the 2 subcortex parcels of Toy'):
        prepare_input(series, BRAIN_JEPA, np.zeros((P, 3)), 'Toy', structures)
    series.data[:, 1] = series.data[:, 2] + 1
    ready = prepare_input(series, BRAIN_JEPA, np.zeros((P, 3)), 'Toy', structures)
    assert ready.donors.tolist() == [1, -1, -1, -1, -1]


@pytest.mark.parametrize('scaling', ['none', 'run-robust', 'global-z', 'parcel-z'])
def test_the_models_units_can_be_undone(scaling):
    """Values of the model come back as the run's own, volume by volume; gaps stay gaps."""
    series = run(300, 0.735)
    level = series.data.mean(axis=0)
    series.data[:] = series.data.clip(level - 200, level + 200)
    series.data[20, 1] += 5000  # beyond the bounds of run-robust
    contract = replace(BRAINLM, scaling=scaling, divide_by=5.6)
    ready = prepare_input(series, contract, np.zeros((P, 3)), 'Toy')
    values = ready.data.copy()
    values[100:110] = np.nan
    back = ready.in_bold_units(values)
    assert back.shape == series.data.shape
    assert np.isnan(back[100:110]).all()
    kept = np.r_[:20, 21:100, 110:300]
    np.testing.assert_allclose(back[kept], series.data[kept], rtol=1e-5)
    cut_off = series.data[20, 1] - back[20, 1]
    assert cut_off > 1000 if scaling == 'run-robust' else abs(cut_off) < 1


@pytest.mark.parametrize('tr', [2.0, 0.8, 0.5])
def test_the_models_rate_can_be_undone(tr):
    """Slow signals come back at the run's own volumes, and no volume is invented."""
    n = 240
    time = np.arange(n) * tr
    data = 9000 + 80 * np.sin(2 * np.pi * time[:, None] * np.linspace(0.01, 0.05, P))
    series = ParcelSeries(data.astype(np.float32), tr, np.ones(P), np.zeros(n, bool), 9000.0)
    ready = prepare_input(series, BRAINLM, np.zeros((P, 3)), 'Toy')
    back = ready.in_bold_units(ready.data)
    assert back.shape == data.shape
    last = (len(ready.data) - 1) * 0.735
    beyond = np.arange(n) * tr > last + 1e-6
    assert beyond.sum() <= 1
    assert np.array_equal(np.isnan(back).all(axis=1), beyond)
    inside = slice(10, n - 10)
    assert np.abs(back - data)[inside].max() < 2  # of 80
    # a stretch without values is one in the run's own time, too
    values = ready.data.copy()
    values[:100] = np.nan
    missing = np.isnan(ready.in_bold_units(values)).all(axis=1)
    assert missing[: int(99 * 0.735 / tr)].all()
    assert not missing[int(101 * 0.735 / tr) + 1 : n - 1].any()


def test_parcels_without_a_series_of_their_own_do_not_come_back():
    series = run(300, 0.735)
    series.data[:, 2] = np.nan
    ready = prepare_input(series, BRAINLM, np.arange(3.0 * P).reshape(P, 3), 'Toy')
    assert ready.own.tolist() == [True, True, False, True, True]
    assert np.isfinite(ready.data).all()
    assert np.isnan(ready.in_bold_units(ready.data)).all(axis=0).tolist() == (~ready.own).tolist()


def test_windows_above_the_limit_of_flagged_volumes_are_excluded():
    """One flagged volume of 400 lies in the first of two windows, 0.5 % of it."""
    limit = {'max_flagged': 0.004}
    assert windows_of(400, 0.735, BRAINLM).excluded.tolist() == [False, False]
    assert windows_of(400, 0.735, BRAINLM, **limit).excluded.tolist() == [True, False]
    # 0.5 % of the run, too
    assert windows_of(200, 0.735, BRAINLM, **limit).excluded.tolist() == [True]
    with pytest.raises(BrainfmError, match='--max-flagged is a proportion from 0 to 1, not 5'):
        replace(BRAINLM, max_flagged=5)


def test_all_windows_of_a_run_above_the_limit_are_excluded():
    series = run(400, 0.735)
    mostly = replace(series, flagged=np.arange(400) >= 150)
    contract = replace(BRAINLM, max_flagged=0.5)
    windows = cut_windows(prepare_input(mostly, contract, np.zeros((P, 3)), 'Toy'), contract)
    assert windows.flagged.tolist() == [0.25, 1.0]
    assert windows.excluded.tolist() == [True, True]


@pytest.mark.parametrize('scaling', ['run-robust', 'global-z', 'parcel-z'])
def test_the_scale_is_that_of_unflagged_samples(scaling):
    """Interpolated volumes vary less, and would make all others larger."""
    rng = np.random.default_rng(0)
    data = (9000 + rng.normal(0, 80, (400, P))).astype(np.float32)
    flagged = np.arange(400) % 2 == 1
    filled = data.copy()
    filled[flagged] = 9000
    made = lambda data, flagged: prepare_input(
        ParcelSeries(data, BRAINLM.tr, np.ones(P), flagged, brain_mean=9000.0),
        replace(BRAINLM, scaling=scaling), np.zeros((P, 3)), 'Toy',
    ).data  # fmt: skip
    alone = made(data[~flagged], np.zeros(200, bool))
    np.testing.assert_allclose(made(filled, flagged)[~flagged], alone, atol=1e-5)
