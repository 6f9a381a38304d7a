"""BrainLM as a ViT-MAE: a window of parcels × time points is read like a picture.

The sizes released by Ortega Caro et al. 2024 (ICLR) are 111M (patch 16) and 650M (patch 14).
Signals are in the model's own contract: rows sorted by ascending Y, and scaled.
Module names are those of the official state dict.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.base import BaseNetwork
from bids_brainfm.models.layers import (
    Attention,
    angles,
    boxed,
    draw_state,
    draw_uniform,
    gelu,
    relate,
    stack,
)
from bids_brainfm.models.masking import put_back, take
from bids_brainfm.models.protocol import Capabilities, forecast_points


@dataclass(frozen=True)
class Grid:
    """A window of ``parcels`` × ``times``, centred on a square of ``side`` and cut into patches.

    Tokens run row by row: token = row block × ``across`` + column block. Rows are parcels,
    columns are time points; what lies outside the window is padding.
    """

    parcels: int
    times: int
    side: int
    patch: int

    @property
    def across(self) -> int:
        """Blocks along each side."""
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        return self.across**2

    @property
    def top(self) -> int:
        """Padding above the first parcel."""
        return (self.side - self.parcels) // 2

    @property
    def left(self) -> int:
        """Padding before the first time point."""
        return (self.side - self.times) // 2

    def patches(self, signal: Tensor, blank: Tensor | None = None) -> Tensor:
        """Pad windows (B, P, T) with -1 and cut them into patches (B, N, patch²).

        Time points `blank` (T,) bool are set to 0, in the padding above and below, too.
        """
        below, right = self.side - self.parcels - self.top, self.side - self.times - self.left
        square = F.pad(signal, (0, 0, self.top, below), value=-1.0)
        if blank is not None:
            square = square.masked_fill(blank, 0)
        square = F.pad(square, (self.left, right), value=-1.0)
        blocks = square.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch))
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)

    def signal(self, patches: Tensor) -> Tensor:
        """Put patches (B, N, patch²) together and crop the padding: (B, P, T)."""
        blocks = patches.view(-1, self.across, self.across, self.patch, self.patch)
        square = blocks.transpose(2, 3).reshape(-1, self.side, self.side)
        rows = slice(self.top, self.top + self.parcels)
        return square[:, rows, self.left : self.left + self.times]

    def points(self, tokens: Tensor) -> Tensor:
        """Return the points (B, P, T) bool of the window that marked tokens (B, N) bool cover."""
        return self.signal(tokens[..., None].expand(-1, -1, self.patch**2))


def predict_last(grid: Grid, points: int) -> Tensor:
    """Mask every block (1, N) bool that holds any of the window's last time points.

    All that the blocks cover is scored (``grid.points``), so up to a block more than asked for.
    """
    return _columns_masked(grid, (grid.left + grid.times - points) // grid.patch)


def predict_last_pixel(grid: Grid, points: int) -> tuple[Tensor, Tensor]:
    """Hide exactly the window's last time points (T,) bool, by 0 in the input; they are scored.

    Whole blocks that begin among them are masked (1, N) bool.
    """
    first = grid.left + grid.times - points
    blank = torch.arange(grid.times) >= grid.times - points
    return _columns_masked(grid, -(-first // grid.patch)), blank


def _columns_masked(grid: Grid, first: int) -> Tensor:
    """Mark block columns from ``first`` to the last one that touches the window, (1, N) bool."""
    last = (grid.left + grid.times - 1) // grid.patch
    column = torch.arange(grid.tokens) % grid.across
    return ((column >= first) & (column <= last))[None]


def position_table(across: int, channels: int) -> Tensor:
    """Return the fixed two-dimensional sin-cos table (1, 1 + across², channels) float32.

    The class token's row of zeros comes first. The first half of the channels is for the column
    (time) block, the second for the row (parcel) block.
    """
    angle = angles(across, channels // 2)
    line = torch.cat([angle.sin(), angle.cos()], 1)
    row, column = torch.meshgrid(torch.arange(across), torch.arange(across), indexing='ij')
    table = torch.cat([line[column.flatten()], line[row.flatten()]], 1)
    return F.pad(table, (0, 0, 1, 0))[None].float()


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, hidden: int, heads: int, intermediate: int, eps: float, bias: bool):
        super().__init__()
        self.attention = boxed(
            attention=Attention(hidden, heads, bias), output=boxed(dense=nn.Linear(hidden, hidden))
        )
        self.intermediate = boxed(dense=nn.Linear(hidden, intermediate))
        self.output = boxed(dense=nn.Linear(intermediate, hidden))
        self.layernorm_before = nn.LayerNorm(hidden, eps)
        self.layernorm_after = nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        context = self.attention.attention(self.layernorm_before(x))
        x = x + self.attention.output.dense(context)
        wide = gelu(self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dense(wide)

    def attention_row(self, x: Tensor) -> Tensor:
        """Attention (B, N) of the first token in this layer, mean over heads."""
        return self.attention.attention.cls_row(self.layernorm_before(x))


class BrainLMViT(BaseNetwork):
    """BrainLM, ViT-MAE family, encoder and decoder; ``grid`` is how a window becomes tokens."""

    model_type = 'vit_mae'
    signature = 'vit.embeddings.patch_embeddings.projection.weight', 'a ViT-MAE BrainLM (vit_mae)'
    trunk = 'vit'

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        side = config['image_size']
        self.grid = Grid(
            parcels=config.get('num_brain_voxels', 424),
            times=config.get('num_timepoints_per_voxel', 200),
            side=side if isinstance(side, int) else side[0],
            patch=config['patch_size'],
        )
        if self.grid.side % self.grid.patch or self.grid.top < 0 or self.grid.left < 0:
            raise BrainfmError(
                f'The configuration asks for {self.grid.parcels} parcels × {self.grid.times} time '
                f'points on a square of {self.grid.side} in patches of {self.grid.patch}, which '
                'does not fit; correct image_size or patch_size.'
            )
        hidden, patch, channels = config['hidden_size'], self.grid.patch, config['num_channels']
        self.capabilities = Capabilities(
            window=(self.grid.parcels, self.grid.times),
            width=hidden,
            class_token=True,
            patches=None,
            token_span=(patch, patch),
            reconstructs=True,
            mask_ratio=config.get('mask_ratio', 0.75),
            forecast_points=forecast_points(self.grid.times),
        )
        eps, bias = config['layer_norm_eps'], config.get('qkv_bias', True)
        embeddings = boxed(
            patch_embeddings=boxed(projection=nn.Conv2d(channels, hidden, patch, patch))
        )
        embeddings.cls_token = nn.Parameter(torch.empty(1, 1, hidden))
        embeddings.position_embeddings = self._table(hidden)
        self.vit = boxed(
            embeddings=embeddings,
            encoder=boxed(layer=stack(Block, config, '', eps, bias)),
            layernorm=nn.LayerNorm(hidden, eps),
        )

        narrow = config['decoder_hidden_size']
        self.decoder = boxed(
            decoder_embed=nn.Linear(hidden, narrow),
            decoder_layers=stack(Block, config, 'decoder_', eps, bias),
            decoder_norm=nn.LayerNorm(narrow, eps),
            decoder_pred=nn.Linear(narrow, patch**2 * channels),
        )
        self.decoder.mask_token = nn.Parameter(torch.empty(1, 1, narrow))
        self.decoder.decoder_pos_embed = self._table(narrow)

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """The layers whose matrices may be of lower precision; a decoder's are not."""
        return (self.vit.encoder,)

    @property
    def tokens(self) -> int:
        """Tokens of a window, those of the padding included."""
        return self.grid.tokens

    def points(self, tokens: Tensor) -> Tensor:
        """See Reconstructing."""
        return self.grid.points(tokens)

    def covering(self, points: Tensor) -> Tensor:
        """See Reconstructing."""
        return (self.grid.patches(points.float()) > 0).any(-1)

    def hide_last(self, points: int, exactly: bool) -> tuple[Tensor, Tensor | None]:
        """See Reconstructing."""
        if exactly:
            return predict_last_pixel(self.grid, points)
        return predict_last(self.grid, points), None

    def at_parcels(self, values: Tensor) -> Tensor:
        """See Network; tokens that hold nothing but padding are left out."""
        grid = self.grid
        row = (grid.top + torch.arange(grid.parcels, device=values.device)) // grid.patch
        first, last = grid.left // grid.patch, (grid.left + grid.times - 1) // grid.patch
        return values.unflatten(1, (grid.across, grid.across))[:, row, first : last + 1]

    def encode(
        self,
        signal: Tensor,
        keep: Tensor | None = None,
        blank: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn windows into tokens, row by row of the grid; attention is the class token's."""
        embeddings = self.vit.embeddings
        projection = embeddings.patch_embeddings.projection
        positions = embeddings.position_embeddings
        # The channels are copies of one another, so their weights add up.
        weight = projection.weight.sum(1).flatten(1)
        x = F.linear(self.grid.patches(signal, blank), weight, projection.bias) + positions[:, 1:]
        if keep is not None:
            x = take(x, keep)
        cls = embeddings.cls_token + positions[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
        return relate(self.vit.encoder.layer, self.vit.layernorm, x, return_attention)

    def decode(self, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """Turn tokens into windows: mean of the output channels, padding cropped."""
        decoder, patch = self.decoder, self.grid.patch
        x = decoder.decoder_embed(hidden)
        if keep is not None:
            tokens = put_back(x[:, 1:], keep, decoder.mask_token, self.grid.tokens)
            x = torch.cat([x[:, :1], tokens], 1)
        x = x + decoder.decoder_pos_embed
        for layer in decoder.decoder_layers:
            x = layer(x)
        x = decoder.decoder_norm(x)[:, 1:]
        # Averaging the channels of the weights is averaging the channels of the output.
        weight = decoder.decoder_pred.weight.unflatten(0, (patch**2, -1)).mean(1)
        bias = decoder.decoder_pred.bias.view(patch**2, -1).mean(1)
        return self.grid.signal(F.linear(x, weight, bias))

    def position_tables(self) -> dict[str, Tensor]:
        """See Network."""
        across, config = self.grid.across, self.config
        return {
            'vit.embeddings.position_embeddings': position_table(across, config['hidden_size']),
            'decoder.decoder_pos_embed': position_table(across, config['decoder_hidden_size']),
        }

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """See Network."""
        return draw_state(self, self.position_tables(), draw_uniform, generator)

    def _table(self, channels: int) -> nn.Parameter:
        """A frozen parameter, as in the official state dict."""
        table = torch.empty(1, 1 + self.grid.tokens, channels)
        return nn.Parameter(table, requires_grad=False)
