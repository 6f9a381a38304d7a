"""Parcels to images: the right place, what the headers say, and the way back."""

import gzip
import resource

import nibabel as nib
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, SeriesAxis

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import home
from bids_brainfm.signals.paint import COLOURS, colour, paint_labels, paint_map, paint_series
from bids_brainfm.signals.parcellate import parcellate
from bids_brainfm.signals.sampling import make_sampler

P, T, TR = 4, 9, 0.735
AFFINE = np.array([[2.0, 0, 0, -8], [0, 2, 0, -9], [0, 0, 2, -7], [0, 0, 0, 1]])
LABELS = np.zeros((8, 9, 7), np.int16)
LABELS[1:4, 1:5], LABELS[1:4, 5:8], LABELS[4:7, 1:5], LABELS[4:7, 5:8] = 1, 2, 3, 4
VALUES = [0.5, -2, np.nan, 7]


def save(path, data, affine=AFFINE, codes=(4, 4), image=nib.Nifti1Image):
    """A volume, or a run, with sform and qform codes."""
    picture = image(data, affine)
    picture.set_sform(affine, codes[0])
    picture.set_qform(affine, codes[1])
    picture.to_filename(path)
    return path


def mirrored(data, affine):
    """The same data in the same place, counted from the other side."""
    affine = affine.copy()
    affine[:3, 3] += affine[:3, 0] * (data.shape[0] - 1)
    affine[:3, 0] *= -1
    return data[::-1], affine


def oriented(side, data, affine):
    """LAS or RAS copy of RAS data."""
    assert ''.join(nib.aff2axcodes(affine)) == 'RAS'
    return mirrored(data, affine) if side == 'LAS' else (data, affine)


def empty_run(path, shape=LABELS.shape, affine=AFFINE, **options):
    return save(path, np.zeros((*shape, 2), np.int16), affine, **options)


def read(path):
    return np.asanyarray(nib.load(path).dataobj)


@pytest.fixture
def atlas(tmp_path):
    return save(tmp_path / 'atlas.nii.gz', LABELS)


@pytest.fixture
def run(tmp_path):
    return empty_run(tmp_path / 'run.nii.gz')


@pytest.fixture
def series():
    return (1000 + 50 * np.random.default_rng(0).standard_normal((T, P))).astype(np.float32)


@pytest.fixture
def cifti(tmp_path):
    """Atlas (dlabel) and run (dtseries) on a few vertices and voxels, and the labels."""
    cortex = BrainModelAxis.from_surface(np.array([3, 4, 5, 9, 11, 12]), 20, 'cortex_left')
    inside = np.zeros((4, 4, 4), bool)
    inside[1:3, 1, :3] = True
    axis = cortex + BrainModelAxis.from_mask(inside, 'cerebellum_left', AFFINE)
    labels = np.array([0, 2, 2, 1, 1, 4, 4, 0, 3, 3, 3, 1])
    table = LabelAxis(['atlas'], {i: (f'parcel {i}', (0, 0, 0, 1)) for i in range(P + 1)})
    dlabel, run = tmp_path / 'atlas.dlabel.nii', tmp_path / 'run.dtseries.nii'
    nib.Cifti2Image(labels[None].astype(np.float32), header=(table, axis)).to_filename(dlabel)
    empty = np.zeros((2, len(axis)), np.float32)
    nib.Cifti2Image(empty, header=(SeriesAxis(5, 2, 2), axis)).to_filename(run)
    return dlabel, run, labels


# --- maps ------------------------------------------------------------------------------------


def test_a_map_holds_each_value_in_its_parcel(tmp_path, atlas):
    path = tmp_path / 'new' / 'r2.nii.gz'
    paint_map(path, atlas, VALUES)
    expected = np.array([0, *VALUES], np.float32)[LABELS]
    np.testing.assert_array_equal(read(path), expected)
    assert np.isnan(read(path)).any()


@pytest.mark.parametrize('codes', [(1, 1), (2, 0), (0, 2)])
def test_a_map_lies_in_mni_space_in_mm(tmp_path, codes):
    """Some atlases come with the code of a scanner's coordinates."""
    atlas = save(tmp_path / 'atlas.nii.gz', *mirrored(LABELS, AFFINE), codes=codes)
    paint_map(tmp_path / 'map.nii.gz', atlas, VALUES)
    paint_labels(tmp_path / 'labels.nii.gz', atlas, [1, 1, 1, 1], ['a'])
    for name, dtype in {'map': np.float32, 'labels': np.int16}.items():
        made = nib.load(tmp_path / f'{name}.nii.gz')
        assert made.get_data_dtype() == dtype
        assert made.header.get_xyzt_units()[0] == 'mm'
        for affine, code in (made.get_sform(coded=True), made.get_qform(coded=True)):
            assert code == 4
            np.testing.assert_allclose(affine, nib.load(atlas).affine, atol=1e-5)


@pytest.fixture(scope='module')
def demo():
    """The embedded atlas, its image, and a parcel well in the left hemisphere."""
    atlas = load_atlas('Demo424', home())
    left = int(np.argmin(atlas.xyz[:, 0]))
    assert atlas.hemispheres[left] == 'L'
    return atlas, nib.load(atlas.image_for('MNI152NLin2009cAsym', 2).path), left


def sides(path):
    """x in mm of every voxel that is not zero."""
    image = nib.load(path)
    data = np.asanyarray(image.dataobj)
    return nib.affines.apply_affine(image.affine, np.argwhere(data))[:, 0]


@pytest.mark.parametrize('side', ['LAS', 'RAS'])
def test_left_stays_left_in_maps(tmp_path, demo, side):
    atlas, image, parcel = demo
    copy = save(tmp_path / 'a.nii.gz', *oriented(side, read(image.get_filename()), image.affine))
    one = np.zeros(atlas.n_parcels, int)
    one[parcel] = 1
    paint_map(tmp_path / 'map.nii.gz', copy, one)
    paint_labels(tmp_path / 'labels.nii.gz', copy, one, ['here'])
    for name in ('map', 'labels'):
        x = sides(tmp_path / f'{name}.nii.gz')
        assert x.max() < 0
        assert x.mean() == pytest.approx(atlas.xyz[parcel, 0], abs=1)


@pytest.mark.parametrize('of_run', ['LAS', 'RAS'])
@pytest.mark.parametrize('of_atlas', ['LAS', 'RAS'])
def test_left_stays_left_in_series(tmp_path, demo, of_atlas, of_run):
    atlas, image, parcel = demo
    shape, affine = (49, 58, 49), np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -96, -132, -78
    copy = oriented(of_atlas, read(image.get_filename()), image.affine)
    copy = save(tmp_path / 'atlas.nii.gz', *copy)
    run = oriented(of_run, np.zeros((*shape, 2), np.int16), affine)
    run = save(tmp_path / 'run.nii.gz', *run)
    series = np.zeros((3, atlas.n_parcels), np.float32)
    series[:, parcel] = 1, 2, 3
    paint_series(tmp_path / 'made.nii.gz', run, copy, series, TR)
    made = nib.load(tmp_path / 'made.nii.gz')
    assert ''.join(nib.aff2axcodes(made.affine)) == of_run
    for t in range(3):
        one = save(tmp_path / 'one.nii.gz', read(made.get_filename())[..., t], made.affine)
        x = sides(one)
        assert x.max() < 0
        assert x.mean() == pytest.approx(atlas.xyz[parcel, 0], abs=3)
    back = parcellate(made.get_filename(), copy, atlas.n_parcels)
    assert np.nanargmax(back.data.max(axis=0)) == parcel


def test_a_map_of_grayordinates(tmp_path, cifti):
    dlabel, _, labels = cifti
    path = tmp_path / 'r2.dscalar.nii'
    paint_map(path, dlabel, VALUES, name='variance explained')
    np.testing.assert_array_equal(read(path), np.array([[0, *VALUES]], np.float32)[:, labels])
    made = nib.load(path)
    assert made.nifti_header.get_intent()[0] == 'ConnDenseScalar'
    assert made.get_data_dtype() == np.float32
    assert made.header.get_axis(0).name.tolist() == ['variance explained']
    assert made.header.get_axis(1) == nib.load(dlabel).header.get_axis(1)


# --- labels ----------------------------------------------------------------------------------


def test_labels_of_volumes(tmp_path, atlas):
    paint_labels(tmp_path / 'networks.nii.gz', atlas, [2, 0, 1, 2], ['visual', 'default'])
    np.testing.assert_array_equal(
        read(tmp_path / 'networks.nii.gz'), np.array([0, 2, 0, 1, 2])[LABELS]
    )


def test_labels_and_names_of_grayordinates(tmp_path, cifti):
    dlabel, _, labels = cifti
    path = tmp_path / 'networks.dlabel.nii'
    paint_labels(path, dlabel, [2, 0, 1, 2], ['visual', 'default'], name='networks')
    np.testing.assert_array_equal(read(path), np.array([[0, 2, 0, 1, 2]])[:, labels])
    made = nib.load(path)
    assert made.nifti_header.get_intent()[0] == 'ConnDenseLabel'
    assert made.header.get_axis(0).name.tolist() == ['networks']
    table = made.header.get_axis(0).label[0]
    assert {key: entry[0] for key, entry in table.items()} == {
        0: '???', 1: 'visual', 2: 'default',
    }  # fmt: skip
    assert table[0][1][3] == 0
    for place in (0, 1):
        np.testing.assert_allclose(table[place + 1][1], colour(place), atol=1e-3)
    assert made.header.get_axis(1) == nib.load(dlabel).header.get_axis(1)


def test_colours_can_be_told_apart():
    """And they are those of the report."""
    from matplotlib.colors import to_rgba

    colours = np.array([colour(i) for i in range(20)])
    np.testing.assert_allclose(colours, [to_rgba(code) for code in COLOURS])
    apart = np.linalg.norm(colours[:, None] - colours, axis=2)[np.triu_indices(20, 1)]
    assert apart.min() > 0.1


@pytest.mark.parametrize('labels', [[1, 2, 3, 1], [0, -1, 2, 1]])
def test_labels_without_a_name_are_refused(tmp_path, atlas, labels):
    with pytest.raises(BrainfmError, match=r'labels must be 1 to 2'):
        paint_labels(tmp_path / 'made.nii.gz', atlas, labels, ['a', 'b'])
    assert not (tmp_path / 'made.nii.gz').exists()


# --- series ----------------------------------------------------------------------------------


@pytest.mark.parametrize('of_run', ['LAS', 'RAS'])
@pytest.mark.parametrize('of_atlas', ['LAS', 'RAS'])
def test_series_come_back_exactly(tmp_path, series, of_atlas, of_run):
    atlas = save(tmp_path / 'atlas.nii.gz', *oriented(of_atlas, LABELS, AFFINE))
    grid = np.diag([1.5, 1.5, 1.5, 1])  # not the atlas's
    grid[:3, 3] = -9, -10, -8
    run = oriented(of_run, np.zeros((12, 13, 11, 2), np.int16), grid)
    run = save(tmp_path / 'run.nii.gz', *run)
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    found = parcellate(tmp_path / 'made.nii.gz', atlas, P)
    assert found.sampling == 'atlas-to-run'
    np.testing.assert_array_equal(found.data, series)
    np.testing.assert_array_equal(found.coverage, 1)
    assert found.header_tr == pytest.approx(TR)


def test_series_are_zero_outside_parcels(tmp_path, atlas, run, series):
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    expected = np.concatenate([np.zeros((T, 1), np.float32), series], axis=1).T[LABELS]
    np.testing.assert_array_equal(read(tmp_path / 'made.nii.gz'), expected)


def coarse(tmp_path, side='RAS'):
    """Atlas of 1 mm and run of 4 mm, whose voxels are shared by parcels 1 and 2."""
    labels = np.zeros((12, 12, 12), np.int16)
    labels[0, 0, 0] = 1  # smaller than a voxel, and not at a centre
    labels[1:4, :4, :4] = 2  # the rest of that voxel's right side
    labels[4:8, :4], labels[8:, 4:] = 3, 4
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = 1.5
    atlas = save(tmp_path / 'fine.nii.gz', *oriented(side, labels, np.eye(4)))
    return atlas, empty_run(tmp_path / 'coarse.nii.gz', (3, 3, 3), affine), labels


@pytest.mark.parametrize('side', ['LAS', 'RAS'])
def test_shared_voxels_hold_the_mean_by_number_of_atlas_voxels(tmp_path, series, side):
    atlas, run, labels = coarse(tmp_path, side)
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    made = read(tmp_path / 'made.nii.gz')
    blocks = labels.reshape(3, 4, 3, 4, 3, 4).transpose(0, 2, 4, 1, 3, 5).reshape(27, 64)
    for block, voxel in zip(blocks, made.reshape(27, T), strict=True):
        here = block[block > 0] - 1
        expected = series[:, here].mean(axis=1, dtype=float) if here.size else np.zeros(T)
        np.testing.assert_allclose(voxel, expected, rtol=1e-6)
    np.testing.assert_allclose(
        made[0, 0, 0], (series[:, 0] + 48 * series[:, 1].astype(float)) / 49, rtol=1e-6
    )


def test_series_come_back_from_a_coarse_grid(tmp_path, series):
    """Exactly where no voxel is shared; a parcel that shares one is drawn to its neighbour."""
    atlas, run, _ = coarse(tmp_path)
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    found = parcellate(tmp_path / 'made.nii.gz', atlas, P)
    assert found.sampling == 'run-to-atlas'
    np.testing.assert_array_equal(found.data[:, 2:], series[:, 2:])
    shared = (series[:, 0] + 48 * series[:, 1].astype(float)) / 49
    np.testing.assert_allclose(found.data[:, :2], np.stack([shared] * 2, axis=1), rtol=1e-6)


def test_a_missing_parcel_does_not_count_in_a_shared_voxel(tmp_path, series):
    atlas, run, _ = coarse(tmp_path)
    series[:, 1] = np.nan
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    np.testing.assert_array_equal(read(tmp_path / 'made.nii.gz')[0, 0, 0], series[:, 0])


def test_the_demo_on_a_coarse_grid(tmp_path, demo):
    """The painted file is what the sampler's weights say, for all 424 parcels."""
    atlas, image, _ = demo
    affine, shape = np.diag([12.0, 12, 12, 1]), (17, 20, 16)
    affine[:3, 3] = -96, -132, -78
    run = empty_run(tmp_path / 'run.nii.gz', shape, affine)
    rng = np.random.default_rng(1)
    series = (1000 + 10 * rng.standard_normal((T, atlas.n_parcels))).astype(np.float32)
    paint_series(tmp_path / 'made.nii.gz', run, image.get_filename(), series, TR)
    found = parcellate(tmp_path / 'made.nii.gz', image.get_filename(), atlas.n_parcels)
    assert found.sampling == 'run-to-atlas'

    sampler = make_sampler(image, atlas.n_parcels, shape, affine)
    size = np.diff(sampler.starts, append=sampler.voxels.size)
    counts = np.zeros((np.prod(shape), atlas.n_parcels))
    np.add.at(counts, (sampler.voxels, np.repeat(sampler.parcels, size)), 1)
    painted = counts @ series.T.astype(float) / np.maximum(counts.sum(axis=1), 1)[:, None]
    expected = (counts / counts.sum(axis=0)).T @ painted
    np.testing.assert_allclose(found.data, expected.T, rtol=1e-6)
    assert np.corrcoef(found.data.ravel(), series.ravel())[0, 1] > 0.8


@pytest.mark.parametrize('image', [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize('codes', [(4, 4), (0, 1), (2, 0)])
def test_the_header_is_that_of_the_run_with_a_new_length(tmp_path, atlas, series, image, codes):
    """Also where qform and sform differ, and in either version of the format."""
    run = tmp_path / 'run.nii.gz'
    picture = image(np.zeros((*LABELS.shape, 2), np.int16), AFFINE)
    picture.set_qform(mirrored(LABELS, AFFINE)[1] if codes[0] == 4 else AFFINE, codes[1])
    picture.set_sform(AFFINE, codes[0])
    picture.header['slice_end'], picture.header['descrip'] = 6, 'of the run'
    picture.header.set_xyzt_units('mm', 'msec')
    picture.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'of the run'))
    picture.to_filename(run)
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    old, new = nib.load(run), nib.load(tmp_path / 'made.nii.gz')
    assert type(new) is type(old)
    assert new.shape == (*LABELS.shape, T)
    assert new.get_data_dtype() == np.float32
    assert (new.dataobj.slope, new.dataobj.inter) == (1, 0)
    assert new.header.get_xyzt_units() == ('mm', 'sec')
    np.testing.assert_allclose(new.header.get_zooms(), (2, 2, 2, TR), rtol=1e-6)
    np.testing.assert_array_equal(new.affine, old.affine)
    for form in ('get_sform', 'get_qform'):
        (was, was_code), (now, code) = (getattr(i, form)(coded=True) for i in (old, new))
        assert code == was_code
        assert (now is None) == (was is None)
        if was is not None:
            np.testing.assert_array_equal(now, was)
    assert not new.header.extensions
    assert new.header['slice_end'] == 0
    assert new.header['descrip'] == b''


def test_a_missing_parcel_is_one_without_signal(tmp_path, atlas, run, series):
    series[:, 1] = np.nan
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    assert (read(tmp_path / 'made.nii.gz')[LABELS == 2] == 0).all()
    found = parcellate(tmp_path / 'made.nii.gz', atlas, P)
    np.testing.assert_array_equal(found.data, series)
    np.testing.assert_array_equal(found.coverage, [1, 0, 1, 1])


def test_gaps_in_time_hold_the_mean_of_the_rest(tmp_path, atlas, run, series, cifti):
    series[[0, 5], 2] = np.nan
    series[7] = np.nan
    filled = np.where(np.isnan(series), np.nanmean(series, axis=0, dtype=float), series)
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    assert np.isfinite(read(tmp_path / 'made.nii.gz')).all()
    found = parcellate(tmp_path / 'made.nii.gz', atlas, P)
    np.testing.assert_array_equal(found.data, filled.astype(np.float32))
    dlabel, grayordinates, _ = cifti
    paint_series(tmp_path / 'made.dtseries.nii', grayordinates, dlabel, series, TR)
    found = parcellate(tmp_path / 'made.dtseries.nii', dlabel, P)
    np.testing.assert_array_equal(found.data, filled.astype(np.float32))


def test_a_constant_parcel_is_written_as_it_is(tmp_path, atlas, run, series):
    """For parcellate, what never changes is no signal."""
    series[:, 3] = 700
    paint_series(tmp_path / 'made.nii.gz', run, atlas, series, TR)
    assert (read(tmp_path / 'made.nii.gz')[LABELS == 4] == 700).all()
    found = parcellate(tmp_path / 'made.nii.gz', atlas, P)
    np.testing.assert_array_equal(found.data[:, :3], series[:, :3])
    assert np.isnan(found.data[:, 3]).all()


def test_series_of_grayordinates(tmp_path, cifti, series, monkeypatch):
    monkeypatch.setattr('bids_brainfm.signals.paint._ROWS', 5)  # several blocks
    dlabel, run, labels = cifti
    series[:, 1] = np.nan
    path = tmp_path / 'made.dtseries.nii'
    paint_series(path, run, dlabel, series, TR)
    expected = np.concatenate([np.zeros((T, 1), np.float32), series], axis=1)
    np.testing.assert_array_equal(read(path), np.nan_to_num(expected[:, labels]))
    made = nib.load(path)
    time = made.header.get_axis(0)
    assert (time.start, time.unit, time.size) == (0, 'SECOND', T)
    assert time.step == pytest.approx(TR)
    assert made.header.get_axis(1) == nib.load(run).header.get_axis(1)
    assert made.nifti_header.get_intent()[0] == 'ConnDenseSeries'
    assert made.get_data_dtype() == np.float32
    found = parcellate(path, dlabel, P)
    np.testing.assert_array_equal(found.data, series)
    assert found.header_tr == pytest.approx(TR)


@pytest.mark.slow
def test_a_real_dlabel(tmp_path, shared):
    """91282 grayordinates of fsLR: series and labels."""
    dlabel = shared / 'atlases' / 'A424.dlabel.nii'
    axis = nib.load(dlabel).header.get_axis(1)
    run = tmp_path / 'run.dtseries.nii'
    empty = np.zeros((2, len(axis)), np.float32)
    nib.Cifti2Image(empty, header=(SeriesAxis(0, TR, 2), axis)).to_filename(run)
    rng = np.random.default_rng(0)
    series = rng.standard_normal((3, 424)).astype(np.float32)
    paint_series(tmp_path / 'made.dtseries.nii', run, dlabel, series, TR)
    found = parcellate(tmp_path / 'made.dtseries.nii', dlabel, 424)
    np.testing.assert_array_equal(found.data, series)

    # the first 180 parcels are of the right cortex, the next 180 of the left
    side = np.repeat([1, 2, 0], [180, 180, 64])
    paint_labels(tmp_path / 'made.dlabel.nii', dlabel, side, ['right', 'left'])
    painted = read(tmp_path / 'made.dlabel.nii')[0]
    left = axis.name == 'CIFTI_STRUCTURE_CORTEX_LEFT'
    right = axis.name == 'CIFTI_STRUCTURE_CORTEX_RIGHT'
    assert not (painted[left] == 1).any()
    assert not (painted[right] == 2).any()
    assert (painted[left] == 2).mean() > 0.9
    assert (painted[right] == 1).mean() > 0.9


def test_equal_series_give_equal_files(tmp_path, atlas, run, series):
    """Gzip notes a name and a time if it is let; the scaling is written as 1 and 0."""
    for name in 'ab':
        paint_series(tmp_path / f'{name}.nii.gz', run, atlas, series, TR)
    packed = (tmp_path / 'a.nii.gz').read_bytes()
    assert packed == (tmp_path / 'b.nii.gz').read_bytes()
    assert packed[4:8] == bytes(4)
    whole = gzip.decompress(packed)
    assert len(whole) == 352 + LABELS.size * T * 4
    assert np.frombuffer(whole[112:120], np.float32).tolist() == [1, 0]


# --- refusals and broken writes --------------------------------------------------------------


@pytest.mark.parametrize('n_values', [P - 1, P + 1])
def test_another_number_of_values_is_refused(tmp_path, atlas, run, cifti, n_values):
    wrong, series = np.ones(n_values), np.ones((T, n_values), np.float32)
    made = tmp_path / 'made.nii.gz'
    for paint in (
        lambda: paint_map(made, atlas, wrong),
        lambda: paint_map(made, cifti[0], wrong),
        lambda: paint_labels(made, atlas, wrong.astype(int), ['a']),
        lambda: paint_series(made, run, atlas, series, TR),
        lambda: paint_series(made, cifti[1], cifti[0], series, TR),
    ):
        with pytest.raises(BrainfmError, match=rf'{n_values} values for the 4 parcels') as caught:
            paint()
        assert '\n' not in str(caught.value)
        assert not made.exists()


def test_files_that_do_not_fit_are_refused(tmp_path, atlas, run, cifti, series):
    made = tmp_path / 'made.nii.gz'
    broken = save(tmp_path / 'broken.nii.gz', np.where(LABELS == 2, 1.5, LABELS))
    far = AFFINE.copy()
    far[:3, 3] += 1000
    far = empty_run(tmp_path / 'far.nii.gz', affine=far)
    shorter = nib.load(cifti[1])
    axes = shorter.header.get_axis(0), shorter.header.get_axis(1)[:9]
    nib.Cifti2Image(np.zeros((2, 9), np.float32), header=axes).to_filename(
        tmp_path / 'short.dtseries.nii'
    )
    for sentence, paint in {
        'labels must be whole numbers': lambda: paint_map(made, broken, VALUES),
        'absent.nii.gz does not exist': lambda: paint_map(made, tmp_path / 'absent.nii.gz', [1]),
        'not a 4-D BOLD run': lambda: paint_series(made, atlas, atlas, series, TR),
        'space of the run': lambda: paint_series(made, far, atlas, series, TR),
        '3-D image of labels': lambda: paint_series(made, run, cifti[0], series, TR),
        'not a .dlabel.nii': lambda: paint_series(made, cifti[1], atlas, series, TR),
        '9 grayordinates': lambda: paint_series(
            made, tmp_path / 'short.dtseries.nii', cifti[0], series, TR
        ),
    }.items():
        with pytest.raises(BrainfmError, match=sentence):
            paint()
        assert not made.exists()


@pytest.mark.parametrize('kind', ['map', 'labels', 'series', 'dscalar', 'dlabel', 'dtseries'])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, atlas, run, cifti, series, kind):
    """The limit on the size of files stands for a full disk."""
    folder = tmp_path / 'out'
    folder.mkdir()
    volume, dense = folder / 'made.nii.gz', folder / f'made.{kind}.nii'
    path, paint = {
        'map': (volume, lambda: paint_map(volume, atlas, VALUES)),
        'labels': (volume, lambda: paint_labels(volume, atlas, [1, 1, 1, 1], ['a'])),
        'series': (volume, lambda: paint_series(volume, run, atlas, series, TR)),
        'dscalar': (dense, lambda: paint_map(dense, cifti[0], VALUES)),
        'dlabel': (dense, lambda: paint_labels(dense, cifti[0], [1, 1, 1, 1], ['a'])),
        'dtseries': (dense, lambda: paint_series(dense, cifti[1], cifti[0], series, TR)),
    }[kind]
    path.write_text('old')
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, usual[1]))
    try:
        with pytest.raises(BrainfmError, match='cannot be written'):
            paint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [file.name for file in folder.iterdir()] == [path.name]
    assert path.read_text() == 'old'
    paint()
    assert path.stat().st_size > 50
