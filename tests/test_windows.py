"""Windows out of a run, and parcels filled where a run has none."""

import numpy as np
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.windows import cover, cut, fill_uncovered


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


def test_a_run_that_is_too_short_has_no_window():
    windows = cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 200)
    assert windows.data.shape == (0, 2, 200)
    assert windows.left_over == pytest.approx(50 * 0.735)


def test_refused_options():
    with pytest.raises(BrainfmError, match='stride'):
        cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 20, stride=0)
    with pytest.raises(BrainfmError, match='refuse, pad, tile'):
        cut(np.zeros((50, 2)), np.zeros(50, bool), 0.735, 20, short='drop')


@pytest.mark.parametrize('n', [39, 38, 36, 35, 119, 116, 115])
def test_a_window_that_lacks_little_is_completed(n):
    """With min_real 0.9 of 40 samples, 36 suffice: the rest is the mean of each parcel."""
    data = np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32)
    flagged, rest = np.arange(n) == n - 1, n % 40
    windows = cut(data, flagged, 2.0, 40, min_real=0.9)
    if rest < 36:
        assert len(windows.data) == n // 40
        assert windows.left_over == rest * 2
        return
    padded = cut(data, flagged, 2.0, 40, short='pad')
    assert windows.real[-1] == rest / 40
    assert windows.left_over == 0
    for name in ('data', 'onset', 'duration', 'real', 'flagged'):
        np.testing.assert_array_equal(getattr(windows, name), getattr(padded, name))
    assert len(cut(data, flagged, 2.0, 40).data) == n // 40  # as it is without min_real


def test_min_real_adds_no_window_where_nothing_is_left():
    data = np.zeros((50, 1))
    windows = cut(data, np.zeros(50, bool), 1.0, 20, stride=1, min_real=0.5)
    assert len(windows.data) == 31
    assert (windows.real == 1).all()


def official(n, tr=0.735, **options):
    """Windows of a run whose values say which volume they are."""
    rows = np.arange(float(n))[:, None] * [1, -1]
    return cut(rows, np.arange(n) % 240 == 0, tr, 160, span=480, **options)


def test_official_frames_of_a_run():
    """Conformance point 5 of the specification, s = 0 and T = 490."""
    windows = official(490)
    assert len(windows.data) == 1
    frames = windows.data[0, 0]
    assert frames[:80].tolist() == list(range(0, 238, 3))
    assert frames[[80, 81, 157, 158, 159]].tolist() == [241, 244, 472, 475, 479]
    np.testing.assert_array_equal(windows.data[0, 1], -frames)
    assert windows.tr == pytest.approx(0.735 * 479 / 159)
    assert windows.tr == pytest.approx(2.2142, abs=5e-5)
    assert windows.duration[0] == pytest.approx(480 * 0.735)
    assert windows.left_over == pytest.approx(10 * 0.735)
    assert windows.flagged[0] == 1 / 160  # volume 0; volume 240 is not picked


def test_official_frames_repeat_the_last_volume_of_a_short_run():
    """Conformance point 5 of the specification, T = 300."""
    assert len(official(300).data) == 0
    padded = official(300, short='pad')
    assert (padded.data[0, 0] == 299).sum() == 60
    assert padded.data[0, 0, 100:].tolist() == [299] * 60
    assert padded.real[0] == (padded.data[0, 0] < 299).mean() == 100 / 160
    assert padded.duration[0] == pytest.approx(300 * 0.735)
    tiled = official(300, short='tile')
    np.testing.assert_array_equal(tiled.data[0, 0, :100], padded.data[0, 0, :100])
    assert tiled.data[0, 0, [100, 101, 159]].tolist() == [1, 4, 179]
    assert tiled.real[0] == 100 / 160


def test_official_windows_are_true_in_time():
    """A stride counted in samples is three times as many volumes."""
    windows = official(1500, tr=2.0, start=6.0)
    assert windows.data[:, 0, 0].tolist() == [0, 480, 960]
    np.testing.assert_array_equal(windows.onset, [6, 966, 1926])
    assert windows.left_over == 60 * 2.0
    halves = official(1500, tr=2.0, stride=80)
    assert halves.data[:, 0, 0].tolist() == [0, 240, 480, 720, 960]
    assert halves.data[1, 0, -1] == 240 + 479
    rest = official(1500, short='pad')
    assert rest.data[-1, 0, [0, 19, 20, 159]].tolist() == [1440, 1497, 1499, 1499]
    assert rest.left_over == 0


def test_official_frames_where_little_lacks():
    """144 of 160 samples are enough for min_real 0.9; the last is floor(143 * 479 / 159) = 430."""
    assert len(official(430, min_real=0.9).data) == 0
    windows = official(431, min_real=0.9)
    assert windows.real[0] == 144 / 160
    assert windows.data[0, 0, 142:].tolist() == [427] + [430] * 17


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


def test_parcels_are_filled_within_their_structure():
    """The nearest parcel of all would be one of the other structure."""
    xyz = np.zeros((6, 3))
    xyz[:, 0] = [0, 10, 20, 1, 2, 30]
    structures = ('subcortex', 'subcortex', 'subcortex', 'cortex', 'cortex', 'cortex')
    data, coverage = np.arange(12.0).reshape(2, 6), [0, 1, 1, 1, 0.2, 1]
    _, donors = fill_uncovered(data, coverage, xyz, 0.5)
    assert donors.tolist() == [3, -1, -1, -1, 3, -1]
    filled, donors = fill_uncovered(data, coverage, xyz, 0.5, structures)
    assert donors.tolist() == [1, -1, -1, -1, 3, -1]
    np.testing.assert_array_equal(filled, data[:, [1, 1, 2, 3, 3, 5]])


@pytest.mark.parametrize('lost', ['subcortex', 'cortex'])
def test_a_whole_structure_is_not_filled_from_another(lost):
    structures = np.array(['subcortex', 'cortex'] * 3)
    said = rf'none of the 3 {lost} parcels of Tian has .*signal.*--cifti-output 91k'
    with pytest.raises(BrainfmError, match=said):
        fill_uncovered(
            np.ones((2, 6)), structures != lost, np.zeros((6, 3)), 0.5, structures, 'Tian'
        )


@pytest.mark.parametrize('n', [7, 10, 11, 29, 30])
def test_cover_holds_every_sample_and_nothing_else(n):
    data = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    windows, samples = cover(data, 10)
    assert windows.shape == (max(1, -(-n // 10)), 3, 10)
    assert windows.dtype == np.float32
    real = samples >= 0
    assert set(samples[real]) == set(range(n))
    for window, rows, there in zip(windows, samples, real, strict=True):
        np.testing.assert_array_equal(window[:, there].T, data[rows[there]])
    assert samples[-1].max() == n - 1
    assert (~real).sum() == max(0, 10 - n)


def test_cover_completes_a_short_run_by_its_mean():
    windows, samples = cover(np.arange(4.0)[:, None], 5)
    assert windows[0, 0].tolist() == [0, 1, 2, 3, 1.5]
    assert samples.tolist() == [[0, 1, 2, 3, -1]]
