"""Which tokens a network sees, and how far it misses the ones it does not see.

A selection of tokens is written as ``keep``: the indices (B, K) of the tokens that are encoded,
in the order in which they are encoded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bids_brainfm.errors import BrainfmError

# Blocks of a window that Brain-JEPA predicts from the rest.
BLOCKS = ('cross-time', 'cross-roi', 'double-cross')


def keep_lowest(noise: Tensor, ratio: float) -> Tensor:
    """Select the tokens with the lowest noise (He et al. 2022, masked autoencoders).

    Of noise (B, N) the floor(N (1 - ratio)) lowest are kept, lowest first; uniform draws give
    random masking.

    >>> keep_lowest(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5)
    tensor([[1, 3]])
    """
    # Stable, so that tied noise gives the same tokens on every machine.
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, : int(noise.shape[1] * (1 - ratio))]


def leave_out(
    n_tokens: int, ratio: float, generator: torch.Generator, visible: Tensor | None = None
) -> list[Tensor]:
    """Hide every token at least once, a proportion of them at a time.

    Each pass hides tokens at random among those not hidden before; where too few are left, others
    again, so that all passes hide the same share (BrainLM, notebook 05; specification, 5.1).

    Tokens `visible` (N,) bool are never hidden; where fewer others are there than `ratio` (above 0
    and below 1) asks for, these are hidden all at once. Returned are the tokens (K,) int64 that
    each pass keeps, in random order: so was the 13M family trained, for which it matters.

    Raises BrainfmError: the ratio hides no token, or leaves none to see.

    >>> passes = leave_out(4240, 0.2, torch.Generator().manual_seed(0))
    >>> len(passes), passes[0].shape
    (5, torch.Size([3392]))
    >>> hidden = torch.stack([masked_tokens(keep[None], 4240)[0] for keep in passes])
    >>> hidden.sum(0).unique()
    tensor([1])
    """
    done = torch.zeros(n_tokens, dtype=torch.bool) if visible is None else visible.clone()
    n_kept = int(n_tokens * (1 - ratio))
    if not 0 < n_kept < n_tokens:
        raise BrainfmError(
            f'A mask ratio of {ratio:g} hides all or none of {n_tokens} tokens; choose one '
            'between 0 and 1 that hides at least one and leaves at least one.'
        )
    n_kept = max(n_kept, int(done.sum()))
    always, passes = done.clone(), []
    while not done.all():
        noise = torch.rand(n_tokens, generator=generator)
        # the lowest are kept: what never is hidden first, then what has been hidden before
        noise = noise - done.float() - always.float()
        keep = torch.argsort(noise)[:n_kept]
        passes.append(keep[torch.randperm(n_kept, generator=generator)])
        done |= masked_tokens(passes[-1][None], n_tokens)[0]
    return passes


def keep_visible(masked: Tensor) -> Tensor:
    """Select the tokens (B, K) that are not masked (B, N), as many in every row."""
    return torch.nonzero(~masked)[:, 1].view(len(masked), -1)


def masked_tokens(keep: Tensor, n_tokens: int) -> Tensor:
    """Return which tokens are masked, (B, N) bool, given those kept, (B, K)."""
    masked = torch.ones(len(keep), n_tokens, dtype=torch.bool, device=keep.device)
    return masked.scatter(1, keep, False)


def take(x: Tensor, keep: Tensor) -> Tensor:
    """Return the tokens ``keep`` (B, K), or (K,), of ``x`` (B, N, H) as (B, K, H)."""
    return x.gather(1, keep[..., None].expand(len(x), -1, x.shape[-1]))


def put_back(x: Tensor, keep: Tensor, mask_token: Tensor, n_tokens: int) -> Tensor:
    """Put tokens (B, K, H) back in their places among mask tokens: (B, N, H)."""
    places = keep[..., None].expand(-1, -1, x.shape[-1])
    return mask_token.to(x.dtype).expand(len(x), n_tokens, -1).scatter(1, places, x)


def spatiotemporal_block(name: str, parcels: int, patches: int) -> tuple[Tensor, Tensor]:
    """Split the tokens of a window into a context and a target to predict from it.

    After the regions of Brain-JEPA's masking (Dong et al. 2024, section 3.2), without chance:
    ``cross-time`` predicts the last 30 % of the time patches (rounded down, at least one) of all
    parcels from those before; ``cross-roi`` every second parcel from the others at the same times;
    ``double-cross`` every second parcel in the last patches from the others before. Tokens (K,)
    and (M,) int64 are ascending: patches × parcel + patch.

    Raises BrainfmError: there is no such block, or the window is too small for it.

    >>> for name in BLOCKS:
    ...     context, target = spatiotemporal_block(name, parcels=2, patches=3)
    ...     print(name, context.tolist(), target.tolist())
    cross-time [0, 1, 3, 4] [2, 5]
    cross-roi [0, 1, 2] [3, 4, 5]
    double-cross [0, 1] [5]
    """
    late = (torch.arange(patches) >= patches - max(1, 3 * patches // 10)).expand(parcels, -1)
    other = (torch.arange(parcels) % 2 == 1)[:, None].expand(-1, patches)
    if name not in BLOCKS:
        raise BrainfmError(
            f'The block of latent prediction {name!r} is not known; choose {", ".join(BLOCKS)}.'
        )
    context, target = {
        'cross-time': (~late, late),
        'cross-roi': (~other, other),
        'double-cross': (~late & ~other, late & other),
    }[name]
    if not (context.any() and target.any()):
        raise BrainfmError(
            f'A window of {parcels} parcels × {patches} time patches is too small for the block '
            f'{name}; take a model with at least two of each.'
        )
    return context.flatten().nonzero().flatten(), target.flatten().nonzero().flatten()


def masked_loss(
    prediction: Tensor, target: Tensor, points: Tensor, kind: str = 'mse',
    normalise: bool = False, reduction: str = 'mean',
) -> Tensor:  # fmt: skip
    """Return the error of windows (B, P, T) over masked points (B, P, T) bool, mean or sum.

    The error is squared (``mse``) or absolute (``mae``); the mean over no points is NaN, as
    officially. With `normalise`, each parcel's target is first standardised over time
    (``norm_pix_loss``).
    """
    target = standardised(target) if normalise else target
    error = {'mse': F.mse_loss, 'mae': F.l1_loss}[kind]
    return error(prediction[points], target[points], reduction=reduction)


def token_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the smooth L1 error (B, K) of latents (B, K, D); its mean is Brain-JEPA's loss."""
    return F.smooth_l1_loss(prediction.float(), target.float(), reduction='none').mean(-1)


def standardised(signal: Tensor) -> Tensor:
    """Bring each parcel of windows (B, P, T) to mean 0 and variance 1 over its time points."""
    variance, mean = torch.var_mean(signal, dim=-1, keepdim=True)
    return (signal - mean) / (variance + 1e-6).sqrt()
