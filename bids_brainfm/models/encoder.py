"""Windows in, embeddings out: one loaded network, run over the windows of many runs."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.masking import spatiotemporal_block
from bids_brainfm.models.precision import products_in

if TYPE_CHECKING:
    from bids_brainfm.models.precision import PrecisionCheck
    from bids_brainfm.models.protocol import LatentPredicting, Network, Reconstructing

Key = TypeVar('Key', bound=Hashable)


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of W windows of a run, float32; None where not asked for or not there.

    Parcels are in atlas order; a parcel has K time patches.
    """

    summary: np.ndarray  # (W, D) class token after the last normalisation, or mean of tokens
    parcels: np.ndarray | None = None  # (W, P, D) mean of each parcel's tokens
    # (W, N, D) without the class token: parcel by parcel and in time within a parcel; where a
    # token spans several parcels, these are in the model's order (of a ViT: row by row)
    tokens: np.ndarray | None = None
    # (W, P, K) attention in the last layer (mean over heads) to the token of each parcel and time
    # patch, as a multiple of uniform attention over all tokens but the class token: that of the
    # class token, or the mean over all tokens; parcels that share a token share its value
    attention_profile: np.ndarray | None = None
    # (W, P, K) smooth L1 error of the latents of a block of each window as predicted from the
    # rest, and as guessed without a model; NaN outside the block
    latent_error: np.ndarray | None = None
    latent_baseline: np.ndarray | None = None
    # (W, C) what the head predicts, in the target's units or as probabilities of the classes
    prediction: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.summary)

    @property
    def attention(self) -> np.ndarray | None:
        """Attention to each parcel as a multiple of uniform attention, mean over time, (W, P)."""
        return None if self.attention_profile is None else self.attention_profile.mean(2)

    def part(self, start: int, stop: int) -> 'Encoding':
        """Return the windows from ``start`` up to ``stop``."""
        return Encoding(**{name: x[start:stop] for name, x in vars(self).items() if x is not None})

    @staticmethod
    def join(parts: 'list[Encoding]') -> 'Encoding':
        """Put windows one after the other."""
        names = [name for name, x in vars(parts[0]).items() if x is not None]
        return Encoding(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


class Encoder:
    """A network ready to encode windows that come in atlas order.

    On the CPU every window passes the network alone: batching gains no time there, and in float32
    the result is the same to the last bit, whatever else is in the batch.

    Parameters
    ----------
    network : Network
        With weights and, where needed, positions (:func:`set_positions`). It is moved to `device`
        and its matrices to `precision`: the encoder takes it over.
    order : (P,) int, optional; row i of the model's input is parcel ``order[i]`` of the atlas
    precision : {'float32', 'tf32', 'bfloat16'}
        Of matrix products, see :func:`bids_brainfm.models.precision.resolve_precision`; all else
        is float32 always.
    name : str, for messages
    block : str, optional
        Of each window to predict from the rest, for families that predict latents; see
        :func:`bids_brainfm.models.masking.spatiotemporal_block`.

    Raises BrainfmError: the network has no weights, or `order` or `block` does not fit it.
    """

    def __init__(
        self,
        network: 'Network',
        order: np.ndarray | None = None,
        device: torch.device | str = 'cpu',
        precision: str = 'float32',
        name: str = 'the model',
        block: str | None = None,
    ):
        if any(parameter.is_meta for parameter in network.parameters()):
            raise BrainfmError(
                f'{name} has no weights yet, so it cannot encode; load a checkpoint '
                '(load_checkpoint) or draw random weights (initialise) first.'
            )
        self.name, self.device, self.precision = name, torch.device(device), precision
        self.network = network.eval().requires_grad_(False).to(self.device)
        if precision == 'bfloat16':
            # Autocast would convert these anew for every window.
            for module in nn.ModuleList(network.transformers).modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.capabilities = network.capabilities
        self.shape = self.capabilities.window
        self.order = None if order is None else np.asarray(order)
        parcels = self.shape[0]
        if self.order is not None and sorted(self.order) != list(range(parcels)):
            raise BrainfmError(
                f'The parcel order of {name} is not a permutation of {parcels} parcels; give the '
                'order that belongs to the model and its atlas.'
            )
        self._block = None
        if block is not None:
            if not self.capabilities.predicts_latents:
                raise BrainfmError(
                    f'{name} predicts no latents, so it has no block {block}; leave latent '
                    'prediction out or take a Brain-JEPA.'
                )
            tokens = spatiotemporal_block(block, parcels, self.capabilities.patches or 0)
            self._block = tuple(part.to(self.device) for part in tokens)

    def encode(
        self, windows: np.ndarray, tokens: bool = False, attention: bool = False
    ) -> Encoding:
        """Encode scaled windows (B, P, T), parcels in atlas order, unmasked.

        With `tokens`, all of them are returned, and attention where parcels have their own; with
        `attention`, where it falls. Raises BrainfmError: the windows have another shape.
        """
        self.check(windows)
        step = 1 if self.device.type == 'cpu' else len(windows)
        starts = range(0, len(windows), step)
        with products_in(self.precision):
            parts = [self._pass(windows[i : i + step], tokens, attention) for i in starts]
        return Encoding.join(parts)

    def check(self, windows: np.ndarray, run: Hashable = None) -> None:
        """Refuse windows that do not have the model's shape, naming the run if given."""
        if windows.ndim != 3 or windows.shape[1:] != self.shape or not len(windows):
            where = f'the windows of {run}' if run is not None else 'the windows'
            raise BrainfmError(
                f'{self.name} takes windows of {self.shape[0]} parcels × {self.shape[1]} time '
                f'points, but {where} have shape {windows.shape}; use the atlas and the window '
                'length of the model.'
            )

    @torch.inference_mode()
    def reconstruct(
        self,
        windows: np.ndarray,
        keep: torch.Tensor,
        blank: torch.Tensor | None = None,
        batch_size: int = 8,
    ) -> np.ndarray:
        """Rebuild whole windows (B, P, T), in atlas order, from a part of their tokens.

        Only what the network did not see says something about it. It sees the tokens `keep`
        (B, K), or (K,) for all windows alike, in this order, with the time points `blank` (T,)
        bool set to 0; `batch_size` windows at once on a GPU.

        Raises BrainfmError: the windows do not have the model's shape, or it reconstructs nothing.
        """
        self.check(windows)
        network = self.reconstructing
        keep = torch.as_tensor(keep).expand(len(windows), -1)
        blank = None if blank is None else blank.to(self.device)
        step, found = 1 if self.device.type == 'cpu' else batch_size, []
        for i in range(0, len(windows), step):
            signal, seen = self._signal(windows[i : i + step]), keep[i : i + step].to(self.device)
            with products_in(self.precision):
                with self._autocast():
                    hidden, _ = network.encode(signal, seen, blank)
                made = network.decode(hidden.float(), seen)
            found.append(self._atlas_order(made).cpu().numpy())
        return np.concatenate(found)

    def points(self, tokens: torch.Tensor) -> np.ndarray:
        """Points (B, P, T) bool, in atlas order, that marked tokens (B, N) bool cover."""
        return self._atlas_order(self.reconstructing.points(tokens)).numpy()

    def covering(self, points: np.ndarray) -> torch.Tensor:
        """Tokens (N,) bool that hold any of the marked points (P, T) bool, in atlas order."""
        rows = points if self.order is None else points[self.order]
        return self.reconstructing.covering(torch.from_numpy(np.ascontiguousarray(rows))[None])[0]

    @property
    def parcel_tokens(self) -> np.ndarray:
        """Number of the token that holds each parcel, (P, K) int for K time patches.

        Tokens are numbered as in :class:`bids_brainfm.models.protocol.Network`.
        """
        tokens = torch.arange(self.network.tokens)[None]
        return self._atlas_order(self.network.at_parcels(tokens))[0].numpy()

    @property
    def reconstructing(self) -> 'Reconstructing':
        """The network, if it reconstructs; refused otherwise."""
        if not self.capabilities.reconstructs:
            raise BrainfmError(
                f'{self.name} has no decoder, so it reconstructs nothing; take a BrainLM.'
            )
        return cast('Reconstructing', self.network)

    def _signal(self, windows: np.ndarray) -> torch.Tensor:
        """Windows as the network takes them: its order of rows, its device."""
        if self.order is not None:
            windows = windows[:, self.order]
        return torch.from_numpy(np.ascontiguousarray(windows, np.float32)).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.precision == 'bfloat16')

    @torch.inference_mode()
    def _pass(self, windows: np.ndarray, tokens: bool, attention: bool) -> Encoding:
        """Encode windows in one pass of the network."""
        signal = self._signal(windows)
        network, patches = self.network, self.capabilities.patches
        attention = attention or (tokens and bool(patches))
        with self._autocast():
            hidden, row = network.encode(signal, return_attention=attention)
            if self._block:
                predicting = cast('LatentPredicting', network)
                errors = predicting.latent_error(signal, hidden, *self._block)
        first = int(self.capabilities.class_token)
        body = hidden[:, first:]
        found = {'summary': hidden[:, 0] if first else body.mean(1)}
        if patches:
            by_parcel = body.unflatten(1, (-1, patches))
            found['parcels'] = self._atlas_order(by_parcel.mean(2))
            body = self._atlas_order(by_parcel).flatten(1, 2)
        if tokens:
            found['tokens'] = body
        if row is not None:
            received = row[:, first:]
            relative = received / received.mean(1, keepdim=True)
            found['attention_profile'] = self._atlas_order(network.at_parcels(relative))
        if self._block:
            for name, error in zip(('latent_error', 'latent_baseline'), errors, strict=True):
                found[name] = self._atlas_order(error.unflatten(1, (-1, patches)))
        if network.head is not None:
            found['prediction'] = network.head.predict(network.head(hidden.float()))
        # Copied, so that a summary does not hold the memory of all tokens.
        return Encoding(**{name: x.cpu().numpy().copy() for name, x in found.items()})

    def _atlas_order(self, x: torch.Tensor) -> torch.Tensor:
        """Put dimension 1, parcels in the model's order, back into atlas order."""
        return x if self.order is None else x[:, np.argsort(self.order)]


def encode_runs(
    encoder: Encoder,
    runs: Iterable[tuple[Key, np.ndarray]],
    batch_size: int,
    tokens: bool = False,
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
    check: 'PrecisionCheck | None' = None,
) -> Iterator[tuple[Key, Encoding]]:
    """Encode the windows of many runs, in batches that cross from one run to the next.

    Runs, each a key and windows (W, P, T), are taken one by one as batches of `batch_size` windows
    need them, so they may come from a generator that reads files; each is given back as soon as
    its last window is encoded. Memory holds one batch and the runs it touches. `progress` is
    called after each batch with the number of windows done so far, and `check` is given each
    batch; for `tokens` and `attention` see :meth:`Encoder.encode`.

    Raises BrainfmError: windows of a run do not have the model's shape.
    """

    def windows_of_runs() -> Iterator[tuple[Key, bool, np.ndarray]]:
        for key, windows in runs:
            encoder.check(windows, key)
            for number, window in enumerate(windows, 1):
                yield key, number == len(windows), window

    waiting, done = windows_of_runs(), 0
    parts: list[Encoding] = []  # of the run whose windows are not all encoded yet
    while batch := list(islice(waiting, batch_size)):
        windows = np.stack([window for *_, window in batch])
        encoded = encoder.encode(windows, tokens, attention)
        if check is not None:
            check.add(windows, encoded.summary)
        for i, (key, is_last, _) in enumerate(batch):
            parts.append(encoded.part(i, i + 1))
            if is_last:
                yield key, Encoding.join(parts)
                parts = []
        done += len(batch)
        if progress:
            progress(done)


def ascending_y(xyz: np.ndarray) -> np.ndarray:
    """Return parcels from posterior to anterior, as the BrainLM ViT models take them.

    Row i of the model's input is parcel ``order[i]``; centres `xyz` (P, 3) are in mm. The sort is
    stable: A424 has only 77 different Y, which else would be in another order elsewhere.
    """
    return np.argsort(np.asarray(xyz)[:, 1], kind='stable')


def row_order(parcel_order: str, xyz: np.ndarray) -> np.ndarray | None:
    """Return the permutation that a card's ``parcel_order`` means, None for the atlas's order."""
    return ascending_y(xyz) if parcel_order == 'ascending-y' else None


def set_positions(
    network: 'Network',
    xyz: np.ndarray,
    order: np.ndarray | None = None,
    gradients: np.ndarray | None = None,
) -> None:
    """Say where parcels lie: centres (P, 3) in mm, gradients (P, G), in atlas order."""
    table = {'coordinates': xyz, 'gradients': gradients}.get(network.capabilities.positions)
    if table is not None:
        network.set_positions(table if order is None else table[order])


def resolve_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` stands for.

    Raises BrainfmError: ``cuda`` is asked for and this machine or this PyTorch has none.
    """
    if name not in ('auto', 'cpu', 'cuda'):
        raise BrainfmError(f'The device {name!r} is not known; choose auto, cpu or cuda.')
    present = torch.cuda.is_available()
    if name == 'cuda' and not present:
        raise BrainfmError(
            'A CUDA device is asked for, but PyTorch finds none here; choose --device cpu or '
            'auto, or install a PyTorch built for your GPU.'
        )
    return torch.device('cuda' if present and name != 'cpu' else 'cpu')
