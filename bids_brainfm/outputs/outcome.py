"""Outcomes of a node for a run: that it is done, or in one sentence why not.

A run that fails must not stop the others, so failures travel through the graph as outcomes, not
as exceptions, and are kept in the participant's log folder until the run succeeds.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bids_brainfm.bids.files import first_line, listed, write_text
from bids_brainfm.bids.naming import failure_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError


@dataclass(frozen=True)
class Outcome:
    """Result of one step for one run."""

    run: str  # its name
    step: str  # what was done, e.g. ``atlas-A424`` or ``atlas-A424_desc-brainlm111m``
    error: str | None = None  # one sentence, None where the step succeeded

    def path(self, output: Path) -> Path:
        """File of the output dataset that says why the step failed."""
        return failure_path(output, self.run, self.step)

    def record(self, output: Path, details: str = '') -> None:
        """Write down why the step failed, or forget an earlier failure."""
        path = self.path(output)
        if self.error is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, f'{self.error}\n{details}')


def attempt(
    output: Path, run: BoldRun, step: str, work: Callable[[], object], stop: bool = False
) -> Outcome:
    """Do the work of a `step` for a run, and record in the log folder of `output` how it went.

    With `stop` a failure is raised after it was recorded.
    """
    done = Outcome(run.name, step)
    try:
        work()
    except Exception as error:
        sentence, details = str(error), ''
        if isinstance(error, MemoryError):
            sentence = 'there is not enough memory: ask for more, or lower --nprocs.'
        elif not isinstance(error, BrainfmError):
            path, details = done.path(output), traceback.format_exc()
            sentence = f'unexpected {type(error).__name__}: {error} (details in {path}).'
        if not sentence.startswith(run.name):
            sentence = f'{run.name}: {sentence}'
        failed = Outcome(run.name, step, sentence)
        failed.record(output, details)
        if stop:
            raise
        return failed
    done.record(output)
    return done


def read_failures(output: Path, subject: str) -> list[Outcome]:
    """All steps that failed for a participant and have not succeeded since."""
    outcomes = []
    for path in listed(output / f'sub-{subject}' / 'log', 'failed-*.txt'):
        run, _, step = path.stem.removeprefix('failed-').partition('_atlas-')
        outcomes.append(Outcome(run, f'atlas-{step}', first_line(path)))
    return outcomes
