"""Which network is run: a card, its weights, and what its outputs are called."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard, checkpoint_dir, load_card

# Seed of random weights, the same on every machine
SEED = 20240606


@dataclass(frozen=True)
class ModelSpec:
    """One network of a run.

    Attributes
    ----------
    card : ModelCard
        With the architecture of the checkpoint, where there is one.
    label : str
        BIDS label of its outputs.
    checkpoint : Path or None
        Folder of the weights; None for random weights.
    sha256 : str or None
        Of the weights file.
    """

    card: ModelCard
    label: str
    checkpoint: Path | None
    sha256: str | None

    @property
    def trained(self) -> bool:
        """Whether weights were loaded; else they are random."""
        return self.checkpoint is not None

    @property
    def weights(self) -> str:
        """What the weights are, in words, for sidecars and the report."""
        return f'sha256 {self.sha256}' if self.sha256 else f'random, untrained (seed {SEED})'


def split_name(text: str) -> tuple[str, Path | None]:
    """Split ``NAME[=PATH]`` of ``--model``.

    >>> split_name('brainlm-111m=/weights/vitmae_111M')
    ('brainlm-111m', PosixPath('/weights/vitmae_111M'))
    """
    name, given, path = text.partition('=')
    return name, Path(path).absolute() if given else None


def find_checkpoint(text: str, home: Path, random_weights: bool) -> tuple[ModelCard, Path | None]:
    """Card and checkpoint folder that ``NAME[=PATH]`` means.

    Raises
    ------
    BrainfmError
        There is no such card, or its weights are not at hand.
    """
    name, path = split_name(text)
    card = load_card(name)
    if path is None and (card.embedded or random_weights):
        return card, None
    folder = path or checkpoint_dir(card, home)
    if not (folder / 'config.json').is_file():
        if path is not None:
            raise BrainfmError(
                f'{path} has no config.json, so it is not a checkpoint in Hugging Face layout: '
                f'give the folder with config.json and model.safetensors or pytorch_model.bin.'
            )
        raise BrainfmError(
            f'The weights of {name} are not in {folder}: run "bids_brainfm_models fetch {name}" '
            f'(on a machine without internet, fetch elsewhere and add --from DIR), or give '
            f'a checkpoint folder with --model {name}=PATH.'
        )
    return card, folder


def resolve_model(text: str, home: Path, random_weights: bool = False) -> ModelSpec:
    """Resolve one ``--model`` argument, before anything runs.

    Parameters
    ----------
    text : str
        ``NAME[=PATH]``.
    home : Path
        Where fetched weights are kept.
    random_weights : bool
        Whether to leave the weights aside: the control experiment.

    Raises
    ------
    BrainfmError
        The card or the checkpoint is missing or is of another family.
    """
    from bids_brainfm.atlases.fetch import sha256_of
    from bids_brainfm.models.weights import build, load_checkpoint, read_config

    card, folder = find_checkpoint(text, home, random_weights)
    digest = None
    try:
        build(card.config)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        raise BrainfmError(
            f'The config of the model card {card.name} makes no network ({reason}): compare it '
            f'with that of brainlm-demo.'
        ) from None
    if folder is not None:
        config = read_config(folder)
        if config.get('model_type') != card.config['model_type']:
            raise BrainfmError(
                f'{folder} holds a checkpoint of the family {config.get("model_type")}, but '
                f'{card.name} is of the family {card.config["model_type"]}: choose a card and a '
                f'folder that match.'
            )
        samples = config.get('num_timepoints_per_voxel', card.window)
        card = dataclasses.replace(card, config=config, window=samples)
        if not random_weights:
            # weights that do not fit are found now, not after hours of parcellation
            digest = sha256_of(load_checkpoint(build(config), folder))
    # the control stands beside the real outputs, never in their place
    label = card.label + ('random' if random_weights and not card.embedded else '')
    return ModelSpec(card, label, folder if digest else None, digest)
