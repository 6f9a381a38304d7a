"""One preprocessed run: what the rooms above know of the input."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class BoldRun:
    """One preprocessed run, in the space it is read in, and its companions.

    Attributes
    ----------
    name : str
        The file name up to the task, acquisition and run, e.g. ``sub-01_task-rest_run-01``.
    entities : dict of str to str
        BIDS entities by their short names, in the order of the file name.
    dataset : str
        Name of the input dataset (BIDS URIs use it).
    root, bold : Path
        The input dataset, and the BOLD file in it.
    mask, sidecar, confounds, confounds_json : Path or None
        Companions, None where the file does not exist.
    """

    name: str
    entities: dict = field(hash=False)
    dataset: str
    root: Path
    bold: Path
    mask: Path | None
    sidecar: Path | None
    confounds: Path | None
    confounds_json: Path | None

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
        roles = ('bold', 'mask', 'sidecar', 'confounds', 'confounds_json')
        return {role: path for role in roles if (path := getattr(self, role)) is not None}

    def uri(self, path: Path) -> str:
        """BIDS URI of a file of the input dataset."""
        return f'bids:{self.dataset}:{path.relative_to(self.root).as_posix()}'
