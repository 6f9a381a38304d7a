"""A loaded model: parcel series or a BOLD file in, embeddings out.

The command encodes through the same class, so that both give the same numbers.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.models.spec import SEED, ModelSpec, resolve_model
from bids_brainfm.resources import home
from bids_brainfm.signals.bold import denoise, parcellate
from bids_brainfm.signals.contract import Contract, ModelInput, prepare_input, windows_of
from bids_brainfm.signals.order import misordered
from bids_brainfm.signals.series import ParcelSeries, Windows

if TYPE_CHECKING:
    from bids_brainfm.models.encoder import Encoder

BATCH_SIZE = 8  # windows at once on a GPU


@dataclass(frozen=True)
class Embedding:
    """What a model makes of the W windows of one run; parcels are in the order of the atlas."""

    summary: np.ndarray  # (W, D) the embedding of each window
    parcels: np.ndarray | None  # (W, P, D); None for a model whose tokens span several parcels
    tokens: np.ndarray | None  # (W, N, D); None where not asked for
    prediction: np.ndarray | None  # (W, C) of a fine-tuned model
    onset: np.ndarray  # (W,) seconds since the run's first volume
    duration: np.ndarray  # (W,) seconds of recorded signal
    real: np.ndarray  # (W,) proportion of samples that were recorded
    flagged: np.ndarray  # (W,) proportion of these from flagged volumes
    donors: np.ndarray  # (P,) parcel that each was filled from, -1 where it has its own series


@dataclass(frozen=True)
class Model:
    """A network, the atlas of its parcels, and the input that it expects."""

    spec: ModelSpec  # card, weights and capabilities
    atlas: Atlas
    contract: Contract  # how series become windows
    device: str = 'cpu'
    precision: str = 'float32'
    block: str | None = None  # of each window to predict from the rest, see Encoder

    def __post_init__(self) -> None:
        parcels = self.spec.capabilities.window[0]
        if parcels != self.atlas.n_parcels:
            raise BrainfmError(
                f'{self.spec.card.name} takes {parcels} parcels, but its atlas {self.atlas.name} '
                f'has {self.atlas.n_parcels}: name the atlas that it was trained with in its card.'
            )

    @cached_property
    def encoder(self) -> 'Encoder':
        """The network with its weights, loaded when it is first used."""
        from bids_brainfm.models.encoder import Encoder, row_order, set_positions
        from bids_brainfm.models.weights import build, initialise, load_checkpoint

        spec = self.spec
        network = build(spec.card.config)
        if spec.checkpoint is None:
            initialise(network, SEED)
        else:
            load_checkpoint(network, spec.checkpoint)
        order = row_order(spec.card.parcel_order, self.atlas.xyz)
        set_positions(network, self.atlas.xyz, order, self.gradients)
        name = spec.card.name
        return Encoder(network, order, self.device, self.precision, name, self.block)

    @cached_property
    def exact(self) -> 'Encoder':
        """The encoder in float32."""
        if self.precision == 'float32':
            return self.encoder
        return dataclasses.replace(self, precision='float32').encoder

    @cached_property
    def gradients(self) -> np.ndarray | None:
        """Brain gradients (P, G) in the order of the atlas, for a model that is given some."""
        table = self.spec.gradients
        return None if table is None else read_gradients(table.path)

    def prepare_input(self, series: ParcelSeries) -> ModelInput:
        """Fill parcels without signal, resample and scale a run as the model expects it."""
        atlas = self.atlas
        return prepare_input(series, self.contract, atlas.xyz, atlas.name, atlas.structures)

    def windows(self, data: ModelInput) -> Windows:
        """Cut a run into windows."""
        return windows_of(data, self.contract)

    def embed(
        self, series: ParcelSeries | ArrayLike, tr: float | None = None, tokens: bool = False
    ) -> Embedding:
        """Embed the parcel series of one run.

        Parameters
        ----------
        series : ParcelSeries or (volumes, parcels) array
            Denoised, in BOLD units and at its own repetition time. Columns are in the order of
            ``model.atlas.names``, whatever the order in which the network takes them. Of an array
            nothing else is known: parcels count as covered, except for those with NaN, which are
            filled from their neighbours; no volume counts as flagged; and the mean of the brain,
            which some scalings need (and no demeaned series has), is the mean of the array.
        tr : float, repetition time of an array in seconds
        tokens : bool, whether to return all tokens, too

        Warns UserWarning: the columns seem to come in another order than the atlas has, see
        :func:`bids_brainfm.signals.order.misordered`.

        Raises BrainfmError: the array is not of the atlas's parcels, has no repetition time, is
        too short for one window, or cannot be scaled.
        """
        from bids_brainfm.models.encoder import encode_runs

        if not isinstance(series, ParcelSeries):
            series = _series_of(series, tr)
        self._check_columns(series.data)
        if (doubt := self._order_doubt(series.data)) is not None:
            warnings.warn(doubt, stacklevel=2)
        data = self.prepare_input(series)
        windows = self.windows(data)
        ((_, encoding),) = encode_runs(self.encoder, [(None, windows.data)], BATCH_SIZE, tokens)
        names = ('summary', 'parcels', 'tokens', 'prediction')
        of_network = {n: getattr(encoding, n) for n in names}
        of_run = {n: getattr(windows, n) for n in ('onset', 'duration', 'real', 'flagged')}
        return Embedding(**of_network, **of_run, donors=data.donors)

    def embed_bold(
        self,
        bold: str | Path,
        mask: str | Path | None = None,
        confounds: str | Path | None = None,
        denoising: str | Path | None = None,
        space: str | None = None,
        tr: float | None = None,
        tokens: bool = False,
    ) -> Embedding:
        """Embed one preprocessed BOLD file.

        Parameters
        ----------
        bold, space, tr
            As :func:`bids_brainfm.parcellate` takes them, and raises.
        mask, confounds : path-like, optional; else those that fMRIPrep writes next to the file
        denoising : strategy of :func:`bids_brainfm.denoise`, optional; else that of the card
        tokens : bool, whether to return all tokens, too
        """
        from bids_brainfm.bids.inputs.fmriprep import run_of

        run = run_of(Path(bold))
        series = parcellate(bold, self.atlas, mask or run.mask, space, tr)
        table = confounds or run.confounds
        series = denoise(series, table, denoising or self.spec.card.denoising)
        return self.embed(series, tokens=tokens)

    def _check_columns(self, data: np.ndarray) -> None:
        name, parcels = self.atlas.name, self.atlas.n_parcels
        if data.ndim == 2 and data.shape[1] == parcels:
            return
        shape = '×'.join(map(str, data.shape))
        turned = data.ndim == 2 and data.shape[0] == parcels
        raise BrainfmError(
            f'{self.spec.card.name} takes series of the {parcels} parcels of the atlas {name} as '
            f'(volumes, parcels), but this array is {shape}: '
            + ('give its transpose.' if turned else f'parcellate the run by {name}.')
        )

    def _order_doubt(self, data: np.ndarray) -> str | None:
        """Say that columns seem to be in another order, None where they do not."""
        from bids_brainfm.models.encoder import ascending_y

        misorders = {**self.atlas.misorders, 'ascending-y': ascending_y(self.atlas.xyz)}
        return misordered(data, self.atlas.xyz, misorders)


def load_model(
    name_or_card: str | Path,
    weights: str | Path | None = None,
    device: str = 'auto',
    precision: str | None = None,
    random_weights: bool = False,
    block: str | None = None,
    **options: Any,
) -> Model:
    """Load a model.

    Parameters
    ----------
    name_or_card : name of a model (``brainlm-111m``), or path of a card
    weights : path-like, optional
        A checkpoint folder or file, as ``NAME=PATH`` of the command; where not given, the fetched
        weights, or those that come with the card.
    device : {'auto', 'cpu', 'cuda'}
    precision : {'float32', 'bfloat16'}, optional; else float32 on the CPU, bfloat16 on a GPU
    random_weights : bool, whether to leave the weights aside: the control experiment
    block : str, optional; of each window to predict from the rest, if the model predicts latents
    **options : how series become windows, see :func:`contract_of`

    Raises BrainfmError: there is no such model, or weights, gradients or the atlas are not at hand
    or do not fit.

    >>> model = load_model('brainlm-demo')
    >>> model.atlas.n_parcels, model.spec.capabilities.pooling
    (424, 'class token')
    """
    from bids_brainfm.models.encoder import resolve_device, resolve_precision

    place = home()
    name = str(name_or_card) if weights is None else f'{name_or_card}={weights}'
    spec = resolve_model(name, place, random_weights)
    chosen = resolve_device(device)
    return Model(
        spec=spec,
        atlas=load_atlas(spec.card.atlas, place),
        contract=contract_of(spec.card, **options),
        device=str(chosen),
        precision=resolve_precision(precision, chosen),
        block=block,
    )


def contract_of(
    card: ModelCard,
    scale: str = 'card',
    scale_stats: str | Path | None = None,
    stride: int | None = None,
    short_runs: str = 'refuse',
    temporal: str = 'resample',
    min_coverage: float = 0.5,
) -> Contract:
    """What a model expects of its input, and what is asked for instead, see ``Contract``.

    ``scale`` is ``card``, ``cohort`` (the card's method with statistics of a cohort), or a method
    of :func:`bids_brainfm.signals.scale.fit_scaling`.
    """
    names = ('tr', 'window', 'divide_by', 'official_volumes', 'min_real')
    return Contract(
        **{name: getattr(card, name) for name in names},
        scaling={'card': card.scaling, 'cohort': card.cohort_scaling}.get(scale, scale),
        stride=stride,
        short_runs=short_runs,
        min_coverage=min_coverage,
        stats=None if scale_stats is None else Path(scale_stats),
        temporal=temporal,
    )


def _series_of(array: ArrayLike, tr: float | None) -> ParcelSeries:
    """Take an array (T, P) for a run of which nothing else is known."""
    if tr is None:
        raise BrainfmError(
            'An array does not tell its repetition time: give it in seconds, as in '
            'embed(series, tr=0.735).'
        )
    if not 0 < tr <= 30:
        raise BrainfmError(f'tr={tr:g} is not a repetition time in seconds.')
    data = np.asarray(array, np.float32)
    return ParcelSeries(
        data=data,
        tr=float(tr),
        coverage=np.asarray(np.isfinite(data).all(axis=0), np.float32),
        flagged=np.zeros(len(data), bool),
        brain_mean=float(data[np.isfinite(data)].mean(dtype=float)),
    )
