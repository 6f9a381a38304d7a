"""Checkpoints: a folder with a configuration and the weights, in Hugging Face's layout or our own.

Loading is strict: a checkpoint fits its network to the last tensor or is refused in one
sentence, because a network that keeps some random weights still gives plausible numbers.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bids_brainfm.documents import read_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.families import family, family_names, working_families
from bids_brainfm.models.files import CONFIG_FILE, weights_file
from bids_brainfm.models.head import Head
from bids_brainfm.models.protocol import Network, check_network
from bids_brainfm.validation import is_number

# Of a network, far above those that exist (BrainLM: 24 layers, 1280 wide, 650 million weights)
MAX_LAYERS, MAX_SIZE, MAX_WEIGHTS = 1000, 10**6, 5 * 10**9
MAX_EPS = 0.1  # added to the variance of features, which is about 1


def read_config(folder: str | Path, default: dict | None = None) -> dict:
    """Read the configuration of a checkpoint folder, `default` where there is none.

    It is ``config.json``, or the file of another name in which a family describes its checkpoints
    and need not name itself: ``architecture.json`` of Brain-JEPA.

    Raises BrainfmError: the file is absent, is no JSON object, or names no ``model_type``.
    """
    path, known = Path(folder) / CONFIG_FILE, {}
    if not path.is_file():
        for kind in working_families():
            if (other := path.with_name(kind.config_file)).is_file():
                path, known = other, {'model_type': kind.model_type}
    if not path.is_file() and default is not None:
        return default
    try:
        config = read_json(path)
    except OSError as error:
        raise BrainfmError(
            f'{path} cannot be read ({error.strerror}); give the folder that holds the '
            "checkpoint's config.json and weights."
        ) from error
    except ValueError as error:
        raise BrainfmError(f'{path} is not valid JSON ({error}); fetch it again.') from error
    config = known | config
    if 'model_type' not in config:
        raise BrainfmError(
            f'{path} has no model_type, so the family of the model is unknown; fetch it again or '
            f'add {" or ".join(family_names())}.'
        )
    return config


def build(config: dict[str, Any]) -> Network:
    """Build the network that a configuration describes, without weights.

    It is on the meta device, in evaluation mode: it has no memory and no values until
    ``load_checkpoint`` or ``initialise`` gives it some. It has a head if its configuration has.

    Raises BrainfmError: the family cannot be used, a size is missing, or sizes do not fit.
    """
    model_type = str(config.get('model_type'))
    kind = family(model_type)
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise BrainfmError(
            f'The configuration has hidden_act {config["hidden_act"]!r}; only gelu is supported.'
        )
    _check_sizes(config, model_type)
    try:
        with torch.device('meta'):
            network = kind(config)
            network.head = None
            if (weights := sum(x.numel() for x in network.state_dict().values())) > MAX_WEIGHTS:
                raise BrainfmError(
                    f'The configuration of a {model_type} model makes a network of {weights:,} '
                    f'weights, and at most {MAX_WEIGHTS:,} are supported: correct its sizes.'
                )
            if lacking := check_network(network):
                raise BrainfmError(
                    f'A network of the family {model_type} lacks {", ".join(lacking)}, which its '
                    'capabilities promise: update the package that declares it.'
                )
            if 'head' in config:
                can = network.capabilities
                network.head = Head(config['head'], can.width, can.class_token)
            return network.eval()
    except KeyError as error:
        raise BrainfmError(
            f'The configuration of a {model_type} model lacks {error.args[0]!r}; add it.'
        ) from error
    except BrainfmError:
        raise
    except Exception as error:  # whatever sizes that do not fit raise
        reason = str(error).partition('\n')[0]
        raise BrainfmError(
            f'The configuration of a {model_type} model makes no network ({reason:.200}): compare '
            'it with the config of a model card that comes with bids_brainfm.'
        ) from error


def _check_sizes(config: dict[str, Any], model_type: str) -> None:
    """Refuse numbers that no network has, before layers are made of them."""
    for key, value in config.items():
        if str(key).endswith('eps') and not (is_number(value) and 0 < value <= MAX_EPS):
            raise BrainfmError(
                f'The configuration of a {model_type} model has {key} {value!r:.60}, which must '
                f'be above 0 and at most {MAX_EPS:g}: correct it.'
            )
        most = MAX_LAYERS if re.search('layers|depth|blocks', str(key)) else MAX_SIZE
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise BrainfmError(
                    f'The configuration of a {model_type} model has {key} {number!r:.60}, and '
                    f'{most:,} is the most that is supported: correct it.'
                )


def load_checkpoint(network: Network, checkpoint: str | Path) -> Path:
    """Give a network the weights of a checkpoint (a folder, or its file), strictly.

    The file, which is returned, is mapped: weights cost memory once, and only when they are used.

    Raises BrainfmError: the file is absent, damaged, would run code, or does not fit.
    """
    path = weights_file(checkpoint)
    content = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)
    state = _check_fit(network, content, path)
    floats = {n: x.float() if x.is_floating_point() else x for n, x in state.items()}
    network.load_state_dict(floats, assign=True)
    return path


def initialise(network: Network, seed: int) -> Network:
    """Give a network its family's official random initialisation, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    # the head comes after the network, which is then the same with and without one
    head, network.head = network.head, None
    network.load_state_dict(network.initial_state(generator), assign=True)
    if head is not None:
        head.load_state_dict(head.initial_state(generator), assign=True)
    network.head = head
    return network


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
        with warnings.catch_warnings():  # of a strange pickle; the error below is clearer
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


def _damaged(path: Path, reason: object) -> BrainfmError:
    first = str(reason).strip().splitlines()[0][:120] if str(reason).strip() else 'it ends early'
    return BrainfmError(
        f'{path} ({path.stat().st_size} bytes) is not a readable weights file ({first}): it is '
        'truncated or damaged; fetch it again.'
    )


def _bare_names(state: dict[str, Any]) -> dict[str, Any]:
    """Take ``module.``, of networks trained on several GPUs, out of names."""
    return {f'.{name}'.replace('.module.', '.')[1:]: x for name, x in state.items()}


def _unpacked(family: Network | type[Network], content: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a checkpoint by their names in a family; none where it has another layout."""
    try:
        return _bare_names(family.unpack(content))
    except Exception:  # whatever a package of somebody else raises
        return {}


def _check_fit(network: Network, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the state dict of a file if it is, name by name and shape by shape, the network's."""
    wanted = network.state_dict()
    for other in working_families():
        key, kind = other.signature
        if key not in wanted and key in _unpacked(other, content):
            raise BrainfmError(
                f'{path} holds {kind} checkpoint, but its configuration says '
                f'{network.model_type}; give the folder of one model with its own configuration.'
            )
    state = _unpacked(network, content)
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    found = {'lacks': missing, 'has unexpected': extra}
    if faults := [f'{fault} {_some(names)}' for fault, names in found.items() if names]:
        raise BrainfmError(
            f'{path} does not fit its configuration: it {" and ".join(faults)}; give a complete '
            f'checkpoint of this {network.model_type} model.'
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
    return state


def _some(names: list[str]) -> str:
    """Count names and quote the first three: 4 tensors (a, b, c, ...)."""
    dots = ', ...' if len(names) > 3 else ''
    return f'{len(names)} tensor{"s" * (len(names) > 1)} ({", ".join(names[:3])}{dots})'


def _shape(tensor: object) -> str:
    """Return 512×20 for such a tensor, its type for anything else."""
    if isinstance(tensor, Tensor):
        return '×'.join(map(str, tensor.shape))
    return f'a {type(tensor).__name__}'
