"""What an atlas is: its card, its parcels, and its images by space."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.faults import Places, fault_of_names
from bids_brainfm.atlases.images import (
    check_complete,
    check_image,
    label_centres,
    misfit,
    read_labels,
)
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import inside

CARDS = Path(__file__).parents[1] / 'data' / 'atlases'
DESCRIBED = ('labels', 'coordinates', 'table')  # an atlas cannot be read without these
ROLES = ('image', *DESCRIBED, 'networks', 'places', 'part')
MADE_BY = ('warp', 'overlay')


@dataclass(frozen=True)
class AtlasFile:
    """One file of an atlas card.

    Attributes
    ----------
    made : dict or None
        How the image is made at fetch time where it is not supplied: ``by`` 'warp' or
        'overlay', ``of`` which files of the card, ``provenance`` in words, and what
        :mod:`bids_brainfm.atlases.obtain` needs besides.
    parcels : list of two int, or None
        First and last parcel that the labels 1, 2, ... of a part stand for.
    column : str or None
        Column of a table of networks that names them.
    """

    name: str
    role: str
    space: str | None = None
    resolution: float | None = None
    sha256: str | None = None
    url: str | None = None
    provenance: str = ''
    made: dict | None = None
    parcels: list | None = None
    column: str | None = None


@dataclass(frozen=True)
class AtlasCard:
    """A YAML file that says what an atlas is and of which files it consists.

    Attributes
    ----------
    order : dict of str to int
        What the names of the labels look like (``*`` for any text), in order, and how many of
        each there are; empty where the order is not checked by name.
    lookalikes : str or None
        Files of this kind (a glob pattern) are looked into where a file is not found in a
        folder, since they may be the right atlas in a wrong order.
    """

    name: str
    parcels: int
    licence: str
    files: tuple[AtlasFile, ...]
    path: Path
    description: str = ''
    citation: tuple[str, ...] = ()
    embedded: bool = False
    order: dict = field(default_factory=dict)
    lookalikes: str | None = None

    def folder(self, home: Path) -> Path:
        """Where the files lie: below `home`, or beside a card that is embedded or the user's."""
        fetched = self.path.parent == CARDS and not self.embedded
        return Path(home) / 'atlases' / self.name if fetched else self.path.parent

    def path_of(self, file: AtlasFile, home: Path) -> Path:
        """Where a file lies: a table of places comes with its card, others are fetched."""
        return inside(self.path.parent if file.role == 'places' else self.folder(home), file.name)

    @property
    def patterns(self) -> list[str]:
        """What the name of each parcel looks like; empty where the card does not say."""
        return [pattern for pattern, count in self.order.items() for _ in range(count)]

    def made_name(self, file: AtlasFile) -> str:
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
    places : Places
        Centre and structure of each parcel, and known wrong orders.
    networks : tuple of P str, or None
    images : tuple of AtlasImage
        Those present on this machine.
    """

    name: str
    names: tuple[str, ...]
    hemispheres: tuple[str, ...]
    places: Places
    networks: tuple[str, ...] | None
    licence: str
    citation: tuple[str, ...]
    images: tuple[AtlasImage, ...]

    @property
    def n_parcels(self) -> int:
        """Number of parcels P."""
        return len(self.names)

    @property
    def xyz(self) -> np.ndarray:
        """Centre of each parcel in mm (MNI, RAS), (P, 3) float."""
        return self.places.xyz

    @property
    def structures(self) -> tuple[str, ...] | None:
        """'subcortex' or 'cortex' for each parcel; None where the atlas does not say."""
        return self.places.structures

    @property
    def misorders(self) -> Mapping[str, np.ndarray]:
        """Known wrong orders by name: row i of such a file is parcel ``misorders[name][i]``."""
        return self.places.misorders

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
        check_image(image.path, self.name, self.places)
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
    labels = [card.name, *(file.space for file in card.files if file.space is not None)]
    for label in labels:
        if not str(label).isalnum():
            raise BrainfmError(
                f'The atlas card {path} has {label!r} as a name or a space, which goes into file '
                f'names: use letters and digits only.'
            )
    for file in card.files:
        _check_entry(file, card)
    if card.order and len(card.patterns) != card.parcels:
        raise BrainfmError(
            f'The atlas card {path} gives the order of {len(card.patterns)} names for '
            f'{card.parcels} parcels.'
        )
    return card


def _check_entry(file, card):
    """Refuse an entry of a card that lacks what its role needs."""
    if file.role not in ROLES:
        raise BrainfmError(
            f'The atlas card {card.path} gives {file.name} the role {file.role}; '
            f'the roles are {", ".join(ROLES)}.'
        )
    if file.role == 'image' and not (file.space and file.resolution):
        raise BrainfmError(
            f'The atlas card {card.path} must state space and resolution (mm) of {file.name}.'
        )
    if file.role == 'part' and not file.parcels:
        raise BrainfmError(
            f'The atlas card {card.path} must state the parcels (first, last) of {file.name}.'
        )
    if file.role == 'networks' and not file.column:
        raise BrainfmError(
            f'The atlas card {card.path} must state the column of {file.name} with the networks.'
        )
    if file.made is None:
        return
    by, sources = file.made.get('by'), file.made.get('of')
    known = sources and {other.name for other in card.files} >= set(sources)
    if by not in MADE_BY or not known or not file.made.get('provenance'):
        raise BrainfmError(
            f'The atlas card {card.path} must state how {file.name} is made: by '
            f'({" or ".join(MADE_BY)}), of (files of the card) and provenance (in words).'
        )


def images_here(card: AtlasCard, home: Path) -> tuple[AtlasImage, ...]:
    """Images of an atlas that are present, a supplied file before the one made in its stead."""
    folder = card.folder(home)
    images = []
    for file in card.files:
        if not file.space:
            continue
        if (folder / file.name).is_file():
            path, provenance = folder / file.name, file.provenance or file.name
        elif file.made and (folder / card.made_name(file)).is_file():
            path, provenance = folder / card.made_name(file), file.made['provenance']
        else:
            continue
        images.append(AtlasImage(path, file.space, file.resolution, provenance))
    return tuple(images)


def missing_files(card: AtlasCard, home: Path, spaces: list[str] | None = None) -> list[str]:
    """Names of files without which the atlas cannot be used in `spaces` (None: all its spaces).

    One image is enough for a space that has several.
    """
    folder = card.folder(home)
    described = [f for f in card.files if f.role in DESCRIBED]
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
    names, hemispheres, places, networks = _read_parcels(card, home, images)
    if hemispheres is None:
        hemispheres = tuple(hemisphere(n, x) for n, x in zip(names, places.xyz[:, 0], strict=True))
    side = np.array([{'L': -1, 'R': 1}.get(h, 0) for h in hemispheres])
    if np.any(wrong := side * places.xyz[:, 0] < -5):
        raise BrainfmError(
            f'Atlas {card.name} places {names[np.argmax(wrong)]} at x = '
            f'{places.xyz[np.argmax(wrong), 0]:.0f} mm, on the other side than its name says: the '
            f'coordinates in {card.folder(home)} are flipped or in another order.'
        )
    return Atlas(
        card.name, names, hemispheres, places, networks, card.licence, card.citation, images
    )


def hemisphere(name: str, x: float) -> str:
    """Hemisphere a parcel's name tells, else the side of its centre.

    >>> [hemisphere(*p) for p in [('R_V1_ROI', 14), ('GP_L', -20), ('Vermis_Crus_I', -4)]]
    ['R', 'L', 'B']
    >>> [hemisphere(*p) for p in [('PUT-VA-rh', 26), ('17Networks_LH_ContA_PFCl_1', -40)]]
    ['R', 'L']
    """
    for form in (r'(L|R)(?:eft|ight)?_', r'.*_(L|R)$', r'\d+Networks_(L|R)H_', r'.*-([lr])h$'):
        if named := re.match(form, name):
            return named[1].upper()
    if name.startswith('Vermis') or x == 0:
        return 'B'
    return 'L' if x < 0 else 'R'


def networks_of(names, structures=None) -> tuple[str, ...] | None:
    """Networks that the names of Schaefer's parcels tell, None where no name does.

    >>> networks_of(['GP-rh', '17Networks_LH_ContA_PFCl_1'], ['subcortex', 'cortex'])
    ('Subcortex', 'ContA')
    """
    named = [re.match(r'\d+Networks_[LR]H_([^_]+)', name) for name in names]
    if not any(named):
        return None
    others = [s.capitalize() for s in structures or ['n/a'] * len(named)]
    return tuple(n[1] if n else other for n, other in zip(named, others, strict=True))


def _read_parcels(card, home, images):
    """Names, hemispheres (or None), places and networks (or None) of a card's parcels."""
    import nibabel as nib

    names, hemispheres, xyz, networks = None, None, None, None
    places, source = None, card.path
    for file in card.files:
        path = card.path_of(file, home)
        try:
            if file.role == 'labels':
                names, source = _label_names(nib.load(path)), path
            elif file.role == 'coordinates':
                rows = np.loadtxt(path)
                _check_order(rows[:, 0], card, path)
                xyz = rows[:, 1:4].astype(np.float32)
            elif file.role == 'places':
                places = _read_places(path, card)
            elif file.role == 'table':
                names, hemispheres, xyz, networks = _read_table(path, card)
                source = path
            elif file.role == 'networks' and path.is_file():  # one can do without
                networks = _read_networks(path, file.column, card)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise BrainfmError(
                f'{path} of atlas {card.name} cannot be read ({error}): fetch or write it anew.'
            ) from None
    if names is None or len(names) != card.parcels:
        raise BrainfmError(
            f'The card of atlas {card.name} says {card.parcels} parcels, but {source} names '
            f'{len(names or ())}: give a table (TSV with index, name) or a dlabel file that fits.'
        )
    if places is None and xyz is None:
        volume = next((image for image in images if image.resolution), None)
        if volume is None:
            raise BrainfmError(
                f'Atlas {card.name} has neither coordinates nor a volume to take them from: '
                f'add columns x, y, z (mm) to {source}.'
            )
        image, labels = read_labels(volume.path, card.name)
        check_complete(labels, volume.path, card.name, card.parcels)
        xyz = label_centres(labels, image.affine, card.parcels)
    places = places or Places(xyz)
    if card.order and (fault := fault_of_names(names, card.patterns, places)):
        raise misfit(source, card.name, fault)
    return names, hemispheres, places, networks or networks_of(names, places.structures)


def _check_order(index, card, path):
    if not np.array_equal(index, np.arange(1, card.parcels + 1)):
        raise BrainfmError(
            f'{path} must list the parcels 1 to {card.parcels} of atlas {card.name} in order.'
        )


def _label_names(image):
    """Names of the labels 1..P in a dlabel image's table, in the order of the labels."""
    table = image.header.get_axis(0).label[0]
    return tuple(table[key][0] for key in sorted(table) if key > 0)


def _read_table(path, card):
    import pandas as pd

    frame = pd.read_csv(path, sep='\t')
    _check_order(frame['index'], card, path)
    column = lambda key: tuple(frame[key].astype(str)) if key in frame else None
    has_centres = {'x', 'y', 'z'} <= set(frame)
    xyz = frame[['x', 'y', 'z']].to_numpy(np.float32) if has_centres else None
    return column('name'), column('hemisphere'), xyz, column('network')


def _read_networks(path, column, card):
    import pandas as pd

    frame = pd.read_csv(path, sep='\t', keep_default_na=False)
    _check_order(frame['index'], card, path)
    return tuple(frame[column].astype(str))


def _read_places(path, card):
    """Centres, structures and misorders; the columns after these are numbers in wrong orders."""
    import pandas as pd

    frame = pd.read_csv(path, sep='\t').set_index('index')
    _check_order(frame.index, card, path)
    xyz = frame[['x', 'y', 'z']].to_numpy(np.float32)
    wrong = frame.drop(columns=['x', 'y', 'z', 'structure'])
    for name, numbers in wrong.items():
        _check_order(np.sort(numbers), card, f'Column {name} of {path}')
    # A column says where parcel i stands in the wrong order, argsort who stands at i.
    misorders = {name: np.argsort(numbers.to_numpy()) for name, numbers in wrong.items()}
    return Places(xyz, tuple(frame['structure']), misorders)


def check_lookalike(path: Path, card: AtlasCard, home: Path) -> None:
    """Refuse a file that may be an atlas in a wrong order, by its names (CIFTI) and its places.

    Raises
    ------
    BrainfmError
        Names the fault.
    """
    file = next(file for file in card.files if file.role == 'places')
    places = _read_places(card.path_of(file, home), card)
    image, _ = read_labels(path, card.name)
    if hasattr(image.header, 'get_axis'):
        fault = fault_of_names(_label_names(image), card.patterns, places)
        if fault:
            raise misfit(path, card.name, fault)
    check_image(path, card.name, places)
