"""Brain gradients: where each parcel lies in the space of functional connectivity.

Brain-JEPA locates parcels by these coordinates. A network needs the very table that it was
trained with; this makes one for another parcellation, from the connectivity of the training set.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.connectome import mean_connectome


def brain_gradients(
    fc: np.ndarray, n_components: int = 30, sparsity: float = 0.9, alpha: float = 0.5
) -> np.ndarray:
    """Gradients of a connectivity matrix by diffusion mapping, scaled as Brain-JEPA's table is.

    Of each row the largest correlations are kept and negative ones set to zero; parcels are
    alike as the angle between their rows is small; the diffusion map of that likeness is summed
    over all scales, so that a column has the length sqrt(P) λ/(1-λ). The largest entry of a
    column is positive. BrainSpace does the arithmetic, with the settings that reproduce the
    spectrum of the published table (Dong et al. 2024, arXiv:2409.19407; Vos de Wael
    et al. 2020, doi:10.1038/s42003-020-0794-7).

    `fc` (P, P) is symmetric, a mean over participants; its diagonal does not matter. `sparsity`
    is the proportion of each row that is left out, `alpha` the anisotropy of the diffusion (0.5:
    Fokker-Planck). Returns (P, n_components) float64. Another order of the parcels changes the
    columns by about half a percent, because BrainSpace's solver takes a matrix for symmetric that
    is so only nearly.

    Raises
    ------
    BrainfmError
        BrainSpace is not installed, or the connectivity is not what a map can be made of.
    """
    try:
        from brainspace.gradient import compute_affinity, diffusion_mapping
    except ImportError:
        raise BrainfmError(
            'Brain gradients are computed with BrainSpace, which is not installed: run '
            "`pip install 'bids_brainfm[gradients]'`."
        ) from None

    fc, parcels = _checked(fc), len(fc)
    sparsity -= 1e-9  # else 1 - 0.9 of 400 parcels would be rounded to 39
    if parcels <= n_components + 1 or parcels * (1 - sparsity) < 2:
        raise BrainfmError(
            f'{parcels} parcels are too few for {n_components} gradients at a sparsity of '
            f'{sparsity:.2g}: ask for fewer gradients or a lower sparsity.'
        )
    kept = compute_affinity(fc, sparsity=sparsity)
    _check_links(fc, kept)
    affinity = compute_affinity(kept, kernel='normalized_angle', sparsity=None)
    return diffusion_mapping(affinity, n_components, alpha=alpha, random_state=0)[0]


def _checked(fc: np.ndarray) -> np.ndarray:
    """Copy a matrix, with ones on the diagonal, if it is square, finite and symmetric."""
    fc = np.array(fc, np.float64)
    if fc.ndim != 2 or fc.shape[0] != fc.shape[1]:
        raise BrainfmError(
            f'Brain gradients need a square matrix of connectivity, not one of shape {fc.shape}: '
            'give the correlations between all parcels.'
        )
    np.fill_diagonal(fc, 1.0)
    if (missing := ~np.isfinite(fc)).any():
        row = int(missing.sum(1).argmax())
        raise BrainfmError(
            f'The connectivity has {missing.sum()} values that are no finite numbers, most of '
            f'them in row {row}: average over runs in which every parcel has signal.'
        )
    if (difference := np.abs(fc - fc.T).max()) > 1e-5:
        raise BrainfmError(
            f'The connectivity is not symmetric (entries differ by up to {difference:.2g} from '
            'their mirror images): give correlations between parcels, one order for rows and '
            'columns.'
        )
    return fc


def _check_links(fc: np.ndarray, kept: np.ndarray) -> None:
    """Refuse connectivity whose strongest correlations `kept` fall apart or are not unique."""
    from scipy.sparse import csgraph, csr_array

    parts, part = csgraph.connected_components(csr_array(kept), directed=False)
    if parts > 1:
        smallest = np.flatnonzero(part == np.bincount(part).argmin())
        raise BrainfmError(
            f'The strongest correlations leave the parcels in {parts} parts without a link '
            f'between them (the smallest has {smallest.size}, row {smallest[0]} among them): look '
            'at the series of those parcels, or lower the sparsity.'
        )
    ordered = np.sort(fc, axis=1)  # the diagonal comes last
    if (flat := ordered[:, 0] == ordered[:, -2]).any():
        raise BrainfmError(
            f'The correlations in row {flat.argmax()} are all the same, so that none is the '
            'strongest: give a connectivity matrix that was measured.'
        )


def group_fc(paths: Iterable[str | Path]) -> np.ndarray:
    """Mean connectivity over runs (P, P) float64, from the app's ``*_relmat.tsv`` of one atlas.

    Each correlation is averaged through Fisher z over the runs that have it, NaN where none has;
    one table at a time is in memory. Raises BrainfmError where there is no file, one cannot be
    read, or they are not of the same parcels.
    """
    mean = mean_connectome(_tables(paths))
    if not mean.ndim:
        raise BrainfmError('There is no connectivity to average: give *_relmat.tsv files.')
    return mean


def _tables(paths: Iterable[str | Path]) -> Iterator[np.ndarray]:
    """Tables of connectivity of the same parcels, one after the other."""
    import pandas as pd

    first = None
    for path in paths:
        try:
            frame = pd.read_csv(path, sep='\t', na_values='n/a', index_col=0)
            if len(frame) != len(frame.columns):
                raise ValueError(f'{len(frame.columns)} columns and {len(frame)} rows')
            relmat = frame.to_numpy(np.float32).astype(np.float64)
        except (OSError, ValueError) as error:
            raise BrainfmError(
                f'{path} is no table of connectivity ({error}): give the *_relmat.tsv files that '
                'bids_brainfm wrote.'
            ) from None
        if first is None:
            first, parcels = path, list(frame.columns)
        if list(frame.columns) != parcels:
            raise BrainfmError(
                f'{path} and {first} are not of the same parcels in the same order: average '
                'matrices of one atlas.'
            )
        yield relmat
