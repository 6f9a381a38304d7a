"""What denoising does: strategies by name, from YAML files, and with other options."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import (
    Condition,
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    Proportion,
    between,
    build,
    read_card,
)

FOLDER = 'denoising'
GSR = '+gsr'  # added to a name or file: the global signal as well
FD, DVARS = 'framewise_displacement', 'std_dvars'  # columns of the confounds table
HEAD_RADIUS = 50.0  # mm, of Power et al. 2012
HIGH_PASS = 1 / 128  # Hz, of the cosines and of the data that fMRIPrep's CompCor is computed on
EXPANSIONS = ('', '_derivative1', '_power2', '_derivative1_power2')
Masks = Annotated[
    tuple[str, ...],
    Condition(lambda value: value and set(value) <= {'combined', 'CSF', 'WM'},
              'a list of combined, CSF, WM'),
]  # fmt: skip


@dataclass(frozen=True)
class CompCor:
    """Which anatomical CompCor components are regressed out.

    Of each mask: the first `number`, or as many as explain `variance`, or all that fMRIPrep
    retained.
    """

    masks: Masks
    number: PositiveInt | None = None
    variance: Proportion | None = None

    def __post_init__(self) -> None:
        if self.number and self.variance:
            raise BrainfmError('compcor takes a number or a variance, not both.')


@dataclass(frozen=True)
class MotionFilter:
    """Filter that takes respiration out of the motion parameters, as in XCP-D.

    ``notch`` (Fair et al. 2020) removes frequencies from `band_stop_min` to `band_stop_max`,
    ``lp`` (Gratton et al. 2020) those above `band_stop_min`; both in breaths per minute.
    """

    type: Literal['notch', 'lp']
    band_stop_min: Positive
    band_stop_max: Positive | None = None
    # of more, numbers of double precision make no filter
    order: Annotated[int, between(1, 20, 'above 0')] = 4

    def __post_init__(self) -> None:
        low, high = self.band_stop_min, self.band_stop_max
        if self.type == 'notch' and (high is None or high <= low):
            raise BrainfmError(
                f'the notch filter of motion parameters needs a band_stop_max above band_stop_min '
                f'{low:g} (breaths per minute), and it is {high or "not given"}: change it.'
            )
        if self.type == 'lp' and high is not None:
            raise BrainfmError(
                'the low-pass filter of motion parameters has no band_stop_max: leave it out.'
            )
        least = {'notch': 4, 'lp': 2}[self.type]
        if self.order % least:
            raise BrainfmError(
                f'the {self.type} filter of motion parameters is applied forwards and backwards, '
                f'so motion_filter_order {self.order} must be a multiple of {least}.'
            )


@dataclass(frozen=True)
class Strategy:
    """What is removed from the parcel series of a run, and how much data must remain.

    Fields are the keys of a YAML file in ``data/denoising``, or of a user's own.
    """

    name: str
    description: str = ''  # of the regressors, for the methods section
    columns: tuple[str, ...] = ()  # names or regular expressions; each must match whole names
    optional_columns: tuple[str, ...] = ()  # may match nothing (such as cosines of a short run)
    compcor: CompCor | None = None
    # Components of ICA-AROMA or tedana; those that are not noise are fitted with them and kept
    ica: Literal['aroma', 'tedana'] | None = None
    outliers: dict[str, float] = field(default_factory=dict)  # volumes above these are flagged
    scrub: Count = 0  # segments of fewer unflagged volumes are flagged, too
    bandpass: tuple[NotNegative | None, Positive | None] | None = None  # Hz
    motion_filter: MotionFilter | None = None
    head_radius: Positive | None = None  # mm; FD is then computed anew, as with a motion filter
    dummy_scans: Count | None = None  # volumes to drop at the start; None: the non-steady ones
    keep_nonsteady: bool = False
    min_dof: Count = 20  # residual degrees of freedom
    min_minutes: NotNegative = 0.0  # of unflagged data

    def __post_init__(self) -> None:
        for pattern in self.columns + self.optional_columns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BrainfmError(
                    f'the column {pattern!r} is not a regular expression ({error}).'
                ) from error
        low, high = self.bandpass or (None, None)
        if self.bandpass and (not (low or high) or (low and high and low >= high)):
            raise BrainfmError(
                f'the band-pass {low or 0:g} to {high or 0:g} Hz is not a band: give the lower '
                'limit first, and 0 (or null) for at most one of them.'
            )

    @property
    def regresses(self) -> bool:
        """Whether something of the confounds table, components or a filter is removed."""
        found = self.columns, self.optional_columns, self.compcor, self.ica, self.bandpass
        return any(found)

    @property
    def finds_dummies(self) -> bool:
        """Whether non-steady-state volumes are looked up in the confounds table."""
        return self.dummy_scans is None and not self.keep_nonsteady

    @property
    def needs_table(self) -> bool:
        """Whether it cannot do without the confounds table."""
        columns = self.columns, self.optional_columns, self.compcor, self.outliers
        return any(columns)

    @property
    def replaces_cosines(self) -> bool:
        """Whether the band-pass takes the place of fMRIPrep's cosines.

        CompCor components were computed on data that these had filtered, so they stay with a
        lower limit below theirs (1/128 Hz).
        """
        low = self.bandpass[0] if self.bandpass else None
        return low is not None and low > 0 and (self.compcor is None or low >= HIGH_PASS)


def load_strategy(name: str | Path) -> Strategy:
    """Read a strategy: one of ours by name, or a user's YAML file, either with ``+gsr``."""
    text = str(name)
    path, content = read_card(text.removesuffix(GSR), FOLDER, 'denoising strategy')
    strategy = build(Strategy, {'name': path.stem} | content, f'The denoising strategy {path}')
    return _with_global_signal(strategy) if text.endswith(GSR) else strategy


def _with_global_signal(strategy: Strategy) -> Strategy:
    """Add the global signal, with the derivatives and squares that white matter has."""
    has = lambda name: any(re.fullmatch(pattern, name) for pattern in strategy.columns)
    if has('global_signal'):
        raise BrainfmError(
            f'The denoising {strategy.name} regresses the global signal out: leave {GSR} out.'
        )
    added = [f'global_signal{e}' for e in EXPANSIONS if not e or has(f'white_matter{e}')]
    more = ' with its derivative and the squares of both' * (len(added) > 1)
    text = f'{strategy.description} The global signal{more} was regressed out.'.strip()
    return dataclasses.replace(
        strategy, name=strategy.name + GSR, columns=(*strategy.columns, *added), description=text
    )


def override(
    strategy: Strategy, *, bandpass: tuple[float | None, float | None] | None = None,
    fd_threshold: float | None = None, dvars_threshold: float | None = None,
    scrub: int | None = None, dummy_scans: int | str | None = None,
    keep_nonsteady: bool | None = None, motion_filter_type: str | None = None,
    band_stop_min: float | None = None, band_stop_max: float | None = None,
    motion_filter_order: int | None = None, head_radius: float | None = None,
    min_dof: int | None = None, min_minutes: float | None = None,
) -> Strategy:  # fmt: skip
    """Change a strategy by the options of the command of these names; None leaves it as it is.

    Raises BrainfmError where a value is not accepted, or options contradict each other.
    """
    given: dict[str, Any] = {
        'scrub': scrub, 'keep_nonsteady': keep_nonsteady, 'min_dof': min_dof,
        'min_minutes': min_minutes, 'head_radius': head_radius,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    limits = {FD: fd_threshold, DVARS: dvars_threshold}
    outliers = strategy.outliers | {key: v for key, v in limits.items() if v is not None}
    changes['outliers'] = {key: value for key, value in outliers.items() if value != 0}
    if dummy_scans is not None:
        number = int(dummy_scans) if str(dummy_scans).isdigit() else dummy_scans
        changes['dummy_scans'] = None if number == 'auto' else number
    if bandpass is not None:
        changes['bandpass'] = [limit or None for limit in bandpass]
    band = {'band_stop_min': band_stop_min, 'band_stop_max': band_stop_max}
    details = {
        key: value for key, value in (band | {'order': motion_filter_order}).items() if value
    }
    if motion_filter_type is not None:
        if band_stop_min is None:
            both = ' and --band-stop-max' * (motion_filter_type == 'notch')
            raise BrainfmError(
                f'--motion-filter-type {motion_filter_type} needs --band-stop-min{both}, in '
                'breaths per minute: add them.'
            )
        changes['motion_filter'] = {'type': motion_filter_type} | details
    elif details:
        raise BrainfmError(
            '--band-stop-min, --band-stop-max and --motion-filter-order belong to '
            '--motion-filter-type: add notch or lp.'
        )
    content = dataclasses.asdict(strategy) | changes
    return build(Strategy, content, f'The denoising {strategy.name}')


def describe(strategy: Strategy) -> str:
    """What a strategy does, as sentences of the methods section."""
    sentences = [strategy.description.strip() or 'No confound was regressed out.']
    if band := strategy.bandpass:
        kept = {
            (True, True): 'outside {} to {} Hz', (True, False): 'below {} Hz',
            (False, True): 'above {1} Hz',
        }[bool(band[0]), bool(band[1])].format(*(f'{limit or 0:g}' for limit in band))  # fmt: skip
        what = f'Discrete cosines {kept} were added as regressors of the same model'
        if strategy.replaces_cosines:
            what = f"Of these, fMRIPrep's cosines were replaced by discrete cosines {kept}"
        sentences.append(
            f'{what}, so that neither the filter nor the other regressors reintroduce what the '
            'other removed (Lindquist et al. 2019, doi:10.1002/hbm.24528).'
        )
    if strategy.regresses:
        sentences.append('The parcel mean was kept.')
    if motion := strategy.motion_filter:
        to = f' to {motion.band_stop_max:g}' if motion.band_stop_max else ''
        what = 'notch' if motion.band_stop_max else 'low-pass'
        sentences.append(
            f'Motion parameters were filtered to remove respiration ({what} filter, '
            f'{motion.band_stop_min:g}{to} breaths per minute), and their expansions and the '
            'framewise displacement computed from the filtered ones.'
        )
    if strategy.head_radius:
        sentences.append(
            f'Framewise displacement was computed with a head radius of {strategy.head_radius:g} '
            'mm.'
        )
    names = {FD: 'framewise displacement above {:g} mm', DVARS: 'standardised DVARS above {:g}'}
    above = [names.get(k, f'{k} above {{:g}}').format(v) for k, v in strategy.outliers.items()]
    if above:
        sentences.append(
            f'Volumes with {" or ".join(above)} were flagged, left out of the fit and '
            'interpolated linearly in time.'
        )
    if above and strategy.scrub:
        sentences.append(
            f'So were segments of fewer than {strategy.scrub} unflagged volumes (Power et al. '
            '2014, doi:10.1016/j.neuroimage.2013.08.048).'
        )
    return ' '.join(sentences)
