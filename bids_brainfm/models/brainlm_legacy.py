"""BrainLM as first released (13M): every token is one parcel over 20 time points.

Ortega Caro et al. 2024 (ICLR). The layers carry the Nyströmformer's names, but the released
configuration (as many landmarks as segments) makes that an exact softmax attention, so it is
computed as such; the depth-wise convolution over tokens stays, and with it the order of tokens
matters.
Signals are in the model's own contract: parcels in atlas order, scaled.
Module names are those of the official state dict.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.layers import (
    Attention,
    angles,
    boxed,
    draw_state,
    draw_uniform,
    gelu,
    without_autocast,
)
from bids_brainfm.models.masking import put_back, take

TABLE_LENGTH = 5000  # rows of the official position tables; a window uses the first ten
DROPOUT = 0.1  # of the embeddings, in training; the official code has it as a constant


def position_table(channels: int) -> Tensor:
    """Return the classic table, sines and cosines interleaved: (5000, channels) float32."""
    angle = angles(TABLE_LENGTH, channels)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()


class Positions(nn.Module):
    """Adds to each token the row of its time block, then drops out."""

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

    def cls_row(self, x: Tensor) -> Tensor:
        """Attention (B, N) of the first token in this layer, mean over heads."""
        return self.attention.self.cls_row(x)


class BrainLMLegacy(nn.Module):
    """BrainLM, the 13M family, encoder and decoder.

    Parameters
    ----------
    config : dict
        The checkpoint's ``config.json``.
    """

    model_type = 'brainlm_mae'
    has_class_token = True
    pooling = 'class token'
    needs_xyz = True
    trunk = 'vit'  # the module that encode uses
    unused = ('decoder.decoder_pred',)  # it is in the official checkpoints only

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.parcels = config['num_brain_voxels']
        self.times = config['num_timepoints_per_voxel']
        self.window_shape = (self.parcels, self.times)
        self.patch = config['timepoint_patching_size']
        self.tokens_per_parcel = self.times // self.patch
        self.tokens = self.parcels * self.tokens_per_parcel
        hidden, narrow = config['hidden_size'], config['decoder_hidden_size']
        self.width, eps = hidden, config['layer_norm_eps']
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

        embeddings = boxed(
            signal_embedding_projection=nn.Linear(self.patch, hidden),
            xyz_embedding_projection=nn.Linear(3, hidden),
            pos_embedding=Positions(hidden),
        )
        embeddings.cls_token = nn.Parameter(torch.empty(1, 1, hidden))
        self.vit = boxed(
            embeddings=embeddings,
            encoder=boxed(layer=self._layers('')),
            layernorm=nn.LayerNorm(hidden, eps),
        )

        self.decoder = boxed(
            decoder_embed=nn.Linear(hidden, narrow),
            decoder_layers=self._layers('decoder_'),
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
        """The layers whose matrices may be of lower precision; a decoder's are not."""
        return (self.vit.encoder,)

    def encode(
        self,
        signal: Tensor,
        xyz: Tensor,
        keep: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn windows into tokens.

        Parameters
        ----------
        signal : (B, P, T)
            Windows, scaled.
        xyz : (B or 1, P, 3)
            Parcel centres in mm (MNI).
        keep : (B, K) int64, optional
            Tokens to encode, in this order (it matters); all, parcel by parcel and in time
            within a parcel, where not given.
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
        # Millimetres give large numbers, beside which bfloat16 would lose most of the signal.
        with without_autocast(signal):
            x = embeddings.signal_embedding_projection(signal.unflatten(2, (-1, self.patch)))
            x = x + embeddings.xyz_embedding_projection(xyz)[:, :, None]
        x = embeddings.pos_embedding(x).flatten(1, 2)
        if keep is not None:
            x = take(x, keep)
        x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1)
        *layers, last = self.vit.encoder.layer
        for layer in layers:
            x = layer(x)
        attention = last.cls_row(x) if return_attention else None
        return self.vit.layernorm(last(x)), attention

    def decode(self, hidden: Tensor, xyz: Tensor, keep: Tensor | None = None) -> Tensor:
        """Turn encoded tokens into windows.

        Parameters
        ----------
        hidden : (B, 1 + K, H)
            What ``encode`` returned.
        xyz : (B or 1, P, 3)
            Parcel centres in mm (MNI).
        keep : (B, K) int64, optional
            The tokens that were encoded, in that order; all where not given.

        Returns
        -------
        (B, P, T)
        """
        decoder = self.decoder
        x = decoder.decoder_embed(hidden)
        cls, x = x[:, :1], x[:, 1:]
        if keep is not None:
            x = put_back(x, keep, decoder.mask_token, self.tokens)
        x = x.unflatten(1, (self.parcels, -1)) + decoder.decoder_xyz_projection(xyz)[:, :, None]
        x = torch.cat([cls, decoder.pos_embedding(x).flatten(1, 2)], 1)
        for layer in decoder.decoder_layers:
            x = layer(x)
        x = decoder.decoder_pred1(decoder.decoder_norm(x)[:, 1:])
        x = decoder.decoder_pred2(F.leaky_relu(x, 0.1))
        if self.config.get('use_tanh_decoder'):
            x = x.tanh()
        return x.reshape(-1, self.parcels, self.times)

    def reconstruct(self, signal: Tensor, xyz: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode the tokens ``keep`` of ``signal`` (B, P, T) and decode all: (B, P, T)."""
        return self.decode(self.encode(signal, xyz, keep)[0], xyz, keep)

    def points(self, tokens: Tensor) -> Tensor:
        """Return the points (B, P, T) bool that marked tokens (B, N) bool cover."""
        return tokens.repeat_interleave(self.patch, 1).unflatten(1, (self.parcels, -1))

    def covering(self, points: Tensor) -> Tensor:
        """Return the tokens (B, N) bool that hold any of the marked points (B, P, T) bool."""
        return points.unflatten(2, (-1, self.patch)).any(-1).flatten(1)

    def hide_last(self, points: int, exactly: bool) -> tuple[Tensor, None]:
        """Hide the patches (1, N) bool that hold any of the window's last time points.

        With them comes None: no point of a patch can be set to 0 beside its others here.

        Raises
        ------
        BrainfmError
            Exactly so many are asked for, and whole patches hold more.
        """
        if exactly and points % self.patch:
            raise BrainfmError(
                f'This model hides whole patches of {self.patch} time points, so it cannot hide '
                f'exactly the last {points}; choose a multiple of {self.patch}, or predict_last.'
            )
        late = torch.arange(self.times) >= self.times - points
        return self.covering(late.expand(1, self.parcels, -1)), None

    def position_tables(self) -> dict[str, Tensor]:
        """Return the fixed position tables by their names in the state dict."""
        return {
            f'{part}.pos_embedding.pe': position_table(self.config['hidden_size'])
            for part in ('vit.embeddings', 'decoder')
        }

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the official initialisation."""
        return draw_state(self, self.position_tables(), draw_uniform, generator)

    def _layers(self, part: str) -> nn.ModuleList:
        """Return the layers of the encoder (``''``) or of the decoder (``'decoder_'``)."""
        sizes = [
            self.config[part + name]
            for name in ('hidden_size', 'num_attention_heads', 'intermediate_size')
        ]
        kernel, eps = self.config['conv_kernel_size'], self.config['layer_norm_eps']
        n_layers = self.config[part + 'num_hidden_layers']
        return nn.ModuleList(Layer(*sizes, kernel, eps) for _ in range(n_layers))
