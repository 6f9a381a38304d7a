"""One preprocessed run: what the rooms above know of the input."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bids_brainfm.documents import read_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import MAX_TR, MIN_TR, is_number

MAX_START = 1e6  # seconds; a run that starts later than this has another clock


@dataclass(frozen=True)
class BoldRun:
    """One preprocessed run, in the space it is read in, and its companions (None where absent)."""

    name: str  # the file name up to task, acquisition and run, e.g. sub-01_task-rest_run-01
    entities: dict[str, str] = field(hash=False)  # by their short names, in the file name's order
    dataset: str  # name of the input dataset, for BIDS URIs
    root: Path  # of the input dataset
    bold: Path
    mask: Path | None = None
    sidecars: tuple[Path, ...] = ()  # later ones are more specific; their values win
    confounds: Path | None = None
    confounds_json: Path | None = None
    custom: Path | None = None  # further confounds
    mixing: Path | None = None  # time courses of ICA components, and their classification
    metrics: Path | None = None
    pipeline: str = ''  # the adapter that found it, a module of bids_brainfm.bids.inputs
    denoised: bool = False  # by the pipeline, so that nothing is regressed out again
    notes: tuple[str, ...] = ()  # sentences on how the files were chosen, for the report

    def __str__(self) -> str:
        """Return the run's name, for messages."""
        return self.name

    @property
    def subject(self) -> str:
        """Participant's label, without ``sub-``."""
        return self.entities['sub']

    @property
    def space(self) -> str:
        """Label of the template space."""
        return self.entities['space']

    @property
    def is_cifti(self) -> bool:
        """Whether the run is a CIFTI series of grayordinates."""
        return self.bold.name.endswith('.dtseries.nii')

    def companions(self) -> list[Path]:
        """Files that the outputs of this run depend on, the BOLD file first."""
        files = (
            self.bold, self.mask, *self.sidecars, self.confounds, self.confounds_json,
            self.custom, self.mixing, self.metrics,
        )  # fmt: skip
        return [path for path in files if path is not None]

    def uri(self, path: Path) -> str:
        """BIDS URI of a file of the input dataset, the URI of any other file."""
        root = f'{self.root}/'
        if str(path).startswith(root):  # far quicker than to ask the paths
            return f'bids:{self.dataset}:{str(path).removeprefix(root)}'
        if not path.is_relative_to(self.root):
            return path.absolute().as_uri()
        return f'bids:{self.dataset}:{path.relative_to(self.root).as_posix()}'


def check_companions(run: BoldRun, denoising: str | None) -> None:
    """Raise BrainfmError where volumes have no mask, or there are no confounds for a `denoising`.

    The sentence lists what is there.
    """
    if run.mask is None and not run.is_cifti:
        raise BrainfmError(
            f'{run.name}: there is no brain mask (desc-brain_mask) in the space and resolution of '
            f'{run.bold.name} ({_found(run, "_mask.nii")}): fMRIPrep writes it next to the '
            f'preprocessed series, so copy it, or run fMRIPrep again for this run.'
        )
    if run.confounds is None and denoising is not None:
        raise BrainfmError(
            f'{run.name}: there is no desc-confounds_timeseries.tsv of this run, which denoising '
            f'"{denoising}" needs ({_found(run, ".tsv")}): copy it if fMRIPrep wrote one, run '
            f'fMRIPrep again for this run, or use --denoise none.'
        )


def _found(run: BoldRun, ending: str) -> str:
    """Names of some files of a kind in the folder of a run."""
    names = sorted(path.name for path in run.bold.parent.iterdir() if ending in path.name)
    return f'found: {", ".join(names[:3]) or "none"}'


def metadata(run: BoldRun) -> dict[str, Any]:
    """Content of the run's sidecars; a more specific one wins, and null leaves a value as it is.

    Raises BrainfmError where one cannot be read.
    """
    found: dict[str, Any] = {}
    for path in run.sidecars:
        found |= {key: value for key, value in _read(run, path).items() if value is not None}
    return found


def _read(run: BoldRun, path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise BrainfmError(
            f'{run.name}: {path} is not a readable JSON file ({error}): restore it.'
        ) from None


def _source(run: BoldRun, key: str) -> str:
    """Name of the sidecar that a value comes from."""
    return next(p for p in reversed(run.sidecars) if _read(run, p).get(key) is not None).name


def repetition_time(run: BoldRun, header: float = 0.0) -> float:
    """Repetition time in seconds, from the run's sidecars.

    That of the `header` of the image (0 where unknown) is used for grayordinates only, whose
    format requires it: volumes often have 1 s there, whatever it was.

    Raises BrainfmError where there is none, or it cannot be in seconds.
    """
    content = metadata(run)
    tr: Any = content.get('RepetitionTime')
    if tr is None and 'VolumeTiming' in content:
        raise BrainfmError(
            f'{run.name}: {_source(run, "VolumeTiming")} gives VolumeTiming instead of '
            f'RepetitionTime, and unevenly spaced volumes cannot be windowed: leave this run out.'
        )
    if tr is None and run.is_cifti and MIN_TR <= header <= MAX_TR:
        return header
    if tr is None:
        names = ' and '.join(path.name for path in run.sidecars)
        lack = f'{names} has' if names else f'{run.bold.name} has no JSON sidecar, and so'
        given = f' (the header of the image gives {header:g} s)' if header > 0 else ''
        task = f'task-{run.entities["task"]}_' if 'task' in run.entities else ''
        raise BrainfmError(
            f'{run.name}: {lack} no RepetitionTime{given}: write it in seconds into the sidecar, '
            f'or once for all runs of the task into {task}bold.json at the root of the dataset.'
        )
    name = _source(run, 'RepetitionTime')
    if is_number(tr) and MIN_TR <= tr <= MAX_TR:
        return float(tr)
    if is_number(tr) and MAX_TR < tr <= 1000 * MAX_TR:
        raise BrainfmError(
            f'{run.name}: RepetitionTime {tr:g} in {name} looks like milliseconds: '
            f'write it in seconds ({tr / 1000:g}).'
        )
    raise BrainfmError(
        f'{run.name}: {name} has RepetitionTime {tr!r:.40}: write the repetition time in seconds.'
    )


def start_time(run: BoldRun) -> float | None:
    """Time of the first volume in seconds, from the run's sidecars; None where unknown.

    fMRIPrep writes as ``StartTime`` the time within the volume that slices were aligned to. BIDS
    allows times below 0. Raises BrainfmError where it is not a finite number.
    """
    start = metadata(run).get('StartTime')
    if start is None:
        return None
    if not (is_number(start) and abs(start) < MAX_START):
        raise BrainfmError(
            f'{run.name}: {_source(run, "StartTime")} has StartTime {start!r:.40}: write the '
            f'time of the first volume in seconds, or leave StartTime out.'
        )
    return float(start)
