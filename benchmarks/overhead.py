"""What the command costs beside its work: one run, through the command and through plain calls.

The command's wall time, less the time that the same reading, computing and writing takes when
its functions are called one after the other in a warm process, is the cost of starting Python,
importing, indexing and Nipype. Limit: 3 s.

    python benchmarks/overhead.py [--repeats 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 3.0


def command(data: Path, out: Path, work: Path) -> float:
    """Seconds of the command in a process of its own."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, '-m', 'bids_brainfm.cli.run', data, out, 'participant',
         '--model', 'brainlm-demo', '-w', work],
        check=True, capture_output=True,
    )  # fmt: skip
    return time.perf_counter() - started


def work_alone(data: Path, out: Path) -> float:
    """Seconds of the same work by plain calls, imports left out."""
    from bids_brainfm.cli.parser import parse_settings
    from bids_brainfm.outputs.encoding import encode_all
    from bids_brainfm.outputs.reporting import report
    from bids_brainfm.outputs.series import make_series
    from bids_brainfm.workflows.plan import make_plan

    work = out.with_name(f'{out.name}_work')
    arguments = [data, out, 'participant', '--model', 'brainlm-demo', '-w', work]
    settings = parse_settings([str(argument) for argument in arguments])
    plan = make_plan(settings, {'preprocessed': data}, work, 'benchmark')
    (atlas,) = plan.atlases
    started = time.perf_counter()
    for run in atlas.todo:
        make_series(run, atlas.task)
    for model in atlas.models:
        encode_all(model.todo, model.task)
    report(out, plan.subjects[0], {})
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats

    from bids_brainfm.cli.demo import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_dataset(place / 'data', participants=1, volumes=490)
        work_alone(place / 'data', place / 'warm')  # the first call pays the imports
        whole, alone = [], []
        for i in range(repeats):
            whole.append(command(place / 'data', place / f'out{i}', place / f'work{i}'))
            alone.append(work_alone(place / 'data', place / f'alone{i}'))
    rest = statistics.median(a - b for a, b in zip(whole, alone, strict=True))
    print(f'command, one run           {statistics.median(whole):6.2f} s (median of {repeats})')
    print(f'reading, computing, writing {statistics.median(alone):5.2f} s')
    print(
        f'everything else            {rest:6.2f} s   limit {LIMIT:.1f} s, ratio {rest / LIMIT:.2f}'
    )


if __name__ == '__main__':
    main()
