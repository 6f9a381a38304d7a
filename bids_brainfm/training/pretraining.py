"""What networks are pretrained for: masked autoencoding, and prediction of latents."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bids_brainfm.analyses.conditional import predict_windows
from bids_brainfm.analyses.reconstruct import interpolate, seen_mean, target_level
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import masking as tokens
from bids_brainfm.models.protocol import LatentPredicting, Reconstructing
from bids_brainfm.signals.covariance import moments, shrunk
from bids_brainfm.training.masking import REGIONS, draw_blocks
from bids_brainfm.training.objective import Objective

GREATEST_RATIO = 0.9
MOSTLY = 0.5  # proportion of flagged time points from which on a token is left out
EVALUATION_MASKS = 8  # that held-out latents are predicted under, in turn

# windows (B, P, T), their flags (B, T) bool, and a seed for each one's mask
Batches = Iterable[tuple[Tensor, Tensor, Sequence[int]]]
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over processes


class MaskedAutoencoding(Objective):
    """Reconstruct what is masked of a window.

    Masked points of flagged volumes hold interpolated values. They are neither learned nor scored.
    `masking` hides tokens at random for each window (``random``), or all that hold any of the
    last time points (``future``); `ratio` is the proportion of tokens or time points, 0 to 0.9.
    `loss` is ``mse`` or ``mae``; `normalise` standardises each parcel's target over its time
    points (``norm_pix_loss``). ``covariance`` (P, P) between the rows of a window, of other people
    than the held-out ones, is set from outside for the covariance baseline.
    """

    network: Reconstructing

    def __init__(
        self, network: Reconstructing, ratio: float, masking: str = 'random', loss: str = 'mse',
        normalise: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not 0 < ratio <= GREATEST_RATIO:
            raise BrainfmError(
                f'--mask-ratio {ratio:g} is not above 0 and up to {GREATEST_RATIO}.'
            )
        for name in network.unused:  # processes that train together would wait for its gradients
            network.get_submodule(name).requires_grad_(False)
        self.network, self.ratio, self.masking = network, ratio, masking
        self.loss, self.normalise = loss, normalise
        self.baselines: dict[str, float] = {}
        self.covariance: np.ndarray | None = None

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw the tokens ``keep`` (B, K) int64 that the encoder sees of each window."""
        if self.masking == 'future':
            points = int(self.ratio * self.network.capabilities.window[1])
            hidden, _ = self.network.hide_last(points, exactly=False)
            return {'keep': tokens.keep_visible(hidden).expand(len(seeds), -1)}
        noise = [torch.rand(self.network.tokens, generator=_generator(seed)) for seed in seeds]
        return {'keep': tokens.keep_lowest(torch.stack(noise), self.ratio)}

    def forward(
        self, signal: Tensor, keep: Tensor, flagged: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed error over masked points, their number, and nothing else to log.

        Time points that are `flagged` (B, T) bool, by default none, are left out.
        """
        points = self.network.points(tokens.masked_tokens(keep, self.network.tokens))
        if flagged is not None:
            points = points & ~flagged[:, None]
        predicted = self.network.reconstruct(signal, keep).float()
        loss = tokens.masked_loss(predicted, signal, points, self.loss, self.normalise, 'sum')
        return loss, points.sum(), {}

    @torch.no_grad()
    def evaluate(self, batches: Batches, reduce: Reduce) -> dict[str, float]:
        """Score the reconstruction of masked, unflagged points of this process's held-out windows.

        Returns ``loss``, ``mse``, ``r2`` and ``r`` over all masked points, the parcel's mean over
        those of the window taken out (so 0 is the mean of the target); ``r2_mean`` and
        ``r2_interpolation`` for the mean of the seen points and their linear interpolation, and
        ``r2_covariance`` for the conditional mean given the parcels seen at the same instant.
        """
        baselines = {} if self.baselines else {'mean': seen_mean, 'interpolation': interpolate}
        if self.covariance is not None and not self.baselines:
            baselines['covariance'] = self._from_covariance
        sums = torch.zeros(1 + len(baselines), 6, dtype=torch.float64)
        loss = torch.zeros(2, dtype=torch.float64)
        for signal, flagged, seeds in batches:
            keep = self.draw(seeds)['keep'].to(signal.device)
            total, count, _ = self(signal, keep, flagged)
            loss += torch.tensor([total.item(), count.item()], dtype=torch.float64)
            windows = (tokens.standardised(signal) if self.normalise else signal).cpu().numpy()
            hidden = self.network.points(tokens.masked_tokens(keep, self.network.tokens))
            seen = ~hidden.cpu().numpy()
            measured = ~flagged[:, None].cpu().numpy()
            scored = ~seen & measured
            predictions = [self.network.reconstruct(signal, keep).float().cpu().numpy()]
            predictions += [fill(windows, seen & measured) for fill in baselines.values()]
            for row, prediction in enumerate(predictions):
                sums[row] += torch.from_numpy(_moments(prediction, windows, scored))
        sums, loss = reduce(sums), reduce(loss)
        scores, *others = map(_scores, sums)
        self.baselines |= {f'r2_{n}': b['r2'] for n, b in zip(baselines, others, strict=True)}
        return {'loss': float(loss[0] / loss[1])} | scores | self.baselines

    def _from_covariance(self, windows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Conditional mean (B, P, T) of hidden points of windows (B, P, T)."""
        covariance = self.covariance
        assert covariance is not None
        if self.normalise:
            sd = np.sqrt(np.diag(covariance))
            covariance = covariance / np.outer(sd, sd)
        return predict_windows(windows, seen, seen_mean(windows, seen), covariance)


def parcel_covariance(series: Iterable[np.ndarray], parcels: int, reduce: Reduce) -> np.ndarray:
    """Covariance (P, P) between the rows of this process's series (P, S), and of all processes'.

    Each run has its own mean; shrunk as of :func:`bids_brainfm.signals.covariance.shrunk`.
    """
    sums = np.zeros((3, parcels, parcels))
    for run in series:
        sums += moments((run - run.mean(axis=1, keepdims=True)).T)
    return shrunk(reduce(torch.from_numpy(sums)).numpy())


def _moments(predictions: np.ndarray, windows: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Sums over scored points from which scores follow: (6,)."""
    total = np.zeros(6)
    for x, y, points in zip(predictions, windows, scored, strict=True):
        level = target_level(np.where(points, y, np.nan).T)[:, None]
        x, y = (np.asarray(v - level, float)[points] for v in (x, y))
        total += [len(y), x.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), y.sum()]
    return total


def _scores(sums: Tensor) -> dict[str, float]:
    n, x, xx, yy, xy, y = sums.tolist()
    error, measured, predicted = xx - 2 * xy + yy, yy - y * y / n, xx - x * x / n
    varies = predicted > 0 and measured > 0
    return {
        'mse': error / n,
        'r2': 1 - error / measured if measured > 0 else np.nan,
        'r': (xy - x * y / n) / (predicted * measured) ** 0.5 if varies else np.nan,
    }


class LatentPrediction(Objective):
    """Predict the latents of blocks of a window from another block, as Brain-JEPA does.

    A target token with at least half of its time points flagged holds mostly interpolated values.
    It is neither learned nor scored. (If any flagged point excluded a token, few would be left: a
    token of Brain-JEPA spans 16 samples.)
    `masks` is the recipe of :func:`~bids_brainfm.training.masking.draw_blocks`.
    """

    network: LatentPredicting

    def __init__(self, network: LatentPredicting, masks: str):
        super().__init__()
        if network.capabilities.patches is None:
            raise BrainfmError(
                f'A model of the family {network.model_type} has tokens that span several '
                f'parcels, so blocks of parcels cannot be masked: pretrain a model with tokens '
                f'of each parcel.'
            )
        self.network, self.masks = network, masks
        self.size = network.capabilities.window[0], network.capabilities.patches

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw context (B, K), targets (B, M) and their regions (B, M) for a batch, together."""
        return vars(draw_blocks(len(seeds), *self.size, self.masks, _generator(seeds[0])))

    def measured(self, flagged: Tensor) -> Tensor:
        """Tokens (B, N) bool that are scored, by the flags (B, T) of time points."""
        patches = flagged.float().unflatten(1, (self.size[1], -1)).mean(2) < MOSTLY
        return patches[:, None].expand(-1, self.size[0], -1).flatten(1)

    def forward(
        self, signal: Tensor, context: Tensor, target: Tensor, region: Tensor,
        flagged: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the summed error over target tokens, their number, and what is to be logged.

        Logged are for each region the pair (summed error, number of tokens), and ``target_sd``:
        standard deviation of the targets between windows, mean over tokens and features, and 1.
        Time points that are `flagged` (B, T) bool, by default none, exclude tokens.
        """
        if flagged is None:
            flagged = torch.zeros_like(signal[:, 0], dtype=torch.bool)
        network, measured = self.network, self.measured(flagged)
        with torch.no_grad():
            hidden = network.encode(signal)[0]
            wanted = network.targets(hidden, target)
        predicted = network.predict(network.context(signal, context), context, target)
        scored = measured.gather(1, target)
        error = tokens.token_error(predicted, wanted) * scored
        facts = {}
        for number, name in enumerate(REGIONS):
            inside = scored & (region == number)
            facts[f'loss_{name}'] = torch.stack([error.detach()[inside].sum(), inside.sum()])
        if len(signal) > 1:
            spread = _spread(F.layer_norm(hidden.float(), hidden.shape[-1:]), measured)
            facts['target_sd'] = torch.stack([spread.nan_to_num(), spread.isfinite().float()])
        return error.sum(), scored.sum(), facts

    def after_step(self, momentum: float | None) -> None:
        """Move the network that makes the targets towards the one that is trained."""
        assert momentum is not None, 'a recipe with masks has a momentum'
        self.network.follow(momentum)

    @torch.no_grad()
    def evaluate(self, batches: Batches, reduce: Reduce) -> dict[str, float]:
        """Score the prediction of latents of this process's held-out windows.

        Returns ``loss``; ``baseline``: the loss of guessing each target to be the mean target of
        the context; ``target_sd``: standard deviation of the layer-normalised latents between
        windows; ``rank``: effective rank of the embeddings, which are made of all tokens;
        ``static``: the error between the latents of a window and of the same window without its
        changes in time (0: the network sees levels only). Errors are means over the windows that
        have a token to score.
        """
        width, size = self.network.capabilities.width, self.size[0] * self.size[1]
        shapes = [(2, 3), (1,), (size,), (size, width), (size, width), (width,), (width, width)]
        zeros = [torch.zeros(s, dtype=torch.float64) for s in shapes]
        sums, n, counts, first, second, mean, outer = zeros
        # drawn together, since they must be of one size however windows come in batches
        masks = self.draw(range(EVALUATION_MASKS))
        for signal, flagged, seeds in batches:
            measured = self.measured(flagged)
            hidden = self.network.encode(signal)[0].float()
            rows = [seed % EVALUATION_MASKS for seed in seeds]
            blocks = {k: v[rows].to(signal.device) for k, v in masks.items()}
            places = blocks['context'], blocks['target']
            error, guess = self.network.latent_error(signal, hidden, *places)
            level = signal.mean(2, keepdim=True).expand_as(signal)
            still = self.network.encode(level)[0].float()
            normal, unmoved = (F.layer_norm(x, x.shape[-1:]) for x in (hidden, still))
            errors = torch.stack([error, guess, tokens.token_error(unmoved, normal)])
            by_window = errors.masked_fill(~measured, torch.nan).nanmean(2)  # (3, B)
            sums += torch.stack([by_window.nansum(1), by_window.isfinite().sum(1)]).double().cpu()
            kept = normal.double() * measured[..., None]
            counts += measured.sum(0).cpu()
            first += kept.sum(0).cpu()
            second += kept.square().sum(0).cpu()
            summary = hidden.mean(1).double().cpu()
            n += len(summary)
            mean += summary.sum(0)
            outer += summary.T @ summary
        sums, n, counts, first, second, mean, outer = map(
            reduce, (sums, n, counts, first, second, mean, outer)
        )
        loss, baseline, static = (sums[0] / sums[1]).tolist()
        seen = counts.clamp(min=1)[:, None]
        variance = (second / seen - (first / seen) ** 2).clamp(min=0)
        return {
            'loss': loss,
            'baseline': baseline,
            'target_sd': float(variance[counts > 0].sqrt().mean()),
            'rank': effective_rank(outer / n - torch.outer(mean / n, mean / n)),
            'static': static,
        }


def _spread(latents: Tensor, measured: Tensor) -> Tensor:
    """Standard deviation of latents (B, N, D) between windows, mean over tokens and features.

    Only windows in which a token is `measured` (B, N) count; NaN where no token is in two.
    """
    kept, n = measured[..., None], measured.sum(0)[:, None]
    mean = (latents * kept).sum(0) / n.clamp(min=1)
    squares, several = ((latents - mean) * kept).square().sum(0), n[:, 0] > 1
    return (squares[several] / (n[several] - 1)).sqrt().mean()


def effective_rank(covariance: Tensor) -> float:
    """Exponential of the entropy of the eigenvalues of a covariance (D, D)."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    proportions = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(proportions).sum().exp())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
