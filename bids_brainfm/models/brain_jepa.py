"""Brain-JEPA: it predicts, from part of a window, what an encoder of the whole makes of the rest.

Dong, Li et al. 2024 (NeurIPS, arXiv:2409.19407). A token is one parcel over one time patch, and
tokens run parcel by parcel, in time within a parcel. Where a parcel lies is told by its row of a
table of brain gradients, which no checkpoint holds: ``set_gradients``.
Signals are in the model's own contract: parcels in atlas order, scaled.
Module names are those of the official state dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.layers import (
    angles,
    boxed,
    draw_normal,
    draw_state,
    gelu,
    without_autocast,
)
from bids_brainfm.models.masking import take

EPS = 1e-6  # of LayerNorms; the official code has it as a constant
WIDENING = 4  # of the MLP, too
QUERIES = 128  # whose attention is held at once: all 4500 × 4500 × 12 would take a gigabyte
SIZES = (
    'patch_size', 'embed_dim', 'depth', 'num_heads',
    'predictor_embed_dim', 'predictor_depth', 'predictor_num_heads', 'gradients',
)  # fmt: skip


def time_table(parcels: int, patches: int, channels: int) -> Tensor:
    """Return the code of each token's time patch, sines before cosines.

    Returns
    -------
    (parcels × patches, channels) float32

    Examples
    --------
    >>> time_table(1, 2, 4)
    tensor([[0.0000, 0.0000, 1.0000, 1.0000],
            [0.8415, 0.0100, 0.5403, 0.9999]])
    """
    angle = angles(patches, channels)
    return torch.cat([angle.sin(), angle.cos()], 1).float().repeat(parcels, 1)


def token_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the smooth L1 error (beta 1) of latents (B, K, D), a token: (B, K) float32.

    Its mean is the official loss.
    """
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction='none')
    return error.mean(-1)


class Positions(nn.Module):
    """The code of each token's position: half of the channels for time, half for the parcel."""

    def __init__(self, parcels: int, patches: int, gradients: int, width: int):
        super().__init__()
        self.patches = patches
        # A frozen parameter, as in the official state dict, and under its misleading name.
        table = torch.empty(parcels * patches, width // 2)
        self.emb_h = nn.Parameter(table, requires_grad=False)
        self.predictor_pos_embed_proj = nn.Linear(gradients, width // 2)

    def forward(self, gradients: Tensor) -> Tensor:
        """Turn gradients (P, G) into codes (N, width).

        The parcels' half is stretched to -1 .. 1 by its extremes over all parcels and channels, so
        each parcel's code depends on all parcels.
        """
        with without_autocast(gradients):
            place = self.predictor_pos_embed_proj(gradients)
            low, high = place.min(), place.max()
            place = 2 * (place - low) / (high - low) - 1
        return torch.cat([self.emb_h, place.repeat_interleave(self.patches, 0)], 1)


class Attention(nn.Module):
    """Multi-head self-attention with packed queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, H) -> the same"""
        context = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return self.proj(context.transpose(1, 2).flatten(2))

    def split(self, packed: Tensor) -> Tensor:
        """(B, N, 3H) -> (3, B, heads, N, H / heads)"""
        return packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def received(self, x: Tensor) -> Tensor:
        """Return the attention that each token receives.

        Parameters
        ----------
        x : (B, N, H)
            Tokens as ``forward`` gets them.

        Returns
        -------
        (B, N) float32
            Mean over heads and queries; each row sums to 1.
        """
        query, key, _ = self.split(self.qkv(x)).float()
        total = x.new_zeros(x.shape[:2], dtype=torch.float32)
        with without_autocast(x):
            key = key.transpose(2, 3) / key.shape[-1] ** 0.5
            for some in query.split(QUERIES, 2):
                total += (some @ key).softmax(-1).sum((1, 2))
        return total / (self.heads * x.shape[1])


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = boxed(
            fc1=nn.Linear(width, WIDENING * width), fc2=nn.Linear(WIDENING * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(gelu(self.mlp.fc1(self.norm2(x))))

    def received(self, x: Tensor) -> Tensor:
        """Attention (B, N) that each token receives in this layer, mean over heads and queries."""
        return self.attn.received(self.norm1(x))


class TokenEncoder(nn.Module):
    """Tokens of a window, and the layers that relate them."""

    def __init__(self, patch: int, positions: Positions, width: int, depth: int, heads: int):
        super().__init__()
        self.patch_embed = boxed(proj=nn.Conv2d(1, width, (1, patch), (1, patch)))
        self.pos_embed_proj = positions
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)

    def embed(self, signal: Tensor, gradients: Tensor) -> Tensor:
        """Turn windows (B, P, T) into tokens (B, N, D) that know where they are."""
        proj = self.patch_embed.proj
        # Signals may be small beside the level they stand on, which bfloat16 would not resolve.
        with without_autocast(signal):
            patches = signal.unflatten(2, (-1, proj.kernel_size[1])).flatten(1, 2)
            x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        return x + self.pos_embed_proj(gradients)

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Relate tokens (B, K, D); with them comes what each received in the last layer."""
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        attention = last.received(x) if return_attention else None
        return self.norm(last(x)), attention


class Predictor(nn.Module):
    """From the tokens of a context to those of a target, all targets at once."""

    def __init__(self, positions: Positions, outer: int, width: int, depth: int, heads: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.predictor_embed = nn.Linear(outer, width)
        self.predictor_2dpe_proj = positions
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, EPS)
        self.predictor_proj = nn.Linear(width, outer)

    def forward(
        self, x: Tensor, gradients: Tensor, context_idx: Tensor, target_idx: Tensor
    ) -> Tensor:
        """(B, K, D) -> (B, M, D)"""
        positions = self.predictor_2dpe_proj(gradients)
        x = self.predictor_embed(x) + positions[context_idx]
        masked = self.mask_token + positions[target_idx]
        x = torch.cat([x, masked.expand(len(x), -1, -1)], 1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -target_idx.shape[-1] :]))


class BrainJEPA(nn.Module):
    """Brain-JEPA: encoder, predictor, and the encoder that makes their targets.

    The target encoder is the one to embed windows with. Indices of tokens, ``(B, K) int64`` or
    ``(K,)`` for all windows alike, count parcel by parcel and in time within a parcel.

    Parameters
    ----------
    config : dict
        ``crop_size`` (parcels, time points), ``patch_size``, ``embed_dim``, ``depth``,
        ``num_heads``, the last three again with ``predictor_``, ``add_w`` ('mapping'), and
        ``gradients``, the number of brain gradients (30 where not given).

    Attributes
    ----------
    gradients : (P, G) Tensor or None
        Given by ``set_gradients``; not part of the state dict.
    """

    model_type = 'brain_jepa'
    needs_xyz = False
    has_class_token = False
    pooling = 'mean over tokens'
    trunk = 'target_encoder'  # the module that encode uses

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = {'gradients': 30} | config
        _check_sizes(config)
        self.window_shape, self.width = tuple(config['crop_size']), config['embed_dim']
        self.tokens_per_parcel = self.window_shape[1] // config['patch_size']
        self.encoder = self._token_encoder()
        self.predictor = Predictor(
            self._positions(config['predictor_embed_dim']),
            config['embed_dim'],
            config['predictor_embed_dim'],
            config['predictor_depth'],
            config['predictor_num_heads'],
        )
        # It follows the encoder by averaging, not by gradients.
        self.target_encoder = self._token_encoder().requires_grad_(False)
        self.register_buffer('gradients', None, persistent=False)

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """The layers whose matrices may be of lower precision."""
        return (
            self.target_encoder.blocks,
            self.encoder.blocks,
            self.predictor.predictor_blocks,
        )

    def set_gradients(self, table) -> None:
        """Say where each parcel lies.

        Parameters
        ----------
        table : (P, G) array-like
            Brain gradients, parcels in the order of the windows. A checkpoint has to be given
            the table that it was trained with.

        Raises
        ------
        BrainfmError
            The table has another shape, holds NaN or infinite values, or tells no parcel apart.
        """
        table = torch.as_tensor(table, dtype=torch.float32)
        parcels, columns = self.window_shape[0], self.config['gradients']
        if table.shape != (parcels, columns):
            raise BrainfmError(
                f'The table of brain gradients is {"×".join(map(str, table.shape))}, but this '
                f'Brain-JEPA takes {parcels} parcels × {columns} gradients; give the table that '
                'the checkpoint was trained with.'
            )
        if not table.isfinite().all() or (table == table[0]).all():
            raise BrainfmError(
                'The table of brain gradients holds NaN or infinite values, or the same for every '
                'parcel; give the table that the checkpoint was trained with.'
            )
        device = self.encoder.norm.weight.device
        self.gradients = table.to('cpu' if device.type == 'meta' else device)

    def encode(
        self, signal: Tensor, return_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Turn windows into tokens by the target encoder.

        Parameters
        ----------
        signal : (B, P, T)
            Windows, scaled.
        return_attention : bool
            Whether to return the attention that tokens receive in the last layer.

        Returns
        -------
        hidden : (B, N, D)
            All tokens after the final LayerNorm.
        attention : (B, N) float32 or None
            Mean over heads and over the tokens that attend; sums to 1.

        Raises
        ------
        BrainfmError
            No gradients have been set; so do the other methods.
        """
        x = self.target_encoder.embed(signal, self._placed())
        return self.target_encoder(x, return_attention)

    def context(self, signal: Tensor, context_idx: Tensor) -> Tensor:
        """Encode the tokens ``context_idx`` of windows (B, P, T), as if alone: (B, K, D)."""
        return self.encoder(take(self.encoder.embed(signal, self._placed()), context_idx))[0]

    def predict(self, context: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """Predict the targets (B, M, D) at ``target_idx`` from ``context`` (B, K, D)."""
        return self.predictor(context, self._placed(), context_idx, target_idx)

    def targets(self, hidden: Tensor, target_idx: Tensor) -> Tensor:
        """Return what is to be predicted: layer-normalised tokens (B, M, D) of ``hidden``."""
        return take(F.layer_norm(hidden, hidden.shape[-1:]), target_idx)

    def latent_error(
        self, signal: Tensor, hidden: Tensor, context_idx: Tensor, target_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict part of each window's latents from another part.

        Parameters
        ----------
        signal : (B, P, T)
            Windows, scaled.
        hidden : (B, N, D)
            What ``encode`` makes of them.
        context_idx, target_idx : (B, K) and (B, M), or (K,) and (M,) int64

        Returns
        -------
        error, baseline : (B, N) float32
            Smooth L1 error of each token, mean over features; NaN for a token that is no target.
            The baseline guesses each target to be the mean target latent of the context.
        """
        prediction = self.predict(self.context(signal, context_idx), context_idx, target_idx)
        target = self.targets(hidden, target_idx)
        guess = self.targets(hidden, context_idx).mean(1, keepdim=True).expand_as(target)
        blank = torch.full(hidden.shape[:2], torch.nan, device=hidden.device)
        places = target_idx.expand(len(hidden), -1)
        error, baseline = (token_error(x, target) for x in (prediction, guess))
        return blank.scatter(1, places, error), blank.scatter(1, places, baseline)

    def position_tables(self) -> dict[str, Tensor]:
        """Return the fixed tables of time by their names in the state dict."""
        narrow = self._time_table(self.config['predictor_embed_dim'])
        wide = self._time_table(self.config['embed_dim'])
        return {
            'encoder.pos_embed_proj.emb_h': wide,
            'predictor.predictor_2dpe_proj.emb_h': narrow,
            'target_encoder.pos_embed_proj.emb_h': wide.clone(),
        }

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the official initialisation: N(0, 0.02) matrices, and equal encoders.

        The official code truncates at 2, which is 100 standard deviations away.
        """
        trained = boxed(encoder=self.encoder, predictor=self.predictor)
        state = draw_state(trained, self.position_tables(), draw_normal, generator)
        ours = [name for name in state if name.startswith('encoder.')]
        return state | {f'target_{name}': state[name].clone() for name in ours}

    def _placed(self) -> Tensor:
        """Return the gradients, if they are there."""
        if self.gradients is None:
            raise BrainfmError(
                'This Brain-JEPA has no table of brain gradients, without which it does not know '
                'where parcels lie, and its checkpoint does not hold it; give it by set_gradients '
                'first.'
            )
        return self.gradients

    def _token_encoder(self) -> TokenEncoder:
        width, depth, heads = (self.config[name] for name in ('embed_dim', 'depth', 'num_heads'))
        return TokenEncoder(self.config['patch_size'], self._positions(width), width, depth, heads)

    def _positions(self, width: int) -> Positions:
        size = (self.window_shape[0], self.tokens_per_parcel, self.config['gradients'])
        return Positions(*size, width)

    def _time_table(self, width: int) -> Tensor:
        return time_table(self.window_shape[0], self.tokens_per_parcel, width // 2)


def _check_sizes(config: dict) -> None:
    """Refuse a configuration that makes no Brain-JEPA."""
    parcels, times = config['crop_size']
    sizes = {name: config[name] for name in SIZES} | {'crop_size': min(parcels, times)}
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise BrainfmError(
            f'The configuration of a brain_jepa model has {small[0]} {sizes[small[0]]}, which is '
            'not above 0; correct it.'
        )
    if config.get('add_w', 'mapping') != 'mapping':
        raise BrainfmError(
            f'The configuration has add_w {config["add_w"]!r}; only mapping, which places parcels '
            'by brain gradients as in the released model, is supported.'
        )
    if times % config['patch_size']:
        raise BrainfmError(
            f'The configuration asks for {times} time points in patches of '
            f'{config["patch_size"]}, which does not divide; correct crop_size or patch_size.'
        )
    for prefix in ('', 'predictor_'):
        width, heads = config[f'{prefix}embed_dim'], config[f'{prefix}num_heads']
        if width % heads or width % 4:
            raise BrainfmError(
                f'The configuration asks for a width of {width} in {heads} attention heads and '
                f'4 parts of the position code, which does not divide; correct {prefix}embed_dim '
                f'or {prefix}num_heads.'
            )
