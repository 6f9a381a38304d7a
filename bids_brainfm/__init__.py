"""fMRI foundation models on fMRIPrep derivatives.

The command does a whole dataset; in a notebook, three lines lead from parcel series (volumes,
parcels), columns in the order of the atlas, to an embedding (windows, dimensions):

>>> import numpy as np
>>> series = 1000 + np.random.default_rng(0).standard_normal((400, 424))

>>> import bids_brainfm
>>> model = bids_brainfm.load_model('brainlm-demo')
>>> embedding = model.embed(series, tr=0.735)
>>> embedding.summary.shape
(2, 128)

``model.embed_bold(path)`` does the same from a preprocessed BOLD file, with the confounds and the
brain mask that fMRIPrep writes next to it.
"""

import os
from typing import TYPE_CHECKING, Any

# Importing Nipype asks the network for its newest version, unless told not to
os.environ.setdefault('NO_ET', '1')
os.environ.setdefault('NIPYPE_NO_ET', '1')

if TYPE_CHECKING:
    from bids_brainfm.api import Embedding, Model, load_model, parcellate
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.signals.bold import denoise
    from bids_brainfm.signals.series import ParcelSeries

__all__ = [
    'Embedding', 'Model', 'ParcelSeries', 'denoise', 'load_atlas', 'load_model', 'parcellate',
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.api'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
