"""Which network is run: a card, its weights, and what its outputs are called."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard, checkpoint_dir, load_card
from bids_brainfm.models.families import family
from bids_brainfm.models.files import CONFIG_FILE, is_weights
from bids_brainfm.models.protocol import Capabilities
from bids_brainfm.resources import recorded_sha256, sha256_of

# Seed of random weights, the same on every machine
SEED = 20240606


@dataclass(frozen=True)
class GradientTable:
    """The table of brain gradients that a network is given, a CSV file.

    It is `named` if it is the one that the card names (by its sha256, where it gives that).
    """

    path: Path
    sha256: str
    named: bool


@dataclass(frozen=True)
class ModelSpec:
    """One network of a run."""

    card: ModelCard  # with the architecture of the checkpoint, where there is one
    label: str  # BIDS label of its outputs
    checkpoint: Path | None  # the weights, or their folder; None for random weights
    sha256: str | None  # of the weights file
    capabilities: Capabilities
    gradients: GradientTable | None = None
    # columns of what its head predicts (models/head.py); empty for a network without one
    predicted: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether weights were loaded; else they are random."""
        return self.checkpoint is not None

    @property
    def weights(self) -> str:
        """What the weights are, in words, for sidecars and the report."""
        return f'sha256 {self.sha256}' if self.sha256 else f'random, untrained (seed {SEED})'


def find_checkpoint(
    name: str, path: Path | None, home: Path, random_weights: bool
) -> tuple[ModelCard, Path | None]:
    """Card and checkpoint (a folder, or its file of weights), see :func:`resolve_model`.

    Raises BrainfmError: there is no such card, or its weights are not at hand.
    """
    card = load_card(name)
    if path is None and (random_weights or not card.weights):
        return card, None
    files = [Path(file['name']) for file in card.weights]
    local = next((f for f in files if f.is_absolute() and f.suffix != '.json'), None)
    checkpoint = path or local or checkpoint_dir(card, home)
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    # Where the publisher gives no configuration, the card's own holds
    needed = not files or CONFIG_FILE in (file.name for file in files)
    if needed:
        kind = family(str(card.config.get('model_type')))
        present = any((folder / name).is_file() for name in (CONFIG_FILE, kind.config_file))
    elif path is not None:
        present = path.exists()
    else:  # a broken fetch may have left a folder without them
        present = checkpoint.is_file() or (
            folder.is_dir() and any(is_weights(file.name) for file in folder.iterdir())
        )
    if not present:
        if path is not None:
            raise BrainfmError(
                f'{path} has no config.json, so it is not a checkpoint in Hugging Face layout: '
                f'give the folder with config.json and model.safetensors or pytorch_model.bin.'
                if needed
                else f'{path} does not exist: give the checkpoint of {name}, or its folder.'
            )
        raise BrainfmError(
            f'The weights of {name} are not in {folder}: run "bids_brainfm_models fetch {name}" '
            f'(on a machine without internet, fetch elsewhere and add --from DIR), or give '
            f'a checkpoint folder with --model {name}=PATH.'
        )
    return card, checkpoint


def find_gradients(name: str, checkpoint: Path | None, home: Path) -> GradientTable | None:
    """Find the table of gradients of a model, None where it needs none.

    It is the only ``gradient*.csv`` in the folder of the user's checkpoint, else the card's.

    Raises BrainfmError: there is none, there are several, or it is not the one the card names.
    """
    card = load_card(name)
    if card.gradients is None:
        return None
    table, expected = card.gradients['name'], card.gradients.get('sha256')
    # a name that is absolute stays as it is
    path, own = checkpoint_dir(card, home) / table, False
    if checkpoint is not None:
        folder = checkpoint.parent if checkpoint.is_file() else checkpoint
        tables = sorted(folder.glob('gradient*.csv'))
        if len(tables) > 1:
            raise BrainfmError(
                f'{folder} holds {len(tables)} tables of gradients '
                f'({", ".join(table.name for table in tables)}): leave the one that the '
                f'checkpoint was trained with.'
            )
        path, own = (tables[0], True) if tables else (path, False)
    if not path.is_file():
        raise BrainfmError(
            f'{card.name} needs the table of brain gradients {Path(table).name}, which is not in '
            f'{path.parent}: run "bids_brainfm_models fetch {name}" (without internet, add '
            f'--from DIR), or put the table that your checkpoint was trained with beside it.'
        )
    digest = sha256_of(path)
    if expected and digest != expected and not own:
        raise BrainfmError(
            f'{path} has sha256 {digest} where {expected} was expected: another table places the '
            f'parcels elsewhere and makes the weights meaningless; fetch it again.'
        )
    return GradientTable(path, digest, digest == expected or not (expected or own))


def _check_content(card: ModelCard) -> None:
    """Refuse local files that are not those their card describes (fetching checks others)."""
    for file in (*card.weights, *filter(None, [card.participants])):
        path, expected = Path(file['name']), file.get('sha256')
        if path.is_absolute() and expected and (digest := sha256_of(path)) != expected:
            raise BrainfmError(
                f'{path} has sha256 {digest} where the card of {card.name} gives {expected}: put '
                f'the file there that belongs to the card, or correct the card.'
            )


def resolve_model(
    name: str, home: Path, path: Path | None = None, random_weights: bool = False
) -> ModelSpec:
    """Resolve a model by the name or path of its card, before anything runs.

    The checkpoint is that of `path`, a folder or file, else the fetched one in `home`, or that
    next to the card; `random_weights` leaves it aside: the control experiment.

    Raises BrainfmError: card, checkpoint or gradients are missing or do not belong together.
    """
    from bids_brainfm.models.gradient_table import read_gradients
    from bids_brainfm.models.weights import build, load_checkpoint, read_config

    (card, checkpoint), digest = find_checkpoint(name, path, home, random_weights), None
    if checkpoint is not None and path is None:
        _check_content(card)
    network = build(card.config)
    if checkpoint is not None:
        folder = checkpoint.parent if checkpoint.is_file() else checkpoint
        config = read_config(folder, default=card.config)
        if config.get('model_type') != card.config['model_type']:
            raise BrainfmError(
                f'{folder} holds a checkpoint of the family {config.get("model_type")}, but '
                f'{card.name} is of the family {card.config["model_type"]}: choose a card and a '
                f'folder that match.'
            )
        network = build(config)
        card = dataclasses.replace(card, config=config, window=network.capabilities.window[1])
        if not random_weights:
            # weights that do not fit are found now, not after hours of parcellation
            weights = load_checkpoint(network, checkpoint)
            digest = sha256_of(weights)
            if path is None and (recorded_sha256(weights) or digest) != digest:
                raise BrainfmError(
                    f'{weights} is damaged, its sha256 is not the one that was recorded when it '
                    f'was fetched: run "bids_brainfm_models fetch {card.name}" again.'
                )
    gradients = find_gradients(name, path, home)
    if gradients is not None:
        network.set_positions(read_gradients(gradients.path))
    if path is not None or digest is None:  # the card describes other weights
        card = dataclasses.replace(card, training=None, participants=None)
    # the control is written in addition to the real outputs, never in their place
    label = card.label + ('random' if random_weights and (card.weights or path) else '')
    trained = checkpoint if digest else None
    predicted = tuple(network.head.columns) if network.head else ()
    return ModelSpec(card, label, trained, digest, network.capabilities, gradients, predicted)
