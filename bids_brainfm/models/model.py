"""A loaded model, parcel series in, embeddings out: the same for the command and notebooks."""

import copy
import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard
from bids_brainfm.models.gradient_table import read_gradients
from bids_brainfm.models.spec import SEED, ModelSpec
from bids_brainfm.signals.contract import Contract, ModelInput, prepare_input, windows_of
from bids_brainfm.signals.order import misordered
from bids_brainfm.signals.scale import check_stats, load_scale_stats
from bids_brainfm.signals.series import ParcelSeries, Windows, check_tr

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
    excluded: np.ndarray  # (W,) bool, above the limit max_flagged
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
        check_fit(self.spec, self.atlas, self.contract)

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
        """The encoder in float32, of the same weights in memory where these are float32."""
        if self.precision == 'bfloat16':
            return replace(self, precision='float32').encoder
        if self.precision == 'float32':
            return self.encoder
        exact = copy.copy(self.encoder)
        exact.precision = 'float32'
        return exact

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
        series : ParcelSeries or array_like of shape (volumes, parcels)
            Denoised, in BOLD units and at its own repetition time; columns in the order of
            ``model.atlas.names``. In an array, parcels with NaN are filled from their neighbours,
            no volume is flagged, and the mean of the brain, which some scalings need (and no
            demeaned series has), is the mean of the array.
        tr : float, optional
            Repetition time in seconds. An array needs it; a ParcelSeries has its own.
        tokens : bool, default False
            Whether to return all tokens, too.

        Returns
        -------
        Embedding
            Of W windows; the embeddings of D dimensions have no unit, times are in seconds.

        Raises
        ------
        BrainfmError
            The series are not numbers of the atlas's parcels, `tr` is missing, is not in seconds
            or contradicts the series, or the run is too short for one window or cannot be scaled.

        Warns
        -----
        UserWarning
            The columns seem to come in another order than the atlas has.
        """
        from bids_brainfm.models.encoder import ascending_y, encode_runs

        if not isinstance(series, ParcelSeries):
            series = _series_of(self._columns(series), tr)
        elif tr is not None and not math.isclose(check_tr(tr), series.tr, rel_tol=1e-3):
            raise BrainfmError(
                f'tr={tr:g} is not the repetition time of this series, {series.tr:g} s: omit it.'
            )
        series, xyz = replace(series, data=self._columns(series.data)), self.atlas.xyz
        misorders = {**self.atlas.misorders, 'ascending-y': ascending_y(xyz)}
        if (doubt := misordered(series.data, xyz, misorders)) is not None:
            warnings.warn(doubt, stacklevel=2)
        data = self.prepare_input(series)
        windows = self.windows(data)
        ((_, encoding),) = encode_runs(self.encoder, [(None, windows.data)], BATCH_SIZE, tokens)
        names = ('summary', 'parcels', 'tokens', 'prediction')
        of_network = {n: getattr(encoding, n) for n in names}
        times = ('onset', 'duration', 'real', 'flagged', 'excluded')
        of_run = {name: getattr(windows, name) for name in times}
        return Embedding(**of_network, **of_run, donors=data.donors)

    def _columns(self, series: ArrayLike) -> np.ndarray:
        """Return series as numbers; refuse those that are not of the atlas's parcels."""
        name, parcels = self.atlas.name, self.atlas.n_parcels
        try:
            data = np.asarray(series, np.float32)
        except (TypeError, ValueError):  # text, or rows of different lengths
            data = np.array(np.nan)
        if data.ndim == 2 and data.shape[1] == parcels and len(data):
            return data
        shape = '×'.join(map(str, data.shape))
        turned = data.ndim == 2 and data.shape[0] == parcels
        raise BrainfmError(
            f'{self.spec.card.name} takes series of the {parcels} parcels of the atlas {name} as '
            f'(volumes, parcels), but this {f"array is {shape}" if shape else "is no array"}: '
            + ('give its transpose.' if turned else f'parcellate the run by {name}.')
        )


def check_fit(spec: ModelSpec, atlas: Atlas, contract: Contract) -> None:
    """See that a model and its statistics are of this atlas."""
    parcels = spec.capabilities.window[0]
    if parcels != atlas.n_parcels:
        raise BrainfmError(
            f'{spec.card.name} takes {parcels} parcels, but its atlas {atlas.name} has '
            f'{atlas.n_parcels}: name the atlas that it was trained with in its card.'
        )
    if contract.stats is not None:
        stats = load_scale_stats(contract.stats, atlas.name, atlas.n_parcels)
        check_stats(stats, contract.scaling)


def contract_of(
    card: ModelCard, scale: str = 'card', scale_stats: str | Path | None = None,
    stride: int | None = None, short_runs: str = 'refuse', temporal: str = 'resample',
    min_coverage: float = 0.5, max_flagged: float = 1.0,
) -> Contract:  # fmt: skip
    """What a model expects of its input, and what is asked for instead, see ``Contract``."""
    names = ('tr', 'window', 'divide_by', 'official_volumes', 'min_real')
    return Contract(
        **{name: getattr(card, name) for name in names},
        scaling={'card': card.scaling, 'cohort': card.cohort_scaling}.get(scale, scale),
        stats=None if scale_stats is None else Path(scale_stats),
        stride=stride, short_runs=short_runs, temporal=temporal, min_coverage=min_coverage,
        max_flagged=max_flagged,
    )  # fmt: skip


def _series_of(data: np.ndarray, tr: float | None) -> ParcelSeries:
    """Take an array (T, P) for a run of which nothing else is known."""
    if tr is None:
        raise BrainfmError(
            'An array does not tell its repetition time: give it in seconds, as in '
            'embed(series, tr=0.735).'
        )
    finite, flagged = np.isfinite(data), np.zeros(len(data), bool)
    coverage, mean = finite.all(axis=0).astype(np.float32), float(data[finite].mean(dtype=float))
    return ParcelSeries(data, check_tr(tr), coverage, flagged, mean)
