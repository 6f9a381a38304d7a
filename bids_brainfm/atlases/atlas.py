"""What an atlas is: its card, its parcels, and its images by space."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError

CARDS = Path(__file__).parents[1] / 'data' / 'atlases'
ROLES = ('image', 'labels', 'coordinates', 'table')
MEDIAN_SHIFT_MM = 10.0  # labels of one atlas agree within 2 mm; a flip or another order is far off


def home() -> Path:
    """Folder of fetched weights and atlases: ``$BIDS_BRAINFM_HOME`` or the user's cache."""
    if chosen := os.environ.get('BIDS_BRAINFM_HOME'):
        return Path(chosen)
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'bids_brainfm'


@dataclass(frozen=True)
class AtlasFile:
    """One file of an atlas card; ``warp`` says how an image is made where it is not supplied."""

    name: str
    role: str
    space: str | None = None
    resolution: float | None = None
    sha256: str | None = None
    url: str | None = None
    provenance: str = ''
    warp: dict | None = None


@dataclass(frozen=True)
class AtlasCard:
    """A YAML file that says what an atlas is and of which files it consists."""

    name: str
    parcels: int
    licence: str
    files: tuple[AtlasFile, ...]
    path: Path
    description: str = ''
    citation: tuple[str, ...] = ()
    embedded: bool = False

    def folder(self, home: Path) -> Path:
        """Where the files lie: below `home`, or beside a card that is embedded or the user's."""
        fetched = self.path.parent == CARDS and not self.embedded
        return Path(home) / 'atlases' / self.name if fetched else self.path.parent

    def warped_name(self, file: AtlasFile) -> str:
        """Name of the image that is made where `file` was not supplied."""
        return f'tpl-{file.space}_atlas-{self.name}_res-{file.resolution:02d}_dseg.nii.gz'


@dataclass(frozen=True)
class AtlasImage:
    """One label image.

    Attributes
    ----------
    path : Path
        NIfTI volume, or CIFTI dlabel for fsLR.
    space : str
        Template the image is in.
    resolution : float or None
        Voxel size in mm, None for CIFTI.
    provenance : str
        Where the image comes from, for sidecars.
    """

    path: Path
    space: str
    resolution: float | None
    provenance: str


@dataclass(frozen=True)
class Atlas:
    """P parcels in the order of their labels 1..P, and the images that show them.

    Attributes
    ----------
    names : tuple of P str
    hemispheres : tuple of P str
        'L', 'R' or 'B' (midline).
    xyz : (P, 3) float
        Centre of each parcel in mm (MNI, RAS).
    networks : tuple of P str, or None
    images : tuple of AtlasImage
        Those present on this machine.
    """

    name: str
    names: tuple[str, ...]
    hemispheres: tuple[str, ...]
    xyz: np.ndarray
    networks: tuple[str, ...] | None
    licence: str
    citation: tuple[str, ...]
    images: tuple[AtlasImage, ...]

    @property
    def n_parcels(self) -> int:
        """Number of parcels P."""
        return len(self.names)

    def image_for(self, space: str, voxel_size_mm: float | None = None) -> AtlasImage:
        """Image of a space with the nearest voxel size, checked label by label.

        Raises
        ------
        BrainfmError
            No image in this space, or an image that does not show this atlas.
        """
        here = [image for image in self.images if image.space == space]
        if not here:
            spaces = ', '.join(dict.fromkeys(image.space for image in self.images))
            raise BrainfmError(
                f'Atlas {self.name} has no image for space {space} on this machine, only for '
                f'{spaces}: choose one of these with --space, or run '
                f'`bids_brainfm_models fetch {self.name}`.'
            )
        wanted = voxel_size_mm or 0
        image = min(here, key=lambda image: abs((image.resolution or wanted) - wanted))
        check_image(image.path, self.name, self.xyz)
        return image

    def table(self):
        """Data frame of the parcels in the columns of a BIDS ``dseg.tsv``."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                'index': np.arange(1, self.n_parcels + 1),
                'name': self.names,
                'hemisphere': self.hemispheres,
                'x': self.xyz[:, 0],
                'y': self.xyz[:, 1],
                'z': self.xyz[:, 2],
            }
        )
        return frame if self.networks is None else frame.assign(network=self.networks)


def atlas_names() -> list[str]:
    """Names of the cards that come with the package."""
    return sorted(path.stem for path in CARDS.glob('*.yml'))


def load_card(name_or_path: str | Path) -> AtlasCard:
    """Read an atlas card by name, or a user's own YAML file of the same form.

    Raises
    ------
    BrainfmError
        No such card, or a card that lacks something.
    """
    import yaml

    path = Path(name_or_path)
    if path.suffix not in ('.yml', '.yaml'):
        path = CARDS / f'{name_or_path}.yml'
        if not path.is_file():
            raise BrainfmError(
                f'There is no atlas {name_or_path}: choose {", ".join(atlas_names())}, '
                'or give the path of a card (.yml).'
            )
    try:
        text = yaml.safe_load(path.read_text())
        files = tuple(AtlasFile(**entry) for entry in text.pop('files'))
        citation = tuple(text.pop('citation', ()))
        card = AtlasCard(files=files, citation=citation, path=path.absolute(), **text)
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise BrainfmError(
            f'The atlas card {path} cannot be used ({type(error).__name__}: {error}): '
            'compare it with the card of Demo424.'
        ) from None
    for file in card.files:
        if file.role not in ROLES:
            raise BrainfmError(
                f'The atlas card {path} gives {file.name} the role {file.role}; '
                f'the roles are {", ".join(ROLES)}.'
            )
        if file.role == 'image' and not (file.space and file.resolution):
            raise BrainfmError(
                f'The atlas card {path} must state space and resolution (mm) of {file.name}.'
            )
    return card


def images_here(card: AtlasCard, home: Path) -> tuple[AtlasImage, ...]:
    """Images of an atlas that are present, a supplied file before its warped stand-in."""
    folder = card.folder(home)
    images = []
    for file in card.files:
        if not file.space:
            continue
        if (folder / file.name).is_file():
            path, provenance = folder / file.name, file.provenance or file.name
        elif file.warp and (folder / card.warped_name(file)).is_file():
            path = folder / card.warped_name(file)
            provenance = (
                f'{file.warp["source"]} warped nearest-neighbour with {file.warp["transform"]}'
            )
        else:
            continue
        images.append(AtlasImage(path, file.space, file.resolution, provenance))
    return tuple(images)


def missing_files(card: AtlasCard, home: Path, spaces: list[str] | None = None) -> list[str]:
    """Names of files without which the atlas cannot be used in `spaces` (None: all its spaces).

    One image is enough for a space that has several.
    """
    folder = card.folder(home)
    described = [f for f in card.files if f.role in ('labels', 'coordinates', 'table')]
    missing = [f.name for f in described if not (folder / f.name).is_file()]
    present = {image.space for image in images_here(card, home)}
    for file in card.files:
        wanted = file.space and (spaces is None or file.space in spaces)
        if wanted and file.space not in present and file.name not in missing:
            missing.append(file.name)
    return missing


def load_atlas(name_or_path: str | Path, home: Path) -> Atlas:
    """Read an atlas.

    Parameters
    ----------
    name_or_path : str or Path
        Name of a card that comes with the package, or a user's own card (its files beside it).
    home : Path
        Where fetched files lie, see :func:`home`.

    Raises
    ------
    BrainfmError
        Files are missing, or contradict the card or each other.

    Examples
    --------
    >>> atlas = load_atlas('Demo424', home())
    >>> atlas.n_parcels, atlas.names[0], atlas.hemispheres[-1]
    (424, 'L_001', 'R')
    """
    card = load_card(name_or_path)
    images = images_here(card, home)
    missing = missing_files(card, home, spaces=[])
    if missing or not images:
        missing = missing or missing_files(card, home)
        again = f'bids_brainfm_models fetch {card.name}'
        raise BrainfmError(
            f'Atlas {card.name} is not complete in {card.folder(home)} (missing: '
            f'{", ".join(missing)}): run `{again}`, or `{again} --from DIR` with the files in '
            'DIR on a machine without internet.'
        )
    names, hemispheres, xyz, networks = _read_parcels(card, home, images)
    if hemispheres is None:
        hemispheres = tuple(hemisphere(n, x) for n, x in zip(names, xyz[:, 0], strict=True))
    side = np.array([{'L': -1, 'R': 1}.get(h, 0) for h in hemispheres])
    if np.any(wrong := side * xyz[:, 0] < -5):
        raise BrainfmError(
            f'Atlas {card.name} places {names[np.argmax(wrong)]} at x = '
            f'{xyz[np.argmax(wrong), 0]:.0f} mm, on the other side than its name says: the '
            f'coordinates in {card.folder(home)} are flipped or in another order.'
        )
    return Atlas(card.name, names, hemispheres, xyz, networks, card.licence, card.citation, images)


def hemisphere(name: str, x: float) -> str:
    """Hemisphere a parcel's name tells, else the side of its centre.

    >>> [hemisphere(*p) for p in [('R_V1_ROI', 14), ('GP_L', -20), ('Vermis_Crus_I', -4)]]
    ['R', 'L', 'B']
    """
    if named := re.match(r'(L|R)(?:eft|ight)?_', name) or re.search(r'_(L|R)$', name):
        return named[1]
    if name.startswith('Vermis') or x == 0:
        return 'B'
    return 'L' if x < 0 else 'R'


def _read_parcels(card, home, images):
    """Names, hemispheres (or None), centres and networks (or None) of a card's parcels."""
    folder = card.folder(home)
    names, hemispheres, xyz, networks = None, None, None, None
    source = card.path
    for file in card.files:
        path = folder / file.name
        try:
            if file.role == 'labels':
                names, source = _cifti_names(path), path
            elif file.role == 'coordinates':
                rows = np.loadtxt(path)
                _check_order(rows[:, 0], card, path)
                xyz = rows[:, 1:4].astype(np.float32)
            elif file.role == 'table':
                names, hemispheres, xyz, networks = _read_table(path, card)
                source = path
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise BrainfmError(
                f'{path} of atlas {card.name} cannot be read ({error}): fetch or write it anew.'
            ) from None
    if names is None or len(names) != card.parcels:
        raise BrainfmError(
            f'The card of atlas {card.name} says {card.parcels} parcels, but {source} names '
            f'{len(names or ())}: give a table (TSV with index, name) or a dlabel file that fits.'
        )
    if xyz is None:
        volume = next((image for image in images if image.resolution), None)
        if volume is None:
            raise BrainfmError(
                f'Atlas {card.name} has neither coordinates nor a volume to take them from: '
                f'add columns x, y, z (mm) to {source}.'
            )
        xyz = label_centres(*_read_labels(volume.path, card.name, card.parcels), card.parcels)
    return names, hemispheres, xyz, networks


def _check_order(index, card, path):
    if not np.array_equal(index, np.arange(1, card.parcels + 1)):
        raise BrainfmError(
            f'{path} must list the parcels 1 to {card.parcels} of atlas {card.name} in order.'
        )


def _cifti_names(path):
    """Names of the labels 1..P in a dlabel file's table, in the order of the labels."""
    import nibabel as nib

    table = nib.load(path).header.get_axis(0).label[0]
    return tuple(table[key][0] for key in sorted(table) if key > 0)


def _read_table(path, card):
    import pandas as pd

    frame = pd.read_csv(path, sep='\t')
    _check_order(frame['index'], card, path)
    column = lambda key: tuple(frame[key].astype(str)) if key in frame else None
    has_centres = {'x', 'y', 'z'} <= set(frame)
    xyz = frame[['x', 'y', 'z']].to_numpy(np.float32) if has_centres else None
    return column('name'), column('hemisphere'), xyz, column('network')


def _read_labels(path, name, n_parcels):
    """Labels as integers and the affine (None for CIFTI); every label 1..P must be there."""
    import nibabel as nib

    try:
        image = nib.load(path)
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise BrainfmError(
            f'The image {path} of atlas {name} cannot be read ({error}): fetch it anew.'
        ) from None
    labels = np.rint(values).astype(np.int32)
    if not np.array_equal(labels, values):
        raise BrainfmError(
            f'{path} of atlas {name} holds values that are not whole numbers: labels must be '
            'resampled by nearest neighbour.'
        )
    absent = np.setdiff1d(np.arange(1, n_parcels + 1), labels)
    if absent.size:
        shown = ', '.join(map(str, absent[:5])) + (' ...' if absent.size > 5 else '')
        raise BrainfmError(
            f'{path} lacks {absent.size} of the {n_parcels} labels of atlas {name} ({shown}): '
            f'use the file that the atlas card names.'
        )
    if labels.min() < 0 or labels.max() > n_parcels:
        raise BrainfmError(
            f'{path} has labels from {labels.min()} to {labels.max()} where atlas {name} has 1 '
            f'to {n_parcels}: it shows another atlas.'
        )
    return labels, getattr(image, 'affine', None)


def label_centres(labels: np.ndarray, affine: np.ndarray, n_parcels: int) -> np.ndarray:
    """Centre of mass of each label 1..P in mm, (P, 3) float32."""
    import nibabel as nib

    where = np.nonzero(labels)
    label = labels[where]
    counts = np.bincount(label, minlength=n_parcels + 1)[1:]
    ijk = [np.bincount(label, axis, n_parcels + 1)[1:] / counts for axis in where]
    return nib.affines.apply_affine(affine, np.stack(ijk, axis=1)).astype(np.float32)


def check_image(path: Path, name: str, xyz: np.ndarray) -> None:
    """Refuse an image that does not show the atlas whose parcels lie at `xyz`.

    Labels must be the whole numbers 0..P, each of 1..P present; in volumes they must lie where
    the atlas says, which a left-right flip or another order of the labels does not.

    Raises
    ------
    BrainfmError
        Says which of these fails.
    """
    labels, affine = _read_labels(path, name, len(xyz))
    if affine is None:
        return
    shift = np.linalg.norm(label_centres(labels, affine, len(xyz)) - xyz, axis=1)
    if np.median(shift) > MEDIAN_SHIFT_MM:
        raise BrainfmError(
            f'The labels of {path} lie {np.median(shift):.0f} mm (median) away from the centres '
            f'of atlas {name}: the image is flipped left to right or numbered in another order.'
        )
