"""Checkpoints: a folder with a configuration and the weights, in Hugging Face's layout or our own.

Loading is strict: a checkpoint fits its network to the last tensor or is refused in one
sentence, because a network that keeps some random weights still gives plausible numbers.
"""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.brain_jepa import BrainJEPA
from bids_brainfm.models.brainlm_legacy import BrainLMLegacy
from bids_brainfm.models.brainlm_vitmae import BrainLMViT
from bids_brainfm.models.files import CONFIG_FILES, config_file, weights_file
from bids_brainfm.models.head import Head

FAMILIES = {family.model_type: family for family in (BrainLMViT, BrainLMLegacy, BrainJEPA)}

# A key that only one kind of checkpoint has, and what to call that kind.
SIGNATURES = {
    'vit.embeddings.patch_embeddings.projection.weight': 'a ViT-MAE BrainLM (vit_mae)',
    'vit.embeddings.xyz_embedding_projection.weight': 'a legacy 13M BrainLM (brainlm_mae)',
    'target_encoder.norm.weight': 'a Brain-JEPA (brain_jepa)',
}

# What the official Brain-JEPA file holds: networks, and what belongs to their training.
NETWORKS = ('encoder', 'predictor', 'target_encoder')
TRAINING = ('opt', 'scaler', 'epoch', 'loss', 'batch_size', 'world_size', 'lr')


def read_config(folder: str | Path, default: dict | None = None) -> dict:
    """Read the configuration of a checkpoint folder.

    Parameters
    ----------
    folder : path-like
        Holds ``config.json``, or ``architecture.json``, which describes a Brain-JEPA and need not
        say so.
    default : dict, optional
        What is returned where neither is there: the official Brain-JEPA comes without.

    Raises
    ------
    BrainfmError
        The file is absent, is not a JSON object, or does not name a ``model_type``.
    """
    path = config_file(folder)
    if path is None and default is not None:
        return default
    path = path or Path(folder) / CONFIG_FILES[0]
    known = {} if path.name == CONFIG_FILES[0] else {'model_type': BrainJEPA.model_type}
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise BrainfmError(
            f'{path} cannot be read ({error.strerror}); give the folder that holds the '
            "checkpoint's config.json and weights."
        ) from error
    except ValueError as error:
        raise BrainfmError(f'{path} is not valid JSON ({error}); fetch it again.') from error
    if not isinstance(config, dict):
        raise BrainfmError(f'{path} holds no JSON object; fetch it again.')
    config = known | config
    if 'model_type' not in config:
        raise BrainfmError(
            f'{path} has no model_type, so the family of the model is unknown; fetch it again or '
            f'add {" or ".join(FAMILIES)}.'
        )
    return config


def build(config: dict) -> nn.Module:
    """Build the network that a configuration describes, without weights.

    The network stands on the meta device: it has names and shapes but no memory and no values
    until ``load_checkpoint`` or ``initialise`` gives it some.

    Parameters
    ----------
    config : dict
        As in a checkpoint's ``config.json``; where it has a ``head``, the network gets one, see
        :class:`bids_brainfm.models.head.Head`.

    Returns
    -------
    BrainLMViT, BrainLMLegacy or BrainJEPA
        In evaluation mode.

    Raises
    ------
    BrainfmError
        The family is unknown, a size is missing, or sizes do not fit each other.
    """
    model_type = config.get('model_type')
    if model_type not in FAMILIES:
        raise BrainfmError(
            f'The configuration has model_type {model_type!r}, which is not known here; '
            f'known are {", ".join(FAMILIES)}.'
        )
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise BrainfmError(
            f'The configuration has hidden_act {config["hidden_act"]!r}; only gelu is supported.'
        )
    try:
        with torch.device('meta'):
            network = FAMILIES[model_type](config)
            if 'head' in config:
                network.head = Head(config['head'], network.width, network.has_class_token)
            return network.eval()
    except KeyError as error:
        raise BrainfmError(
            f'The configuration of a {model_type} model lacks {error.args[0]!r}; add it.'
        ) from error


def load_checkpoint(module: nn.Module, checkpoint: str | Path) -> Path:
    """Give a network the weights of a checkpoint, strictly.

    The file is mapped, not read: weights cost memory once, and only when they are used.

    Parameters
    ----------
    module : nn.Module
        From ``build``.
    checkpoint : path-like
        A file of weights, or the folder of one; see
        :func:`bids_brainfm.models.files.weights_file`.

    Returns
    -------
    Path
        The file that was loaded.

    Raises
    ------
    BrainfmError
        No weights file, a damaged one, one that would run code, or one that does not fit.
    """
    path = weights_file(checkpoint)
    state = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)
    state = _flatten(state)
    _check_fit(module, state, path)
    floats = {n: x.float() if x.is_floating_point() else x for n, x in state.items()}
    module.load_state_dict(floats, assign=True)
    return path


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Give a network its family's official random initialisation, the same on every machine.

    Parameters
    ----------
    module : nn.Module
        From ``build``; changed in place.
    seed : int

    Returns
    -------
    nn.Module
        The same network.
    """
    generator = torch.Generator().manual_seed(seed)
    # the head comes after the network, which is then the same with and without one
    head = module._modules.pop('head', None)
    module.load_state_dict(module.initial_state(generator), assign=True)
    if head is not None:
        head.load_state_dict(head.initial_state(generator), assign=True)
        module.head = head
    return module


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework='pt') as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read ``torch.save`` output by an unpickler that makes tensors and nothing else."""
    with path.open('rb') as file:
        zipped = file.read(2) == b'PK'
    if zipped and not zipfile.is_zipfile(path):
        raise _damaged(path, 'the archive has no end')
    try:
        with warnings.catch_warnings():  # of a strange pickle; the sentence below says it better
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise BrainfmError(
            f'{path} is refused: it holds something other than tensors, which may run code on '
            'loading, and nothing of it was run; get the checkpoint from its official source, as '
            'model.safetensors if there is one.'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise _damaged(path, 'no state dict in it')
    return state


def _flatten(state: dict) -> dict:
    """Bring the official Brain-JEPA's nested state dicts, and names behind ``module.``, to ours.

    >>> _flatten({'encoder': {'module.norm.bias': 1}, 'target_encoder': {}, 'epoch': 300})
    {'encoder.norm.bias': 1}
    """
    parts = {part: state[part] for part in NETWORKS if isinstance(state.get(part), dict)}
    if parts:
        rest = {name: x for name, x in state.items() if name not in (*parts, *TRAINING)}
        state = rest | {f'{part}.{name}': x for part in parts for name, x in parts[part].items()}
    # The prefix of networks trained on several GPUs.
    return {f'.{name}'.replace('.module.', '.')[1:]: x for name, x in state.items()}


def _damaged(path: Path, reason: object) -> BrainfmError:
    first = str(reason).strip().splitlines()[0][:120] if str(reason).strip() else 'it ends early'
    return BrainfmError(
        f'{path} ({path.stat().st_size} bytes) is not a readable weights file ({first}): it is '
        'truncated or damaged; fetch it again.'
    )


def _check_fit(module: nn.Module, state: dict, path: Path) -> None:
    """Refuse a state dict that is not, name by name and shape by shape, the network's own."""
    wanted = module.state_dict()
    for key, family in SIGNATURES.items():
        if key in state and key not in wanted:
            raise BrainfmError(
                f'{path} holds {family} checkpoint, but its configuration says '
                f'{module.model_type}; give the folder of one model with its own configuration.'
            )
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    if missing or extra:
        faults = [f'lacks {_some(missing)}'] * bool(missing)
        faults += [f'has unexpected {_some(extra)}'] * bool(extra)
        raise BrainfmError(
            f'{path} does not fit its configuration: it {" and ".join(faults)}; give a complete '
            f'checkpoint of this {module.model_type} model.'
        )
    wrong = [
        f'{name} is {_shape(state[name])} where {_shape(tensor)} is expected'
        for name, tensor in wanted.items()
        if _shape(state[name]) != _shape(tensor)
    ]
    if wrong:
        more = f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''
        raise BrainfmError(
            f'{path} does not fit its configuration: {wrong[0]}{more}; correct the sizes there or '
            'give the checkpoint that belongs to it.'
        )


def _some(names: list[str]) -> str:
    """Count names and quote the first few.

    >>> _some(['a', 'b', 'c', 'd'])
    '4 tensors (a, b, c, ...)'
    """
    dots = ', ...' if len(names) > 3 else ''
    return f'{len(names)} tensor{"s" * (len(names) > 1)} ({", ".join(names[:3])}{dots})'


def _shape(tensor: object) -> str:
    """Return 512×20 for such a tensor, its type for anything else."""
    if not isinstance(tensor, Tensor):
        return f'a {type(tensor).__name__}'
    return '×'.join(map(str, tensor.shape))
