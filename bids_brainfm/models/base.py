"""Defaults of the protocol, for networks whose tokens are equal rectangles of a window."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.protocol import Capabilities

if TYPE_CHECKING:
    import numpy as np

    from bids_brainfm.models.head import Head


class BaseNetwork(nn.Module):
    """What families have in common; see :class:`bids_brainfm.models.protocol.Network`.

    A family sets ``self.capabilities`` in its ``__init__`` and writes ``encode`` and
    ``initial_state``, and ``decode`` if it reconstructs. It overrides what differs: ``points``,
    ``covering``, ``hide_last`` and ``at_parcels`` where tokens are no equal rectangles.
    """

    model_type: ClassVar[str]
    signature: ClassVar[tuple[str, str]]
    config_file: ClassVar[str] = 'config.json'
    config_defaults: ClassVar[Mapping[str, Any]] = {}
    trunk: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    capabilities: Capabilities
    head: 'Head | None'
    encode: Callable[..., tuple[Tensor, Tensor | None]]  # a family writes these
    decode: Callable[..., Tensor]
    positions: Tensor | None  # (P, 3) or (P, G) by set_positions; not part of the state dict

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = {**self.config_defaults, **config}
        self.head = None
        self.register_buffer('positions', None, persistent=False)

    @staticmethod
    def unpack(state: dict[str, Any]) -> dict[str, Any]:
        """Take the state dict as it is."""
        return state

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """Layers whose matrices may be of lower precision: none."""
        return ()

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return math.prod(self._grid)

    @property
    def _grid(self) -> tuple[int, int]:
        """Tokens along the parcels and along time."""
        (parcels, times), (rows, points) = self.capabilities.window, self.capabilities.token_span
        return parcels // rows, times // points

    def set_positions(self, table: 'np.ndarray | Tensor') -> None:
        """Take centres (P, 3) in mm; see Network."""
        parcels, table = self.capabilities.window[0], torch.as_tensor(table, dtype=torch.float32)
        if table.shape != (parcels, 3) or not table.isfinite().all():
            raise BrainfmError(self._lacks_coordinates(f'got {tuple(table.shape)}'))
        self._keep_positions(table)

    def _keep_positions(self, table: Tensor) -> None:
        device = next(self.parameters()).device
        self.positions = table.to('cpu' if device.type == 'meta' else device)

    def _lacks_coordinates(self, found: str) -> str:
        return (
            f'This {self.model_type} model needs the coordinates of its '
            f'{self.capabilities.window[0]} parcels (x, y, z in mm), but {found}; give an atlas '
            'with coordinates.'
        )

    def at_parcels(self, values: Tensor) -> Tensor:
        """See Network."""
        rows = self.capabilities.token_span[0]
        return values.unflatten(1, self._grid).repeat_interleave(rows, 1)

    def points(self, tokens: Tensor) -> Tensor:
        """See Reconstructing."""
        rows, points = self.capabilities.token_span
        blocks = tokens.unflatten(1, self._grid).repeat_interleave(rows, 1)
        return blocks.repeat_interleave(points, 2)

    def covering(self, points: Tensor) -> Tensor:
        """See Reconstructing."""
        rows, span = self.capabilities.token_span
        return points.unflatten(2, (-1, span)).any(3).unflatten(1, (-1, rows)).any(2).flatten(1)

    def hide_last(self, points: int, exactly: bool) -> tuple[Tensor, Tensor | None]:
        """See Reconstructing: whole patches only."""
        parcels, times = self.capabilities.window
        patch = self.capabilities.token_span[1]
        if exactly and points % patch:
            raise BrainfmError(
                f'This model hides whole patches of {patch} time points, so it cannot hide '
                f'exactly the last {points}; choose a multiple of {patch}, or predict_last.'
            )
        late = torch.arange(times) >= times - points
        return self.covering(late.expand(1, parcels, -1)), None

    def reconstruct(
        self, signal: Tensor, keep: Tensor | None = None, blank: Tensor | None = None
    ) -> Tensor:
        """See Reconstructing."""
        return self.decode(self.encode(signal, keep, blank)[0], keep)

    def position_tables(self) -> dict[str, Tensor]:
        """Return the fixed position tables by their names in the state dict: none."""
        return {}
