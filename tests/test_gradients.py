"""Brain gradients: the published spectrum, an independent solution, bad input, the demo table."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from bids_brainfm.analyses.gradients import brain_gradients, group_fc
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_matrix
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.gradient_table import read_gradients, write_gradients
from bids_brainfm.resources import home
from bids_brainfm.signals.connectome import connectome
from bids_brainfm.signals.order import order_check
from bids_brainfm.signals.simulate import simulate_run

DATA = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
TABLE = DATA / 'brain-jepa-demo_gradients.csv'
HCP = 'matrices/main_group/schaefer_400_mean_connectivity_matrix.csv'


def brainspace_table(name):
    """A table that comes with BrainSpace, an optional extra; read without importing VTK."""
    package = Path(pytest.importorskip('brainspace').__file__).parent
    return np.loadtxt(package / 'datasets' / name, delimiter=',')


@pytest.fixture(scope='module')
def brainspace():
    """Skips where the extra is not installed."""
    return pytest.importorskip('brainspace')


@pytest.fixture(scope='module')
def hcp():
    """Mean connectivity of HCP participants, Schaefer-400 in 7-network order."""
    return brainspace_table(HCP)


@pytest.fixture(scope='module')
def small():
    """Connectivity of 60 parcels that mix four sources."""
    rng = np.random.default_rng(0)
    series = rng.standard_normal((300, 4)) @ rng.random((4, 60))
    return connectome(series + 0.5 * rng.standard_normal(series.shape)).astype(float)


def test_published_spectrum(hcp):
    """Column lengths of section 7 of the specification (conformance point 8)."""
    gradients = brain_gradients(hcp)
    assert gradients.shape == (400, 30)
    lengths = np.linalg.norm(gradients, axis=0)
    assert lengths[:6] == pytest.approx([1.46, 1.43, 1.00, 0.68, 0.63, 0.54], abs=0.01)
    assert lengths[[9, 19, 29]] == pytest.approx([0.31, 0.12, 0.07], abs=0.01)
    assert np.array_equal(brain_gradients(hcp), gradients)


def diffusion_map(fc, n_components, sparsity, alpha):
    """The recipe written out, with a dense solver for the symmetric form of the operator."""
    parcels = len(fc)
    keep = round(parcels * (1 - sparsity))
    cut = np.sort(fc, axis=1)[:, -keep][:, None]
    kept = np.where(fc >= cut, np.maximum(fc, 0), 0)
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    likeness = 1 - np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    degree = likeness.sum(1) ** -alpha
    scaled = likeness * degree * degree[:, None]
    root = np.sqrt(scaled.sum(1))
    values, vectors = np.linalg.eigh(scaled / root / root[:, None])
    values, vectors = values[::-1], vectors[:, ::-1] / root[:, None]
    first = slice(1, n_components + 1)
    values = values[first] / values[0]
    gradients = vectors[:, first] / vectors[:, [0]] * values / (1 - values)
    return gradients * np.sign(gradients[np.abs(gradients).argmax(0), np.arange(n_components)])


@pytest.mark.parametrize(('sparsity', 'alpha'), [(0.9, 0.5), (0.8, 1.0), (0.9, 0.0)])
def test_agrees_with_the_recipe_written_out(hcp, sparsity, alpha):
    """Up to what BrainSpace's solver makes of a matrix that is symmetric only nearly."""
    found = brain_gradients(hcp, 6, sparsity, alpha)
    wanted = diffusion_map(hcp, 6, sparsity, alpha)
    lengths = [np.linalg.norm(each, axis=0) for each in (found, wanted)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
    together = [np.corrcoef(*pair)[0, 1] for pair in zip(found.T, wanted.T, strict=True)]
    assert min(together) > 0.99
    assert (found[np.abs(found).argmax(0), np.arange(6)] > 0).all()


def test_a_tenth_is_a_tenth(brainspace, small):
    """Exactly 6 of 60 are kept: 0.9 and 0.9 plus a rounding error are the same."""
    assert np.array_equal(brain_gradients(small, 3), brain_gradients(small, 3, 0.9 - 1e-12))
    assert not np.allclose(brain_gradients(small, 3), brain_gradients(small, 3, 0.92), atol=1e-3)


def test_the_diagonal_does_not_matter_and_the_input_is_kept(brainspace, small):
    other = small.copy()
    np.fill_diagonal(other, np.nan)
    before = other.copy()
    assert np.array_equal(brain_gradients(other, 3), brain_gradients(small, 3))
    assert np.array_equal(other, before, equal_nan=True)


def not_symmetric(fc):
    fc[3, 5] += 0.1
    return fc


def with_nan(fc):
    fc[7], fc[:, 7] = np.nan, np.nan
    return fc


def with_a_lone_parcel(fc):
    fc[9], fc[:, 9] = 0, 0
    return fc


def in_two_parts(fc):
    fc[:30, 30:], fc[30:, :30] = -0.1, -0.1
    return fc


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (not_symmetric, 'not symmetric'),
        (with_nan, 'most of them in row 7'),
        (with_a_lone_parcel, r'2 parts .* 1, row 9'),
        (in_two_parts, r'2 parts .* 30, row 0'),
        (lambda fc: np.full_like(fc, 0.5), 'row 0 are all the same'),
        (lambda fc: fc[:, :-1], r'shape \(60, 59\)'),
        (lambda fc: fc[:31, :31], '31 parcels are too few for 30'),
    ],
)
def test_bad_connectivity_is_refused_in_one_sentence(brainspace, small, spoil, said):
    with pytest.raises(BrainfmError, match=said) as refused:
        brain_gradients(spoil(small.copy()))
    assert '\n' not in str(refused.value)


def test_a_lower_sparsity_is_asked_for(brainspace, small):
    with pytest.raises(BrainfmError, match='lower sparsity'):
        brain_gradients(small, 3, sparsity=0.98)


def test_says_how_to_get_brainspace(monkeypatch, small):
    monkeypatch.setitem(sys.modules, 'brainspace.gradient', None)
    with pytest.raises(BrainfmError, match=r"pip install 'bids_brainfm\[gradients\]'"):
        brain_gradients(small)


def write_relmat(path, relmat, names):
    """As the app writes it."""
    write_matrix(path, relmat, ['Node', *names], names)
    return path


def test_group_connectivity_leaves_out_what_is_missing(tmp_path):
    first = np.array([[1, 0.2, np.nan], [0.2, 1, np.nan], [np.nan, np.nan, np.nan]])
    second = np.array([[1, 0.4, 0.6], [0.4, 1, np.nan], [0.6, np.nan, 1]])
    paths = (write_relmat(tmp_path / f'{i}.tsv', m, 'abc') for i, m in enumerate((first, second)))
    r = np.tanh(np.mean(np.arctanh([0.2, 0.4])))  # 0.302, through Fisher z
    wanted = [[1, r, 0.6], [r, 1, np.nan], [0.6, np.nan, 1]]
    np.testing.assert_allclose(group_fc(paths), wanted, rtol=2e-6)


def test_group_connectivity_refuses_what_does_not_belong(tmp_path):
    first = write_relmat(tmp_path / 'first.tsv', np.eye(3), 'abc')
    swapped = write_relmat(tmp_path / 'swapped.tsv', np.eye(3), 'acb')
    with pytest.raises(BrainfmError, match=r'swapped.tsv and .*first.tsv are not of the same'):
        group_fc([first, swapped])
    cut = tmp_path / 'cut.tsv'
    cut.write_text(first.read_text().rsplit('\n', 2)[0] + '\n')
    with pytest.raises(BrainfmError, match=r'cut.tsv .*3 columns and 2 rows'):
        group_fc([cut])
    words = tmp_path / 'words.tsv'
    words.write_text('Node\ta\na\tone\n')
    with pytest.raises(BrainfmError, match=r'words.tsv is no table of connectivity'):
        group_fc([words])
    with pytest.raises(BrainfmError, match=r'none.tsv is no table of connectivity'):
        group_fc([tmp_path / 'none.tsv'])
    with pytest.raises(BrainfmError, match='no connectivity to average'):
        group_fc([])


def test_demo_table_places_the_demo_parcels():
    """The table in the package belongs to the simulated parcels, in the order of the atlas."""
    assert TABLE.stat().st_size < 150_000
    table = read_gradients(TABLE)
    atlas = load_atlas('Demo424', home())
    assert table.shape == (atlas.n_parcels, 30)
    run = simulate_run(atlas.xyz, 300, 0.735, 0.3, np.random.default_rng(0))
    backwards = {'backwards': np.arange(atlas.n_parcels)[::-1]}
    found = order_check(table, connectome(run.series), backwards)
    assert found['as read'] > 0.3
    assert max(found['shuffled'], found['backwards']) < 0.1


def test_demo_table_places_parcels_as_its_tool_does(brainspace, tmp_path, capsys):
    """To what the simulator has changed since: the demo weights belong to the table as it is."""
    spec = importlib.util.spec_from_file_location(
        'make_demo_gradients', Path(__file__).parents[1] / 'tools' / 'make_demo_gradients.py'
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main(tmp_path / 'again.csv')
    again, table = (read_gradients(path)[:, :8] for path in (tmp_path / 'again.csv', TABLE))
    distance = lambda x: np.linalg.norm(x[:, None] - x, axis=2).ravel()
    assert np.corrcoef(distance(again), distance(table))[0, 1] > 0.95
    shuffled = np.random.default_rng(0).permutation(again)
    assert np.corrcoef(distance(shuffled), distance(table))[0, 1] < 0.1


def test_written_table_is_read_again(tmp_path, small):
    write_gradients(tmp_path / 'table.csv', small[:, :4])
    np.testing.assert_allclose(read_gradients(tmp_path / 'table.csv'), small[:, :4], rtol=1e-5)
