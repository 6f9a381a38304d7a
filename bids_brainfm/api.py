"""The public names: signals and models, with what fMRIPrep writes next to a BOLD file."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.bids.inputs.fmriprep import run_of
from bids_brainfm.bids.run import repetition_time, start_time
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import model as models
from bids_brainfm.models.model import Embedding, contract_of
from bids_brainfm.models.spec import resolve_model
from bids_brainfm.resources import home
from bids_brainfm.signals import bold as signals
from bids_brainfm.signals.bold import BoldSeries, denoise
from bids_brainfm.signals.parcellate import DEMEANED
from bids_brainfm.signals.scale import check_stats
from bids_brainfm.signals.series import ParcelSeries as ParcelSeries
from bids_brainfm.signals.strategy import Strategy
from bids_brainfm.signals.stream import open_bold


class Model(models.Model):
    """A network, the atlas of its parcels, and the input that it expects."""

    def embed_bold(
        self, bold: str | Path, mask: str | Path | None = None,
        confounds: str | Path | None = None, denoising: str | Path | Strategy | None = None,
        space: str | None = None, tr: float | None = None, tokens: bool = False,
    ) -> Embedding:  # fmt: skip
        """Embed one preprocessed BOLD file.

        Parameters
        ----------
        bold, mask, space, tr, tokens
            As :func:`bids_brainfm.parcellate` and :meth:`embed` take them.
        confounds : path-like, optional
            Table of confounds; by default the one that fMRIPrep writes next to the file.
        denoising : str, path-like or Strategy, optional
            Strategy of :func:`bids_brainfm.denoise`; by default that of the model's card.

        Returns
        -------
        Embedding
            As of :meth:`embed`.

        Raises
        ------
        BrainfmError
            As of :func:`bids_brainfm.parcellate`, of :func:`bids_brainfm.denoise` for missing or
            unfit confounds, and of :meth:`embed` for a run that is too short or cannot be scaled.

        Warns
        -----
        UserWarning
            Volumes come without a brain mask, or the parcels seem to be in another order.
        """
        table = confounds or run_of(Path(bold)).confounds
        series = parcellate(bold, self.atlas, mask, space, tr)
        series = denoise(series, table, denoising or self.spec.card.denoising)
        return self.embed(series, tokens=tokens)


def parcellate(
    bold: str | Path, atlas: Atlas | str | Path, mask: str | Path | None = None,
    space: str | None = None, tr: float | None = None, voxels: str = 'mask',
) -> BoldSeries:  # fmt: skip
    """Average a BOLD file over the parcels of an atlas.

    Parameters
    ----------
    bold : path-like
        A preprocessed 4-D NIfTI file or a CIFTI dense series, in a standard space.
    atlas : Atlas, str or path-like
        An atlas, or what :func:`bids_brainfm.load_atlas` takes.
    mask : path-like, optional
        Brain mask on the grid of the volumes; by default the one that fMRIPrep writes next to the
        file. A CIFTI series needs none.
    space : str, optional
        Template space, such as ``'MNI152NLin6Asym'``; by default that of the file name.
    tr : float, optional
        Repetition time in seconds; by default that of the JSON sidecar, else of the header.
    voxels : {'mask', 'all'}, default 'mask'
        Whether the mean is taken over the voxels of a parcel inside the brain mask, or over all.
        Voxels that are constant over the run are left out of both. No difference for CIFTI.

    Returns
    -------
    BoldSeries
        A ParcelSeries in BOLD units (volumes, parcels); NaN for a parcel without a usable voxel.
        Of each parcel, ``coverage`` is the proportion of voxels that are inside the brain mask and
        vary, ``level`` the mean over time in BOLD units, and ``tsnr`` the temporal signal-to-noise
        ratio: mean by standard deviation over time of a voxel, and the median over voxels.
        ``level``, ``tsnr`` and the mean of the brain leave out the volumes that fMRIPrep found not
        to be in steady state. Volumes without signal are ``flagged`` and interpolated.
        ``start`` is the StartTime of the sidecar, 0 where there is none.

    Raises
    ------
    BrainfmError
        The space is unknown, `tr` is not in seconds, the atlas is not at hand in this space, a
        file cannot be read or is not of the run, or `voxels` has another value.

    Warns
    -----
    UserWarning
        There is no brain mask of the volumes, so that voxels outside the brain are not
        distinguished from those inside; volumes hold no signal; or the parcels fluctuate about
        zero, as in data that were denoised before.
    """
    run = run_of(Path(bold))
    atlas = atlas if isinstance(atlas, Atlas) else load_atlas(atlas)
    space = space or run.entities.get('space')
    if space is None:
        raise BrainfmError(
            f'The name of {run.bold.name} has no space- entity, so its template space is unknown: '
            f'give it as space=, such as {atlas.images[0].space}.'
        )
    if tr is None and run.sidecars:
        tr = repetition_time(run, open_bold(run.bold).tr)
    start = start_time(run)
    series = signals.parcellate(
        run.bold, atlas, Path(mask) if mask else run.mask, space, tr, start or 0.0, voxels,
        run.confounds,
    )  # fmt: skip
    if lost := np.count_nonzero(series.flagged):
        warnings.warn(
            f'{lost} of {len(series.data)} volumes hold no signal (empty, constant, NaN, cut off, '
            'or equal to the volume before): they are flagged, and their values interpolated.',
            stacklevel=2,
        )
    if series.found.demeaned:
        warnings.warn(f'{run.bold.name}: {DEMEANED}', stacklevel=2)
    return series


def load_model(
    name_or_card: str | Path, weights: str | Path | None = None, device: str = 'auto',
    precision: str | None = None, random_weights: bool = False, block: str | None = None,
    **options: Any,
) -> Model:  # fmt: skip
    """Load a model.

    Parameters
    ----------
    name_or_card : str or path-like
        Name of a model (``'brainlm-111m'``), or path of a card.
    weights : path-like, optional
        A checkpoint folder or file; by default the fetched weights, or those next to the card.
    device : {'auto', 'cpu', 'cuda'}
        Where the network runs; ``'auto'`` takes a GPU where there is one.
    precision : {'float32', 'tf32', 'bfloat16'}, optional
        Of matrix products; by default float32 on the CPU, and TF32 on a GPU that has it.
    random_weights : bool, default False
        Whether to leave the weights aside: the control experiment.
    block : {'cross-time', 'cross-roi', 'double-cross'}, optional
        Part of each window to predict from the rest, if the model predicts latents.
    **options
        How series become windows, as for the command: `scale` ('card', 'cohort' or a method of
        :func:`bids_brainfm.signals.scale.fit_scaling`), `scale_stats` (a file, for 'cohort'),
        `stride` (samples), `short_runs` ('refuse', 'pad' or 'tile'), `temporal` ('resample' or
        'official'), `min_coverage` and `max_flagged` (0 to 1).

    Returns
    -------
    Model
        With its atlas; the network is loaded when it is first used.

    Raises
    ------
    BrainfmError
        There is no such model, an option has a value that it does not take, or weights,
        gradients, statistics or the atlas are not at hand or do not fit.
    """
    from bids_brainfm.models.encoder import resolve_device
    from bids_brainfm.models.precision import resolve_precision

    place, path = home(), None if weights is None else Path(weights).absolute()
    spec = resolve_model(str(name_or_card), place, path, random_weights)
    atlas, contract = load_atlas(spec.card.atlas, place), contract_of(spec.card, **options)
    if contract.stats is None:
        check_stats(None, contract.scaling)
    where = resolve_device(device)
    model = Model(spec, atlas, contract, str(where), resolve_precision(precision, where), block)
    if block is not None:
        _ = model.encoder  # refuses a block that does not fit
    return model
