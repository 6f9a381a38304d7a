"""Model cards: YAML files that say what a model is and what shape of input it expects."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bids_brainfm.documents import read_tsv
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import inside
from bids_brainfm.signals.connectome import LABEL as CONNECTOME
from bids_brainfm.signals.scale import METHODS
from bids_brainfm.signals.strategy import GSR
from bids_brainfm.validation import (
    LABEL,
    Condition,
    Positive,
    PositiveInt,
    Proportion,
    Seconds,
    build,
    card_names,
    is_label,
    one_of,
    read_card,
)

FOLDER = 'models'
Scaling = Annotated[str, one_of(METHODS)]
NamedFile = Annotated[
    dict[str, Any],
    Condition(lambda file: isinstance(file.get('name'), str), 'a mapping with the name of a file'),
]
ModelLabel = Annotated[
    str,
    Condition(
        lambda label: is_label(label) and label != CONNECTOME,
        f'{LABEL} and other than {CONNECTOME}, the name of the baseline',
    ),
]


@dataclass(frozen=True)
class ModelCard:
    """What a model is and what it expects."""

    name: str  # what --model takes, e.g. brainlm-111m
    label: ModelLabel  # in output names, e.g. brainlm111m
    description: str  # one sentence
    # Architecture; the checkpoint's config.json replaces it. model_type names the family.
    config: dict[str, Any] = field(hash=False)
    atlas: str  # name of the atlas, or path of an atlas card
    parcel_order: Literal['atlas', 'ascending-y']  # of the rows that the network expects
    tr: Seconds  # repetition time in seconds
    window: PositiveInt  # samples
    scaling: Scaling  # method of signals.scale.fit_scaling
    divide_by: Positive  # constant by which the scaled values are divided
    denoising: str  # name of a denoising preset, or path of a user's own
    licence: str  # of the weights, as is the source
    source: str
    citation: list[str] = field(hash=False)
    # Files of the checkpoint: name, and url and sha256 where known. Names are absolute paths where
    # all of them lie next to the card; else they are to be fetched. Empty for a network that
    # nobody trained.
    weights: list[NamedFile] = field(hash=False, default_factory=list)
    # The table of brain gradients that places the parcels (Brain-JEPA), like one of the weights
    gradients: NamedFile | None = field(hash=False, default=None)
    # Volumes of which the official code picks a window's frames; None: no --temporal official
    official_volumes: PositiveInt | None = None
    min_real: Proportion = 1.0  # of a window that must be recorded; the rest is completed
    cohort_scaling: Scaling = 'cohort'  # what --scale cohort means for this model
    # How the weights were made and how they scored on held-out participants
    training: dict[str, Any] | None = field(hash=False, default=None)
    # Table next to the card of the part (train, validation, test) of each participant
    participants: NamedFile | None = field(hash=False, default=None)

    def __post_init__(self) -> None:
        if self.official_volumes is not None and self.official_volumes < self.window:
            raise BrainfmError(
                f'official_volumes {self.official_volumes} must be at least the window of '
                f'{self.window} samples.'
            )


def model_names() -> list[str]:
    """Names of the cards that come with this package."""
    return card_names(FOLDER)


def load_card(name: str | Path) -> ModelCard:
    """Load a card by its name, or a user's own by its path.

    Weights, gradients, atlas card and denoising preset next to the card are taken from there.

    Raises BrainfmError: no such card, or it lacks a field, has an unknown one or a wrong value.
    """
    path, content = read_card(name, FOLDER, 'model card')
    card = build(ModelCard, content, f'The model card {name}')
    folder = path.absolute().parent
    is_file = lambda name: name.removesuffix(GSR).endswith(('.yml', '.yaml'))
    near = lambda name: str(folder / name) if is_file(name) else name
    # The training goes into sidecars, and JSON has no NaN.
    training = json.dumps(card.training, default=str)
    return dataclasses.replace(
        card,
        atlas=near(card.atlas),
        denoising=near(card.denoising),
        weights=_absolute(folder, card.weights),
        gradients=card.gradients and _absolute(folder, [card.gradients])[0],
        participants=card.participants and _absolute(folder, [card.participants])[0],
        training=json.loads(training, parse_constant=lambda name: None),
    )


def read_parts(card: ModelCard) -> dict[str, str] | None:
    """Part of each participant in the training of a model, by label (01); None if not known."""
    if card.participants is None or not Path(card.participants['name']).is_file():
        return None
    table = read_tsv(Path(card.participants['name']), dtype=str)
    labels = table['participant_id'].str.removeprefix('sub-')
    return dict(zip(labels, table['part'], strict=True))


def _absolute(folder: Path, listed: list[NamedFile]) -> list[NamedFile]:
    """Give the paths of files in a card's folder; a part of them makes no checkpoint."""
    paths = [folder / file['name'] for file in listed]
    if not all(path.is_file() for path in paths):
        return listed
    return [file | {'name': str(path)} for file, path in zip(listed, paths, strict=True)]


def checkpoint_dir(card: ModelCard, home: Path) -> Path:
    """Folder where the weights of a card are kept."""
    return inside(home / 'models', card.name)
