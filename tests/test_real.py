"""The command on real recordings and on full-size trees painted with real series.

These need the shared test material and take minutes, so they run with the slow checks.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_brainfm.bids.files import read_matrix

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def a424(shared, tmp_path_factory):
    """A home with the A424 atlas, fetched from a folder as a user without internet would."""
    from bids_brainfm.cli.models import main

    home = tmp_path_factory.mktemp('a424')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('BIDS_BRAINFM_HOME', str(home))
        assert main(['fetch', 'A424', '--from', str(shared / 'atlases')]) == 0
        yield home


def checkpoint(folder: Path, name: str, **sizes) -> str:
    """A checkpoint of random weights in the official layout, as ``NAME=PATH``."""
    from safetensors.torch import save_file

    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.weights import build, initialise

    config = load_card(name).config | sizes
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    state = initialise(build(config), 1).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / 'model.safetensors')
    return f'{name}={folder}'


@pytest.fixture
def small(tmp_path):
    """A small network of BrainLM's form, which the full-size contract applies to."""
    return checkpoint(
        tmp_path / 'small', 'brainlm-111m', hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64,
    )  # fmt: skip


ATLASES = {
    'MNI152NLin6Asym': 'A424+2mm.nii.gz',
    'MNI152NLin2009cAsym': (
        'tpl-MNI152NLin2009cAsym_atlas-AA424Parcels2mm_res-02_desc-2mm_dseg.nii.gz'
    ),
}


def paint(shared, out: Path, space: str, *options: str, atlas: str | None = None) -> Path:
    """Make a full-size tree with known parcel series (in ``<out>_truth``); A424 by default."""
    subprocess.run(
        [
            sys.executable, shared / 'tools' / 'make_fmriprep_tree.py', out,
            '--atlas', shared / 'atlases' / (atlas or ATLASES[space]), '--space', space,
            '--truth', f'{out}_truth', '--volumes', '205', *options,
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize('space', ATLASES)
def test_series_equal_the_truth_whatever_the_orientation(
    shared, a424, small, tmp_path, app, space
):
    """Parcel series are the painted ones, and a mirrored copy gives the same outputs."""
    found = {}
    for kind in ('plain', 'flip'):
        options = ['--subjects', '01', '--sessions', 'a', '--runs', '01', '02']
        data = paint(
            shared, tmp_path / kind, space, *options, *(['--flip'] if kind == 'flip' else [])
        )
        out = tmp_path / f'{kind}_out'
        assert app(data, out, '--model', small, '--denoise', 'none') == 0
        for truth in sorted(Path(f'{data}_truth').glob('*.npy')):
            stem = out / 'sub-01' / 'ses-a' / 'func' / f'{truth.stem}_space-{space}_atlas-A424'
            series, names = read_matrix(Path(f'{stem}_stat-mean_timeseries.tsv'))
            assert names[0] == 'R_V1_ROI'
            assert np.abs(series - np.load(truth)).max() < 0.05
            table = pd.read_csv(f'{stem}_desc-brainlm111m_embedding.tsv', sep='\t')
            found.setdefault(truth.stem, []).append((series, table.to_numpy()))
    assert len(found) == 2
    for (series, table), (mirrored, mirrored_table) in found.values():
        np.testing.assert_allclose(series, mirrored, rtol=1e-6)
        np.testing.assert_allclose(table, mirrored_table, atol=1e-5)


def test_integers_and_lost_parcels(shared, a424, small, tmp_path, app):
    """int16 data come out within rounding; parcels out of the field of view are filled."""
    data = paint(
        shared, tmp_path / 'data', 'MNI152NLin6Asym', '--subjects', '01', '--dtype', 'int16',
        '--drop-parcels', '7', '100', '--res', '',
    )  # fmt: skip
    out = tmp_path / 'out'
    assert app(data, out, '--model', small, '--denoise', 'none') == 0
    stem = next(out.glob('sub-01/func/*_stat-mean_timeseries.tsv'))
    series, names = read_matrix(stem)
    truth = np.load(next(tmp_path.glob('data_truth/*.npy')))
    kept = np.setdiff1d(np.arange(424), [6, 99])
    assert np.isnan(series[:, [6, 99]]).all()
    assert np.abs(series - truth)[:, kept].max() < 0.6
    sidecar = json.loads(
        next(out.glob('sub-01/func/*_desc-brainlm111m_embedding.json')).read_text()
    )
    assert set(sidecar['FilledParcels']) == {names[6], names[99]}


def test_real_recordings_on_a_coarse_grid(shared, a424, small, tmp_path, app):
    """Three real people on a 7.5 mm grid: parcels outside the mask are n/a, runs are padded."""
    data = shared / 'data' / 'fmriprep_lowres'
    assert app(data, tmp_path / 'refused', '--model', small) == 1
    out = tmp_path / 'out'
    assert app(data, out, '--model', small, '--short-runs', 'pad') == 0
    for path in out.glob('sub-*/func/*_stat-mean_timeseries.tsv'):
        series, _ = read_matrix(path)
        assert series.shape == (50, 424)
        lost = np.isnan(series).any(axis=0)
        assert lost.sum() == {'sub-007': 1, 'sub-018': 4, 'sub-067': 0}[path.name[:7]]
        assert (series[:, ~lost].std(axis=0) > 0).all()
    tables = [pd.read_csv(p, sep='\t') for p in out.glob('sub-*/func/*_desc-brainlm111m_*.tsv')]
    assert len(tables) == 3
    for table in tables:
        assert len(table) == 1
        assert 0.6 < table['real'][0] < 0.7


def dense(shared, root, volumes=210):
    """A 91k series in which every grayordinate has its parcel's series, (T, P): the truth."""
    import nibabel as nib

    labels = nib.load(shared / 'atlases' / 'A424.dlabel.nii')
    parcel = labels.get_fdata()[0].astype(int)
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((volumes, 425)).cumsum(0) * 5 + 9000
    truth[:, 0] = 0
    data = truth[:, parcel].astype(np.float32)
    axes = (nib.cifti2.SeriesAxis(0, 0.735, volumes), labels.header.get_axis(1))
    func = root / 'sub-01' / 'func'
    func.mkdir(parents=True)
    description = {'Name': 'x', 'BIDSVersion': '1.4.0', 'DatasetType': 'derivative'}
    (root / 'dataset_description.json').write_text(json.dumps(description))
    stem = 'sub-01_task-rest_space-fsLR_den-91k_bold'
    nib.save(nib.Cifti2Image(data, axes), func / f'{stem}.dtseries.nii')
    (func / f'{stem}.json').write_text(json.dumps({'RepetitionTime': 0.735, 'TaskName': 'rest'}))
    return truth[:, 1:]


def test_cifti_takes_the_same_way(shared, a424, small, tmp_path, app):
    """Parcels are those of the dense series, and what comes back as CIFTI lies where they do."""
    import nibabel as nib

    root, out = tmp_path / 'data', tmp_path / 'out'
    truth = dense(shared, root)
    options = ('--denoise', 'none', '--outputs', 'all', '--write-bold')
    assert app(root, out, '--model', small, *options) == 0
    one = lambda pattern: next(out.glob(f'sub-01/func/sub-01_task-rest_space-fsLR*{pattern}'))
    series, names = read_matrix(one('_stat-mean_timeseries.tsv'))
    assert np.abs(series - truth).max() < 0.05

    labels = nib.load(shared / 'atlases' / 'A424.dlabel.nii')
    parcel = labels.get_fdata()[0].astype(int)
    left = next(
        part
        for name, part, _ in labels.header.get_axis(1).iter_structures()
        if name == 'CIFTI_STRUCTURE_CORTEX_LEFT'
    )
    table = pd.read_csv(one('_stat-perturbation_desc-brainlm111m_boldmap.tsv'), sep='\t')
    image = nib.load(one('_stat-perturbation_desc-brainlm111m_boldmap.dscalar.nii'))
    where = np.flatnonzero(np.nan_to_num(image.get_fdata()[0]) == 1)
    assert table['Node'][table['target'] == 1].tolist() == ['L_V1_ROI']
    assert np.array_equal(where, np.flatnonzero(parcel == 1 + names.index('L_V1_ROI')))
    assert where.max() < left.stop
    assert image.header.get_axis(0).name[0] == 'perturbation brainlm111m'
    made, _ = read_matrix(one('_desc-brainlm111m_timeseries.tsv'))
    bold = nib.load(
        out / 'sub-01/func/sub-01_task-rest_space-fsLR_desc-brainlm111m_bold.dtseries.nii'
    )
    np.testing.assert_allclose(bold.get_fdata()[:, where[0]], made[:, names.index('L_V1_ROI')])
    found = nib.load(one('_desc-connectome_dseg.dlabel.nii')).header.get_axis(0).label[0]
    assert {'Visual', 'Default Mode', 'Subcortical'} <= {name for name, _ in found.values()}
    silent(out)


def silent(out):
    """The validator has nothing to say."""
    validator = Path(sys.executable).with_name('bids-validator-deno')
    found = subprocess.run(
        [validator, '--format', 'json', out], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout)['issues']['issues'] == []


def test_networks_of_real_series_are_found_far_above_chance(shared, a424, small, tmp_path, app):
    """From connectivity on a full-size tree: above all surrogates of the same smoothness."""
    data = paint(
        shared, tmp_path / 'data', 'MNI152NLin6Asym', '--subjects', '01', '--volumes', '420'
    )
    out = tmp_path / 'out'
    assert app(data, out, '--model', small, '--outputs', 'networks') == 0
    path = next(out.glob('sub-01/func/sub-01_task-rest*_desc-connectome_knn.tsv'))
    table = pd.read_csv(path, sep='\t', index_col='features')
    null = json.loads(path.with_suffix('.json').read_text())['SpatialNull']
    print(table, max(null))
    assert table['accuracy']['features'] > max(null)
    assert table['accuracy']['features'] > 2 * table['accuracy']['majority']
    assert table['p']['features'] == pytest.approx(1 / 101)
    silent(out)


@pytest.fixture(scope='module')
def schaefer_tian(shared, tmp_path_factory):
    """A home with the atlas of Brain-JEPA, completed from a folder."""
    from bids_brainfm.cli.models import main

    home = tmp_path_factory.mktemp('schaefer_tian')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('BIDS_BRAINFM_HOME', str(home))
        source = str(shared / 'atlases')
        assert main(['fetch', 'Schaefer2018Tian2020', 'A424', '--from', source]) == 0
        assert main(['fetch', 'brain-jepa-vitb', '--from', source]) == 2  # but for the weights
        yield home


@pytest.mark.parametrize('space', ['MNI152NLin6Asym', 'MNI152NLin2009cAsym'])
def test_brain_jepa_series_and_orientation(shared, schaefer_tian, tmp_path, app, space):
    """Series are the painted ones, 50 Tian parcels first; a mirrored copy gives the same."""
    model = f'brain-jepa-vitb={shared / "golden" / "brainjepa"}'
    (image,) = (shared / 'atlases').glob(f'tpl-{space}_res-02_*Schaefer2018Tian2020*')
    options = ['--subjects', '01', '--tr', '2.0', '--volumes', '178']
    found = []
    for flip in ([], ['--flip']):
        kind = flip[0].strip('-') if flip else 'plain'
        data = paint(shared, tmp_path / kind, space, *options, *flip, atlas=image.name)
        out = tmp_path / f'{kind}_out'
        assert app(data, out, '--model', model, '--denoise', 'none') == 0
        (truth,) = Path(f'{data}_truth').glob('*.npy')
        (path,) = out.glob('sub-01/func/*_stat-mean_timeseries.tsv')
        series, names = read_matrix(path)
        assert (names[0], names[50]) == ('HIP-head-m-rh', '17Networks_LH_VisCent_ExStr_1')
        assert np.abs(series - np.load(truth)).max() < 0.05
        (table,) = out.glob('sub-01/func/*_desc-brainjepavitb_embedding.tsv')
        found.append((series, pd.read_csv(table, sep='\t').to_numpy()))
    (series, table), (mirrored, mirrored_table) = found
    np.testing.assert_allclose(series, mirrored, rtol=1e-6)
    np.testing.assert_allclose(table, mirrored_table, atol=1e-5)


def test_both_models_at_full_size(shared, schaefer_tian, tmp_path, app):
    """BrainLM 111M and Brain-JEPA ViT-B, with random weights, in one command on real series."""
    data = paint(
        shared, tmp_path / 'data', 'MNI152NLin6Asym', '--subjects', '01', '--tr', '2.0',
        '--volumes', '178', '--seed', '3',
    )  # fmt: skip
    out = tmp_path / 'out'
    models = ('--model', 'brainlm-111m', 'brain-jepa-vitb', '--random-weights')
    assert app(data, out, *models) == 0
    for label, size in (('brainlm111mrandom', 768), ('brainjepavitbrandom', 768)):
        (path,) = out.glob(f'sub-01/func/*_desc-{label}_embedding.tsv')
        table = pd.read_csv(path, sep='\t')
        assert table.shape[1] == 6 + size
        assert np.isfinite(table.to_numpy()).all()


def test_run_without_subcortex_is_refused(shared, schaefer_tian, tmp_path, app):
    """50 missing rows are neither zero nor taken from the cortex."""
    image = next((shared / 'atlases').glob('tpl-MNI152NLin6Asym*Schaefer2018Tian2020*'))
    data = paint(
        shared, tmp_path / 'data', 'MNI152NLin6Asym', '--subjects', '01', '--tr', '2.0',
        '--volumes', '178', '--drop-parcels', *map(str, range(1, 51)), atlas=image.name,
    )  # fmt: skip
    out, model = tmp_path / 'out', f'brain-jepa-vitb={shared / "golden" / "brainjepa"}'
    assert app(data, out, '--model', model, '--denoise', 'none') == 1
    (reason,) = (out / 'sub-01' / 'log').glob('failed-*.txt')
    assert 'none of the 50 subcortex parcels' in reason.read_text()
    assert not list(out.glob('sub-01/func/*_desc-brainjepavitb_embedding.tsv'))


def test_full_size_network(shared, a424, tmp_path, app):
    """The 111M network, with random weights, encodes a full-size run of real series."""
    model = checkpoint(tmp_path / 'vitmae_111M', 'brainlm-111m')
    data = paint(shared, tmp_path / 'data', 'MNI152NLin2009cAsym', '--subjects', '01')
    out = tmp_path / 'out'
    assert app(data, out, '--model', model) == 0
    table = pd.read_csv(next(out.glob('sub-01/func/*_desc-brainlm111m_*.tsv')), sep='\t')
    assert table.shape == (1, 6 + 768)
    assert np.isfinite(table.to_numpy()).all()
