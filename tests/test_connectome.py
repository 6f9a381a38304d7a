"""Functional connectivity: flagged volumes are left out, and means go through Fisher z."""

import numpy as np
import pytest

from bids_brainfm.signals.connectome import connectome, connectome_vector, mean_connectome
from bids_brainfm.signals.quality import distance_dependence


def bursts(n_volumes, proportion, rng, length=15):
    """Volumes flagged in bursts, (T,) bool."""
    flagged = np.zeros(n_volumes, bool)
    while flagged.mean() < proportion:
        start = rng.integers(n_volumes - length)
        flagged[start : start + length] = True
    return flagged


def interpolated(data, flagged):
    """Series with flagged volumes replaced by linear interpolation, as the encoder gets them."""
    time = np.arange(len(data))
    columns = [np.interp(time, time[~flagged], column[~flagged]) for column in data.T]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(('proportion', 'largest'), [(0.3, 0.06), (0.8, 0.16)])
def test_connectivity_of_unflagged_volumes_is_nearest_to_that_of_the_whole_run(
    shared, proportion, largest
):
    """AOMIC, bursts of 15 volumes: RMSE .05 and .15, where interpolated volumes give .07, .22."""
    runs = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    errors = {'left out': [], 'counted': []}
    for person, name in enumerate(key for key in runs if key.startswith('sub_')):
        data = runs[name].astype(float)
        time = np.linspace(-1, 1, len(data))
        drift = np.polynomial.legendre.legvander(time, 4)
        data = data - drift @ np.linalg.lstsq(drift, data, rcond=None)[0]
        whole = connectome_vector(connectome(data))
        for draw in range(3):
            flagged = bursts(len(data), proportion, np.random.default_rng([person, draw]))
            filled = interpolated(data, flagged)
            for name, found in {
                'left out': connectome(filled, flagged), 'counted': connectome(filled)
            }.items():  # fmt: skip
                errors[name].append(np.sqrt(np.mean((connectome_vector(found) - whole) ** 2)))
    left_out, counted = (np.mean(errors[name]) for name in ('left out', 'counted'))
    assert left_out < largest
    assert left_out < 0.8 * counted


def test_flagged_values_do_not_matter():
    rng = np.random.default_rng(0)
    data, flagged = rng.normal(size=(60, 5)), np.arange(60) % 4 == 0
    found = connectome(data, flagged)
    data[flagged] = 1e6
    np.testing.assert_array_equal(connectome(data, flagged), found)
    np.testing.assert_allclose(found, np.corrcoef(data[~flagged].T), rtol=1e-5)


def test_connectivity_of_a_single_volume_is_missing():
    assert np.isnan(connectome(np.ones((9, 3)), np.arange(9) > 0)).all()


def test_connectomes_are_averaged_through_fisher_z():
    first, second = np.array([0.0, 0.99]), np.array([0.9, np.nan])
    found = mean_connectome([first, second])
    assert found[0] == pytest.approx(np.tanh(np.arctanh(0.9) / 2))  # 0.63, not 0.45
    assert found[1] == pytest.approx(0.99)
    assert np.isnan(mean_connectome([np.array([np.nan])])).all()


def test_distance_dependence_is_found():
    rng = np.random.default_rng(1)
    xyz = rng.uniform(-70, 70, (40, 3))
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    falling = np.exp(-distance / 40)
    assert distance_dependence(falling, xyz) < -0.8
    shuffled = rng.permutation(40)
    assert abs(distance_dependence(falling[np.ix_(shuffled, shuffled)], xyz)) < 0.2
    assert np.isnan(distance_dependence(np.full((3, 3), np.nan), xyz[:3]))
