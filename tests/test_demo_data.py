"""The simulated dataset looks like fMRIPrep's output and holds what was put into it."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.cli import demo
from bids_brainfm.signals.simulate import (
    NETWORKS,
    express,
    framewise_displacement,
    network_loadings,
    neural_series,
    simulate_run,
)

VOLUMES = 60


@pytest.fixture(scope='module')
def atlas(tmp_path_factory):
    return load_atlas('Demo424', tmp_path_factory.mktemp('home'))


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo') / 'data'
    demo.write_dataset(folder, participants=2, volumes=VOLUMES)
    return folder


def only(dataset, pattern):
    (path,) = dataset.glob(f'sub-01/func/{pattern}')
    return path


def test_layout(dataset):
    assert len(list(dataset.rglob('*_bold.nii.gz'))) == 2
    bold = nib.load(only(dataset, '*_desc-preproc_bold.nii.gz'))
    mask = nib.load(only(dataset, '*_desc-brain_mask.nii.gz'))
    assert bold.shape == (*mask.shape, VOLUMES)
    assert np.array_equal(bold.affine, mask.affine)
    sidecar = json.loads(only(dataset, '*_bold.json').read_text())
    assert sidecar['RepetitionTime'] == pytest.approx(float(bold.header.get_zooms()[3]))
    people = pd.read_csv(dataset / 'participants.tsv', sep='\t')
    assert list(people) == ['participant_id', 'age', 'trait']
    assert 'SIMULATED' in (dataset / 'dataset_description.json').read_text()
    assert sorted(p.name for p in dataset.parent.iterdir()) == ['data']


def test_confounds(dataset):
    table = pd.read_csv(only(dataset, '*_timeseries.tsv'), sep='\t', na_values='n/a')
    assert len(table) == VOLUMES
    names = ['trans_x', 'trans_y', 'trans_z', 'rot_x', 'rot_y', 'rot_z']
    for name in [*names, 'csf', 'white_matter', 'global_signal']:
        for suffix in ('', '_derivative1', '_power2', '_derivative1_power2'):
            assert f'{name}{suffix}' in table
    fd = framewise_displacement(table[names].to_numpy())
    np.testing.assert_allclose(table['framewise_displacement'], fd, atol=1e-5)
    assert table['framewise_displacement'].max() > 0.5
    assert table.isna().sum().max() == 1
    assert table.loc[1:].notna().all(axis=None)
    outliers = table.filter(like='motion_outlier')
    flagged = (table['framewise_displacement'] > 0.5) | (table['std_dvars'] > 1.5)
    assert np.array_equal(outliers.sum(axis=1) > 0, flagged)
    components = json.loads(only(dataset, '*_timeseries.json').read_text())
    assert set(components) == set(table.filter(like='comp_cor'))


def test_painted_volumes_hold_the_series(dataset, atlas):
    rng = np.random.default_rng(0)
    people = pd.read_csv(dataset / 'participants.tsv', sep='\t')
    rng.integers(20, 75, 2), rng.standard_normal(2)  # what write_dataset draws before
    run = simulate_run(atlas.xyz, VOLUMES, demo.TR, rng=rng, **express(people['trait'][0]))
    labels, brain = demo._grid_labels(atlas.image_for(demo.SPACE, demo.VOXEL_MM).path)
    bold = np.asanyarray(nib.load(only(dataset, '*_bold.nii.gz')).dataobj)
    assert (bold[~brain] == 0).all()
    for parcel in (0, 100, 423):
        painted = bold[labels == parcel + 1].mean(0)
        assert np.corrcoef(painted, run.series[:, parcel])[0, 1] > 0.95


def test_same_seed_same_files(dataset, tmp_path):
    demo.write_dataset(tmp_path / 'data', participants=2, volumes=VOLUMES)
    for path in sorted(p for p in dataset.rglob('*') if p.is_file()):
        assert (tmp_path / 'data' / path.relative_to(dataset)).read_bytes() == path.read_bytes()


def test_validator_finds_no_error(dataset):
    validator = Path(sys.executable).with_name('bids-validator-deno')
    if not validator.is_file():
        pytest.skip('bids-validator-deno is not installed')
    answer = subprocess.run([validator, dataset], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_series_have_realistic_level_and_spread(atlas):
    run = simulate_run(atlas.xyz, 300, 0.735, 0.3, np.random.default_rng(1))
    level, spread = run.series.mean(0), run.series.std(0)
    assert 7900 < level.min() < level.max() < 12100
    assert 0.004 < np.min(spread / level) < np.max(spread / level) < 0.015


def test_coupling_shows_between_the_two_networks(atlas):
    loadings = network_loadings(atlas.xyz)
    np.testing.assert_allclose((loadings**2).sum(1), 1)
    member = loadings.argmax(1)
    default, frontal = (list(NETWORKS).index(n) for n in ('default mode', 'frontoparietal'))

    def between(coupling):
        series = neural_series(atlas.xyz, 490, 0.735, coupling, np.random.default_rng(2))
        pairs = np.ix_(member == default, member == frontal)
        return np.corrcoef(series.T)[pairs].mean()

    assert between(-0.5) + 0.1 < between(0.2) < between(0.9) - 0.1


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'precious').write_text('')
    assert demo.main([str(tmp_path)]) == 2
    assert 'name another folder' in capsys.readouterr().err
    assert (tmp_path / 'data' / 'precious').exists()


def test_the_trait_shows_between_parcels_not_within(atlas):
    """Coherence is between parcels of a network; no parcel's own spectrum tells it."""
    of = [
        neural_series(atlas.xyz, 490, 0.735, rng=np.random.default_rng(3), **express(trait))
        for trait in (-2.0, 2.0)
    ]
    same = network_loadings(atlas.xyz).argmax(1)
    pairs = (same[:, None] == same) & ~np.eye(len(same), dtype=bool)
    low, high = (np.corrcoef(series.T)[pairs].mean() for series in of)
    assert high > low + 0.1
    slow = [np.abs(np.fft.rfft(series, axis=0)[:40]).mean() for series in of]
    assert slow[0] == pytest.approx(slow[1], rel=0.03)


def test_a_higher_corner_makes_faster_fluctuations_and_the_default_is_the_demo_s(atlas):
    def made(**options):
        return neural_series(atlas.xyz, 490, 0.735, 0.3, np.random.default_rng(4), **options)

    def slow_share(series):
        power = np.abs(np.fft.rfft(series, axis=0)) ** 2
        return power[: int(0.06 * 490 * 0.735)].sum() / power.sum()

    slow, usual, fast = (slow_share(made(corner_hz=hz)) for hz in (0.06, 0.1, 0.17))
    assert slow > usual + 0.05 > fast + 0.1
    np.testing.assert_array_equal(made(), made(corner_hz=0.1))
    runs = [
        simulate_run(atlas.xyz, 490, 0.735, 0.3, np.random.default_rng(1), corner_hz=hz).series
        for hz in (0.06, 0.17)
    ]
    slow, fast = (slow_share(series - series.mean(0)) for series in runs)
    assert slow > fast + 0.05
