"""The order check: gradients against connectivity, in the right order and in wrong ones."""

import time

import numpy as np
import pandas as pd
import pytest
from test_gradients import HCP, brainspace_table

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.signals.connectome import connectome
from bids_brainfm.signals.order import EXPECTED, MARGIN, order_check, order_warning

SEVEN = '7-network order'


@pytest.fixture(scope='module')
def made():
    """A table, connectivity that decays with its distances, and a wrong order."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(0, 1, (80, 3))
    distance = np.linalg.norm(gradients[:, None] - gradients, axis=2)
    return gradients, np.exp(-distance), {'other order': rng.permutation(80)}


@pytest.fixture(scope='module')
def hcp():
    """Mean connectivity of HCP participants, Schaefer-400 in 7-network order."""
    return brainspace_table(HCP)


@pytest.fixture(scope='module')
def schaefer(shared):
    """Brain-JEPA's table of the 400 cortical parcels and what row i is in 7-network order."""
    atlases = shared / 'atlases'
    table = pd.read_csv(
        atlases / 'atlas-Schaefer2018Tian2020_desc-400Parcels17NetworksS3_dseg.tsv', sep='\t'
    )
    seven = np.argsort(table['index_7network_combined'].to_numpy())
    return read_gradients(atlases / 'gradient_mapping_450.csv')[50:], seven[50:] - 50


def test_correlates_pairs_of_parcels(made):
    """Against the definition written with loops; missing parcels do not count."""
    gradients, fc, misorders = made
    fc = fc.copy()
    fc[11], fc[:, 11] = np.nan, np.nan
    for name, rows in {'as read': np.arange(80), **misorders}.items():
        pairs = [(i, j) for i in range(80) for j in range(i + 1, 80) if 11 not in (i, j)]
        near = [-np.linalg.norm(gradients[rows[i]] - gradients[rows[j]]) for i, j in pairs]
        wanted = np.corrcoef(near, [fc[pair] for pair in pairs])[0, 1]
        assert order_check(gradients, fc, misorders)[name] == pytest.approx(wanted, abs=1e-12)


def test_names_the_order_that_the_rows_are_in(made):
    gradients, fc, misorders = made
    right = order_check(gradients, fc, misorders)
    assert list(right) == ['as read', 'other order', 'shuffled']
    assert right['as read'] > 0.8 > right['other order'] + 0.7
    assert order_warning(right) is None
    rows = misorders['other order']
    wrong = order_check(gradients, fc[np.ix_(rows, rows)], misorders)
    assert wrong['other order'] == pytest.approx(right['as read'])
    assert f'in another order, other order (r = {right["as read"]:.2f})' in order_warning(wrong)
    unknown = np.random.default_rng(1).permutation(80)
    lost = order_check(gradients, fc[np.ix_(unknown, unknown)], misorders)
    assert 'no better' in order_warning(lost)


def test_a_lead_within_the_margin_is_no_warning():
    found = {'as read': 0.3, 'mirrored': 0.3 + 0.9 * MARGIN, 'shuffled': 0.0}
    assert order_warning(found) is None
    assert 'mirrored' in order_warning(found | {'mirrored': 0.3 + 1.1 * MARGIN})
    assert 'no better' in order_warning({'as read': 0.9 * MARGIN, 'shuffled': 0.0})
    assert order_warning({'as read': 1.1 * MARGIN, 'shuffled': 0.0}) is None


@pytest.mark.parametrize(
    ('fc', 'said'), [(np.eye(79), r'80 rows'), (np.full((80, 80), np.nan), 'no two values')]
)
def test_nothing_to_compare_is_refused(made, fc, said):
    with pytest.raises(BrainfmError, match=said):
        order_check(made[0], fc, {})


def test_takes_milliseconds():
    rng = np.random.default_rng(0)
    gradients, fc = rng.normal(size=(450, 30)), connectome(rng.normal(size=(160, 450)))
    misorders = {str(i): rng.permutation(450) for i in range(3)}
    best = np.inf
    for _ in range(3):
        begin = time.perf_counter()
        order_check(gradients, fc, misorders)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.2  # 0.01 s on an idle machine


def test_group_connectivity_tells_the_published_orders_apart(schaefer, hcp):
    """Conformance point 7: 0.41 in the right order, 0.16 where 7 networks are read as 17."""
    gradients, seven = schaefer
    misread = order_check(gradients, hcp, {SEVEN: seven})
    assert misread['as read'] == pytest.approx(EXPECTED[SEVEN], abs=0.01)
    assert misread[SEVEN] == pytest.approx(EXPECTED['right order'], abs=0.01)
    assert SEVEN in order_warning(misread)
    sorted_fc = hcp[np.ix_(np.argsort(seven), np.argsort(seven))]
    right = order_check(gradients, sorted_fc, {SEVEN: seven})
    assert right['as read'] == pytest.approx(misread[SEVEN])
    assert right['as read'] > right[SEVEN] + 0.1
    assert order_warning(right) is None


def test_margin_holds_for_single_runs(schaefer, hcp):
    """160 volumes with as much noise as signal: both orders are told, each of 20 times."""
    gradients, seven = schaefer
    values, vectors = np.linalg.eigh(hcp)
    mix = vectors * np.sqrt(np.maximum(values, 1e-3))
    right = np.ix_(np.argsort(seven), np.argsort(seven))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        source, noise = rng.standard_normal((2, 160, 400))
        fc = connectome(source @ mix.T + noise + 0.7 * rng.standard_normal((160, 1)))
        assert SEVEN in order_warning(order_check(gradients, fc, {SEVEN: seven}))
        assert order_warning(order_check(gradients, fc[right], {SEVEN: seven})) is None


def test_real_runs_fit_the_right_order(schaefer, shared):
    """Five people, Schaefer-100: the 400 parcels' gradients averaged over shared vertices."""
    gradients, seven = schaefer
    coarse, fine = (
        brainspace_table(f'parcellations/schaefer_{n}_conte69.csv').astype(int) for n in (100, 400)
    )
    overlap = np.zeros((101, 401))
    np.add.at(overlap, (coarse, fine), 1)
    share = overlap[1:, 1:] / overlap[1:, 1:].sum(1, keepdims=True)
    right, wrong = share @ gradients[seven], share @ gradients
    runs = np.load(shared / 'data' / 'aomic_schaefer100-7net_5subj.npz')
    lead = []
    for name in (name for name in runs if name.startswith('sub')):
        series = runs[name].astype(float)
        drift = np.polynomial.legendre.legvander(np.linspace(-1, 1, len(series)), 6)
        fc = connectome(series - drift @ np.linalg.lstsq(drift, series, rcond=None)[0])
        found = order_check(right, fc, {})
        assert order_warning(found) is None
        lead.append(found['as read'] - order_check(wrong, fc, {})['as read'])
    assert len(lead) == 5
    assert min(lead) > 0
    assert np.mean(lead) > 0.1
