"""BrainLM as a ViT-MAE: a window of parcels × time points is read like a picture.

The sizes released by Ortega Caro et al. 2024 (ICLR) are 111M (patch 16) and 650M (patch 14).
Signals are in the model's own contract: rows sorted by ascending Y, and scaled.
Module names are those of the official state dict.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.layers import Attention, angles, boxed, draw_state, draw_uniform, gelu
from bids_brainfm.models.masking import put_back, take


@dataclass(frozen=True)
class Grid:
    """A window of ``parcels`` × ``times``, centred on a square of ``side`` and cut into patches.

    Tokens run row by row: token = row block × ``across`` + column block. Rows are parcels,
    columns are time points; what lies outside the window is padding.

    >>> grid = Grid(parcels=424, times=200, side=432, patch=16)
    >>> grid.across, grid.tokens, grid.top, grid.left
    (27, 729, 4, 116)
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
        """Pad windows with -1 and cut them into patches.

        Parameters
        ----------
        signal : (B, P, T)
        blank : (T,) bool, optional
            Time points set to 0, in the padding above and below the parcels too.

        Returns
        -------
        (B, N, patch²)
        """
        below = self.side - self.parcels - self.top
        right = self.side - self.times - self.left
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
        """Return the points inside the window that marked tokens cover.

        Parameters
        ----------
        tokens : (B, N) bool

        Returns
        -------
        (B, P, T) bool
        """
        return self.signal(tokens[..., None].expand(-1, -1, self.patch**2))


def predict_last(grid: Grid, points: int) -> Tensor:
    """Mask every block that holds any of the window's last time points.

    Parameters
    ----------
    grid : Grid
    points : int
        Time points to predict; the official ratio R means floor(R T) of them.

    Returns
    -------
    (1, N) bool
        Masked tokens, for all rows. What they cover is scored (``grid.points``), so up to a block
        more than was asked for.
    """
    return _columns_masked(grid, (grid.left + grid.times - points) // grid.patch)


def predict_last_pixel(grid: Grid, points: int) -> tuple[Tensor, Tensor]:
    """Hide exactly the window's last time points.

    Whole blocks are masked; what is left of the horizon is set to 0 in the input.

    Parameters
    ----------
    grid : Grid
    points : int
        Time points to predict.

    Returns
    -------
    tokens : (1, N) bool
        Masked tokens: blocks that begin inside the horizon.
    blank : (T,) bool
        The last time points: to be set to 0 (``encode``'s argument) and to be scored.
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
    """Return the fixed two-dimensional sin-cos table, the class token's row of zeros first.

    Returns
    -------
    (1, 1 + across², channels) float32
        First half of the channels: column (time) block; second half: row (parcel) block.
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
            attention=Attention(hidden, heads, bias),
            output=boxed(dense=nn.Linear(hidden, hidden)),
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

    def cls_row(self, x: Tensor) -> Tensor:
        """Attention (B, N) of the first token in this layer, mean over heads."""
        return self.attention.attention.cls_row(self.layernorm_before(x))


class BrainLMViT(nn.Module):
    """BrainLM, ViT-MAE family, encoder and decoder.

    Parameters
    ----------
    config : dict
        The checkpoint's ``config.json``.

    Attributes
    ----------
    grid : Grid
        How a window becomes tokens.
    """

    model_type = 'vit_mae'
    tokens_per_parcel = None  # a token spans as many parcels as time points
    has_class_token = True
    pooling = 'class token'
    needs_xyz = False
    trunk = 'vit'  # the module that encode uses

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
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
        self.window_shape = (self.grid.parcels, self.grid.times)
        hidden, patch, channels = config['hidden_size'], self.grid.patch, config['num_channels']
        self.width = hidden
        eps = config['layer_norm_eps']

        embeddings = boxed(
            patch_embeddings=boxed(projection=nn.Conv2d(channels, hidden, patch, patch))
        )
        embeddings.cls_token = nn.Parameter(torch.empty(1, 1, hidden))
        embeddings.position_embeddings = self._table(hidden)
        self.vit = boxed(
            embeddings=embeddings,
            encoder=boxed(layer=self._blocks('')),
            layernorm=nn.LayerNorm(hidden, eps),
        )

        narrow = config['decoder_hidden_size']
        self.decoder = boxed(
            decoder_embed=nn.Linear(hidden, narrow),
            decoder_layers=self._blocks('decoder_'),
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
        """Return the points (B, P, T) bool that marked tokens (B, N) bool cover."""
        return self.grid.points(tokens)

    def covering(self, points: Tensor) -> Tensor:
        """Return the tokens (B, N) bool that hold any of the marked points (B, P, T) bool."""
        return (self.grid.patches(points.float()) > 0).any(-1)

    def hide_last(self, points: int, exactly: bool) -> tuple[Tensor, Tensor | None]:
        """Hide the window's last time points, or the blocks that hold them.

        Returns
        -------
        tokens : (1, N) bool
            Tokens to mask.
        blank : (T,) bool or None
            Time points to set to 0 (``encode``'s argument).
        """
        if exactly:
            return predict_last_pixel(self.grid, points)
        return predict_last(self.grid, points), None

    def attention_profile(self, shares: Tensor) -> Tensor:
        """Spread attention over the parcels that a token spans.

        Parameters
        ----------
        shares : (B, N)

        Returns
        -------
        (B, P, K)
            For each parcel (in the model's order) and block of time that touches the window;
            the parcels of a token have equal parts of it. What falls on padding is left out.
        """
        grid = self.grid
        row = (grid.top + torch.arange(grid.parcels, device=shares.device)) // grid.patch
        first, last = grid.left // grid.patch, (grid.left + grid.times - 1) // grid.patch
        blocks = shares.unflatten(1, (grid.across, grid.across))[:, row, first : last + 1]
        return blocks / torch.bincount(row)[row][:, None]

    def encode(
        self,
        signal: Tensor,
        keep: Tensor | None = None,
        blank: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn windows into tokens.

        Parameters
        ----------
        signal : (B, P, T)
            Windows, rows in the model's order, scaled.
        keep : (B, K) int64, optional
            Tokens to encode; all, in their own order, where not given.
        blank : (T,) bool, optional
            Time points set to 0 in the padded input (``predict_last_pixel``).
        return_attention : bool
            Whether to return the class token's attention in the last layer.

        Returns
        -------
        hidden : (B, 1 + K, H)
            Class token, then tokens, after the final LayerNorm.
        attention : (B, 1 + K) float32 or None
            How the class token attends to itself and all tokens, mean over heads.
        """
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
        *layers, last = self.vit.encoder.layer
        for layer in layers:
            x = layer(x)
        attention = last.cls_row(x) if return_attention else None
        return self.vit.layernorm(last(x)), attention

    def decode(self, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """Turn encoded tokens into windows.

        Parameters
        ----------
        hidden : (B, 1 + K, H)
            What ``encode`` returned.
        keep : (B, K) int64, optional
            The tokens that were encoded; all where not given.

        Returns
        -------
        (B, P, T)
            Mean of the output channels, padding cropped.
        """
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

    def reconstruct(
        self, signal: Tensor, keep: Tensor | None = None, blank: Tensor | None = None
    ) -> Tensor:
        """Encode the tokens ``keep`` of ``signal`` (B, P, T) and decode all: (B, P, T)."""
        return self.decode(self.encode(signal, keep, blank)[0], keep)

    def position_tables(self) -> dict[str, Tensor]:
        """Return the fixed position tables by their names in the state dict."""
        across, config = self.grid.across, self.config
        return {
            'vit.embeddings.position_embeddings': position_table(across, config['hidden_size']),
            'decoder.decoder_pos_embed': position_table(across, config['decoder_hidden_size']),
        }

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the official initialisation."""
        return draw_state(self, self.position_tables(), draw_uniform, generator)

    def _blocks(self, part: str) -> nn.ModuleList:
        """Return the layers of the encoder (``''``) or of the decoder (``'decoder_'``)."""
        sizes = [
            self.config[part + name]
            for name in ('hidden_size', 'num_attention_heads', 'intermediate_size')
        ]
        eps, bias = self.config['layer_norm_eps'], self.config.get('qkv_bias', True)
        n_layers = self.config[part + 'num_hidden_layers']
        return nn.ModuleList(Block(*sizes, eps, bias) for _ in range(n_layers))

    def _table(self, channels: int) -> nn.Parameter:
        """A frozen parameter, as in the official state dict."""
        table = torch.empty(1, 1 + self.grid.tokens, channels)
        return nn.Parameter(table, requires_grad=False)
