"""A family of networks as another package adds it: masked autoencoding without a class token.

A token is a rectangle of ``rows`` parcels and four time points, and windows are as short as 16.
"""

import torch
from torch import Tensor, nn

from bids_brainfm.models.base import BaseNetwork
from bids_brainfm.models.masking import put_back, take
from bids_brainfm.models.protocol import Capabilities, forecast_points

POINTS = 4


class ExampleMAE(BaseNetwork):
    model_type = 'example_mae'
    signature = ('body.embed.weight', 'an example (example_mae)')
    trunk = 'body'

    def __init__(self, config: dict):
        super().__init__(config)
        parcels, times, rows, width = (config[n] for n in ('parcels', 'times', 'rows', 'width'))
        self.capabilities = Capabilities(
            window=(parcels, times),
            width=width,
            class_token=False,
            patches=times // POINTS if rows == 1 else None,
            token_span=(rows, POINTS),
            positions='coordinates',
            parcel_features='parcels' if rows == 1 else None,
            reconstructs=True,
            mask_ratio=0.5,
            forecast_points=forecast_points(times, POINTS),
        )
        mix = nn.MultiheadAttention(width, 2, batch_first=True)
        embed, place = nn.Linear(rows * POINTS, width), nn.Linear(3, width)
        self.body = nn.ModuleDict({'embed': embed, 'place': place, 'mix': mix})
        self.pixels = nn.Linear(width, rows * POINTS)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))

    def places(self) -> Tensor:
        """Where each token lies (N, width)."""
        centres = self.positions.unflatten(0, (-1, self.capabilities.token_span[0])).mean(1)
        patches = self.capabilities.window[1] // POINTS
        return self.body['place'](centres / 100).repeat_interleave(patches, 0)

    def encode(self, signal, keep=None, blank=None, return_attention=False):
        if blank is not None:
            signal = signal.masked_fill(blank, 0)
        rows = self.capabilities.token_span[0]
        pieces = signal.unflatten(1, (-1, rows)).unflatten(3, (-1, POINTS)).transpose(2, 3)
        x = self.body['embed'](pieces.flatten(3).flatten(1, 2)) + self.places()
        if keep is not None:
            x = take(x, keep)
        mixed, attention = self.body['mix'](x, x, x, need_weights=return_attention)
        return x + mixed, attention.mean(1) if return_attention else None

    def decode(self, hidden, keep=None):
        if keep is not None:
            hidden = put_back(hidden, keep, self.mask_token, self.tokens)
        (parcels, times), (rows, _) = self.capabilities.window, self.capabilities.token_span
        pieces = self.pixels(hidden + self.places()).unflatten(2, (rows, POINTS))
        pieces = pieces.unflatten(1, (parcels // rows, -1)).transpose(2, 3)
        return pieces.reshape(len(hidden), parcels, times)

    def initial_state(self, generator):
        draw = lambda x: 0.5 * torch.randn(x.shape, generator=generator)
        return {name: draw(x) for name, x in self.state_dict().items()}
