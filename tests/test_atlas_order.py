"""The order of an atlas's parcels: made of its parts, checked by names and by places."""

import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.atlases.cards import load_card, missing_files
from bids_brainfm.atlases.export import export_atlas
from bids_brainfm.atlases.images import label_centres
from bids_brainfm.atlases.obtain import obtain_atlas, overlay_labels
from bids_brainfm.errors import BrainfmError

SPACE = 'MNI152NLin6Asym'
NAMES = ('p-rh', 'p-lh', '17Networks_LH_A_1', '17Networks_LH_B_x_1', '17Networks_RH_A_1',
         '17Networks_RH_B_1')  # fmt: skip
SEVEN = ('p-rh', 'p-lh', '7Networks_LH_C_1', '7Networks_LH_D_1', '7Networks_RH_C_1',
         '7Networks_RH_D_1')  # fmt: skip
XYZ = [(20, -10, 0), (-20, -20, 0), (-40, -60, 10), (-40, 40, 10), (40, -50, 10), (40, 50, 10)]
# Where parcel i stands in a wrong order.
WRONG = {
    '7-network order': (1, 2, 4, 3, 6, 5),
    'cortex first': (5, 6, 1, 2, 3, 4),
    'left first': (2, 1, 3, 4, 5, 6),
}
CARD = """
name: Small
parcels: 6
licence: CC0
order: {'*-rh': 1, '*-lh': 1, 17Networks_LH_A_*: 1, 17Networks_LH_B_*: 1, 17Networks_RH_*: 2}
lookalikes: '*small*'
files:
- {name: places.tsv, role: places}
- {name: small17.dlabel.nii, role: labels, space: fsLR, url: nowhere}
- name: small17.nii.gz
  role: image
  space: MNI152NLin6Asym
  resolution: 10
  made: {by: overlay, of: [cortex_small17.nii.gz, subcortex.nii], provenance: two parts}
- {name: subcortex.nii, role: part, parcels: [1, 2], url: nowhere}
- {name: cortex_small17.nii.gz, role: part, parcels: [3, 6], url: nowhere}
"""


def paint(path, xyz, first=1, signs=(1, 1, 1)):
    """Label image of 10 mm voxels, one for each centre, with axes that run as `signs` say."""
    affine = nib.affines.from_matvec(np.diag(signs) * 10, np.multiply(signs, -100))
    labels = np.zeros((21, 21, 21), np.int16)
    ijk = nib.affines.apply_affine(np.linalg.inv(affine), xyz).astype(int)
    labels[tuple(ijk.T)] = np.arange(first, first + len(xyz))
    nib.save(nib.Nifti1Image(labels, affine), path)


def write_dlabel(path, names, subcortex=(1, 2), cortex=(3, 4, 5, 6)):
    """A dlabel file: the subcortical labels each in the voxel of XYZ, the cortical in vertices."""
    affine = nib.affines.from_matvec(np.eye(3) * 10, (-100, -100, -100))
    vertices = np.arange(len(cortex))
    axis = nib.cifti2.BrainModelAxis.from_surface(vertices, len(vertices), 'CORTEX_LEFT')
    if subcortex:
        mask = np.zeros((21, 21, 21), bool)
        ijk = nib.affines.apply_affine(np.linalg.inv(affine), XYZ[:2]).astype(int)
        mask[tuple(ijk.T)] = True
        axis += nib.cifti2.BrainModelAxis.from_mask(mask, name='THALAMUS_LEFT', affine=affine)
        subcortex = subcortex[::-1]  # voxels count from the left
    table = {i: (name, (0, 0, 0, 1)) for i, name in enumerate(('???', *names))}
    labels = nib.cifti2.LabelAxis(['parcels'], [table])
    data = np.array([(*cortex, *subcortex)], np.float32)
    nib.save(nib.Cifti2Image(data, (labels, axis)), path)


def in_order(items, fault):
    """Items of the parcels as a file in a wrong order has them."""
    return [items[i] for i in np.argsort(WRONG[fault])]


@pytest.fixture
def card(tmp_path):
    """A user's own atlas: subcortex and cortex, in two parts; its card, nothing fetched yet."""
    folder = tmp_path / 'mine'
    folder.mkdir()
    table = pd.DataFrame(XYZ, index=pd.RangeIndex(1, 7, name='index'), columns=list('xyz'))
    table['structure'] = ['subcortex'] * 2 + ['cortex'] * 4
    table.assign(**WRONG).to_csv(folder / 'places.tsv', sep='\t')
    (folder / 'small.yml').write_text(CARD)
    return load_card(folder / 'small.yml')


@pytest.fixture
def usb(tmp_path):
    """The published parts, on grids that count in different directions."""
    folder = tmp_path / 'usb'
    folder.mkdir()
    write_dlabel(folder / 'small17.dlabel.nii', NAMES)
    paint(folder / 'subcortex.nii', XYZ[:2], signs=(-1, 1, 1))
    paint(folder / 'cortex_small17.nii.gz', XYZ[2:])
    return folder


def present(card):
    return sorted(p.name for p in card.path.parent.iterdir() if p.suffix != '.sha256')


def test_made_of_its_parts(card, usb, tmp_path):
    obtain_atlas(card, tmp_path, usb)
    atlas = load_atlas(card.path, tmp_path)
    assert atlas.names == NAMES
    assert atlas.hemispheres == ('R', 'L', 'L', 'L', 'R', 'R')
    assert atlas.networks == ('Subcortex', 'Subcortex', 'A', 'B', 'A', 'B')
    assert atlas.structures == ('subcortex',) * 2 + ('cortex',) * 4
    assert atlas.xyz.tolist() == [list(xyz) for xyz in XYZ]
    assert atlas.misorders['cortex first'].tolist() == [2, 3, 4, 5, 0, 1]
    image = atlas.image_for(SPACE, 2)
    assert image.provenance == 'two parts'
    assert image.path.name == f'tpl-{SPACE}_atlas-Small_res-10_dseg.nii.gz'
    made = nib.load(image.path)
    centres = label_centres(np.asanyarray(made.dataobj), made.affine, 6)
    assert centres.tolist() == atlas.xyz.tolist()
    assert atlas.image_for('fsLR').path.name == 'small17.dlabel.nii'
    assert missing_files(card, tmp_path) == []
    written = image.path.stat().st_mtime_ns
    obtain_atlas(card, tmp_path, usb)
    assert image.path.stat().st_mtime_ns == written

    # a supplied image is preferred
    shutil.copy(image.path, usb / 'small17.nii.gz')
    obtain_atlas(card, tmp_path, usb)
    assert load_atlas(card.path, tmp_path).image_for(SPACE, 2).path.name == 'small17.nii.gz'


def test_exported_with_its_networks(card, usb, tmp_path):
    obtain_atlas(card, tmp_path, usb)
    atlas = load_atlas(card.path, tmp_path)
    copy = export_atlas(tmp_path / 'out', atlas, atlas.image_for('fsLR'))
    table = pd.read_csv(next(copy.parent.glob('*.tsv')), sep='\t')
    assert table['name'].tolist() == list(NAMES)
    assert table['network'].tolist() == list(atlas.networks)


def test_what_lies_above_wins(tmp_path):
    paint(tmp_path / 'below.nii.gz', XYZ[2:])
    paint(tmp_path / 'above.nii.gz', [XYZ[4]], signs=(-1, -1, 1))
    image = overlay_labels([tmp_path / 'below.nii.gz', tmp_path / 'above.nii.gz'], [3, 1])
    labels = np.asanyarray(image.dataobj)
    assert sorted(labels[labels > 0]) == [1, 3, 4, 6]
    centre = label_centres(labels, image.affine, 6)
    assert centre[0].tolist() == list(XYZ[4])
    assert np.isnan(centre[1]).all()


@pytest.mark.parametrize('fault', [*WRONG, 'flipped left to right'])
def test_volume_with_a_known_fault(card, usb, tmp_path, fault):
    xyz = np.multiply(XYZ, [-1, 1, 1]) if fault not in WRONG else in_order(XYZ, fault)
    paint(usb / 'small17.nii.gz', xyz)
    obtain_atlas(card, tmp_path, usb)  # no sha256 in this card, so it is taken
    with pytest.raises(BrainfmError, match=rf'small17.nii.gz .* Small .*\({fault}\)'):
        load_atlas(card.path, tmp_path).image_for(SPACE, 2)


def test_volume_with_an_unknown_fault(card, usb, tmp_path):
    paint(usb / 'small17.nii.gz', [XYZ[i] for i in (0, 4, 1, 3, 2, 5)])
    obtain_atlas(card, tmp_path, usb)
    with pytest.raises(BrainfmError, match=r'\(numbered in another order\)'):
        load_atlas(card.path, tmp_path).image_for(SPACE, 2)


def test_dlabel_whose_voxels_are_in_a_wrong_order(card, usb, tmp_path):
    write_dlabel(usb / 'small17.dlabel.nii', NAMES, subcortex=(2, 1))
    obtain_atlas(card, tmp_path, usb)
    atlas = load_atlas(card.path, tmp_path)
    assert atlas.image_for(SPACE, 2)
    with pytest.raises(BrainfmError, match=r'small17.dlabel.nii .*\(left first\)'):
        atlas.image_for('fsLR')


@pytest.mark.parametrize(
    ('names', 'fault'),
    [
        (SEVEN, '7-network order'),
        (in_order(NAMES, 'cortex first'), 'cortex first'),
        (in_order(NAMES, 'left first'), 'left first'),
        (in_order(NAMES, '7-network order'), '7-network order'),
        (('p-rh', 'q-lh', *NAMES[2:]), 'numbered in another order'),
        ((*NAMES[:4], '17Networks_LH_B_1', NAMES[5]), 'numbered in another order'),
    ],
)
def test_names_with_a_fault(card, usb, tmp_path, names, fault):
    write_dlabel(usb / 'small17.dlabel.nii', names)
    with pytest.raises(BrainfmError, match=rf'small17.dlabel.nii .* Small .*\({fault}\)'):
        obtain_atlas(card, tmp_path, usb)


def test_part_in_a_wrong_order_is_not_kept(card, usb, tmp_path):
    right = usb / 'cortex_small17.nii.gz'
    kept = right.read_bytes()
    paint(right, in_order(XYZ, '7-network order')[2:])
    with pytest.raises(BrainfmError, match=r'ready except .*\(7-network order\).*not kept'):
        obtain_atlas(card, tmp_path, usb)
    assert 'cortex_small17.nii.gz' not in present(card)
    assert not [name for name in present(card) if name.startswith(('tpl-', 'part_'))]
    assert {image.space for image in load_atlas(card.path, tmp_path).images} == {'fsLR'}
    right.write_bytes(kept)
    obtain_atlas(card, tmp_path, usb)
    assert load_atlas(card.path, tmp_path).image_for(SPACE, 2)


def test_own_part_in_a_wrong_order_is_left_alone(card, usb, tmp_path):
    """What the user put beside a card is not ours to remove."""
    own = card.path.with_name('cortex_small17.nii.gz')
    paint(own, XYZ[2:], signs=(-1, 1, 1))
    image = nib.load(own)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([10, 10, 10, 1])), own)
    with pytest.raises(BrainfmError, match=rf'{own} does not .* Remove it, then fetch again'):
        obtain_atlas(card, tmp_path, usb)
    assert own.is_file()


def test_image_that_lacks_a_parcel_never_gets_its_name(card, usb, tmp_path):
    """Both parts are right, but the one above hides a parcel of the one below."""
    paint(usb / 'subcortex.nii', XYZ[:2], signs=(-1, 1, 1))
    image = nib.load(usb / 'subcortex.nii')
    labels = np.asanyarray(image.dataobj).copy()
    below = np.round(np.linalg.inv(image.affine) @ [*XYZ[2], 1]).astype(int)[:3]
    away = np.round(np.linalg.inv(image.affine) @ [2 * XYZ[1][0] - XYZ[2][0], 40, -10, 1])[:3]
    labels[tuple(below)] = labels[tuple(away.astype(int))] = 2  # the centre stays where it was
    nib.save(nib.Nifti1Image(labels, image.affine), usb / 'subcortex.nii')
    with pytest.raises(BrainfmError, match=r'lacks 1 of the 6 labels of atlas Small \(3\)'):
        obtain_atlas(card, tmp_path, usb)
    assert not [name for name in present(card) if name.startswith(('tpl-', 'part_'))]


def test_missing_part_is_named(card, usb, tmp_path):
    (usb / 'cortex_small17.nii.gz').unlink()
    with pytest.raises(BrainfmError, match=r'neither supplied .* hold cortex_small17.nii.gz: add'):
        obtain_atlas(card, tmp_path, usb)
    assert load_atlas(card.path, tmp_path).image_for('fsLR')


@pytest.mark.parametrize(
    ('name', 'write', 'fault'),
    [
        ('small7.dlabel.nii', lambda path: write_dlabel(path, SEVEN), '7-network order'),
        ('small7.nii.gz', lambda path: paint(path, in_order(XYZ, '7-network order')), '7-network'),
        (
            'only_small17.dlabel.nii',
            lambda path: write_dlabel(path, NAMES[2:], (), (1, 2, 3, 4)),
            'the 2 parcels of the subcortex are missing',
        ),
        (
            'only_small17.nii.gz',
            lambda path: paint(path, XYZ[2:]),
            'the 2 parcels of the subcortex are missing',
        ),
        (
            'only_small7.nii.gz',
            lambda path: paint(path, in_order(XYZ, '7-network order')[2:]),
            '7-network order, the 2 parcels of the subcortex are missing',
        ),
    ],
)
def test_folder_that_holds_a_lookalike_instead(card, usb, tmp_path, name, write, fault):
    (usb / 'small17.dlabel.nii').unlink()
    write(usb / name)
    with pytest.raises(BrainfmError) as caught:
        obtain_atlas(card, tmp_path, usb)
    assert f'{usb} does not hold small17.dlabel.nii' in str(caught.value)
    assert f'{usb / name} does not show atlas Small' in str(caught.value)
    assert fault in str(caught.value)
    assert 'cortex_small17.nii.gz does not' not in str(caught.value)


def test_lookalike_under_the_right_name(card, usb, tmp_path):
    """A checksum alone would not tell what is wrong."""
    path = card.path
    path.write_text(path.read_text().replace('fsLR, url', f'fsLR, sha256: {"f" * 64}, url'))
    write_dlabel(usb / 'small17.dlabel.nii', SEVEN)
    with pytest.raises(BrainfmError, match=r'where f{64} was expected.*\(7-network order\)'):
        obtain_atlas(load_card(path), tmp_path, usb)
    assert present(card) == ['places.tsv', 'small.yml']


@pytest.mark.parametrize(
    ('old', 'new', 'sentence'),
    [
        ("'*-rh': 1", "'*-rh': 2", 'the order of 7 names for 6 parcels'),
        ('by: overlay', 'by: magic', r"small17\.nii\.gz: by 'magic' is not one of warp, overlay"),
        (
            'subcortex.nii]',
            'absent.nii]',
            r'small17\.nii\.gz is made of .*absent\.nii, but',
        ),
        (', provenance: two parts', '', r'small17\.nii\.gz lacks provenance'),
        (
            'parcels: [1, 2], ',
            '',
            r'subcortex\.nii: a part must state the parcels',
        ),
    ],
)
def test_bad_card(card, old, new, sentence):
    card.path.write_text(card.path.read_text().replace(old, new))
    with pytest.raises(BrainfmError, match=sentence):
        load_card(card.path)


def test_bad_table_of_places(card, usb, tmp_path):
    obtain_atlas(card, tmp_path, usb)
    path = card.path.with_name('places.tsv')
    text = path.read_text()
    path.write_text(text.replace('subcortex\t1\t5', 'subcortex\t2\t5'))
    with pytest.raises(BrainfmError, match=r'Column 7-network order of .*places\.tsv must list'):
        load_atlas(card.path, tmp_path)
    path.write_text(text.replace('structure', 'part'))
    with pytest.raises(BrainfmError, match=r'places.tsv of atlas Small cannot be read'):
        load_atlas(card.path, tmp_path)


# The atlas of Brain-JEPA itself

NAME = 'Schaefer2018Tian2020'
DLABEL = 'Schaefer2018_400Parcels_17Networks_order_Tian_Subcortex_S3.dlabel.nii'
VOLUME = 'tpl-{}_res-02_atlas-Schaefer2018Tian2020_desc-400Parcels17NetworksS3_dseg.nii.gz'
PART = 'tpl-{}_res-02_atlas-Schaefer2018_desc-400Parcels17Networks_dseg.nii.gz'
TIAN = {
    'MNI152NLin6Asym': 'Tian_Subcortex_S3_3T.nii',
    'MNI152NLin2009cAsym': 'Tian_Subcortex_S3_3T_2009cAsym.nii.gz',
}


@pytest.fixture(scope='module')
def official(shared, tmp_path_factory):
    """The atlas, fetched from the shared files."""
    home = tmp_path_factory.mktemp('home')
    obtain_atlas(load_card(NAME), home, shared / 'atlases')
    return load_atlas(NAME, home)


@pytest.fixture(scope='module')
def nodes(shared):
    """Names and numbers of the parcels in both orders."""
    path = shared / 'atlases' / f'atlas-{NAME}_desc-400Parcels17NetworksS3_dseg.tsv'
    return pd.read_csv(path, sep='\t')


def renumber(source, target, numbers):
    """Copy of a label volume or dlabel file in which label i is numbers[i]."""
    image = nib.load(source)
    labels = np.asanyarray(image.dataobj).astype(int)
    changed = np.r_[0, numbers][labels]
    if isinstance(image, nib.Cifti2Image):
        new = nib.Cifti2Image(changed.astype(np.float32), image.header)
    else:
        new = nib.Nifti1Image(changed.astype(np.int16), image.affine)
    nib.save(new, target)


def seven_network_dlabel(shared, nodes, target):
    """The dlabel file in 7-network order, with 7-network names."""
    order = nodes.sort_values('index_7network_combined')['name_7network']
    renumber(shared / 'atlases' / DLABEL, target, nodes['index_7network_combined'])
    image = nib.load(target)
    table = {i: (name, (0, 0, 0, 1)) for i, name in enumerate(['???', *order])}
    axes = (nib.cifti2.LabelAxis(['parcels'], [table]), image.header.get_axis(1))
    data = np.asanyarray(image.dataobj).copy()  # the file is written anew
    nib.save(nib.Cifti2Image(data, axes), target)


def test_official_parcels(official, nodes):
    assert official.n_parcels == 450
    assert official.names == tuple(nodes['name'])
    assert official.hemispheres == tuple(nodes['hemi'])
    assert official.networks == tuple(nodes['network17'])
    assert official.structures == ('subcortex',) * 50 + ('cortex',) * 400
    assert len(official.citation) == 2
    side = np.sign(official.xyz[:, 0])
    assert (side[:25] == 1).all()
    assert (side[25:50] == -1).all()
    assert (side[50:250] == -1).all()
    assert (side[250:] == 1).all()


def test_official_misorders(official, nodes):
    seven = official.misorders['7-network order']
    assert (np.argsort(seven) + 1).tolist() == nodes['index_7network_combined'].tolist()
    assert (seven != np.arange(450)).sum() == 396
    assert seven[:50].tolist() == list(range(50))
    sides = np.array(official.hemispheres)
    assert (sides[seven] == sides).all()
    # In that order each network of each hemisphere stands in one block.
    there = nodes['name_7network'].str.extract('Networks_(.H_[^_]+)')[0][seven]
    blocks = there.dropna()[there.dropna() != there.dropna().shift()]
    assert len(blocks) == 14
    names = np.array(official.names)
    assert names[official.misorders['cortex first']][[0, 399, 400]].tolist() == [
        *names[[50, 449, 0]]
    ]
    assert names[official.misorders['left first']][[0, 25, 50]].tolist() == [*names[[25, 0, 50]]]


def test_official_images(official, shared):
    assert missing_files(load_card(NAME), official.images[0].path.parents[2]) == []
    for space, mm in {'MNI152NLin6Asym': 2, 'MNI152NLin2009cAsym': 1, 'fsLR': None}.items():
        image = official.image_for(space, mm)
        assert (image.space, image.resolution) == (space, mm)
    image = nib.load(official.image_for('MNI152NLin6Asym', 2).path)
    centres = label_centres(np.asanyarray(image.dataobj), image.affine, 450)
    assert np.rint(centres).tolist() == official.xyz.tolist()


def test_official_atlas_made_of_published_parts(official, shared, tmp_path):
    usb = tmp_path / 'usb'
    usb.mkdir()
    shutil.copy(shared / 'atlases' / DLABEL, usb)
    numbers = np.r_[np.zeros(50, int), 1:401]
    for space, tian in TIAN.items():
        shutil.copy(shared / 'atlases' / tian, usb)
        renumber(shared / 'atlases' / VOLUME.format(space), usb / PART.format(space), numbers)
    obtain_atlas(load_card(NAME), tmp_path, usb)
    atlas = load_atlas(NAME, tmp_path)
    for space in TIAN:
        image = atlas.image_for(space, 2)
        assert image.provenance == f'{TIAN[space]} over {PART.format(space)}'
        made, whole = nib.load(image.path), nib.load(shared / 'atlases' / VOLUME.format(space))
        assert np.array_equal(made.affine, whole.affine)
        assert np.array_equal(np.asanyarray(made.dataobj), np.asanyarray(whole.dataobj))


@pytest.mark.parametrize('name', [VOLUME, VOLUME.replace('17N', '7N')], ids=['right', 'own'])
def test_seven_network_volume(shared, nodes, tmp_path, name):
    usb = tmp_path / 'usb'
    usb.mkdir()
    for file in (DLABEL, *TIAN.values()):
        shutil.copy(shared / 'atlases' / file, usb)
    path = usb / name.format('MNI152NLin6Asym')
    whole = shared / 'atlases' / VOLUME.format('MNI152NLin6Asym')
    renumber(whole, path, nodes['index_7network_combined'])
    with pytest.raises(BrainfmError) as caught:
        obtain_atlas(load_card(NAME), tmp_path, usb)
    assert f'{path} does not show atlas {NAME} as it must be (7-network order)' in str(
        caught.value
    )


@pytest.mark.parametrize('name', [DLABEL, DLABEL.replace('17N', '7N')], ids=['right', 'own'])
def test_seven_network_dlabel(shared, nodes, tmp_path, name):
    usb = tmp_path / 'usb'
    usb.mkdir()
    seven_network_dlabel(shared, nodes, usb / name)
    with pytest.raises(BrainfmError, match='7-network order'):
        obtain_atlas(load_card(NAME), tmp_path, usb)


@pytest.mark.parametrize('fault', ['7-network order', 'cortex first', 'left first'])
def test_official_image_in_a_wrong_order(official, tmp_path, fault):
    home = tmp_path / 'home'
    shutil.copytree(official.images[0].path.parents[2], home)
    path = load_atlas(NAME, home).image_for('MNI152NLin2009cAsym', 2).path
    renumber(path, path, np.argsort(official.misorders[fault]) + 1)
    with pytest.raises(BrainfmError, match=rf'\({fault}\)'):
        load_atlas(NAME, home).image_for('MNI152NLin2009cAsym', 2)
