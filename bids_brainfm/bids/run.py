"""One preprocessed run: what the rooms above know of the input."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import MAX_TR, is_number


@dataclass(frozen=True)
class BoldRun:
    """One preprocessed run, in the space it is read in, and its companions (None where absent)."""

    name: str  # the file name up to task, acquisition and run, e.g. sub-01_task-rest_run-01
    entities: dict[str, str] = field(hash=False)  # by their short names, in the file name's order
    dataset: str  # name of the input dataset, for BIDS URIs
    root: Path  # of the input dataset
    bold: Path
    mask: Path | None = None
    sidecar: Path | None = None
    confounds: Path | None = None
    confounds_json: Path | None = None
    custom: Path | None = None  # further confounds
    mixing: Path | None = None  # time courses of ICA components, and their classification
    metrics: Path | None = None
    pipeline: str = ''  # the adapter that found it, a module of bids_brainfm.bids.inputs
    denoised: bool = False  # by the pipeline, so that nothing is regressed out again

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

    def companions(self) -> dict[str, Path]:
        """Existing files that the outputs of this run depend on, by role."""
        roles = ('bold', 'mask', 'sidecar', 'confounds', 'confounds_json', 'custom', 'mixing',
                 'metrics')  # fmt: skip
        return {role: path for role in roles if (path := getattr(self, role)) is not None}

    def uri(self, path: Path) -> str:
        """BIDS URI of a file of the input dataset, the URI of any other file."""
        root = f'{self.root}/'
        if str(path).startswith(root):  # far quicker than to ask the paths
            return f'bids:{self.dataset}:{str(path).removeprefix(root)}'
        if not path.is_relative_to(self.root):
            return path.absolute().as_uri()
        return f'bids:{self.dataset}:{path.relative_to(self.root).as_posix()}'


def metadata(run: BoldRun) -> dict[str, Any]:
    """Content of the run's sidecar; BrainfmError where there is none or it cannot be read."""
    if run.sidecar is None:
        raise BrainfmError(
            f'{run.name}: {run.bold.name} has no JSON sidecar, which must give the '
            f'RepetitionTime: copy it from the fMRIPrep output.'
        )
    try:
        return dict(json.loads(run.sidecar.read_text()))
    except (ValueError, TypeError) as error:
        raise BrainfmError(
            f'{run.name}: {run.sidecar.name} is not readable JSON ({error}): restore the file.'
        ) from None


def repetition_time(run: BoldRun) -> float:
    """Repetition time in seconds, from the run's sidecar.

    Raises BrainfmError where there is no sidecar, none in it, or it cannot be in seconds.
    """
    content = metadata(run)
    tr: Any = content.get('RepetitionTime')
    name = cast('Path', run.sidecar).name
    if tr is None and 'VolumeTiming' in content:
        raise BrainfmError(
            f'{run.name}: {name} gives VolumeTiming instead of RepetitionTime, and '
            f'unevenly spaced volumes cannot be windowed: leave this run out.'
        )
    if not (is_number(tr) and tr > 0):
        found = 'no RepetitionTime' if tr is None else f'RepetitionTime {tr!r}'
        raise BrainfmError(
            f'{run.name}: {name} has {found}: write the repetition time in seconds.'
        )
    if tr > MAX_TR:
        raise BrainfmError(
            f'{run.name}: RepetitionTime {tr:g} in {name} looks like milliseconds: '
            f'write it in seconds ({tr / 1000:g}).'
        )
    return float(tr)


def start_time(run: BoldRun) -> float | None:
    """Time of the first volume in seconds, from the run's sidecar; None where unknown.

    fMRIPrep writes as ``StartTime`` the time within the volume that slices were aligned to. BIDS
    allows times below 0. Raises BrainfmError where it is not a finite number.
    """
    start = metadata(run).get('StartTime')
    if start is None:
        return None
    if not (is_number(start) and math.isfinite(start)):
        raise BrainfmError(
            f'{run.name}: {cast("Path", run.sidecar).name} has StartTime {start!r}: write the '
            f'time of the first volume in seconds, or leave StartTime out.'
        )
    return float(start)
