"""Resampling, scaling and cutting of parcel series."""

import json

import numpy as np
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.resample import nearest_volume, resample
from bids_brainfm.signals.scale import ScaleStats, load_scale_stats, scale
from bids_brainfm.signals.windows import cut, fill_uncovered

RATES = [(2.0, 0.735), (0.72, 0.735), (0.735, 2.2142), (0.8, 0.735), (3.0, 0.72)]


@pytest.mark.parametrize(('tr', 'target'), RATES)
def test_slow_signals_and_the_level_survive_resampling(tr, target):
    frequency = 0.1 * min(0.5 / tr, 0.5 / target)
    signal = lambda t: 9000 + 30 * np.sin(2 * np.pi * frequency * t + 0.4)
    data = np.stack([signal(np.arange(200) * tr), np.full(200, 9000.0)], axis=1)
    found = resample(data, tr, target)
    times = np.arange(len(found)) * target
    assert found.dtype == np.float32
    assert times[-1] <= 199 * tr + 1e-6 < times[-1] + target
    np.testing.assert_allclose(found[:, 0], signal(times), atol=0.3)  # 1 % of 30
    np.testing.assert_allclose(found[:, 1], 9000, atol=1e-3)


@pytest.mark.parametrize('n_volumes', [3, 20])
def test_very_short_runs_can_be_resampled(n_volumes):
    data = 9000 + np.linspace(0, 30, n_volumes)[:, None]
    found = resample(data, 2.0, 0.735)[:, 0]
    expected = 9000 + 30 * np.arange(len(found)) * 0.735 / (2.0 * (n_volumes - 1))
    np.testing.assert_allclose(found, expected, atol=1.5)


def test_fast_signals_are_suppressed_not_folded():
    t = np.arange(400) * 0.735
    for frequency in (0.3, 0.45, 0.6):  # the new Nyquist frequency is 0.226 Hz
        found = resample(np.sin(2 * np.pi * frequency * t)[:, None], 0.735, 2.2142)
        assert np.abs(found[5:-5]).max() < 0.02


def test_resampling_leaves_equal_rates_and_gaps_alone():
    data = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    assert np.array_equal(resample(data, 0.7351, 0.735), data)
    data[:, 1] = np.nan
    found = resample(data, 2.0, 0.735)
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, [0, 2]]).all()


@pytest.mark.parametrize(('tr', 'target'), [*RATES, (0.7351, 0.735)])
def test_nearest_volume_has_a_sample_for_each(tr, target):
    index = nearest_volume(60, tr, target)
    assert len(index) == len(resample(np.zeros((60, 1)), tr, target))
    assert index.max() < 60
    assert np.abs(index * tr - np.arange(len(index)) * target).max() <= tr / 2 + 0.01


def run(n=300, p=6, seed=0):
    rng = np.random.default_rng(seed)
    return 9000 + 50 * np.arange(p) + rng.standard_normal((n, p)) * (10 + np.arange(p))


def test_scale_none_and_z():
    data = run()
    assert np.array_equal(scale(data, 'none', 9000, 5.6), data.astype(np.float32))
    z = scale(data, 'parcel-z', 9000, divide_by=2)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0, ddof=1), 0.5, rtol=1e-5)
    z = scale(data, 'global-z', 9000)
    expected = (data - data.mean()) / data.std(ddof=1)
    np.testing.assert_allclose(z, expected, atol=1e-5)


def test_run_robust():
    data = run()
    data[10, 0] += 1000
    data[11, 0] -= 1000
    found = scale(data, 'run-robust', 9000, divide_by=5.6430855)
    demeaned = (data - data.mean(0)) * 10_000 / 9000
    sd = demeaned.std(0, ddof=1)
    iqr = np.subtract(*np.percentile(demeaned, [75, 25], axis=0))
    expected = np.clip(demeaned, -3.6 * sd, 3.7 * sd) / iqr / 5.6430855
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[10, 0] == pytest.approx(3.7 * sd[0] / iqr[0] / 5.6430855, rel=1e-5)
    np.testing.assert_array_equal(found, scale(data, 'run-robust', 123.0, 5.6430855))


def test_run_robust_without_an_interquartile_range():
    data = np.zeros((100, 2))
    data[:3, 0] = [3.0, -4.0, 2.0]
    data[:, 1] = run(100, 1)[:, 0]
    found = scale(data, 'run-robust', 1.0)[:, 0]
    sd = data[:, 0].std(ddof=1)
    x = data[:, 0] - data[:, 0].mean()
    np.testing.assert_allclose(found, np.clip(x, -3.6 * sd, 3.7 * sd) / (sd / 0.79), atol=1e-5)


def cohort(p=6):
    rng = np.random.default_rng(3)
    return ScaleStats(
        median=rng.standard_normal(p),
        iqr=20 + 10 * rng.random(p),
        lower=np.full(p, -2.0),
        upper=np.full(p, 2.1),
        atlas='A424',
    )


def test_cohort_is_the_published_formula():
    """x = c + IQR u gives clip(u - mean(u) - median / IQR), whatever c."""
    stats = cohort()
    u = np.random.default_rng(4).standard_normal((250, 6))
    expected = np.clip(u - u.mean(0) - stats.median / stats.iqr, stats.lower, stats.upper)
    assert (expected == stats.upper).any()
    for level in (0.0, 8000.0, np.arange(6) * 1000.0):
        found = scale(level + stats.iqr * u, 'cohort', 10_000, stats=stats)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    found = scale(0.5 * stats.iqr * u, 'cohort', 5_000, divide_by=2.0, stats=stats)
    np.testing.assert_allclose(found, expected / 2, atol=1e-5)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('method', ['run-robust', 'global-z', 'parcel-z', 'cohort'])
def test_scaling_guards(method):
    data = run().astype(np.float32)
    data[:, 1] = np.nan
    data[:, 2] = 9123.4
    stats = cohort()
    stats.iqr[3] = 0
    stats.median[4] = np.nan
    found = scale(data, method, 9000, stats=stats)
    assert found.dtype == np.float32
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(np.delete(found, 1, axis=1)).all()
    assert np.ptp(found[:, 2]) == 0
    if method != 'global-z':
        assert (found[:, 2] == 0).all()
    if method == 'cohort':
        assert (found[:, 3:5] == 0).all()
        assert found[:, 5].any()
    with pytest.raises(BrainfmError, match='constant'):
        scale(np.full((50, 6), 9123.4, np.float32), method, 9000, stats=stats)


def test_scaling_refusals():
    with pytest.raises(BrainfmError, match='--scale-stats'):
        scale(run(), 'cohort', 9000)
    with pytest.raises(BrainfmError, match='not a BOLD level'):
        scale(run(), 'cohort', -0.1, stats=cohort())
    with pytest.raises(BrainfmError, match='choose one of none, run-robust'):
        scale(run(), 'z', 9000)


def test_scale_stats_files(tmp_path):
    path = tmp_path / 'stats.json'
    content = {
        'Atlas': 'A424',
        'Median': [0.1, 0.2],
        'IQR': [30, 40],
        'Lower': [-3, -3],
        'Upper': [3, 3],
        'Participants': 12,
    }
    path.write_text(json.dumps(content))
    stats = load_scale_stats(path, 'A424', 2)
    assert list(stats.iqr) == [30, 40]
    assert stats.provenance == {'Participants': 12}
    with pytest.raises(BrainfmError, match=r'fitted on the atlas A424.*uses Schaefer'):
        load_scale_stats(path, 'Schaefer', 2)
    with pytest.raises(BrainfmError, match=r'2 values in a list.*424 parcels'):
        load_scale_stats(path, 'A424', 424)
    del content['IQR']
    path.write_text(json.dumps(content))
    with pytest.raises(BrainfmError, match="no key 'IQR'"):
        load_scale_stats(path, 'A424', 2)
    path.write_text('{')
    with pytest.raises(BrainfmError, match='cannot be read'):
        load_scale_stats(path, 'A424', 2)


def test_windows_follow_one_another_from_the_start():
    data = np.arange(50.0)[:, None] * [1, -1]
    flagged = np.arange(50) % 10 == 0
    windows = cut(data, flagged, 0.5, 20, start=3.0)
    assert windows.data.shape == (2, 2, 20)
    assert windows.data.dtype == np.float32
    np.testing.assert_array_equal(windows.data[1, 0], np.arange(20, 40))
    np.testing.assert_array_equal(windows.onset, [3, 13])
    np.testing.assert_array_equal(windows.duration, [10, 10])
    np.testing.assert_array_equal(windows.real, [1, 1])
    np.testing.assert_array_equal(windows.flagged, [0.1, 0.1])
    assert windows.left_over == 5
    assert windows.tr == 0.5


def test_stride():
    windows = cut(np.arange(50.0)[:, None], np.zeros(50, bool), 1.0, 20, stride=10)
    np.testing.assert_array_equal(windows.onset, [0, 10, 20, 30])
    assert windows.left_over == 0
    padded = cut(np.arange(50.0)[:, None], np.zeros(50, bool), 1.0, 20, stride=10, short='pad')
    assert len(padded.data) == 4  # the fourth reaches the end: nothing is left to pad
    padded = cut(np.arange(53.0)[:, None], np.zeros(53, bool), 1.0, 20, stride=10, short='pad')
    np.testing.assert_array_equal(padded.onset, [0, 10, 20, 30, 40])
    assert padded.real[-1] == 13 / 20


@pytest.mark.parametrize('n', [30, 70])
def test_incomplete_windows(n):
    data = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    rest = n % 40
    flagged = np.isin(np.arange(n), [0, n - 1])
    share = np.mean(flagged[-rest:])
    padded = cut(data, flagged, 2.0, 40, short='pad')
    assert len(padded.data) == n // 40 + 1
    np.testing.assert_array_equal(padded.data[-1, :, :rest], data[-rest:].T)
    expected = np.tile(data.mean(0)[:, None], 40 - rest)
    np.testing.assert_allclose(padded.data[-1, :, rest:], expected, atol=1e-6)
    assert padded.real[-1] == rest / 40
    assert padded.duration[-1] == rest * 2
    assert padded.flagged[-1] == pytest.approx(share)
    assert padded.left_over == 0
    tiled = cut(data, flagged, 2.0, 40, short='tile')
    np.testing.assert_array_equal(tiled.data[-1, :, rest:], data[: 40 - rest].T)
    assert tiled.real[-1] == rest / 40
    assert tiled.flagged[-1] == pytest.approx(share)


def test_a_run_shorter_than_a_window_may_be_repeated_many_times():
    data = np.arange(3.0)[:, None]
    tiled = cut(data, np.zeros(3, bool), 1.0, 8, short='tile')
    np.testing.assert_array_equal(tiled.data[0, 0], [0, 1, 2, 0, 1, 2, 0, 1])


def test_short_runs_are_refused():
    with pytest.raises(BrainfmError, match=r'200 volumes.*147\.0 s.*50 \(36\.8 s\).*--short-runs'):
        cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 200)
    with pytest.raises(BrainfmError, match='stride'):
        cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 20, stride=0)
    with pytest.raises(BrainfmError, match='refuse, pad, tile'):
        cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 20, short='drop')


def test_uncovered_parcels_take_the_nearest_series():
    data = np.arange(8.0).reshape(2, 4)
    data[:, 3] = np.nan
    xyz = [[0, 0, 0], [10, 0, 0], [12, 0, 0], [3, 0, 0]]
    filled, donors = fill_uncovered(data, [1, 1, 0.49, 1], xyz, 0.5)
    np.testing.assert_array_equal(donors, [-1, -1, 1, 0])
    np.testing.assert_array_equal(filled, data[:, [0, 1, 1, 0]])
    assert np.isnan(data[:, 3]).all()
    _, donors = fill_uncovered(np.ones((2, 4)), np.ones(4), xyz, 0.5)
    assert (donors == -1).all()
    with pytest.raises(BrainfmError, match='3 of 4 parcels'):
        fill_uncovered(data, [1, 0, 0, 0], xyz, 0.5)
