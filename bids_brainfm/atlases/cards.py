"""Atlas cards: YAML files that say what an atlas is and of which files it consists."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from bids_brainfm import validation
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import inside
from bids_brainfm.validation import DATA, Label, Positive, PositiveInt, between

FOLDER = 'atlases'
Edge = Annotated[int, between(1, 1000, 'above 0')]  # voxels along an axis
DESCRIBED = ('labels', 'coordinates', 'table')  # an atlas cannot be read without these


@dataclass(frozen=True)
class Making:
    """How an image is made at fetch time where it is not supplied."""

    by: Literal['warp', 'overlay']
    of: tuple[str, ...]  # files of the card
    provenance: str  # in words
    transform: str = ''  # of a warp, as TemplateFlow names it
    shape: tuple[Edge, ...] = ()  # of the grid of a warp
    origin: tuple[float, ...] = ()  # of this grid, in mm

    def __post_init__(self) -> None:
        grid = len(self.shape), len(self.origin)
        if self.by == 'warp' and not (self.transform and grid == (3, 3)):
            raise BrainfmError('a warp must state transform, shape and origin (mm).')


@dataclass(frozen=True)
class AtlasFile:
    """One file of an atlas card."""

    name: str
    role: Literal['image', 'labels', 'coordinates', 'table', 'networks', 'places', 'part']
    space: Label | None = None
    resolution: Positive | None = None  # mm
    sha256: str | None = None
    url: str | None = None
    provenance: str = ''
    made: Making | None = None
    # First and last parcel that the labels 1, 2, ... of a part show
    parcels: tuple[PositiveInt, PositiveInt] | None = None
    column: str | None = None  # of a table of networks, the one that names them

    def __post_init__(self) -> None:
        if self.role == 'image' and not (self.space and self.resolution):
            raise BrainfmError('an image must state space and resolution (mm).')
        if self.role == 'part' and not self.parcels:
            raise BrainfmError('a part must state the parcels (first, last) that it shows.')
        if self.role == 'networks' and not self.column:
            raise BrainfmError('a table of networks must state the column that names them.')


@dataclass(frozen=True)
class AtlasCard:
    """What an atlas is and of which files it consists."""

    name: Label
    parcels: PositiveInt
    licence: str
    files: tuple[AtlasFile, ...]
    path: Path  # of the card itself
    description: str = ''
    citation: tuple[str, ...] = ()
    embedded: bool = False
    # Patterns (*) of the names of the labels, in order, and how many of each; empty: not checked
    order: dict[str, PositiveInt] = field(default_factory=dict)
    lookalikes: str | None = None  # glob pattern of files that may be the atlas in a wrong order

    def __post_init__(self) -> None:
        named = sum(self.order.values())
        if self.order and named != self.parcels:
            raise BrainfmError(f'it gives the order of {named} names for {self.parcels} parcels.')
        names = {file.name for file in self.files}
        for file in self.files:
            if file.made and not (file.made.of and names.issuperset(file.made.of)):
                of = f'made of {", ".join(file.made.of) or "nothing"}'
                raise BrainfmError(f'{file.name} is {of}, but must be of files of the card.')

    def folder(self, home: Path) -> Path:
        """Where the files lie: below `home`, or next to a card that is embedded or the user's."""
        fetched = self.path.parent == DATA / FOLDER and not self.embedded
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
        return f'tpl-{file.space}_atlas-{self.name}_res-{file.resolution:02.0f}_dseg.nii.gz'


def atlas_names() -> list[str]:
    """Names of the cards that come with the package."""
    return validation.card_names(FOLDER)


def load_card(name: str | Path) -> AtlasCard:
    """Read an atlas card by name, or a user's own YAML file of the same form."""
    path, content = validation.read_card(name, FOLDER, 'atlas card')
    what = f'The atlas card {path}'
    return validation.build(AtlasCard, content, what, path=path.absolute())


@dataclass(frozen=True)
class AtlasImage:
    """One label image."""

    path: Path  # NIfTI volume, or CIFTI dlabel for fsLR
    space: str  # template the image is in
    resolution: float | None  # voxel size in mm, None for CIFTI
    provenance: str  # where the image comes from, for sidecars


def images_here(card: AtlasCard, home: Path) -> tuple[AtlasImage, ...]:
    """Images of an atlas that are present, a supplied file before the one made in its place."""
    folder, images = card.folder(home), []
    for file in card.files:
        if not file.space:
            continue
        found = [(folder / file.name, file.provenance or file.name)]
        found += [(folder / card.made_name(file), file.made.provenance)] if file.made else []
        for path, provenance in [item for item in found if item[0].is_file()][:1]:
            images.append(AtlasImage(path, file.space, file.resolution, provenance))
    return tuple(images)


def missing_files(card: AtlasCard, home: Path, spaces: list[str] | None = None) -> list[str]:
    """Files without which the atlas cannot be used in `spaces` (None: all), one image each."""
    folder = card.folder(home)
    described = [f for f in card.files if f.role in DESCRIBED]
    missing = [f.name for f in described if not (folder / f.name).is_file()]
    present = {image.space for image in images_here(card, home)}
    for file in card.files:
        wanted = file.space and (spaces is None or file.space in spaces)
        if wanted and file.space not in present and file.name not in missing:
            missing.append(file.name)
    return missing
