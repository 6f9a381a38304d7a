"""Atlases: the official one as its files say, the demo one as its script makes it."""

import gzip
import importlib.util
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_brainfm.atlases.atlas import Atlas, hemisphere, load_atlas
from bids_brainfm.atlases.cards import images_here, load_card, missing_files
from bids_brainfm.atlases.obtain import obtain_atlas, warp_labels
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import home
from bids_brainfm.validation import DATA

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared' / 'atlases'
SPACES = ('MNI152NLin6Asym', 'MNI152NLin2009cAsym', 'fsLR')
WARP = load_card('A424').files[-1].made

needs_a424 = pytest.mark.skipif(
    not SHARED.is_dir(), reason='the A424 files are GPL-3 and not in the repository'
)


@pytest.fixture(scope='module')
def a424_home(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    obtain_atlas(load_card('A424'), home, SHARED)
    return home


@pytest.fixture
def own_atlas(tmp_path):
    """A user's own atlas of four parcels: card, table and image; returns the card's path."""
    labels = np.zeros((10, 10, 10), np.int16)
    for label, (i, j) in enumerate([(0, 0), (0, 6), (7, 0), (7, 6)], start=1):
        labels[i : i + 3, j : j + 3, 4:7] = label
    affine = nib.affines.from_matvec(np.eye(3) * 10, (-45, -45, -45))
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / 'mine.nii.gz')
    (tmp_path / 'mine.tsv').write_text('index\tname\n1\tL_a\n2\tL_b\n3\tR_a\n4\tR_b\n')
    card = tmp_path / 'mine.yml'
    card.write_text(
        'name: Mine\nparcels: 4\nlicence: CC0\nfiles:\n'
        '- {name: mine.tsv, role: table}\n'
        '- {name: mine.nii.gz, role: image, space: MNI152NLin6Asym, resolution: 10}\n'
    )
    return card


def save_labels(card, change):
    """Rewrite a user's image with changed labels."""
    path = card.with_name('mine.nii.gz')
    image = nib.load(path)
    labels = change(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(labels, image.affine), path)


def test_home_is_read_when_asked(monkeypatch, tmp_path):
    monkeypatch.setenv('BIDS_BRAINFM_HOME', str(tmp_path / 'a'))
    assert home() == tmp_path / 'a'
    monkeypatch.delenv('BIDS_BRAINFM_HOME')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'b'))
    assert home() == tmp_path / 'b' / 'bids_brainfm'
    assert list(tmp_path.iterdir()) == []


@needs_a424
def test_a424_parcels(a424_home):
    atlas = load_atlas('A424', a424_home)
    assert atlas.n_parcels == 424
    assert atlas.names[0] == 'R_V1_ROI'
    assert atlas.names[180] == 'L_V1_ROI'
    assert atlas.names[360:362] == ('mAmyg_L', 'mAmyg_R')
    assert atlas.names[423] == 'Right_X'
    assert atlas.xyz[0].tolist() == [14, -78, 4]
    sides = np.array(atlas.hemispheres)
    assert (sides == 'B').sum() == 8  # the vermis
    assert (atlas.xyz[sides == 'R', 0] > 0).all()
    assert (atlas.xyz[sides == 'L', 0] < 0).all()
    assert len(np.unique(atlas.xyz[:, 1])) == 77
    table = atlas.table()
    assert list(table) == ['index', 'name', 'hemisphere', 'x', 'y', 'z', 'network']
    assert table['index'].tolist() == list(range(1, 425))


@needs_a424
def test_a424_images(a424_home):
    atlas = load_atlas('A424', a424_home)
    assert missing_files(load_card('A424'), a424_home) == []
    for space in SPACES:
        assert atlas.image_for(space, 2.4).space == space
    assert atlas.image_for('MNI152NLin2009cAsym', 1.2).resolution == 1
    assert atlas.image_for('MNI152NLin2009cAsym', 4.0).resolution == 2
    assert 'as supplied' in atlas.image_for('MNI152NLin2009cAsym', 2).provenance
    with pytest.raises(BrainfmError, match=r'no image for space T1w .*MNI152NLin6Asym, MNI'):
        atlas.image_for('T1w', 2)


@needs_a424
def test_a424_without_label_120_is_refused(a424_home, tmp_path):
    """The trap of A424.nii.gz, which lacks a label."""
    shutil.copytree(a424_home, tmp_path / 'home')
    path = load_atlas('A424', tmp_path / 'home').image_for('MNI152NLin6Asym', 2).path
    image = nib.load(path)
    labels = np.asanyarray(image.dataobj).copy()
    labels[labels == 120] = 0
    nib.save(nib.Nifti1Image(labels, image.affine), path)
    with pytest.raises(BrainfmError, match=r'lacks 1 of the 424 labels of atlas A424 \(120\)'):
        load_atlas('A424', tmp_path / 'home').image_for('MNI152NLin6Asym', 2)


def test_absent_atlas_names_files_and_command(tmp_path):
    with pytest.raises(BrainfmError) as caught:
        load_atlas('A424', tmp_path)
    assert 'A424_Coordinates.dat' in str(caught.value)
    assert '`bids_brainfm_models fetch A424 --from DIR`' in str(caught.value)
    card = load_card('A424')
    assert 'A424+2mm.nii.gz' in missing_files(card, tmp_path, ['MNI152NLin6Asym'])
    assert 'A424+2mm.nii.gz' not in missing_files(card, tmp_path, ['fsLR'])
    assert list(tmp_path.iterdir()) == []


def write_itk_composite(path, shift_ras, shape=(30, 36, 30), spacing=8.0):
    """An ITK composite as TemplateFlow has: identity affine, field of one constant shift."""
    import h5py

    shift = np.array(shift_ras, float) * [-1, -1, 1]  # ITK points are LPS
    origin = np.array([-120, -150, -90.0]) * [-1, -1, 1]
    direction = np.diag([-1.0, -1, 1])
    field = np.broadcast_to(shift, (*shape, 3))
    with h5py.File(path, 'w') as file:
        group = file.create_group('TransformGroup')
        transforms = {
            'CompositeTransform': (None, None),
            'AffineTransform': (np.r_[np.eye(3).ravel(), np.zeros(3)], np.zeros(3)),
            'DisplacementFieldTransform': (
                np.moveaxis(field, -1, 0).ravel(order='F'),
                np.r_[shape, origin, [spacing] * 3, direction.ravel()],
            ),
        }
        for number, (kind, (values, fixed)) in enumerate(transforms.items()):
            entry = group.create_group(str(number))
            entry['TransformType'] = np.array([f'{kind}_double_3_3'.encode()])
            if values is not None:
                entry['TransformParameters'] = values
                entry['TransformFixedParameters'] = fixed


@needs_a424
def test_warp_takes_points_of_the_new_grid_to_the_old_image(tmp_path):
    write_itk_composite(tmp_path / 'x.h5', (4, -6, 2))
    affine = nib.affines.from_matvec(np.eye(3) * 2, (-90, -126, -72))
    image = SHARED / 'A424+2mm.nii.gz'
    warped = np.asanyarray(warp_labels(image, tmp_path / 'x.h5', (91, 109, 91), affine).dataobj)
    truth = np.asanyarray(nib.load(image).dataobj)[::-1]  # LAS to RAS
    shifted = np.roll(truth, (-2, 3, -1), axis=(0, 1, 2))  # what lies at x + shift
    assert np.array_equal(warped[5:-5, 5:-5, 5:-5], shifted[5:-5, 5:-5, 5:-5])


@needs_a424
def test_image_that_nobody_supplied_is_warped(tmp_path, monkeypatch):
    source = tmp_path / 'usb'
    source.mkdir()
    for name in ('A424+2mm.nii.gz', 'A424.dlabel.nii', 'A424_Coordinates.dat'):
        shutil.copy(SHARED / name, source)
    monkeypatch.setenv('TEMPLATEFLOW_HOME', str(tmp_path / 'templateflow'))
    card, home = load_card('A424'), tmp_path / 'home'
    with pytest.raises(BrainfmError, match='ready except for space MNI152NLin2009cAsym'):
        obtain_atlas(card, home, source)
    spaces = {image.space for image in load_atlas('A424', home).images}
    assert spaces == {'MNI152NLin6Asym', 'fsLR'}
    assert missing_files(card, home, ['MNI152NLin6Asym', 'fsLR']) == []
    assert len(missing_files(card, home)) == 2

    folder = tmp_path / 'templateflow' / 'tpl-MNI152NLin2009cAsym'
    folder.mkdir(parents=True)
    write_itk_composite(folder / WARP.transform, (0, 0, 0))
    obtain_atlas(card, home, source)
    assert missing_files(card, home) == []
    image = load_atlas('A424', home).image_for('MNI152NLin2009cAsym', 2)
    assert image.path.name == 'tpl-MNI152NLin2009cAsym_atlas-A424_res-02_dseg.nii.gz'
    assert image.provenance == (f'A424+2mm.nii.gz warped nearest-neighbour with {WARP.transform}')
    assert nib.load(image.path).shape == (97, 115, 97)
    made = image.path.stat().st_mtime_ns
    obtain_atlas(card, home, source)
    assert image.path.stat().st_mtime_ns == made

    # a supplied file is preferred
    shutil.copy(SHARED / card.files[-1].name, source)
    obtain_atlas(card, home, source)
    image = load_atlas('A424', home).image_for('MNI152NLin2009cAsym', 2)
    assert image.path.name == card.files[-1].name


@pytest.mark.parametrize(
    ('name', 'x', 'side'),
    [
        ('L_V1_ROI', -1, 'L'),
        ('Otha_R', 1, 'R'),
        ('Left_I-IV', -1, 'L'),
        ('Vermis_Crus_I', -4, 'B'),
        ('PCC', -3, 'L'),
        ('brainstem', 0, 'B'),
    ],
)
def test_hemisphere(name, x, side):
    assert hemisphere(name, x) == side


def test_own_atlas_with_centres_from_its_image(own_atlas):
    atlas = load_atlas(own_atlas, own_atlas.parent)
    assert isinstance(atlas, Atlas)
    assert atlas.hemispheres == ('L', 'L', 'R', 'R')
    assert atlas.xyz[2].tolist() == [35, -35, 5]
    assert atlas.image_for('MNI152NLin6Asym', 2).provenance == 'mine.nii.gz'


def test_own_atlas_refusals(own_atlas):
    def image():
        return load_atlas(own_atlas, own_atlas.parent).image_for('MNI152NLin6Asym', 2)

    table = own_atlas.with_name('mine.tsv')
    original = table.read_text()
    table.write_text('index\tname\n2\tL_b\n1\tL_a\n3\tR_a\n4\tR_b\n')
    with pytest.raises(BrainfmError, match='1 to 4 of atlas Mine in order'):
        image()
    table.write_text(original.replace('L_', 'Q').replace('R_', 'L_').replace('Q', 'R_'))
    with pytest.raises(BrainfmError, match='on the other side than its name says'):
        image()
    rows = [('L_a', -35, -35), ('L_b', -35, 25), ('R_a', 35, -35), ('R_b', 35, 25)]
    text = ''.join(f'{i + 1}\t{n}\t{x}\t{y}\t5\n' for i, (n, x, y) in enumerate(rows))
    table.write_text('index\tname\tx\ty\tz\n' + text)
    assert image().space == 'MNI152NLin6Asym'
    save_labels(own_atlas, lambda labels: labels[::-1])
    with pytest.raises(BrainfmError, match='flipped left to right'):
        image()
    save_labels(own_atlas, lambda labels: labels[::-1] + np.float32(0.5))
    with pytest.raises(BrainfmError, match='not whole numbers'):
        image()
    save_labels(own_atlas, lambda labels: np.where(labels == 2.5, 9, labels - 0.5))
    with pytest.raises(BrainfmError, match=r'lacks 1 of the 4 labels of atlas Mine \(2\)'):
        image()


@pytest.mark.parametrize(
    ('old', 'new', 'sentence'),
    [
        ('parcels: 4', 'parcels: 5', 'must list the parcels 1 to 5'),
        ('role: table', 'role: words', "role 'words' is not one of image, labels"),
        (', resolution: 10', '', 'must state space and resolution'),
        ('licence: CC0', 'license: CC0', 'lacks licence and has the unknown key license'),
        ('name: Mine', ': : :', 'is not a YAML mapping'),
    ],
)
def test_bad_card(own_atlas, old, new, sentence):
    own_atlas.write_text(own_atlas.read_text().replace(old, new))
    with pytest.raises(BrainfmError, match=sentence):
        load_atlas(own_atlas, own_atlas.parent)


def test_unknown_atlas_names_the_known():
    with pytest.raises(BrainfmError, match='atlas card A425: choose A424, Demo424, Schaefer2018'):
        load_card('A425')


def test_demo_atlas(tmp_path):
    atlas = load_atlas('Demo424', tmp_path)
    assert atlas.n_parcels == 424
    for space in SPACES[:2]:
        image = atlas.image_for(space, 4)
        assert 'for demonstration' in image.provenance
    sizes = np.bincount(np.asanyarray(nib.load(image.path).dataobj).ravel())[1:]
    assert sizes.min() >= 10
    assert image.path.stat().st_size < 100_000
    mirrored = atlas.xyz[:212] * [-1, 1, 1]
    np.testing.assert_allclose(mirrored, atlas.xyz[212:], atol=1e-4)
    assert images_here(load_card('Demo424'), tmp_path) == atlas.images


def test_demo_atlas_is_what_its_script_makes(tmp_path):
    script = ROOT / 'tools' / 'make_demo_atlas.py'
    spec = importlib.util.spec_from_file_location('make_demo_atlas', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    table, image = 'Demo424_dseg.tsv', 'Demo424_dseg.nii.gz'
    assert (tmp_path / table).read_bytes() == (DATA / 'atlases' / table).read_bytes()
    made, kept = ((folder / image).read_bytes() for folder in (tmp_path, DATA / 'atlases'))
    # The inflated bytes: the deflated ones depend on the zlib that Python was built with.
    assert gzip.decompress(made) == gzip.decompress(kept)
    assert kept[4:8] == bytes(4)  # no time stamp
