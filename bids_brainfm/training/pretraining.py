"""What networks are pretrained for: masked autoencoding, and prediction of latents.

An objective is a module that gives the error of a batch as a sum and a count, so that the mean is
the same however a batch is split over processes and micro batches.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.analyses.reconstruct import interpolate, seen_mean, target_level
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.brain_jepa import token_error
from bids_brainfm.models.masking import (
    keep_lowest,
    keep_visible,
    masked_loss,
    masked_tokens,
    standardised,
)
from bids_brainfm.training.masking import REGIONS, draw_blocks

GREATEST_RATIO = 0.9
EVALUATION_MASKS = 8  # that held-out latents are predicted under, in turn


class MaskedAutoencoding(nn.Module):
    """Reconstruct what is masked of a window (BrainLM).

    Parameters
    ----------
    network : BrainLMViT or BrainLMLegacy
    ratio : float
        Share of tokens (random) or of time points (future) that is masked, 0 to 0.9.
    masking : {'random', 'future'}
        Tokens at random, a new draw for each window; or all tokens that hold any of the last
        time points.
    loss : {'mse', 'mae'}
    normalise : bool
        Standardise each parcel's target over its time points (``norm_pix_loss``).
    xyz : (1, P, 3) Tensor, optional
        Parcel centres in mm, for the family that needs them.
    """

    selects = 'loss'  # of what is evaluated, the lower the better

    def __init__(
        self,
        network: nn.Module,
        ratio: float,
        masking: str = 'random',
        loss: str = 'mse',
        normalise: bool = False,
        xyz: Tensor | None = None,
    ):
        super().__init__()
        if not 0 < ratio <= GREATEST_RATIO:
            raise BrainfmError(
                f'--mask-ratio {ratio:g} is not above 0 and up to {GREATEST_RATIO}.'
            )
        for name in getattr(network, 'unused', ()):
            # processes that train together would wait for its gradients
            network.get_submodule(name).requires_grad_(False)
        self.network, self.ratio, self.masking = network, ratio, masking
        self.loss, self.normalise = loss, normalise
        self.register_buffer('xyz', xyz, persistent=False)
        self.baselines: dict[str, float] = {}

    @property
    def trained(self) -> nn.Module:
        """What is optimised."""
        return self.network

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw the tokens ``keep`` (B, K) int64 that the encoder sees of each window."""
        if self.masking == 'future':
            points = int(self.ratio * self.network.window_shape[1])
            hidden, _ = self.network.hide_last(points, exactly=False)
            return {'keep': keep_visible(hidden).expand(len(seeds), -1)}
        tokens = self.network.tokens
        noise = [torch.rand(tokens, generator=_generator(seed)) for seed in seeds]
        return {'keep': keep_lowest(torch.stack(noise), self.ratio)}

    def forward(self, signal: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed error over masked points, their number, and nothing else to log.

        Parameters
        ----------
        signal : (B, P, T)
        keep : (B, K) int64
        """
        points = self.network.points(masked_tokens(keep, self.network.tokens))
        made = self._reconstruct(signal, keep).float()
        count = points.sum()
        return masked_loss(made, signal, points, self.loss, self.normalise) * count, count, {}

    def _reconstruct(self, signal: Tensor, keep: Tensor) -> Tensor:
        place = () if self.xyz is None else (self.xyz,)
        return self.network.reconstruct(signal, *place, keep=keep)

    def after_step(self, momentum: float | None) -> None:
        """Nothing follows a step."""

    @torch.no_grad()
    def evaluate(self, batches, reduce) -> dict[str, float]:
        """Score the reconstruction of masked points of held-out windows.

        Parameters
        ----------
        batches : iterable of (signal (B, P, T), list of B int)
            This process's windows, and a seed for the mask of each.
        reduce : callable
            Sums a tensor over processes.

        Returns
        -------
        dict
            ``loss``, ``mse``, ``r2`` and ``r`` over all masked points, the parcel's mean over
            those of the window taken out (so 0 is the mean of what was to be found); ``r2_mean``
            and ``r2_interpolation`` for the mean of the seen points and their linear
            interpolation.
        """
        names = ['model'] if self.baselines else ['model', 'mean', 'interpolation']
        sums = torch.zeros(len(names), 6, dtype=torch.float64)
        loss = torch.zeros(2, dtype=torch.float64)
        for signal, seeds in batches:
            keep = self.draw(seeds)['keep'].to(signal.device)
            total, count, _ = self(signal, keep)
            loss += torch.tensor([total.item(), count.item()], dtype=torch.float64)
            windows = (standardised(signal) if self.normalise else signal).cpu().numpy()
            seen = ~self.network.points(masked_tokens(keep, self.network.tokens)).cpu().numpy()
            made = {'model': self._reconstruct(signal, keep).float().cpu().numpy()}
            if not self.baselines:
                made['mean'] = seen_mean(windows, seen)
                made['interpolation'] = interpolate(windows, seen)
            for row, name in enumerate(names):
                sums[row] += torch.from_numpy(_moments(made[name], windows, ~seen))
        sums, loss = reduce(sums), reduce(loss)
        scores = {name: _scores(row) for name, row in zip(names, sums, strict=True)}
        if not self.baselines:
            for name in ('mean', 'interpolation'):
                self.baselines[f'r2_{name}'] = scores[name]['r2']
        return {'loss': float(loss[0] / loss[1])} | scores['model'] | self.baselines


def _moments(made: np.ndarray, windows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Sums over hidden points from which scores follow: (6,)."""
    total = np.zeros(6)
    for x, y, points in zip(made, windows, hidden, strict=True):
        level = target_level(np.where(points, y, np.nan).T)[:, None]
        x, y = (np.asarray(v - level, float)[points] for v in (x, y))
        total += [len(y), x.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), y.sum()]
    return total


def _scores(sums: Tensor) -> dict[str, float]:
    n, x, xx, yy, xy, y = sums.tolist()
    error, spread = xx - 2 * xy + yy, yy - y * y / n
    made = xx - x * x / n
    return {
        'mse': error / n,
        'r2': 1 - error / spread if spread > 0 else np.nan,
        'r': (xy - x * y / n) / (made * spread) ** 0.5 if made > 0 and spread > 0 else np.nan,
    }


class LatentPrediction(nn.Module):
    """Predict the latents of blocks of a window from another block (Brain-JEPA).

    Parameters
    ----------
    network : BrainJEPA
        With its table of gradients.
    masks : {'fixed', 'official'}
        See :func:`bids_brainfm.training.masking.draw_blocks`.
    """

    selects = 'loss'

    def __init__(self, network: nn.Module, masks: str):
        super().__init__()
        self.network, self.masks = network, masks

    @property
    def trained(self) -> nn.Module:
        """What is optimised; the target encoder follows by averaging."""
        return self.network

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw context (B, K), targets (B, M) and their regions (B, M) for a batch.

        All windows of the batch have equal numbers of tokens, so their masks are drawn together.
        """
        network = self.network
        blocks = draw_blocks(
            len(seeds),
            network.window_shape[0],
            network.tokens_per_parcel,
            self.masks,
            _generator(seeds[0]),
        )
        return {'context': blocks.context, 'target': blocks.target, 'region': blocks.region}

    def forward(
        self, signal: Tensor, context: Tensor, target: Tensor, region: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed error over target tokens, their number, and what is to be logged.

        Parameters
        ----------
        signal : (B, P, T)
        context, target, region : (B, K), (B, M), (B, M) int64

        Returns
        -------
        total, count : () tensors
        facts : dict
            For each region the pair (summed error, number of tokens); ``target_sd``: standard
            deviation of the targets between windows, mean over tokens and features, and 1.
        """
        network = self.network
        with torch.no_grad():
            hidden = network.encode(signal)[0]
            wanted = network.targets(hidden, target)
        found = network.predict(network.context(signal, context), context, target)
        error = token_error(found, wanted)
        facts = {}
        for number, name in enumerate(REGIONS):
            inside = region == number
            facts[f'loss_{name}'] = torch.stack([error.detach()[inside].sum(), inside.sum()])
        if len(signal) > 1:
            spread = F.layer_norm(hidden.float(), hidden.shape[-1:]).std(0).mean()
            facts['target_sd'] = torch.stack([spread, torch.ones_like(spread)])
        return error.sum(), torch.tensor(error.numel(), device=error.device), facts

    @torch.no_grad()
    def after_step(self, momentum: float | None) -> None:
        """Move the target encoder towards the encoder: m × target + (1 - m) × encoder."""
        pairs = zip(
            self.network.target_encoder.parameters(),
            self.network.encoder.parameters(),
            strict=True,
        )
        for target, source in pairs:
            target.lerp_(source, 1 - momentum)

    @torch.no_grad()
    def evaluate(self, batches, reduce) -> dict[str, float]:
        """Score the prediction of latents of held-out windows.

        Parameters
        ----------
        batches : iterable of (signal (B, P, T), list of B int)
            This process's windows, and a number that picks the mask of each.
        reduce : callable
            Sums a tensor over processes.

        Returns
        -------
        dict
            ``loss``; ``baseline``: the loss of guessing each target to be the mean target of the
            context; ``target_sd``: standard deviation of the layer-normalised latents between
            windows; ``rank``: effective rank of the embeddings (exponential of the entropy of
            the eigenvalues of their covariance); ``static``: the error by which the latents of a
            window differ from those of the same window without its changes in time (0: the
            network sees levels only).
        """
        width = self.network.config['embed_dim']
        tokens = self.network.window_shape[0] * self.network.tokens_per_parcel
        sums = torch.zeros(4, dtype=torch.float64)
        first, second = (torch.zeros(tokens, width, dtype=torch.float64) for _ in range(2))
        mean, outer = (
            torch.zeros(*shape, dtype=torch.float64) for shape in [(width,), (width,) * 2]
        )
        # drawn together, since they must be of one size however windows come in batches
        masks = self.draw(range(EVALUATION_MASKS))
        for signal, seeds in batches:
            hidden = self.network.encode(signal)[0].float()
            rows = [seed % EVALUATION_MASKS for seed in seeds]
            blocks = {k: v[rows].to(signal.device) for k, v in masks.items()}
            error, guess = self.network.latent_error(
                signal, hidden, blocks['context'], blocks['target']
            )
            level = signal.mean(2, keepdim=True).expand_as(signal)
            still = self.network.encode(level)[0].float()
            normal, unmoved = (F.layer_norm(x, x.shape[-1:]) for x in (hidden, still))
            sums += torch.tensor(
                [
                    error.nanmean(1).sum().item(),
                    guess.nanmean(1).sum().item(),
                    token_error(unmoved, normal).mean(1).sum().item(),
                    len(signal),
                ]
            )
            first += normal.double().sum(0).cpu()
            second += normal.double().square().sum(0).cpu()
            summary = hidden.mean(1).double().cpu()
            mean += summary.sum(0)
            outer += summary.T @ summary
        sums, first, second, mean, outer = map(reduce, (sums, first, second, mean, outer))
        n = float(sums[3])
        variance = (second / n - (first / n) ** 2).clamp(min=0)
        covariance = outer / n - torch.outer(mean / n, mean / n)
        return {
            'loss': float(sums[0] / n),
            'baseline': float(sums[1] / n),
            'target_sd': float(variance.sqrt().mean()),
            'rank': effective_rank(covariance),
            'static': float(sums[2] / n),
        }


def effective_rank(covariance: Tensor) -> float:
    """Exponential of the entropy of the eigenvalues of a covariance (D, D).

    >>> round(effective_rank(torch.eye(4, dtype=torch.float64)), 3)
    4.0
    """
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
