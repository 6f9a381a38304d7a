"""What a family of networks provides, so that everything else works with it.

A family is one class, a ``torch.nn.Module``, that a package declares as an entry point of the
group ``bids_brainfm.families`` (see :mod:`bids_brainfm.models.families`). It says by its
:class:`Capabilities` what it can do; nothing else is asked of a network, and no other part of this
package knows a family by name. :class:`bids_brainfm.models.base.BaseNetwork` gives defaults for
most of the protocol, so that a family need only describe its layers.

Shapes: B windows, P parcels in the network's row order, T time points, N tokens without the class
token, K of them that are kept, D dimensions of an embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Generator, Tensor, nn

    from bids_brainfm.models.head import Head


@dataclass(frozen=True)
class Capabilities:
    """What a network can do and how its tokens lie. Nothing else asks a network what it is."""

    window: tuple[int, int]  # parcels and time points of a window
    width: int  # dimensions of an embedding
    # whether the first token is one, and so the embedding; else that is the mean of all tokens
    class_token: bool
    patches: int | None  # tokens of each parcel; None where a token spans several parcels
    token_span: tuple[int, int]  # parcels and time points that one token spans
    # what set_positions must be given before encode
    positions: Literal['none', 'coordinates', 'gradients'] = 'none'
    # features from which networks of parcels are found: where attention falls, or embeddings
    parcel_features: Literal['attention', 'parcels'] | None = None
    reconstructs: bool = False  # whether it is Reconstructing
    predicts_latents: bool = False  # whether it is LatentPredicting
    mask_ratio: float | None = None  # default proportion of tokens that are hidden
    # default number of time points that are forecast, see forecast_points(); None: too short
    forecast_points: int | None = None
    recipe: str = 'brainlm-vit'  # default recipe by which the family is trained

    @property
    def pooling(self) -> str:
        """What the embedding of a window is, in words."""
        return 'class token' if self.class_token else 'mean over tokens'


def forecast_points(window: int, step: int = 1) -> int | None:
    """Time points to forecast of a window: a tenth of it, as BrainLM's authors do.

    It is a multiple of `step`, the points that can only be hidden together, and leaves at least
    two points to forecast from; None where there is no such number.

    >>> forecast_points(200), forecast_points(16, step=4), forecast_points(16, step=16)
    (20, 4, None)
    """
    points = max(1, round(window / 10 / step)) * step
    return points if points <= window - 2 else None


class _Module(Protocol):
    """What every ``torch.nn.Module`` has, as far as it is used here."""

    training: bool

    def eval(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...
    def to(self, device: 'torch.device') -> Self: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def state_dict(self) -> dict[str, 'Tensor']: ...
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any: ...
    def parameters(self, recurse: bool = True) -> 'Iterator[nn.Parameter]': ...
    def named_parameters(self) -> 'Iterator[tuple[str, nn.Parameter]]': ...
    def get_submodule(self, target: str) -> 'nn.Module': ...


class Network(_Module, Protocol):
    """A network that encodes windows. A family implements it as a ``torch.nn.Module``."""

    model_type: ClassVar[str]  # name of the family, in entry points, configurations and cards
    # a key that only the state dict of this family has, and what to call such a checkpoint
    signature: ClassVar[tuple[str, str]]
    # JSON file in which its publisher describes a checkpoint; if it has another name than
    # config.json, it need not give model_type
    config_file: ClassVar[str]
    config_defaults: ClassVar[Mapping[str, Any]]  # what a configuration may leave out
    trunk: ClassVar[str]  # submodule that encode uses, which fine-tuning trains
    unused: ClassVar[tuple[str, ...]]  # submodules that no output depends on
    config: dict[str, Any]  # what it was built from, defaults filled in
    capabilities: Capabilities
    head: 'Head | None'  # predicts something of the participant; set by build()

    def __init__(self, config: dict[str, Any]) -> None: ...

    @property
    def transformers(self) -> 'tuple[nn.Module, ...]':
        """Layers whose matrices may be of lower precision."""

    @staticmethod
    def unpack(state: dict[str, Any]) -> dict[str, Any]:
        """Bring what an official file holds to one state dict with the network's names."""

    def set_positions(self, table: 'np.ndarray | Tensor') -> None:
        """Say where each parcel lies, by a buffer that is not part of the state dict.

        The table holds centres (P, 3) in mm (MNI), or brain gradients (P, G), in the network's
        order of rows. Raises BrainfmError: it is not of this network's parcels.
        """

    def encode(
        self,
        signal: 'Tensor',
        keep: 'Tensor | None' = None,
        blank: 'Tensor | None' = None,
        return_attention: bool = False,
    ) -> 'tuple[Tensor, Tensor | None]':
        """Turn windows into tokens.

        Tokens are numbered from 0 to N - 1, without the class token. Where each parcel has its own
        (``capabilities.patches``), they are numbered parcel by parcel and in time within a parcel,
        whatever the order in which the network takes them.

        Parameters
        ----------
        signal : (B, P, T), scaled windows, rows in the network's order
        keep : (B, K) int64, tokens to encode, in this order; by default all, ascending
        blank : (T,) bool, time points set to 0 in the input
        return_attention : bool, whether to return where attention falls in the last layer

        Returns
        -------
        hidden : (B, N, D), with a class token (B, 1 + N, D); K in place of N with `keep`
            The class token first, then tokens, after the last normalisation.
        attention : (B, N) or (B, 1 + N) float32, or None
            Attention of the class token, or of all tokens on average, to each token; mean over
            heads, sums to 1.

        Raises BrainfmError: positions are needed and were not set.
        """

    @property
    def tokens(self) -> int:
        """Number of tokens N, those that hold only padding included."""

    def at_parcels(self, values: 'Tensor') -> 'Tensor':
        """Return the values of tokens (B, N) at each parcel and time patch (B, P, K).

        K are the time patches that touch the window; parcels that share a token share its value.
        """

    def position_tables(self) -> 'dict[str, Tensor]':
        """Return fixed tables of the state dict, which are never trained, by their names."""

    def initial_state(self, generator: 'Generator') -> 'dict[str, Tensor]':
        """Draw the family's official initialisation, a whole state dict."""


class Reconstructing(Network, Protocol):
    """A network that reconstructs hidden tokens: ``capabilities.reconstructs``."""

    def decode(self, hidden: 'Tensor', keep: 'Tensor | None' = None) -> 'Tensor':
        """Turn what ``encode`` returned for the tokens `keep` into windows (B, P, T)."""

    def reconstruct(
        self, signal: 'Tensor', keep: 'Tensor | None' = None, blank: 'Tensor | None' = None
    ) -> 'Tensor':
        """Encode the tokens `keep` of `signal` (B, P, T) and decode all: (B, P, T)."""

    def points(self, tokens: 'Tensor') -> 'Tensor':
        """Return the points (B, P, T) bool that marked tokens (B, N) bool cover."""

    def covering(self, points: 'Tensor') -> 'Tensor':
        """Return the tokens (B, N) bool that hold any of the marked points (B, P, T) bool."""

    def hide_last(self, points: int, exactly: bool) -> 'tuple[Tensor, Tensor | None]':
        """Hide the window's last time points, exactly or with what else their tokens hold.

        Returned are tokens (1, N) bool to leave out, and time points (T,) bool to set to 0
        (`blank`), or None. Raises BrainfmError: whole tokens hold more than asked for `exactly`.
        """


class LatentPredicting(Network, Protocol):
    """A network that predicts latents of some tokens from others: ``predicts_latents``.

    Token numbers are ``(B, K) int64``, or ``(K,)`` for all windows alike.
    """

    def context(self, signal: 'Tensor', context_idx: 'Tensor') -> 'Tensor':
        """Encode the tokens ``context_idx`` of windows (B, P, T), as if alone: (B, K, D)."""

    def predict(self, context: 'Tensor', context_idx: 'Tensor', target_idx: 'Tensor') -> 'Tensor':
        """Predict the targets (B, M, D) at ``target_idx`` from ``context`` (B, K, D)."""

    def targets(self, hidden: 'Tensor', target_idx: 'Tensor') -> 'Tensor':
        """Return what is to be predicted (B, M, D), from what ``encode`` returned (B, N, D)."""

    def latent_error(
        self, signal: 'Tensor', hidden: 'Tensor', context_idx: 'Tensor', target_idx: 'Tensor'
    ) -> 'tuple[Tensor, Tensor]':
        """Return the error (B, N) of predicted latents and that of a guess without a model.

        NaN for a token that is no target.
        """

    def follow(self, momentum: float) -> None:
        """Move the network that makes the targets towards the one that is trained."""


def missing_members(family: type, protocol: type = Network) -> list[str]:
    """Return what a class lacks of a protocol, of what a class can have.

    ``config``, ``capabilities`` and ``head`` exist once a network is built.
    """
    later = {'config', 'capabilities', 'head', *_members(_Module)}
    return sorted(n for n in _members(protocol) - later if not hasattr(family, n))


def check_network(network: Network) -> list[str]:
    """Return what a network lacks of what its capabilities promise."""
    if not isinstance(getattr(network, 'capabilities', None), Capabilities):
        return ['capabilities']
    can, kind = network.capabilities, type(network)
    lacking = missing_members(kind, Reconstructing) if can.reconstructs else []
    return lacking + (missing_members(kind, LatentPredicting) if can.predicts_latents else [])


def _members(protocol: type) -> set[str]:
    names = {n for c in protocol.__mro__ for n in (*vars(c), *vars(c).get('__annotations__', {}))}
    return {name for name in names if not name.startswith('_')}
