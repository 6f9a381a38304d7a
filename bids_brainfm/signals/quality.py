"""Measures of the quality of a run, for its table of quality metrics."""

from pathlib import Path

import numpy as np

from bids_brainfm.signals.confounds import measure
from bids_brainfm.signals.connectome import connectome_vector, fisher_z


def motion(confounds: Path | None, start: int = 0, stop: int | None = None) -> dict[str, float]:
    """Framewise displacement and standardised DVARS of a run, NaN where the table has none.

    `confounds` is fMRIPrep's table, of which the volumes from `start` to `stop` count. Framewise
    displacement is in mm, as fMRIPrep computes it (Power et al. 2012,
    doi:10.1016/j.neuroimage.2011.10.018); the first volume of the run has none.
    """
    import pandas as pd

    fd, dvars = (
        pd.Series(measure(confounds, name) if confounds else [], dtype=float)[start:stop]
        for name in ('framewise_displacement', 'std_dvars')
    )
    return {
        'mean_fd': fd.mean(), 'median_fd': fd.median(), 'max_fd': fd.max(),
        'mean_std_dvars': dvars.mean(),
    }  # fmt: skip


def distance_dependence(relmat: np.ndarray, xyz: np.ndarray) -> float:
    """Pearson r, over pairs of parcels, of connectivity (Fisher z) with distance.

    `relmat` (P, P) are correlations, `xyz` (P, 3) parcel centres in mm. Motion makes near parcels
    more alike than far ones (Power et al. 2012). NaN where fewer than two pairs have a value.
    """
    from scipy.spatial.distance import pdist

    z = fisher_z(connectome_vector(relmat))
    known = np.isfinite(z)
    if known.sum() < 2 or np.ptp(z[known]) == 0:
        return float('nan')
    return float(np.corrcoef(z[known], pdist(xyz)[known])[0, 1])
