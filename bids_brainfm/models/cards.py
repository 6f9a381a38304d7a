"""Model cards: YAML files that say what a model is and what shape of input it expects."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.connectome import LABEL as CONNECTOME
from bids_brainfm.resources import inside
from bids_brainfm.signals.scale import METHODS

PARCEL_ORDERS = ('atlas', 'ascending-y')


@dataclass(frozen=True)
class ModelCard:
    """What a model is and what it expects.

    Attributes
    ----------
    name : str
        What ``--model`` takes, e.g. ``brainlm-111m``.
    label : str
        BIDS label in output names (letters and digits), e.g. ``brainlm111m``.
    description : str
        One sentence.
    config : dict
        Architecture in the form of the checkpoint's ``config.json``; ``model_type`` names the
        family. A checkpoint's own ``config.json`` replaces it.
    atlas : str
        Name of the atlas, or path of an atlas card.
    parcel_order : {'atlas', 'ascending-y'}
        Order of the rows that the network expects.
    tr : float
        Repetition time in seconds.
    window : int
        Samples per window.
    scaling : str
        Method of :func:`bids_brainfm.signals.scale.scale`.
    divide_by : float
        Constant by which the scaled values are divided.
    denoising : str
        Name of a denoising preset.
    licence, source : str
        Of the weights.
    citation : list of str
    weights : list of dict
        Files of the checkpoint: ``name``, and ``url`` and ``sha256`` where known. Names are
        absolute paths where all of them lie beside the card; else they are to be fetched. Empty
        for a network that nobody trained.
    gradients : dict or None
        The table of brain gradients that places the parcels (Brain-JEPA): ``name`` of the file
        (an absolute path where it lies beside the card), and ``url`` and ``sha256`` where known.
    official_volumes : int or None
        Volumes that the official code spans with one window by picking frames, whatever the
        repetition time; None where ``--temporal official`` means nothing.
    min_real : float
        Share of a window that must be recorded for it to be taken; what lacks is completed and
        said.
    cohort_scaling : str
        Method that ``--scale cohort`` means for this model.
    training : dict or None
        How the weights were made and how they scored on held-out participants, as the commands
        that train write it.
    """

    name: str
    label: str
    description: str
    config: dict = field(hash=False)
    atlas: str
    parcel_order: str
    tr: float
    window: int
    scaling: str
    divide_by: float
    denoising: str
    licence: str
    source: str
    citation: list[str] = field(hash=False)
    weights: list[dict] = field(hash=False, default_factory=list)
    gradients: dict | None = field(hash=False, default=None)
    official_volumes: int | None = None
    min_real: float = 1.0
    cohort_scaling: str = 'cohort'
    training: dict | None = field(hash=False, default=None)

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            wanted = (
                (int, float) if item.type is float else getattr(item.type, '__origin__', item.type)
            )
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise BrainfmError(
                    f'Model card {self.name}: {item.name} {value!r} is not a '
                    f'{getattr(item.type, "__name__", item.type)}.'
                )
        if not self.label.isalnum() or self.label == CONNECTOME:
            raise BrainfmError(
                f'Model card {self.name}: label {self.label!r} goes into file names, so it may '
                f'have letters and digits only, and {CONNECTOME} is the name of the baseline.'
            )
        for scaling in (self.scaling, self.cohort_scaling):
            if scaling not in METHODS:
                raise BrainfmError(
                    f'Model card {self.name}: scaling {scaling!r} is not one of '
                    f'{", ".join(METHODS)}.'
                )
        if not all(isinstance(citation, str) for citation in self.citation):
            raise BrainfmError(f'Model card {self.name}: citation must be a list of texts.')
        listed = [('weights', file) for file in self.weights]
        listed += [('gradients', self.gradients)] if self.gradients is not None else []
        for what, file in listed:
            if not isinstance(file, dict) or not isinstance(file.get('name'), str):
                raise BrainfmError(f'Model card {self.name}: {what} must give the name of a file.')
        if self.parcel_order not in PARCEL_ORDERS:
            raise BrainfmError(
                f'Model card {self.name}: parcel_order {self.parcel_order!r} is not one of '
                f'{", ".join(PARCEL_ORDERS)}.'
            )
        if not (self.tr > 0 and self.window > 0 and self.divide_by > 0):
            raise BrainfmError(
                f'Model card {self.name}: tr, window and divide_by must be above zero.'
            )
        if not 0 < self.min_real <= 1 or (self.official_volumes or self.window) < self.window:
            raise BrainfmError(
                f'Model card {self.name}: min_real must be a share above 0, and official_volumes '
                f'at least the window of {self.window} samples.'
            )


def model_names() -> list[str]:
    """Names of the cards that come with this package.

    >>> 'brainlm-111m' in model_names()
    True
    """
    folder = files('bids_brainfm') / 'data' / 'models'
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix('.yml') for name in names if name.endswith('.yml'))


def load_card(name: str | Path) -> ModelCard:
    """Load a card by its name, or a user's own by its path.

    Weights and gradients that lie beside the card are taken from there.

    Raises
    ------
    BrainfmError
        No such card, or it lacks a field or has an unknown one.

    Examples
    --------
    >>> load_card('brainlm-111m').window
    200
    """
    import yaml

    path = Path(name)
    if str(name) in model_names():
        source = files('bids_brainfm') / 'data' / 'models' / f'{name}.yml'
    elif path.suffix in ('.yml', '.yaml'):
        if not path.is_file():
            raise BrainfmError(f'The model card {path} does not exist: check the path.')
        source = path
    else:
        raise BrainfmError(
            f'There is no model {name}: the models are {", ".join(model_names())}, or give the '
            f'path of a card of your own (.yml).'
        )
    try:
        content = yaml.safe_load(source.read_text())
        given = set(content)
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise BrainfmError(f'The model card {name} is not a YAML mapping: {error}.') from None
    fields = dataclasses.fields(ModelCard)
    missing = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is f.default_factory is missing}
    wrong = sorted(needed - given) + sorted(given - {f.name for f in fields})
    if wrong:
        raise BrainfmError(
            f'The model card {name} lacks or does not know: {", ".join(wrong)}; a card has the '
            f'fields {", ".join(f.name for f in fields)}.'
        )
    if source is path:  # what a user's own card names lies beside it
        for key in ('atlas', 'denoising'):
            if str(content[key]).endswith(('.yml', '.yaml')):
                content[key] = str(path.absolute().parent / content[key])
    if 'training' in content:  # goes into sidecars, and JSON has no NaN
        text = json.dumps(content['training'], default=str)
        content['training'] = json.loads(text, parse_constant=lambda name: None)
    card = ModelCard(**content)
    folder = Path(source).absolute().parent
    gradients = _beside(folder, [card.gradients] if card.gradients else [])
    return dataclasses.replace(
        card, weights=_beside(folder, card.weights), gradients=next(iter(gradients), None)
    )


def _beside(folder: Path, listed: list[dict]) -> list[dict]:
    """Give the paths of files that lie beside a card; a part of them makes no checkpoint."""
    paths = [folder / file['name'] for file in listed]
    if not all(path.is_file() for path in paths):
        return listed
    return [file | {'name': str(path)} for file, path in zip(listed, paths, strict=True)]


def checkpoint_dir(card: ModelCard, home: Path) -> Path:
    """Folder where the weights of a card are kept."""
    return inside(home / 'models', card.name)
