"""What a node says about a run: that it is done, or in one sentence why not.

A run that fails must not stop the others, so failures travel through the graph as outcomes, not
as exceptions, and stand in the participant's log folder until the run succeeds.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path

from bids_brainfm.bids.files import write_text
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError


@dataclass(frozen=True)
class Outcome:
    """Result of one step for one run.

    Attributes
    ----------
    run : str
        Name of the run.
    step : str
        What was done, e.g. ``atlas-A424`` or ``atlas-A424_desc-brainlm111m``.
    error : str or None
        One sentence, None where the step succeeded.
    """

    run: str
    step: str
    error: str | None = None

    def path(self, output: Path) -> Path:
        """File of the output dataset that says why the step failed."""
        return output / self.run.partition('_')[0] / 'log' / f'failed-{self.run}_{self.step}.txt'

    def record(self, output: Path, details: str = '') -> None:
        """Write down why the step failed, or forget an earlier failure."""
        path = self.path(output)
        if self.error is None:
            path.unlink(missing_ok=True)
        else:
            write_text(path, f'{self.error}\n{details}')


def attempt(output: Path, run: BoldRun, step: str, work, stop: bool = False) -> Outcome:
    """Do some work for a run and tell how it went.

    Parameters
    ----------
    output : Path
        The output dataset.
    run : BoldRun
    step : str
        Names the work in the log folder.
    work : callable
        Takes no argument; raises where it fails.
    stop : bool
        Whether a failure is raised after it was recorded.
    """
    done = Outcome(run.name, step)
    try:
        work()
    except Exception as error:
        details = ''
        if isinstance(error, BrainfmError):
            sentence = str(error)
        elif isinstance(error, MemoryError):
            sentence = 'there is not enough memory: ask for more, or lower --nprocs.'
        else:
            path = done.path(output)
            sentence = f'unexpected {type(error).__name__}: {error} (details in {path}).'
            details = traceback.format_exc()
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
    for path in sorted((output / f'sub-{subject}' / 'log').glob('failed-*.txt')):
        run, _, step = path.stem.removeprefix('failed-').partition('_atlas-')
        sentence = path.read_text().partition('\n')[0]
        outcomes.append(Outcome(run, f'atlas-{step}', sentence))
    return outcomes
