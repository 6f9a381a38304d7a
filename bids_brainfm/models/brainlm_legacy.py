"""BrainLM as first released (13M): every token is one parcel over 20 time points.

Ortega Caro et al. 2024 (ICLR). The layers carry the Nyströmformer's names, but the released
configuration (as many landmarks as segments) makes that an exact softmax attention; the depth-wise
convolution over tokens stays, and with it the order of tokens matters.
Signals are in the model's own contract: parcels in atlas order, scaled.
Module names are those of the official state dict.
"""

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
    without_autocast,
)
from bids_brainfm.models.masking import put_back, take
from bids_brainfm.models.protocol import Capabilities, forecast_points

TABLE_LENGTH = 5000  # rows of the official position tables; a window uses the first ten
DROPOUT = 0.1  # of the embeddings, in training; the official code has it as a constant


def position_table(channels: int) -> Tensor:
    """Return the classic table, sines and cosines interleaved: (5000, channels) float32."""
    angle = angles(TABLE_LENGTH, channels)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class Positions(nn.Module):
    """Adds to each token the row of its time block, then drops out."""

    pe: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer('pe', torch.empty(TABLE_LENGTH, channels))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, K, H) -> the same"""
        return self.dropout(x + self.pe[: x.shape[2]])


class Layer(nn.Module):
    """One post-norm transformer layer with a convolution over tokens."""

    def __init__(self, hidden: int, heads: int, intermediate: int, kernel: int, eps: float):
        super().__init__()
        attention = Attention(hidden, heads, kernel=kernel)
        self.attention = boxed(
            self=attention,
            output=boxed(dense=nn.Linear(hidden, hidden), LayerNorm=nn.LayerNorm(hidden, eps)),
        )
        self.intermediate = boxed(dense=nn.Linear(hidden, intermediate))
        self.output = boxed(
            dense=nn.Linear(intermediate, hidden), LayerNorm=nn.LayerNorm(hidden, eps)
        )

    def forward(self, x: Tensor) -> Tensor:
        mix, out = self.attention.output, self.output
        x = mix.LayerNorm(mix.dense(self.attention.self(x)) + x)
        return out.LayerNorm(out.dense(gelu(self.intermediate.dense(x))) + x)

    def attention_row(self, x: Tensor) -> Tensor:
        """Attention (B, N) of the first token in this layer, mean over heads."""
        return self.attention.self.cls_row(x)


class BrainLMLegacy(BaseNetwork):
    """BrainLM, the 13M family, encoder and decoder."""

    model_type = 'brainlm_mae'
    signature = (
        'vit.embeddings.xyz_embedding_projection.weight',
        'a legacy 13M BrainLM (brainlm_mae)',
    )
    trunk = 'vit'
    unused = ('decoder.decoder_pred',)  # it is in the official checkpoints only

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.parcels = config['num_brain_voxels']
        self.times = config['num_timepoints_per_voxel']
        self.patch = config['timepoint_patching_size']
        hidden, narrow = config['hidden_size'], config['decoder_hidden_size']
        eps = config['layer_norm_eps']
        if config.get('num_landmarks') != config.get('segment_means_seq_len'):
            raise BrainfmError(
                'The configuration has num_landmarks unlike segment_means_seq_len, which asks '
                'for an approximate attention that no released BrainLM uses; only equal values '
                'are supported.'
            )
        if hidden != narrow or self.times % self.patch:
            raise BrainfmError(
                'The configuration of a brainlm_mae model needs a decoder_hidden_size '
                f'({narrow}) equal to hidden_size ({hidden}) and num_timepoints_per_voxel '
                f'({self.times}) divisible by timepoint_patching_size ({self.patch}).'
            )
        self.capabilities = Capabilities(
            window=(self.parcels, self.times),
            width=hidden,
            class_token=True,
            patches=self.times // self.patch,
            token_span=(1, self.patch),
            positions='coordinates',
            parcel_features='attention',
            reconstructs=True,
            mask_ratio=config.get('mask_ratio', 0.75),
            forecast_points=forecast_points(self.times, self.patch),
            recipe='brainlm-legacy',
            ordered_tokens=True,
        )

        encoder, decoder = (
            stack(Layer, config, part, config['conv_kernel_size'], eps)
            for part in ('', 'decoder_')
        )
        embeddings = boxed(
            signal_embedding_projection=nn.Linear(self.patch, hidden),
            xyz_embedding_projection=nn.Linear(3, hidden),
            pos_embedding=Positions(hidden),
        )
        embeddings.cls_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.vit = boxed(
            embeddings=embeddings,
            encoder=boxed(layer=encoder),
            layernorm=nn.LayerNorm(hidden, eps),
        )

        self.decoder = boxed(
            decoder_embed=nn.Linear(hidden, narrow),
            decoder_layers=decoder,
            decoder_norm=nn.LayerNorm(narrow, eps),
            # Never used, but the official checkpoints hold it.
            decoder_pred=nn.Linear(narrow, config['patch_size'] ** 2 * config['num_channels']),
            decoder_xyz_projection=nn.Linear(3, narrow),
            pos_embedding=Positions(narrow),
            decoder_pred1=nn.Linear(narrow, narrow // 2),
            decoder_pred2=nn.Linear(narrow // 2, self.patch),
        )
        self.decoder.mask_token = nn.Parameter(torch.empty(1, 1, narrow))

    @property
    def transformers(self) -> tuple[nn.Module, ...]:
        """See Network; the decoder keeps its precision."""
        return (self.vit.encoder,)

    def encode(
        self,
        signal: Tensor,
        keep: Tensor | None = None,
        blank: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See Network; the order of `keep` matters, and attention is the class token's."""
        embeddings = self.vit.embeddings
        if blank is not None:
            signal = signal.masked_fill(blank, 0)
        # Millimetres give large numbers, next to which bfloat16 would lose most of the signal.
        with without_autocast(signal):
            x = embeddings.signal_embedding_projection(signal.unflatten(2, (-1, self.patch)))
            x = x + embeddings.xyz_embedding_projection(self._placed())[:, :, None]
        x = embeddings.pos_embedding(x).flatten(1, 2)
        if keep is not None:
            x = take(x, keep)
        x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1)
        return relate(self.vit.encoder.layer, self.vit.layernorm, x, return_attention)

    def decode(self, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """See Reconstructing."""
        decoder = self.decoder
        x = decoder.decoder_embed(hidden)
        cls, x = x[:, :1], x[:, 1:]
        if keep is not None:
            x = put_back(x, keep, decoder.mask_token, self.tokens)
        place = decoder.decoder_xyz_projection(self._placed())
        x = x.unflatten(1, (self.parcels, -1)) + place[:, :, None]
        x = torch.cat([cls, decoder.pos_embedding(x).flatten(1, 2)], 1)
        for layer in decoder.decoder_layers:
            x = layer(x)
        x = decoder.decoder_pred1(decoder.decoder_norm(x)[:, 1:])
        x = decoder.decoder_pred2(F.leaky_relu(x, 0.1))
        if self.config.get('use_tanh_decoder'):
            x = x.tanh()
        return x.reshape(-1, self.parcels, self.times)

    def _placed(self) -> Tensor:
        """Parcel centres (1, P, 3) in mm (MNI)."""
        if self.positions is None:
            raise BrainfmError(self._lacks_coordinates('has none'))
        return self.positions[None]

    def position_tables(self) -> dict[str, Tensor]:
        """See Network."""
        return {
            f'{part}.pos_embedding.pe': position_table(self.config['hidden_size'])
            for part in ('vit.embeddings', 'decoder')
        }

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """See Network."""
        return draw_state(self, self.position_tables(), draw_uniform, generator)
