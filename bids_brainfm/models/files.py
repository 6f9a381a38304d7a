"""Which files of a folder make a checkpoint; nothing heavy is imported to tell."""

from pathlib import Path

from bids_brainfm.errors import BrainfmError

# The second describes a Brain-JEPA, which needs no model_type there.
CONFIG_FILES = ('config.json', 'architecture.json')
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin')
OFFICIAL_JEPA = '.pth.tar'  # ends the name of Brain-JEPA's official file


def config_file(folder: str | Path) -> Path | None:
    """Return the configuration of a checkpoint folder, None where there is none."""
    paths = (Path(folder) / name for name in CONFIG_FILES)
    return next((path for path in paths if path.is_file()), None)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights.

    >>> is_weights('jepa-ep300.pth.tar'), is_weights('config.json')
    (True, False)
    """
    return name in WEIGHTS_FILES or name.endswith(OFFICIAL_JEPA)


def weights_file(checkpoint: str | Path) -> Path:
    """Return the weights file of a checkpoint: safetensors, a pickle, or an official Brain-JEPA.

    Parameters
    ----------
    checkpoint : path-like
        A folder, or the file itself.

    Raises
    ------
    BrainfmError
        There is none, or several of which none goes first.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_file():
        return checkpoint
    for name in WEIGHTS_FILES:
        if (checkpoint / name).is_file():
            return checkpoint / name
    official = sorted(checkpoint.glob(f'*{OFFICIAL_JEPA}'))
    if len(official) == 1:
        return official[0]
    if official:
        raise BrainfmError(
            f'{checkpoint} holds {len(official)} checkpoints '
            f'({", ".join(path.name for path in official)}); give the one file that is meant.'
        )
    raise BrainfmError(
        f'{checkpoint} holds no weights: neither {", ".join(WEIGHTS_FILES)} nor a '
        f'*{OFFICIAL_JEPA} is there; fetch the checkpoint or give its folder.'
    )
