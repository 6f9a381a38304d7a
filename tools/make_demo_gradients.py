#!/usr/bin/env python
"""Make the demo model's table of gradients: 30 for the 424 parcels of the demo atlas.

    python tools/make_demo_gradients.py [FILE]

From the mean connectivity of 20 simulated participants (seed 424) who are not those of the demo:
series as denoising would leave them, 490 volumes at 0.735 s each, with a trait drawn as the demo
draws it. Needs `pip install 'bids_brainfm[gradients]'`.

The table in the package is of an earlier simulator, whose networks were a little weaker at their
borders; brain-jepa-demo was trained with it, so make both anew or neither.
"""

import sys
from pathlib import Path

import numpy as np

from bids_brainfm.analyses.gradients import brain_gradients
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.models.gradient_table import write_gradients
from bids_brainfm.resources import home
from bids_brainfm.signals.connectome import connectome
from bids_brainfm.signals.simulate import neural_series

MODELS = Path(__file__).resolve().parents[1] / 'bids_brainfm' / 'data' / 'models'
SEED, PARTICIPANTS, VOLUMES, TR = 424, 20, 490, 0.735


def mean_connectivity(xyz: np.ndarray) -> np.ndarray:
    """Mean over the participants, (P, P)."""
    rng = np.random.default_rng(SEED)
    total = np.zeros((len(xyz), len(xyz)))
    for _ in range(PARTICIPANTS):
        coupling = float(np.clip(0.3 + 0.25 * rng.standard_normal(), -0.9, 0.9))
        total += connectome(neural_series(xyz, VOLUMES, TR, coupling, rng)).astype(float)
    return total / PARTICIPANTS


def main(path: Path) -> None:
    """Write the table."""
    gradients = brain_gradients(mean_connectivity(load_atlas('Demo424', home()).xyz))
    write_gradients(path, gradients)
    lengths = np.linalg.norm(gradients, axis=0)
    print(f'{path}: {gradients.shape}, column lengths {lengths[:6].round(2)} ...')


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS / 'brain-jepa-demo_gradients.csv')
