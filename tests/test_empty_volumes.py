"""Volumes without signal, as of a scan that was stopped early, change no number of the others."""

import json
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.signals.empty import without_signal
from bids_brainfm.signals.parcellate import parcellate

T, SHAPE = 40, (10, 10, 10)
FAULTS = {
    'zero': lambda good: 0,
    'constant': lambda good: 1000,
    'NaN': lambda good: np.nan,
    'infinite': lambda good: np.inf,
    'noise': lambda good: np.random.default_rng(1).normal(0, 1, good.shape),
    'half': lambda good: (
        good * (np.arange(good.shape[0]) < good.shape[0] / 2)[:, None, None, None]
    ),
    'repeated': lambda good: good[..., :1],
}
PLACES = {
    'end': slice(30, None), 'start': slice(0, 3), 'inside': slice(11, 15), 'most': slice(8, None),
    'one': slice(20, 21),
}  # fmt: skip


def simulated_run():
    """Volumes of unlike voxels that fluctuate, as those of BOLD, and labels of four parcels."""
    rng = np.random.default_rng(0)
    level = rng.uniform(400, 1200, SHAPE)[..., None]
    data = level * (1 + 0.02 * rng.standard_normal((*SHAPE, T)))
    return data.astype(np.float32), 1 + np.arange(1000).reshape(SHAPE) // 250


def save(path, data):
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), path)
    return path


def save_cifti(path, data):
    axis = nib.cifti2.BrainModelAxis.from_surface(np.arange(1000), 1000, 'cortex_left')
    if len(data) > 1:
        first = nib.cifti2.SeriesAxis(0, 1, len(data))
    else:
        first = nib.cifti2.LabelAxis(['a'], {0: ('none', (0, 0, 0, 0)), 1: ('a', (1, 0, 0, 1))})
    nib.save(nib.Cifti2Image(data.astype(np.float32), header=(first, axis)), path)
    return path


@pytest.mark.parametrize('kind', ['volumes', 'grayordinates'])
@pytest.mark.parametrize(
    ('fault', 'place'),
    [('zero', place) for place in PLACES] + [(f, 'inside') for f in FAULTS] + [('NaN', 'end')],
)
def test_numbers_are_those_of_the_other_volumes(tmp_path, fault, place, kind):
    """Level, tSNR, coverage and mean of the brain are those of a run without these volumes."""
    data, labels = simulated_run()
    data[0, 0, 0] = 7  # constant, so that it is not covered, also where it is 0 in empty volumes
    lost, where = np.zeros(T, bool), PLACES[place]
    lost[where] = True
    before = data[..., where.start - 1 : where.start] if place != 'start' else data[..., 3:4]
    lost[0] &= fault != 'repeated'  # the first of equal volumes is the one that counts
    whole = data[..., ~lost].copy()
    data[..., where] = FAULTS[fault](before if fault == 'repeated' else data[..., where])
    if fault == 'repeated' and place == 'start':
        whole[..., 0], lost[3] = data[..., 0], True
        whole = np.delete(whole, 1, axis=-1)
    if kind == 'volumes':
        atlas = save(tmp_path / 'atlas.nii.gz', labels.astype(np.int16))
        mask = save(tmp_path / 'mask.nii.gz', np.ones(SHAPE, np.uint8))
        paths = [save(tmp_path / f'{i}.nii.gz', x) for i, x in enumerate((data, whole))]
        found, wanted = (parcellate(path, atlas, 4, mask) for path in paths)
    else:
        atlas = save_cifti(tmp_path / 'a.dlabel.nii', labels.reshape(1, -1))
        flat = [x.reshape(-1, x.shape[-1]).T for x in (data, whole)]
        paths = [save_cifti(tmp_path / f'{i}.dtseries.nii', x) for i, x in enumerate(flat)]
        found, wanted = (parcellate(path, atlas, 4) for path in paths)
    assert list(found.empty) == list(lost)
    assert not wanted.empty.any()
    np.testing.assert_allclose(found.data[~lost], wanted.data, rtol=1e-6)
    assert np.isfinite(found.data).all()
    assert found.data[lost].min() >= wanted.data.min()  # interpolated
    assert found.brain_mean == pytest.approx(wanted.brain_mean, rel=1e-6)
    for name in ('level', 'tsnr', 'coverage'):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5)
    assert found.coverage[0] == pytest.approx(249 / 250)
    assert found.n_nonfinite == 0


def test_whole_runs_have_none():
    """Nor have series about zero, a spike of motion, bright volumes at the start, or even ones."""
    rng = np.random.default_rng(0)
    data = simulated_run()[0].reshape(-1, T).T
    assert not without_signal(data).any()
    assert not without_signal(data - data.mean(axis=0)).any()
    even = 9000 + np.linspace(0.01, 100, T)[:, None] * rng.standard_normal(data.shape)
    assert not without_signal(even).any()
    bright = data * np.r_[3, 2, 1.3, np.ones(T - 3)][:, None]
    bright[20] *= 0.4
    assert not without_signal(bright).any()
    assert not without_signal(np.where(rng.random(1000) < 0.3, np.nan, data)).any()
    assert not without_signal(np.arange(T)[:, None] * np.ones(50)).any()  # all are flat


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['none', 'simple'])
def test_a_scan_stopped_early_is_shortened_with_a_warning(dataset, tmp_path, app, strategy):
    """Connectivity and mean of the brain are those of the run that ends where the signal ends."""
    func = dataset / 'sub-01' / 'func'
    bold, table = next(func.glob('*_bold.nii.gz')), next(func.glob('*timeseries.tsv'))
    image, confounds = nib.load(bold), pd.read_csv(table, sep='\t')
    data = np.asanyarray(image.dataobj)
    other = dataset / 'sub-02' / 'func'
    for file in func.iterdir():
        (other / file.name.replace('sub-01', 'sub-02')).write_bytes(file.read_bytes())
    nib.save(image.slicer[..., :150], other / bold.name.replace('sub-01', 'sub-02'))
    text = confounds[:150].to_csv(sep='\t', index=False, na_rep='n/a')
    (other / table.name.replace('sub-01', 'sub-02')).write_text(text)
    data[..., 150:], data[..., 70] = 0, 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), bold)
    out = tmp_path / 'out'
    assert app(dataset, out, '--denoise', strategy, '--stop-after', 'timeseries') == 0
    (stopped, cut) = (
        json.loads(next(out.glob(f'sub-{s}/func/*timeseries.json')).read_text())
        for s in ('01', '02')
    )
    assert stopped['NumberOfVolumesWithoutSignal'] == 61
    assert stopped['NumberOfVolumesLeftOutAtEnd'] == 60
    dummy = 150 - _rows(out, '01')
    assert 70 - dummy in stopped['FlaggedVolumes']
    assert (len(stopped['FlaggedVolumes']) == 1) == (strategy == 'none')
    assert any('60 at the end were left out and 1 were' in text for text in stopped['Warnings'])
    assert stopped['BrainMean'] == pytest.approx(cut['BrainMean'], rel=1e-4)
    assert _rows(out, '01') == _rows(out, '02')
    relmat = [
        pd.read_csv(next(out.glob(f'sub-{s}/func/*relmat.tsv')), sep='\t', index_col=0).to_numpy()
        for s in ('01', '02')
    ]
    above = np.triu_indices(424, 1)
    assert np.median(relmat[0][above]) == pytest.approx(np.median(relmat[1][above]), abs=0.01)


def _rows(out, label):
    return len(
        pd.read_csv(next(out.glob(f'sub-{label}/func/*stat-mean_timeseries.tsv')), sep='\t')
    )


def test_the_functions_of_python_warn(dataset):
    """As the command does in sidecar and report."""
    import bids_brainfm

    func = dataset / 'sub-01' / 'func'
    bold = next(func.glob('*_bold.nii.gz'))
    image = nib.load(bold)
    data = np.asanyarray(image.dataobj)
    data[..., 180:] = 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), bold)
    with pytest.warns(UserWarning, match='30 of 210 volumes hold no signal'):
        series = bids_brainfm.parcellate(bold, 'Demo424')
    assert list(np.flatnonzero(series.flagged)) == list(range(180, 210))
    with warnings.catch_warnings(record=True) as caught:
        clean = bids_brainfm.denoise(series, next(func.glob('*timeseries.tsv')), 'none')
    assert any('30 at the end were left out' in str(each.message) for each in caught)
    assert len(clean.data) == 180 - clean.dummy
    assert not clean.flagged.any()
