"""Brain-JEPA: it predicts, from part of a window, what an encoder of the whole makes of the rest.

Dong, Li et al. 2024 (NeurIPS, arXiv:2409.19407). A token is one parcel over one time patch, and
tokens run parcel by parcel, in time within a parcel. The position of a parcel is its row of a
table of brain gradients, which no checkpoint holds: ``set_positions``.
Signals are in the model's own contract: parcels in atlas order, scaled.
Module names are those of the official state dict.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import layers
from bids_brainfm.models.base import BaseNetwork
from bids_brainfm.models.layers import angles, boxed, draw_normal, gelu, without_autocast
from bids_brainfm.models.masking import take, token_error
from bids_brainfm.models.protocol import Capabilities

if TYPE_CHECKING:
    import numpy as np

EPS = 1e-6  # of LayerNorms; the official code has it as a constant
WIDENING = 4  # of the MLP, too
# What the official file holds: networks, and what belongs to their training.
NETWORKS = ('encoder', 'predictor', 'target_encoder')
TRAINING = ('opt', 'scaler', 'epoch', 'loss', 'batch_size', 'world_size', 'lr')
QUERIES = 128  # whose attention is held at once: all 4500 × 4500 × 12 would take a gigabyte
LAYERS = ('embed_dim', 'depth', 'num_heads')  # of the predictor with a prefix
SIZES = ('patch_size', *LAYERS, *(f'predictor_{name}' for name in LAYERS), 'gradients')


def time_table(parcels: int, patches: int, channels: int) -> Tensor:
    """Return the code (N, channels) of each token's time patch, sines before cosines."""
    angle = angles(patches, channels)
    return torch.cat([angle.sin(), angle.cos()], 1).float().repeat(parcels, 1)


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
        """Turn gradients (P, G) into codes (N, width), the parcels' half stretched to -1 .. 1."""
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
        context = F.scaled_dot_product_attention(*self.split(self.qkv(x)))
        return self.proj(context.transpose(1, 2).flatten(2))

    def split(self, packed: Tensor) -> Tensor:
        """(B, N, 3H) -> (3, B, heads, N, H / heads)"""
        return packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def received(self, x: Tensor) -> Tensor:
        """Attention (B, N) float32 that tokens (B, N, H) receive, mean over heads and queries."""
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
        wide = WIDENING * width
        self.mlp = boxed(fc1=nn.Linear(width, wide), fc2=nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(gelu(self.mlp.fc1(self.norm2(x))))

    def attention_row(self, x: Tensor) -> Tensor:
        """Attention (B, N) that each token receives in this layer."""
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
        return layers.relate(self.blocks, self.norm, x, return_attention)


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


class BrainJEPA(BaseNetwork):
    """Brain-JEPA: encoder, predictor, and the encoder that makes their targets.

    The target encoder is the one to embed windows with. The configuration has ``crop_size``
    (parcels, time points), ``patch_size``, ``embed_dim``, ``depth``, ``num_heads``, the last three
    again with ``predictor_``, ``add_w`` ('mapping'), and ``gradients``, the number of them.
    """

    model_type = 'brain_jepa'
    signature = ('target_encoder.norm.weight', 'a Brain-JEPA (brain_jepa)')
    config_file = 'architecture.json'
    config_defaults: ClassVar[dict[str, Any]] = {'gradients': 30}
    trunk = 'target_encoder'

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        config = self.config
        _check_sizes(config)
        (parcels, times), patch = config['crop_size'], config['patch_size']
        self.capabilities = Capabilities(
            window=(parcels, times),
            width=config['embed_dim'],
            class_token=False,
            patches=times // patch,
            token_span=(1, patch),
            positions='gradients',
            parcel_features='parcels',
            predicts_latents=True,
            recipe='fixed',
        )
        self.encoder = self._token_encoder()
        sizes = [config[f'predictor_{name}'] for name in LAYERS]
        self.predictor = Predictor(self._positions(sizes[0]), config['embed_dim'], *sizes)
        # It follows the encoder by averaging, not by gradients.
        self.target_encoder = self._token_encoder().requires_grad_(False)

    @staticmethod
    def unpack(state: dict[str, Any]) -> dict[str, Any]:
        """Join the state dicts of the official file, without what belongs to its training."""
        parts = {part: state[part] for part in NETWORKS if isinstance(state.get(part), dict)}
        if not parts:
            return state
        rest = {name: x for name, x in state.items() if name not in (*parts, *TRAINING)}
        return rest | {f'{part}.{n}': x for part in parts for n, x in parts[part].items()}

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """See Network."""
        return (self.target_encoder.blocks, self.encoder.blocks, self.predictor.predictor_blocks)

    def set_positions(self, table: 'np.ndarray | Tensor') -> None:
        """See Network; a table that holds NaN or tells no parcel apart is refused, too."""
        table = torch.as_tensor(table, dtype=torch.float32)
        parcels, columns = self.capabilities.window[0], self.config['gradients']
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
        self._keep_positions(table)

    def encode(
        self,
        signal: Tensor,
        keep: Tensor | None = None,
        blank: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See Network: the target encoder; attention is what tokens receive."""
        if blank is not None:
            signal = signal.masked_fill(blank, 0)
        x = self.target_encoder.embed(signal, self._placed())
        if keep is not None:
            x = take(x, keep)
        return self.target_encoder(x, return_attention)

    def context(self, signal: Tensor, context_idx: Tensor) -> Tensor:
        """See LatentPredicting."""
        return self.encoder(take(self.encoder.embed(signal, self._placed()), context_idx))[0]

    def predict(self, context: Tensor, context_idx: Tensor, target_idx: Tensor) -> Tensor:
        """See LatentPredicting."""
        return self.predictor(context, self._placed(), context_idx, target_idx)

    def targets(self, hidden: Tensor, target_idx: Tensor) -> Tensor:
        """Return what is to be predicted: layer-normalised tokens (B, M, D) of ``hidden``."""
        return take(F.layer_norm(hidden, hidden.shape[-1:]), target_idx)

    def latent_error(
        self, signal: Tensor, hidden: Tensor, context_idx: Tensor, target_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See LatentPredicting: smooth L1; the guess is the mean target latent of the context."""
        prediction = self.predict(self.context(signal, context_idx), context_idx, target_idx)
        target = self.targets(hidden, target_idx)
        guess = self.targets(hidden, context_idx).mean(1, keepdim=True).expand_as(target)
        blank = torch.full(hidden.shape[:2], torch.nan, device=hidden.device)
        places = target_idx.expand(len(hidden), -1)
        put = lambda x: blank.scatter(1, places, token_error(x, target))
        return put(prediction), put(guess)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the target encoder towards the encoder: m × target + (1 - m) × encoder."""
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        for target, source in pairs:
            target.lerp_(source, 1 - momentum)

    def position_tables(self) -> dict[str, Tensor]:
        """See Network: the tables of time."""
        widths = {
            'encoder.pos_embed_proj': 'embed_dim',
            'predictor.predictor_2dpe_proj': 'predictor_embed_dim',
            'target_encoder.pos_embed_proj': 'embed_dim',
        }
        sizes = {part: self.config[width] // 2 for part, width in widths.items()}
        return {f'{part}.emb_h': time_table(*self._grid, size) for part, size in sizes.items()}

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """See Network: N(0, 0.02), officially truncated at 100 SDs, and equal encoders."""
        trained = boxed(encoder=self.encoder, predictor=self.predictor)
        state = layers.draw_state(trained, self.position_tables(), draw_normal, generator)
        ours = [name for name in state if name.startswith('encoder.')]
        return state | {f'target_{name}': state[name].clone() for name in ours}

    def _placed(self) -> Tensor:
        """Return the gradients, if they are there."""
        if self.positions is None:
            raise BrainfmError(
                'This Brain-JEPA has no table of brain gradients, without which it does not know '
                'where parcels lie, and its checkpoint does not hold it; give it by set_positions '
                'first.'
            )
        return self.positions

    def _token_encoder(self) -> TokenEncoder:
        width, depth, heads = (self.config[name] for name in LAYERS)
        return TokenEncoder(self.config['patch_size'], self._positions(width), width, depth, heads)

    def _positions(self, width: int) -> Positions:
        return Positions(*self._grid, self.config['gradients'], width)


def _check_sizes(config: dict) -> None:
    """Refuse a configuration that makes no Brain-JEPA."""
    parcels, times = config['crop_size']
    sizes = {name: config[name] for name in SIZES} | {'crop_size': min(parcels, times)}
    if small := [name for name, size in sizes.items() if size < 1]:
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
