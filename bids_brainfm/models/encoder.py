"""Windows in, embeddings out: one loaded network, run over the windows of many runs."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.masking import spatiotemporal_block


@dataclass(frozen=True)
class Encoding:
    """What an encoder says about the windows of one run, all float32.

    Attributes
    ----------
    summary : (W, D)
        The embedding of each window: the class token after the final LayerNorm, or the mean of
        all tokens for a model without one.
    parcels : (W, P, D) or None
        Mean of each parcel's tokens, parcels in atlas order; None where a token spans several
        parcels.
    tokens : (W, N, D) or None
        All tokens in their canonical order, without the class token. For a model with tokens
        per parcel: parcel by parcel in atlas order, in time within a parcel. For a ViT: row by
        row of its grid, parcels in the model's order. None where not asked for.
    attention_profile : (W, P, K) or None
        Share of attention in the last layer that falls on each parcel at each of K time patches
        (mean over heads), in atlas order: the class token's, or the mean over all tokens for a
        model without one. Parcels that share a token have equal parts of it. None where not
        asked for.
    latent_error, latent_baseline : (W, P, K) or None
        Smooth L1 error of the latents of a block of each window as predicted from the rest, and
        as guessed without a model, for each parcel in atlas order and each of K time patches; NaN
        outside the block. None where no block was asked for.
    prediction : (W, C) or None
        What the network's head says, in the target's units or as probabilities of the classes;
        None for a network without a head.
    """

    summary: np.ndarray
    parcels: np.ndarray | None = None
    tokens: np.ndarray | None = None
    attention_profile: np.ndarray | None = None
    latent_error: np.ndarray | None = None
    latent_baseline: np.ndarray | None = None
    prediction: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.summary)

    @property
    def attention(self) -> np.ndarray | None:
        """Share of attention that falls on each parcel, (W, P); None where not asked for."""
        return None if self.attention_profile is None else self.attention_profile.sum(2)

    def part(self, start: int, stop: int) -> 'Encoding':
        """Return the windows from ``start`` up to ``stop``."""
        return self._map(lambda name: getattr(self, name)[start:stop])

    @staticmethod
    def join(parts: 'list[Encoding]') -> 'Encoding':
        """Put windows one after the other."""
        return parts[0]._map(lambda name: np.concatenate([getattr(part, name) for part in parts]))

    def _map(self, make: Callable[[str], np.ndarray]) -> 'Encoding':
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return Encoding(**{name: make(name) for name in names})


class Encoder:
    """A network ready to encode windows that come in atlas order.

    On the CPU every window passes the network alone: batching gains no time there, and the
    result cannot depend on what else is in the batch. In float32 it is the same to the last bit
    each time.

    Parameters
    ----------
    network : nn.Module
        With weights. It is moved to ``device`` and its matrices to ``precision``: the encoder
        takes it over.
    order : (P,) int, optional
        Row permutation: row i of the model's input is parcel ``order[i]`` of the atlas.
    xyz : (P, 3) float, optional
        Parcel centres in mm, atlas order; only the legacy family uses them, and needs them.
    device : torch.device
    precision : {'float32', 'bfloat16'}
        Of matrix products. Normalisation, the sum that runs through the layers, and outputs are
        float32 always.
    name : str
        The model's name, for messages.
    block : str, optional
        Block of each window to predict from the rest, for families that predict latents; see
        :func:`bids_brainfm.models.masking.spatiotemporal_block`.

    Raises
    ------
    BrainfmError
        Coordinates are needed and not given, ``order`` or ``xyz`` do not fit the model, or it has
        no such block.
    """

    def __init__(
        self,
        network: nn.Module,
        order: np.ndarray | None = None,
        xyz: np.ndarray | None = None,
        device: torch.device | str = 'cpu',
        precision: str = 'float32',
        name: str = 'the model',
        block: str | None = None,
    ):
        self.name = name
        self.device = torch.device(device)
        self.precision = precision
        self.network = network.eval().requires_grad_(False).to(self.device)
        if precision == 'bfloat16':
            # Autocast would convert these anew for every window.
            for module in nn.ModuleList(network.transformers).modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        self.shape = network.window_shape
        self.order = None if order is None else np.asarray(order)
        self.xyz = None if xyz is None else np.asarray(xyz, np.float32)
        parcels = self.shape[0]
        if self.order is not None and sorted(self.order) != list(range(parcels)):
            raise BrainfmError(
                f'The parcel order of {name} is not a permutation of {parcels} parcels; give the '
                'order that belongs to the model and its atlas.'
            )
        self._place = ()
        if network.needs_xyz:
            if self.xyz is None or self.xyz.shape != (parcels, 3):
                raise BrainfmError(
                    f'{name} needs the coordinates of its {parcels} parcels (x, y, z in mm), '
                    f'but got {None if self.xyz is None else self.xyz.shape}; give an atlas with '
                    'coordinates.'
                )
            rows = self.xyz if self.order is None else self.xyz[self.order]
            self._place = (torch.from_numpy(rows)[None].to(self.device),)
        self._block = None
        if block is not None:
            if not hasattr(network, 'latent_error'):
                raise BrainfmError(
                    f'{name} predicts no latents, so it has no block {block}; leave latent '
                    'prediction out or take a Brain-JEPA.'
                )
            tokens = spatiotemporal_block(block, parcels, network.tokens_per_parcel)
            self._block = tuple(part.to(self.device) for part in tokens)

    def encode(
        self, windows: np.ndarray, tokens: bool = False, attention: bool = False
    ) -> Encoding:
        """Encode windows, unmasked and with tokens in their own order.

        Parameters
        ----------
        windows : (B, P, T) float32
            Scaled windows, parcels in atlas order.
        tokens : bool
            Whether to return all tokens, and attention with them where parcels have their own.
        attention : bool
            Whether to return where attention falls.

        Returns
        -------
        Encoding
            Of B windows.

        Raises
        ------
        BrainfmError
            The windows do not have the model's shape.
        """
        self.check(windows)
        step = 1 if self.device.type == 'cpu' else len(windows)
        return Encoding.join(
            [
                self._pass(windows[i : i + step], tokens, attention)
                for i in range(0, len(windows), step)
            ]
        )

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
        """Rebuild whole windows from a part of their tokens.

        Parameters
        ----------
        windows : (B, P, T) float32
            Scaled windows, parcels in atlas order.
        keep : (B, K) int64, or (K,) for all windows alike
            Tokens that the network sees, in the order in which it sees them.
        blank : (T,) bool, optional
            Time points set to 0 in the input.
        batch_size : int
            Windows at once on a GPU.

        Returns
        -------
        (B, P, T) float32
            Atlas order. Only what the network did not see says something about it.

        Raises
        ------
        BrainfmError
            The windows do not have the model's shape, or the model reconstructs nothing.
        """
        self.check(windows)
        if not hasattr(self.network, 'decode'):
            raise BrainfmError(
                f'{self.name} has no decoder, so it reconstructs nothing; take a BrainLM.'
            )
        keep = torch.as_tensor(keep).expand(len(windows), -1)
        masking = {} if blank is None else {'blank': blank.to(self.device)}
        step, found = 1 if self.device.type == 'cpu' else batch_size, []
        for i in range(0, len(windows), step):
            signal, seen = self._signal(windows[i : i + step]), keep[i : i + step].to(self.device)
            with self._autocast():
                hidden, _ = self.network.encode(signal, *self._place, keep=seen, **masking)
            made = self.network.decode(hidden.float(), *self._place, keep=seen)
            found.append(self._atlas_order(made).cpu().numpy())
        return np.concatenate(found)

    def points(self, tokens: torch.Tensor) -> np.ndarray:
        """Points (B, P, T) bool, in atlas order, that marked tokens (B, N) bool cover."""
        return self._atlas_order(self.network.points(tokens)).numpy()

    def covering(self, parcels: np.ndarray) -> torch.Tensor:
        """Tokens (N,) bool that hold any of the marked parcels (P,) bool, in atlas order."""
        rows = parcels if self.order is None else parcels[self.order]
        points = torch.from_numpy(np.ascontiguousarray(rows))[None, :, None]
        return self.network.covering(points.expand(1, *self.shape))[0]

    def _signal(self, windows: np.ndarray) -> torch.Tensor:
        """Windows as the network takes them: its order of rows, its device."""
        if self.order is not None:
            windows = windows[:, self.order]
        return torch.from_numpy(np.ascontiguousarray(windows, np.float32)).to(self.device)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision == 'bfloat16'
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.inference_mode()
    def _pass(self, windows: np.ndarray, tokens: bool, attention: bool) -> Encoding:
        """Encode windows in one pass of the network."""
        signal = self._signal(windows)
        network, per_parcel = self.network, self.network.tokens_per_parcel
        attention = attention or (tokens and bool(per_parcel))
        with self._autocast():
            hidden, row = network.encode(signal, *self._place, return_attention=attention)
            errors = network.latent_error(signal, hidden, *self._block) if self._block else ()
        first = int(network.has_class_token)
        body = hidden[:, first:]
        found = {'summary': hidden[:, 0] if first else body.mean(1)}
        if per_parcel:
            by_parcel = body.unflatten(1, (-1, per_parcel))
            found['parcels'] = self._atlas_order(by_parcel.mean(2))
            body = self._atlas_order(by_parcel).flatten(1, 2)
        if tokens:
            found['tokens'] = body
        if attention:
            shares = row[:, first:]
            profile = (
                shares.unflatten(1, (-1, per_parcel))
                if per_parcel
                else network.attention_profile(shares)
            )
            found['attention_profile'] = self._atlas_order(profile)
        for name, error in zip(('latent_error', 'latent_baseline'), errors, strict=False):
            found[name] = self._atlas_order(error.unflatten(1, (-1, per_parcel)))
        if hasattr(network, 'head'):
            found['prediction'] = network.head.predict(network.head(hidden.float()))
        # Copied, so that a summary does not hold the memory of all tokens.
        return Encoding(**{name: x.cpu().numpy().copy() for name, x in found.items()})

    def _atlas_order(self, x: torch.Tensor) -> torch.Tensor:
        """Put dimension 1, parcels in the model's order, back into atlas order."""
        return x if self.order is None else x[:, np.argsort(self.order)]


def encode_runs(
    encoder: Encoder,
    runs: Iterable[tuple[Hashable, np.ndarray]],
    batch_size: int,
    tokens: bool = False,
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Hashable, Encoding]]:
    """Encode the windows of many runs, in batches that cross from one run to the next.

    Parameters
    ----------
    encoder : Encoder
    runs : iterable of (key, (W, P, T) float32)
        Taken one by one as batches need them, so it may be a generator that reads files.
    batch_size : int
        Windows per batch.
    tokens, attention : bool
        Whether to return all tokens, and where attention falls.
    progress : callable, optional
        Called after each batch with the number of windows done so far.

    Yields
    ------
    key, Encoding
        Each run in turn, as soon as its last window is encoded. Memory holds one batch and the
        runs it touches.

    Raises
    ------
    BrainfmError
        Windows of a run do not have the model's shape.
    """
    waiting = []  # windows of the batch being filled, (key, number of windows in the run, piece)
    parts = []  # of the run whose windows are not all encoded yet
    done = 0

    def flush() -> Iterator[tuple[Hashable, Encoding]]:
        nonlocal waiting, parts, done
        batch = np.concatenate([piece for *_, piece in waiting])
        encoded = encoder.encode(batch, tokens, attention)
        start = 0
        for key, total, piece in waiting:
            parts.append(encoded.part(start, start + len(piece)))
            start += len(piece)
            if sum(map(len, parts)) == total:
                yield key, Encoding.join(parts)
                parts = []
        done += len(encoded)
        waiting = []
        if progress:
            progress(done)

    for key, windows in runs:
        encoder.check(windows, key)
        start = 0
        while start < len(windows):
            room = batch_size - sum(len(piece) for *_, piece in waiting)
            piece = windows[start : start + room]
            waiting.append((key, len(windows), piece))
            start += len(piece)
            if len(piece) == room:
                yield from flush()
    if waiting:
        yield from flush()


def ascending_y(xyz: np.ndarray) -> np.ndarray:
    """Return parcels from posterior to anterior, as the BrainLM ViT models take them.

    The sort is stable, so parcels with the same Y stay in atlas order; A424 has only 77
    different Y, and an unstable sort would give other rows on other machines.

    Parameters
    ----------
    xyz : (P, 3) float
        Parcel centres in mm.

    Returns
    -------
    (P,) int
        Row i of the model's input is parcel ``order[i]``.

    Examples
    --------
    >>> ascending_y(np.array([[0, 5, 0], [0, -3, 0], [1, 5, 1]])).tolist()
    [1, 0, 2]
    """
    return np.argsort(np.asarray(xyz)[:, 1], kind='stable')


def resolve_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` stands for.

    Raises
    ------
    BrainfmError
        ``cuda`` is asked for and this machine or this PyTorch has none.
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


def resolve_precision(name: str | None, device: torch.device) -> str:
    """Return the precision to compute in: float32 on the CPU, bfloat16 on a GPU by default.

    >>> resolve_precision(None, torch.device('cpu'))
    'float32'
    """
    if name is None:
        return 'float32' if device.type == 'cpu' else 'bfloat16'
    if name not in ('float32', 'bfloat16'):
        raise BrainfmError(f'The precision {name!r} is not known; choose float32 or bfloat16.')
    return name
