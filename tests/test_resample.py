"""Parcel series at another repetition time, and the frames that the official code picks."""

import numpy as np
import pytest

from bids_brainfm.signals.resample import (
    nearest_volume,
    official_frames,
    resample,
    volumes_for,
)

BRAIN_JEPA_TR = 2.2142
RATES = [(2.0, 0.735), (0.72, 0.735), (0.735, 2.2142), (0.8, 0.735), (3.0, 0.72), (2.0, 2.2142)]


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


@pytest.mark.parametrize(('tr', 'n_volumes'), [(0.735, 490), (0.8, 420), (2.0, 200)])
def test_resampling_to_the_repetition_time_of_brain_jepa(tr, n_volumes):
    """A tone of 0.05 Hz and the level stay within 1 %; what cannot be shown at 2.2 s is gone."""
    tone = lambda frequency, t: np.sin(2 * np.pi * frequency * t + 0.3)
    t = np.arange(n_volumes) * tr
    new = np.arange(len(resample(t[:, None], tr, BRAIN_JEPA_TR))) * BRAIN_JEPA_TR
    found = resample((9000 + 90 * tone(0.05, t))[:, None], tr, BRAIN_JEPA_TR)[:, 0]
    inside = slice(5, -5)
    assert np.abs(found - 9000 - 90 * tone(0.05, new))[inside].max() < 0.002 * 90
    assert np.abs(found - 9000 - 90 * tone(0.05, new)).max() < 0.011 * 90  # at the ends
    level = resample(np.full((n_volumes, 1), 9000.0), tr, BRAIN_JEPA_TR)
    np.testing.assert_allclose(level, 9000, atol=1e-3)
    for frequency in (0.3, 0.4, 0.5, 0.6):
        if frequency < 0.5 / tr:
            found = resample(tone(frequency, t)[:, None], tr, BRAIN_JEPA_TR)[inside]
            power = 20 * np.log10(np.sqrt(2) * found.std())
            assert power < -50


@pytest.mark.parametrize(
    ('tr', 'n_volumes', 'n_samples'),
    [(0.735, 490, 163), (2.0, 200, 180), (0.8, 420, 152), (2.0, 150, 135)],
)
def test_lengths(tr, n_volumes, n_samples):
    assert len(resample(np.zeros((n_volumes, 1)), tr, BRAIN_JEPA_TR)) == n_samples


@pytest.mark.parametrize(('tr', 'target'), [*RATES, (0.7351, 0.735), (0.7349, 0.735)])
def test_volumes_for_is_the_least_that_gives_the_samples(tr, target):
    length = lambda n: len(nearest_volume(n, tr, target))
    for n_samples in (2, 5, 144, 160, 200):
        n_volumes = volumes_for(n_samples, tr, target)
        assert length(n_volumes) >= n_samples > length(n_volumes - 1)


def test_official_frames():
    """Conformance point 5 of the specification: steps of 3, and of 4 after samples 79 and 158."""
    frames = official_frames(160, 480)
    steps = np.diff(frames)
    assert frames[0] == 0
    assert frames[-1] == 479
    assert np.bincount(steps).tolist() == [0, 0, 0, 157, 2]
    assert np.flatnonzero(steps == 4).tolist() == [79, 158]
    assert frames[[79, 80, 157, 158]].tolist() == [237, 241, 472, 475]


@pytest.mark.parametrize(('n_samples', 'n_volumes'), [(160, 480), (50, 479), (7, 7), (33, 257)])
def test_official_frames_are_the_formula(n_samples, n_volumes):
    """floor(linspace(0, n - 1)), in fractions, where a product cannot come out a little short."""
    from fractions import Fraction

    step = Fraction(n_volumes - 1, n_samples - 1)
    expected = [int(k * step) for k in range(n_samples)]
    assert official_frames(n_samples, n_volumes).tolist() == expected
