"""BOLD file to parcel series: streaming, sampling, coverage and refusals."""

import gzip
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.parcellate import parcellate
from bids_brainfm.signals.sampling import make_sampler
from bids_brainfm.signals.stream import frames, open_bold

SHARED = Path(__file__).parents[1].parent / 'shared'
SHAPE, T, P = (8, 9, 7), 12, 6
AFFINE = np.array([[2.0, 0, 0, -8], [0, 2, 0, -9], [0, 0, 2, -7], [0, 0, 0, 1]])


def save(path, data, affine=AFFINE, image=nib.Nifti1Image, tr=0.8):
    picture = image(data, affine)
    if data.ndim == 4:
        picture.header.set_zooms((*picture.header.get_zooms()[:3], tr))
        picture.header.set_xyzt_units('mm', 'sec')
    nib.save(picture, path)
    return path


def flipped(data, affine, axis=0):
    """The same data in the same place, counted from the other side."""
    affine = affine.copy()
    affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
    affine[:3, axis] *= -1
    return np.flip(data, axis), affine


@pytest.fixture
def case(tmp_path):
    """A run, an atlas of six slabs along y and x, and the true means."""
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.int16)
    labels[1:4, 1:3], labels[1:4, 3:5], labels[1:4, 5:8] = 1, 2, 3
    labels[4:7, 1:3], labels[4:7, 3:5], labels[4:7, 5:8] = 4, 5, 6
    data = (1000 + 50 * rng.standard_normal((*SHAPE, T))).astype(np.float32)
    truth = np.stack([data[labels == p].mean(0, dtype=float) for p in range(1, P + 1)], axis=1)
    return {
        'data': data,
        'labels': labels,
        'truth': truth,
        'bold': save(tmp_path / 'bold.nii.gz', data),
        'atlas': save(tmp_path / 'atlas.nii.gz', labels),
        'dir': tmp_path,
    }


def test_means_equal_the_truth(case):
    mask = (case['labels'] > 0).astype(np.uint8)
    mask_path = save(case['dir'] / 'mask.nii.gz', mask)
    found = parcellate(case['bold'], case['atlas'], P, mask_path)
    np.testing.assert_allclose(found.data, case['truth'], atol=1e-3)
    assert found.data.dtype == np.float32
    assert (found.coverage == 1).all()
    assert found.brain_mean == pytest.approx(case['data'][mask > 0].mean(dtype=float), rel=1e-5)
    assert found.header_tr == pytest.approx(0.8)
    assert (found.sampling, found.n_nonfinite) == ('atlas-to-run', 0)


@pytest.mark.parametrize('dtype', ['<i2', '>i2', '<u2', '>f4', '<f8', '<i4'])
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_types_byte_orders_and_scaling(case, dtype, suffix):
    """The stored numbers are scaled by slope and intercept, whatever their type."""
    stored = np.rint(case['data']).astype(dtype)
    picture = nib.Nifti1Image(stored, AFFINE, nib.Nifti1Header(endianness=dtype[0]))
    picture.header.set_data_dtype(dtype)
    path = case['dir'] / f'typed{suffix}'
    # nibabel works the scaling out by itself, so it is written into the header afterwards
    nib.save(picture, path)
    raw = bytearray((gzip.open if suffix == '.nii.gz' else open)(path, 'rb').read())
    raw[112:120] = np.array([0.5, 30], dtype[0] + 'f4').tobytes()
    (gzip.open if suffix == '.nii.gz' else open)(path, 'wb').write(raw)
    assert open_bold(path).dtype == np.dtype(dtype)
    found = parcellate(path, case['atlas'], P)
    values = 0.5 * stored.astype(float) + 30
    truth = np.stack([values[case['labels'] == p].mean(0) for p in range(1, P + 1)], axis=1)
    np.testing.assert_allclose(found.data, truth, atol=1e-3)
    assert found.brain_mean == pytest.approx(values[case['labels'] > 0].mean(), rel=1e-6)


def test_nifti2(case):
    path = save(case['dir'] / 'two.nii.gz', case['data'], image=nib.Nifti2Image)
    np.testing.assert_allclose(parcellate(path, case['atlas'], P).data, case['truth'], atol=1e-3)


def test_frames_are_the_volumes_on_disk(case):
    bold = open_bold(case['bold'])
    for t, frame in enumerate(frames(bold)):
        assert np.array_equal(frame, case['data'][..., t].ravel(order='F'))
    assert t == T - 1


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_orientation_is_read_from_the_affine(case, axis):
    data, affine = flipped(case['data'], AFFINE, axis)
    path = save(case['dir'] / 'flipped.nii.gz', data, affine)
    found = parcellate(path, case['atlas'], P).data
    np.testing.assert_allclose(found, parcellate(case['bold'], case['atlas'], P).data, atol=1e-5)


@pytest.mark.parametrize('step', [1.0, 4.0])
def test_ties_do_not_depend_on_orientation(case, step):
    """Voxel centres halfway between atlas voxels fall to the same side in LAS and RAS."""
    rng = np.random.default_rng(1)
    affine = np.diag([step, 1, 1, 1.0])
    affine[0, 3] = 0.5 if step == 1 else 1.0
    labels = rng.integers(1, P + 1, (12, 9, 7)).astype(np.int16)
    fine = np.eye(4) if step == 1 else np.diag([2.0, 1, 1, 1])
    atlas = nib.Nifti1Image(labels, fine)
    data = rng.standard_normal((11, 9, 7))
    mirrored, other = flipped(data, affine)
    mirrored_labels, other_fine = flipped(labels, fine)

    def means(volume, affine, atlas):
        sampler = make_sampler(atlas, P, volume.shape, affine)
        return np.add.reduceat(volume.ravel(order='F')[sampler.voxels], sampler.starts)

    expected = means(data, affine, atlas)
    np.testing.assert_allclose(means(mirrored, other, atlas), expected)
    mirrored_atlas = nib.Nifti1Image(mirrored_labels, other_fine)
    np.testing.assert_allclose(means(data, affine, mirrored_atlas), expected)
    np.testing.assert_allclose(means(mirrored, other, mirrored_atlas), expected)


def test_a_coarse_grid_loses_no_parcel(tmp_path):
    """Parcels smaller than the run's voxels take the value of the voxel they lie in."""
    labels = np.zeros((12, 12, 12), np.int16)
    labels[0, 0, 0], labels[6:, 6:, 6:] = 1, 2
    labels[5, 1, 0] = 2
    atlas = save(tmp_path / 'atlas.nii.gz', labels, np.eye(4))
    rng = np.random.default_rng(0)
    data = rng.standard_normal((3, 3, 3, T)).astype(np.float32) + 100
    coarse = np.diag([4.0, 4, 4, 1])
    coarse[:3, 3] = 1.5
    found = parcellate(save(tmp_path / 'bold.nii.gz', data, coarse), atlas, 2)
    assert found.sampling == 'run-to-atlas'
    assert (found.coverage == 1).all()
    np.testing.assert_allclose(found.data[:, 0], data[0, 0, 0], rtol=1e-6)
    # second parcel: (12 - 6)^3 atlas voxels, two of the six on each axis in the middle voxel
    weight = np.zeros((3, 3, 3))
    half = np.array([0, 2, 4])
    weight += half[:, None, None] * half[:, None] * half
    weight[1, 0, 0] += 1
    expected = np.tensordot(weight, data.astype(float), 3) / weight.sum()
    np.testing.assert_allclose(found.data[:, 1], expected, rtol=1e-6)


def test_voxels_without_variance_are_outside_the_field_of_view(case):
    data = case['data'].copy()
    data[:, 1:3, :] = 700.0  # the whole of parcels 1 and 4, at a constant level
    data[1, 3:5, :] = 0.0  # a third of parcel 2
    found = parcellate(save(case['dir'] / 'cut.nii.gz', data), case['atlas'], P)
    assert np.isnan(found.data[:, [0, 3]]).all()
    np.testing.assert_allclose(found.coverage, [0, 2 / 3, 1, 0, 1, 1], rtol=1e-6)
    seen = np.zeros(SHAPE, bool)
    seen[2:4, 3:5] = True
    np.testing.assert_allclose(found.data[:, 1], data[seen].mean(0, dtype=float), atol=1e-3)


def masked(case, inside):
    """Path of a brain mask (X, Y, Z)."""
    return save(case['dir'] / 'mask.nii.gz', inside.astype(np.uint8))


def test_a_parcel_outside_the_brain_mask_is_not_covered(case):
    """Noise at 0.5 % of the brain's level varies, too, but is no signal of a parcel."""
    outside = case['labels'] == 5
    data = case['data'].copy()
    data[outside] *= 0.005
    bold, mask = save(case['dir'] / 'noise.nii.gz', data), masked(case, ~outside)
    found = parcellate(bold, case['atlas'], P, mask)
    assert found.coverage.tolist() == [1, 1, 1, 1, 0, 1]
    assert found.voxels == 'mask'
    for values in (found.data[:, 4], found.level[4], found.tsnr[4]):
        assert np.isnan(values).all()
    others = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(found.data[:, others], case['truth'][:, others], atol=1e-3)
    whole = parcellate(bold, case['atlas'], P, mask, 'all')
    assert (whole.voxels, whole.coverage.tolist()) == ('all', found.coverage.tolist())
    np.testing.assert_allclose(whole.data[:, 4], 0.005 * case['truth'][:, 4], rtol=1e-5)


def test_parcel_means_are_over_the_brain_mask_unless_over_all_voxels(case):
    inside = np.ones(SHAPE, bool)
    inside[1, 3:5] = False  # a third of parcel 2
    data = case['data'].copy()
    data[1, 3:5] /= 10
    data[2, 3:5, :2] = 7  # constant, a fifth of the rest
    bold, mask = save(case['dir'] / 'part.nii.gz', data), masked(case, inside)
    expected = [1, 2 / 3 * 5 / 7 / 2 + 1 / 3, 1, 1, 1, 1]
    chosen = (case['labels'] == 2) & (data.std(axis=3) > 0)
    for voxels, used in (('mask', chosen & inside), ('all', chosen)):
        found = parcellate(bold, case['atlas'], P, mask, voxels)
        np.testing.assert_allclose(found.coverage, expected, rtol=1e-6)
        truth = data[used].mean(axis=0, dtype=float)
        np.testing.assert_allclose(found.data[:, 1], truth, atol=1e-3)
    without = parcellate(bold, case['atlas'], P)
    assert without.voxels == 'all'
    np.testing.assert_array_equal(without.data, found.data)
    np.testing.assert_allclose(without.coverage[1], np.mean(chosen[case['labels'] == 2]))
    with pytest.raises(BrainfmError, match="voxels='brain' is unknown: choose mask or all"):
        parcellate(bold, case['atlas'], P, mask, 'brain')


def test_an_atlas_outside_the_mask_is_refused(case):
    mask = masked(case, case['labels'] == 0)
    refused(
        'No parcel of the atlas lies inside the brain mask', case['bold'], case['atlas'], P, mask
    )


@pytest.mark.parametrize('slope', [1.0, -0.5])
@pytest.mark.parametrize('dtype', ['<f4', '>i2'])
def test_level_and_temporal_signal_to_noise_ratio(case, dtype, slope):
    """As computed voxel by voxel in float64, of values 200 SD from zero and a bright start."""
    rng = np.random.default_rng(2)
    data = np.rint(1e4 + 50 * rng.standard_normal((*SHAPE, 300))).astype(np.float32)
    data[..., :3] = np.rint(1.3 * data[..., :3])  # not in steady state
    data[1, 1:3] = 5  # constant, a third of parcel 1
    data[1:4, 3:5] = 5  # the whole of parcel 2
    path = case['dir'] / 'level.nii'
    save(path, data.astype(dtype))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, 30], '<f4').tobytes()
    path.write_bytes(raw)
    inside = np.ones(SHAPE, bool)
    inside[3, 5:8] = False  # a third of parcel 3
    for skip in (0, 3):
        found = parcellate(path, case['atlas'], P, masked(case, inside), skip=skip)
        values = slope * data[..., skip:].astype(float) + 30
        spread = values.std(axis=3)
        with np.errstate(divide='ignore'):
            ratio = values.mean(axis=3) / spread
        for parcel in (1, 3, 4, 5, 6):
            used = (case['labels'] == parcel) & inside & (spread > 0)
            assert found.level[parcel - 1] == pytest.approx(values[used].mean(), rel=1e-5)
            assert found.tsnr[parcel - 1] == pytest.approx(np.median(ratio[used]), rel=1e-5)
        assert np.isnan([found.level[1], found.tsnr[1]]).all()
        assert found.brain_mean == pytest.approx(values[inside].mean(), rel=1e-6)
        without = parcellate(path, case['atlas'], P, skip=skip)
        used = (case['labels'] > 0) & (spread > 0)
        assert without.brain_mean == pytest.approx(values[used].mean(), rel=1e-6)
    if slope == 1:
        assert 190 < found.tsnr[0] < 210  # and 33 with the bright volumes


def test_a_voxel_that_changes_once_counts(case):
    data = case['data'].copy()
    data[1:4, 1:3] = 5.0
    data[1, 1, 0, -1] = data[1, 2, 0, 6] = 7.0
    found = parcellate(save(case['dir'] / 'late.nii.gz', data), case['atlas'], P)
    assert (found.data[0, 0], found.data[6, 0], found.data[-1, 0]) == (5, 6, 6)
    assert found.coverage[0] == pytest.approx(2 / (3 * 2 * 7))


def test_a_parcel_partly_outside_the_box_is_partly_covered(case):
    moved = AFFINE.copy()
    moved[0, 3] += 3 * 2
    found = parcellate(save(case['dir'] / 'box.nii.gz', case['data'][3:], moved), case['atlas'], P)
    np.testing.assert_allclose(found.coverage, [1 / 3, 1 / 3, 1 / 3, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(found.data[:, 3:], case['truth'][:, 3:], atol=1e-3)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_left_out(case, value):
    data = case['data'].copy()
    data[1, 1, 0, 5] = value
    data[0, 0, 0, 3] = value  # in no parcel, not in the mask
    mask = (case['labels'] > 0).astype(np.uint8)
    mask_path = save(case['dir'] / 'mask.nii.gz', mask)
    found = parcellate(save(case['dir'] / 'nan.nii.gz', data), case['atlas'], P, mask_path)
    voxels = case['labels'] == 1
    voxels[1, 1, 0] = False
    np.testing.assert_allclose(found.data[:, 0], data[voxels].mean(0, dtype=float), atol=1e-3)
    np.testing.assert_allclose(found.data[:, 1:], case['truth'][:, 1:], atol=1e-3)
    assert found.n_nonfinite == 1
    assert found.coverage[0] == pytest.approx(41 / 42)
    mask[1, 1, 0] = 0
    assert found.brain_mean == pytest.approx(data[mask > 0].mean(dtype=float), rel=1e-5)


def cifti(path, data, labels, label_path, extra=0):
    """A dense series of 40 cortical and 30 cerebellar grayordinates and its atlas."""
    left = nib.cifti2.BrainModelAxis.from_surface(np.arange(40), 50, 'cortex_left')
    volume = np.zeros((5, 5, 5), bool)
    volume.ravel()[:30] = True
    right = nib.cifti2.BrainModelAxis.from_mask(volume, 'cerebellum_left', AFFINE)
    wider = nib.cifti2.BrainModelAxis.from_surface(np.arange(40 + extra), 50, 'cortex_left')
    time = nib.cifti2.SeriesAxis(0, 0.8, len(data))
    nib.save(nib.Cifti2Image(data, header=(time, left + right)), path)
    table = nib.cifti2.LabelAxis(['atlas'], {0: ('none', (0, 0, 0, 0)), 1: ('a', (1, 0, 0, 1))})
    image = nib.Cifti2Image(labels[None].astype(np.float32), header=(table, wider + right))
    nib.save(image, label_path)
    return path, label_path


def test_cifti_takes_the_same_way(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    data = (500 + 20 * rng.standard_normal((T, 70))).astype(np.float32)
    labels = np.repeat([0, 2, 1, 3, 2], 14)
    data[:, 14] = 9.0  # constant, in parcel 2
    data[4, 28] = np.nan  # in parcel 1
    paths = cifti(tmp_path / 'a.dtseries.nii', data, labels, tmp_path / 'a.dlabel.nii')
    found = parcellate(*paths, 4)
    keep = np.ones(70, bool)
    keep[[14, 28]] = False
    for parcel in (1, 2, 3):
        truth = data[:, keep & (labels == parcel)].mean(1, dtype=float)
        np.testing.assert_allclose(found.data[:, parcel - 1], truth, atol=1e-3)
    assert np.isnan(found.data[:, 3]).all()
    np.testing.assert_allclose(found.coverage, [13 / 14, 27 / 28, 1, 0], rtol=1e-6)
    assert found.brain_mean == pytest.approx(data[:, keep].mean(dtype=float), rel=1e-6)
    assert (found.sampling, found.voxels) == ('grayordinates', 'grayordinates')
    assert found.n_nonfinite == 1
    steady = parcellate(*paths, 4, skip=2)
    values = data[2:].astype(float)
    with np.errstate(divide='ignore', invalid='ignore'):
        ratio = values.mean(axis=0) / values.std(axis=0)
    for parcel in (1, 2, 3):
        used = keep & (labels == parcel)
        assert steady.level[parcel - 1] == pytest.approx(values[:, used].mean(), rel=1e-5)
        assert steady.tsnr[parcel - 1] == pytest.approx(np.median(ratio[used]), rel=1e-5)
    assert np.isnan([steady.level[3], steady.tsnr[3]]).all()
    assert steady.brain_mean == pytest.approx(values[:, keep].mean(), rel=1e-6)
    assert found.header_tr == pytest.approx(0.8)


def test_cifti_of_another_density_is_refused(tmp_path):
    data, labels = np.random.default_rng(0).random((T, 70), np.float32), np.ones(72)
    paths = cifti(tmp_path / 'a.dtseries.nii', data, labels, tmp_path / 'a.dlabel.nii', extra=2)
    with pytest.raises(BrainfmError, match=r'70 grayordinates.*72 grayordinates'):
        parcellate(*paths, 1)


def test_cifti_of_cortex_only_is_refused_by_what_it_lacks(tmp_path):
    """Parcel 3 lies in the cerebellum alone, parcel 2 also in cortex, parcel 1 in cortex alone."""
    data = np.random.default_rng(0).random((T, 70), np.float32)
    labels = np.repeat([1, 2, 2, 3], [30, 10, 10, 20])
    paths = cifti(tmp_path / 'a.dtseries.nii', data, labels, tmp_path / 'a.dlabel.nii')
    whole = nib.load(paths[0])
    time, axis = (whole.header.get_axis(i) for i in range(2))
    cortex = tmp_path / 'cortex.dtseries.nii'
    nib.save(nib.Cifti2Image(data[:, :40], header=(time, axis[:40])), cortex)
    refused(
        r'cortex only \(40 grayordinates\).* 1 parcels.*--cifti-output 91k', cortex, paths[1], 3
    )
    assert np.isfinite(parcellate(*paths, 3).data).all()


def test_cifti_of_cortex_only_is_well_where_the_atlas_is_of_cortex(tmp_path):
    data = np.random.default_rng(0).random((T, 70), np.float32)
    bold, dlabel = cifti(tmp_path / 'a.dtseries.nii', data, np.ones(70), tmp_path / 'a.dlabel.nii')
    for path in (bold, dlabel):
        image = nib.load(path)
        axes = image.header.get_axis(0), image.header.get_axis(1)[:40]
        data = np.asarray(image.dataobj)[:, :40]
        nib.save(nib.Cifti2Image(data, header=axes), path.with_name(f'cortex_{path.name}'))
    found = parcellate(*(path.with_name(f'cortex_{path.name}') for path in (bold, dlabel)), 1)
    assert found.coverage.tolist() == [1]


@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared test material is absent')
def test_the_subcortical_parcels_of_brain_jepa_are_counted(tmp_path):
    dlabel = 'Schaefer2018_400Parcels_17Networks_order_Tian_Subcortex_S3.dlabel.nii'
    axis = nib.load(SHARED / 'atlases' / dlabel).header.get_axis(1)
    axis = axis[axis.surface_mask]
    data = np.random.default_rng(0).random((2, len(axis)), np.float32)
    path = tmp_path / 'a.dtseries.nii'
    nib.save(nib.Cifti2Image(data, header=(nib.cifti2.SeriesAxis(0, 0.8, 2), axis)), path)
    refused(r'59412 grayordinates.* 50 parcels', path, SHARED / 'atlases' / dlabel, 450)


def refused(match, *arguments):
    with pytest.raises(BrainfmError, match=match) as caught:
        parcellate(*arguments)
    assert '\n' not in str(caught.value)


def test_truncated_files_say_how_much_could_be_read(case):
    whole = case['bold'].read_bytes()
    short = case['dir'] / 'short.nii.gz'
    short.write_bytes(whole[: int(len(whole) * 0.6)])
    refused(r'short\.nii\.gz.*\d of 12 volumes', short, case['atlas'], P)
    plain = case['dir'] / 'short.nii'
    plain.write_bytes(gzip.decompress(whole)[:-10])
    refused(
        r'short\.nii is truncated .* 24,544 bytes, and a file of 24,534', plain, case['atlas'], P
    )


def test_a_wrong_checksum_is_refused(case):
    whole = case['bold'].read_bytes()
    path = case['dir'] / 'sum.nii.gz'
    path.write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    refused('truncated or damaged', path, case['atlas'], P)


def test_files_that_are_no_run_are_refused(case):
    folder, atlas = case['dir'], case['atlas']
    refused('does not exist', folder / 'absent.nii.gz', atlas, P)
    refused('not a 4-D', save(folder / '3d.nii.gz', case['data'][..., 0]), atlas, P)
    refused('not a 4-D', save(folder / 'one.nii.gz', case['data'][..., :1]), atlas, P)
    refused('plain numbers', save(folder / 'c.nii.gz', case['data'].astype('c8')), atlas, P)
    (folder / 'text.nii.gz').write_text('not an image')
    refused('cannot be read', folder / 'text.nii.gz', atlas, P)
    (folder / 'empty.nii.gz').touch()
    refused('cannot be read', folder / 'empty.nii.gz', atlas, P)
    constant = save(folder / 'constant.nii.gz', np.full((*SHAPE, T), 7, np.float32))
    refused('is constant', constant, atlas, P)
    nothing = save(folder / 'nan.nii.gz', np.full((*SHAPE, T), np.nan, np.float32))
    refused('finite', nothing, atlas, P)
    nowhere = AFFINE.copy()
    nowhere[:3, 3] += 1000
    refused('space of the run', save(folder / 'far.nii.gz', case['data'], nowhere), atlas, P)
    picture = nib.Nifti1Image(case['data'], None)
    picture.set_sform(None, 0)
    picture.set_qform(None, 0)
    nib.save(picture, folder / 'bare.nii.gz')
    refused('neither sform nor qform', folder / 'bare.nii.gz', atlas, P)


def test_atlas_and_mask_that_do_not_fit_are_refused(case):
    folder, bold, atlas = case['dir'], case['bold'], case['atlas']
    refused('from 0 to 6', bold, atlas, P - 1)
    refused('labels must be whole', bold, save(folder / 'p.nii.gz', case['data'][..., 0]), P)
    refused('3-D image of labels', bold, bold, 10**6)
    mask = np.ones(SHAPE, np.uint8)
    refused('another grid', bold, atlas, P, save(folder / 'm.nii.gz', mask[1:]))
    flip = save(folder / 'm.nii.gz', *flipped(mask, AFFINE))
    refused('another grid .* another affine puts its voxels up to', bold, atlas, P, flip)
    refused('is empty', bold, atlas, P, save(folder / 'm.nii.gz', mask * 0))


TREES = [
    ('MNI152NLin6Asym', 'A424+2mm.nii.gz', ['--coords', 'A424_Coordinates.dat']),
    (
        'MNI152NLin2009cAsym',
        'tpl-MNI152NLin2009cAsym_atlas-AA424Parcels2mm_res-02_desc-2mm_dseg.nii.gz',
        [],
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared test material is absent')
@pytest.mark.parametrize(('space', 'atlas', 'options'), TREES, ids=lambda x: str(x)[:20])
def test_painted_trees_give_the_painted_series(tmp_path, space, atlas, options):
    """Real series painted into full-size volumes come back; left-right flipped copies too."""
    atlas = SHARED / 'atlases' / atlas
    options = [str(SHARED / 'atlases' / o) if o.endswith('.dat') else o for o in options]
    found = {}
    for name, more in {
        'float': [],
        'flip': ['--flip'],
        'int16': ['--dtype', 'int16'],
        'drop': ['--drop-parcels', '3', '400'],
    }.items():
        out = tmp_path / name
        tool = SHARED / 'tools' / 'make_fmriprep_tree.py'
        command = [sys.executable, tool, out, '--atlas', atlas, '--space', space, *options, *more]
        command += ['--subjects', '01', '--volumes', '8', '--truth', out / 'truth']
        subprocess.run(command, check=True, capture_output=True)
        (bold,) = out.glob('sub-01/func/*_bold.nii.gz')
        mask = Path(str(bold).replace('desc-preproc_bold', 'desc-brain_mask'))
        found[name] = parcellate(bold, atlas, 424, mask)
        truth = np.load(out / 'truth' / 'sub-01_task-rest.npy')
        if name == 'drop':
            assert list(np.flatnonzero(found[name].coverage == 0)) == [2, 399]
            truth[:, [2, 399]] = np.nan
        np.testing.assert_allclose(found[name].data, truth, atol=0.6 if name == 'int16' else 0.05)
    np.testing.assert_allclose(found['flip'].data, found['float'].data, atol=1e-5)
    assert found['flip'].brain_mean == pytest.approx(found['float'].brain_mean, rel=1e-6)


@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared test material is absent')
@pytest.mark.parametrize(
    ('atlas', 'n_parcels', 'low'),
    [
        (TREES[1][1], 424, [1, 4, 0]),
        ('tpl-MNI152NLin2009cAsym_res-02_*Schaefer2018Tian2020*', 450, [0, 9, 2]),
    ],
)
def test_coverage_of_real_coarse_runs_counts_the_brain_mask(atlas, n_parcels, low):
    """Some parcels at the edge of the brain are less than half inside the mask of a run."""
    (path,), found = (SHARED / 'atlases').glob(atlas), []
    for bold in sorted((SHARED / 'data/fmriprep_lowres').glob('sub-*/func/*_bold.nii.gz')):
        mask = Path(str(bold).replace('preproc_bold', 'brain_mask'))
        found.append(parcellate(bold, path, n_parcels, mask))
        assert found[-1].sampling == 'run-to-atlas'
        for values in (found[-1].data, found[-1].level, found[-1].tsnr):
            assert (values > 0).all()
        without = parcellate(bold, path, n_parcels)
        assert without.coverage.min() > 0.9
        np.testing.assert_array_equal(
            parcellate(bold, path, n_parcels, mask, 'all').data, without.data
        )
    assert [int((one.coverage < 0.5).sum()) for one in found] == low


def test_a_mask_with_exchanged_axes_is_refused(tmp_path):
    """Its first and last voxel are those of the run."""
    labels = np.ones((6, 6, 6), np.int16)
    affine = np.diag([2.0, 2, 2, 1])
    data = np.random.default_rng(0).normal(100, 1, (*labels.shape, T)).astype(np.float32)
    bold = save(tmp_path / 'bold.nii', data, affine)
    atlas = save(tmp_path / 'atlas.nii', labels, affine)
    mask = save(tmp_path / 'mask.nii', labels, affine[:, [1, 0, 2, 3]])
    refused('affine puts its voxels up to 10 mm away', bold, atlas, 1, mask)


def test_series_about_zero_count_as_demeaned(case):
    """As residuals of a denoising do; BOLD fluctuates by percents around its level."""
    assert not parcellate(case['bold'], case['atlas'], P).demeaned
    data = case['data'] - case['data'].mean(axis=-1, keepdims=True)
    for level in (0, 1):
        bold = save(case['dir'] / 'residuals.nii.gz', data + level)
        assert parcellate(bold, case['atlas'], P).demeaned
