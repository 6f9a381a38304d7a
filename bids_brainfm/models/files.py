"""Which files of a folder make a checkpoint; nothing heavy is imported to tell."""

from pathlib import Path

from bids_brainfm.errors import BrainfmError

CONFIG_FILE = 'config.json'
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin')
OFFICIAL_JEPA = '.pth.tar'  # ends the name of Brain-JEPA's official file


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights."""
    return name in WEIGHTS_FILES or name.endswith(OFFICIAL_JEPA)


def weights_file(checkpoint: str | Path) -> Path:
    """Return the weights file of a checkpoint, which is a folder or the file itself.

    Raises BrainfmError: there is none, or several of which none goes first.
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
