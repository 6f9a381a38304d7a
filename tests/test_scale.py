"""Parcel series in the units of a model, and the statistics of a cohort."""

import json

import numpy as np
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.cohort_stats import CohortFit
from bids_brainfm.signals.scale import (
    METHODS,
    STATISTICS,
    ScaleStats,
    brain_level,
    check_stats,
    fit_scaling,
    kind_of,
    load_scale_stats,
    static_proportion,
    static_warning,
    unusable,
)


def scale(data, *options, **named):
    """What a model sees of a run (T, P)."""
    return fit_scaling(data, *options, **named).apply(data)


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


def cohort_means(p=6):
    """Medians and spread of the temporal means of 50 participants."""
    rng = np.random.default_rng(6)
    means = 9000 + 50 * np.arange(p) + rng.normal(0, 700, (50, p))
    return ScaleStats(
        median=np.median(means, axis=0),
        iqr=np.subtract(*np.percentile(means, [75, 25], axis=0)),
        atlas='Schaefer2018Tian2020',
        statistic='temporal mean',
    )


def test_cohort_means_keep_the_level():
    """A run at the median of each parcel fluctuates about 0, one an IQR above it about 1."""
    stats = cohort_means()
    u = np.random.default_rng(4).standard_normal((250, 6))
    u[0, 0] = 60.0  # not clipped
    for shift in (0.0, 1.0, np.arange(6) - 2.5):
        found = scale(stats.median + stats.iqr * (shift + u), 'cohort-means', 10_000, stats=stats)
        np.testing.assert_allclose(found, shift + u, atol=1e-4)
    found = scale(stats.median + stats.iqr * u, 'cohort-means', 10_000, 2.0, stats)
    np.testing.assert_allclose(found, u / 2, atol=1e-4)


def between_person_variance(gain_sd, brain_means=None, people=200, parcels=100, volumes=60):
    """Between-person variance of what the model is given, and what one number explains of it.

    Parcels differ between people by a third of 20 %, receivers by `gain_sd`. The number is the
    mean over parcels, by which each parcel is predicted.
    """
    rng, fit, runs = np.random.default_rng(1), CohortFit('A'), []
    pattern = rng.uniform(7000, 12000, parcels)
    for person in range(people):
        own = pattern * (1 + 0.2 / 3 * rng.standard_normal(parcels))
        data = own * (1 + 0.01 * rng.standard_normal((volumes, parcels)))
        data *= 1 + gain_sd * np.clip(rng.standard_normal(), -2.5, 2.5)
        level = data.mean() if brain_means is None else brain_means
        fit.add(f'{person:03d}', data, level)
        runs.append((data, level))
    stats = fit.temporal_means()
    given = np.array([scale(x, 'cohort-means', level, 1, stats).mean(0) for x, level in runs])
    given = given - given.mean(axis=0)
    number = given.mean(axis=1)
    explained = np.outer(number, number @ given / (number @ number))
    return given, float((explained**2).sum() / (given**2).sum())


def test_one_number_does_not_drown_the_differences_between_people():
    """A gain SD of 20 % between receivers is nearly all that differed; it cancels now."""
    _, without_grand_mean = between_person_variance(0.2, brain_means=10_000)
    assert without_grand_mean == pytest.approx(0.9, abs=0.02)
    given, found = between_person_variance(0.2)
    other, without_gain = between_person_variance(0.0)
    assert found == pytest.approx(without_gain, abs=1e-3)
    assert found < 0.03
    np.testing.assert_allclose(given, other, atol=0.01)


def test_cohort_means_come_back():
    """Scaling and its inverse, at a receiver gain of 1.2."""
    stats, data = cohort_means(), 1.2 * run()
    scaling = fit_scaling(data, 'cohort-means', 12_000, 2.0, stats)
    np.testing.assert_allclose(scaling.undo(scaling.apply(data)), data, rtol=1e-5)
    expected = fit_scaling(data / 1.2, 'cohort-means', 10_000, 2.0, stats).apply(data / 1.2)
    np.testing.assert_allclose(scaling.apply(data), expected, atol=1e-5)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('method', METHODS[1:])
def test_scaling_guards(method):
    data = run().astype(np.float32)
    data[:, 1] = np.nan
    data[:, 2] = 9123.4
    stats = cohort_means() if method == 'cohort-means' else cohort()
    stats.iqr[3] = 0
    stats.median[4] = np.nan
    found = scale(data, method, 9000, stats=stats)
    assert found.dtype == np.float32
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(np.delete(found, 1, axis=1)).all()
    assert np.ptp(found[:, 2]) == 0
    if method not in ('global-z', 'cohort-means'):
        assert (found[:, 2] == 0).all()
    if method in STATISTICS:
        assert (found[:, 3:5] == 0).all()
        assert found[:, 5].any()
        assert unusable(stats).tolist() == [3, 4]
    constant = np.full((50, 6), 9123.4, np.float32)
    with pytest.raises(BrainfmError, match='constant'):
        scale(constant, method, 9000, stats=stats)
    constant[::3] = np.nextafter(constant[::3], np.float32(np.inf))  # rounding is no signal
    with pytest.raises(BrainfmError, match='constant'):
        scale(constant, method, 9000, stats=stats)


def test_z_scores_leave_a_gap_out():
    """A parcel without signal changes nothing for the others."""
    data = run()
    gap = np.insert(data, 2, np.nan, axis=1)
    for method in ('global-z', 'parcel-z'):
        found = scale(gap, method, 9000)
        np.testing.assert_allclose(np.delete(found, 2, axis=1), scale(data, method, 9000))
        assert np.isnan(found[:, 2]).all()


def test_a_parcel_of_rounding_noise_is_zero():
    data = run().astype(np.float32)
    data[:, 2] = 9123.4
    data[::3, 2] = np.nextafter(np.float32(9123.4), np.float32(np.inf))
    for method in ('parcel-z', 'run-robust', 'cohort'):
        assert (scale(data, method, 9000, stats=cohort())[:, 2] == 0).all()


@pytest.mark.parametrize('wrong', [0.0, -3.0, np.nan, np.inf])
def test_parcels_without_usable_statistics_are_zero(wrong):
    stats = cohort_means()
    stats.iqr[1] = wrong
    stats.median[4] = np.nan
    found = scale(run(), 'cohort-means', 9000, stats=stats)
    assert unusable(stats).tolist() == [1, 4]
    assert (found[:, [1, 4]] == 0).all()
    assert (np.ptp(found[:, [0, 2, 3, 5]], axis=0) > 0).all()
    stats.iqr[[0, 2]] = wrong  # with the other two more than half
    with pytest.raises(BrainfmError, match='4 of 6 parcels'):
        scale(run(), 'cohort-means', 9000, stats=stats)


def test_units_cancel_and_those_that_contradict_are_refused():
    """Units do not matter, unless the brain mean is in other ones than the parcels."""
    once = scale(run(), 'cohort-means', 9000, stats=cohort_means())
    again = scale(100 * run(), 'cohort-means', 900_000, stats=cohort_means())
    np.testing.assert_allclose(again, once, atol=1e-5)
    with pytest.raises(BrainfmError, match=r'interquartile ranges .* in other units'):
        scale(100 * run(), 'cohort-means', 9000, stats=cohort_means())
    with pytest.raises(BrainfmError, match='not a BOLD level'):
        scale(run(), 'cohort-means', 0.0, stats=cohort_means())


def test_series_that_were_demeaned_are_no_levels():
    """A model would see (0 - median) / IQR in every parcel."""
    data, stats = run(), cohort_means()
    with pytest.raises(
        BrainfmError, match=r'were demeaned.*medians.* 9\d\d\d:.*global-z'
    ) as caught:
        scale(data - data.mean(axis=0), 'cohort-means', 9000, stats=stats)
    assert '\n' not in str(caught.value)
    with pytest.raises(BrainfmError, match='were demeaned'):
        scale(scale(data, 'parcel-z', 9000), 'cohort-means', 9000, stats=stats)
    small = 0.5 * float(np.median(data.std(axis=0)))  # rounding leaves a mean just above zero
    with pytest.raises(BrainfmError, match=r'at an SD of the parcels of .* not a BOLD level'):
        brain_level(small, data.std(axis=0))
    assert brain_level(9000, data.std(axis=0)) == 9000


def uk_biobank_like():
    """Parcels at 9000, 1500 apart, with an SD of 80 over time."""
    rng = np.random.default_rng(5)
    return rng.normal(9000, 1500, 450) + rng.normal(0, 80, (490, 450))


def test_static_proportion():
    """Most of what Brain-JEPA sees does not change: trap 3 of the specification, 99.7 %."""
    data = uk_biobank_like()
    between, within = 1500.0**2, 80.0**2
    assert between / (between + within) == pytest.approx(0.997, abs=5e-4)
    z = scale(data, 'global-z', 9000)
    assert static_proportion(z) == pytest.approx(0.997, abs=5e-4)
    assert static_proportion(z) == pytest.approx(static_proportion(data), rel=1e-5)
    assert static_proportion(scale(data, 'parcel-z', 9000)) < 1e-6
    assert static_proportion(np.insert(z, 3, np.nan, axis=1)) == pytest.approx(
        static_proportion(z)
    )


def test_a_static_input_is_warned_of():
    """UK Biobank-like series are 99.7 % static after global-z; half static is no reason."""
    data = uk_biobank_like()
    found = static_warning(static_proportion(scale(data, 'global-z', 9000)), 'global-z')
    assert found.startswith('After --scale global-z, 99.7% of the variance')
    assert 'coil, field strength and acquisition' in found
    assert '--scale parcel-z' in found
    assert '--scale cohort' in found
    rng = np.random.default_rng(2)
    even = rng.normal(9000, 80, 450) + rng.normal(0, 80, (490, 450))
    proportion = static_proportion(scale(even, 'global-z', 9000))
    assert proportion == pytest.approx(0.5, abs=0.05)
    assert static_warning(proportion, 'global-z') is None
    assert static_warning(0.9, 'global-z') is None
    assert static_warning(0.901, 'global-z') is not None
    assert static_warning(0.997, 'cohort-means') is None


def test_scaling_refusals():
    with pytest.raises(BrainfmError, match='--scale-stats'):
        scale(run(), 'cohort', 9000)
    with pytest.raises(BrainfmError, match=r"'cohort' .*of the series.*are of the temporal mean"):
        scale(run(), 'cohort', 9000, stats=cohort_means())
    with pytest.raises(BrainfmError, match=r'of the temporal mean .*are of the series'):
        check_stats(cohort(), 'cohort-means')
    check_stats(None, 'global-z')
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
    assert (stats.statistic, *kind_of(path)) == ('series', 'A424', 'series')
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
    with pytest.raises(BrainfmError, match='cannot be read'):
        kind_of(path)


def test_scale_stats_of_temporal_means(tmp_path):
    path = tmp_path / 'stats.json'
    content = {
        'Atlas': 'Schaefer2018Tian2020',
        'Statistic': 'temporal mean',
        'FormatVersion': 2,
        'Median': [9100.0, None],
        'IQR': [700, 800],
        'Participants': 12,
    }
    path.write_text(json.dumps(content))
    stats = load_scale_stats(path, 'Schaefer2018Tian2020', 2)
    check_stats(stats, 'cohort-means')
    assert (stats.lower, stats.upper, stats.provenance) == (None, None, {'Participants': 12})
    assert unusable(stats).tolist() == [1]
    path.write_text(json.dumps(content | {'Statistic': 'mode'}))
    with pytest.raises(BrainfmError, match=r"of 'mode'.*series, temporal mean"):
        load_scale_stats(path, 'Schaefer2018Tian2020', 2)


def test_temporal_means_in_bold_units_are_refused_by_name(tmp_path):
    """They were fitted before the grand mean was brought to 10 000; series are as they were."""
    path = tmp_path / 'old_scale.json'
    old = {'Atlas': 'A', 'Statistic': 'temporal mean', 'Median': [9100.0], 'IQR': [700]}
    for version in ({}, {'FormatVersion': 1}):
        path.write_text(json.dumps(old | version))
        with pytest.raises(
            BrainfmError, match=r'old_scale.json are of format 1.*fit them again.*--scale-stats'
        ):
            load_scale_stats(path, 'A', 1)
    path.write_text(json.dumps(old | {'FormatVersion': 3}))
    with pytest.raises(BrainfmError, match=r'format 3.*update bids_brainfm'):
        kind_of(path)
    series = old | {'Statistic': 'series', 'Lower': [-3], 'Upper': [3], 'FormatVersion': 1}
    path.write_text(json.dumps(series))
    assert load_scale_stats(path, 'A', 1).median == [9100]


@pytest.mark.parametrize('upper', [-4, -3])
def test_bounds_that_cross_are_refused(tmp_path, upper):
    path = tmp_path / 'stats.json'
    content = {'Atlas': 'A424', 'Median': [0, 0, 0], 'IQR': [30, 40, 50]}
    path.write_text(json.dumps(content | {'Lower': [-3] * 3, 'Upper': [3, upper, 3]}))
    with pytest.raises(
        BrainfmError, match=r'bounds that cross.*1 parcels \(the first is number 2'
    ):
        load_scale_stats(path, 'A424', 3)
