"""How training speeds up with processes: windows per second of 1 and 2 processes (or GPUs).

Series of noise are trained on by the command, each number of processes with the same batch in all
and one CPU thread a process (on GPUs: one GPU a process). Printed are windows per second, the
ratio to one process, and the ratio to as many processes side by side that do not talk to each
other: what is lost by talking, and not by sharing the memory of one machine.

    python benchmarks/scaling.py [--processes 1 2] [--steps 30] [--model NAME] [--repeats 3]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_matrix, write_table
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.models.cards import load_card
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.resources import home

PEOPLE, VOLUMES, BATCH, WARM = 10, 490, 8, 5


def write_noise(folder: Path, atlas_name: str) -> None:
    """Parcel series of noise, laid out as the participant level writes them."""
    atlas, rng = load_atlas(atlas_name, home()), np.random.default_rng(0)
    for i in range(PEOPLE):
        stem = folder / f'sub-{i:02d}' / 'func' / f'sub-{i:02d}_task-rest_atlas-{atlas_name}'
        series = 10_000 + 50 * rng.standard_normal((VOLUMES, atlas.n_parcels))
        names = list(atlas.names)
        write_matrix(Path(f'{stem}_stat-mean_timeseries.tsv'), series, names)
        coverage = {'Node': names, 'coverage': np.ones(len(names))}
        write_table(Path(f'{stem}_stat-coverage_bold.tsv'), coverage)
        facts = {'RepetitionTime': 0.735, 'StartTime': 0, 'FlaggedVolumes': [], 'BrainMean': 1e4}
        facts['ResultsVersion'] = BY_NAME['series'].results_version
        write_sidecar(Path(f'{stem}_stat-mean_timeseries.tsv'), facts)


def start(
    data: Path, out: Path, model: str, processes: int, steps: int, batch: int
) -> subprocess.Popen:
    """Start a training."""
    launch = ['torch.distributed.run', '--standalone', '--nproc-per-node', str(processes), '-m']
    return subprocess.Popen(
        [sys.executable, '-m', *(launch if processes > 1 else []), 'bids_brainfm.cli.models',
         'pretrain', model, out, '--data', data, '--batch-size', str(batch), '--nthreads', '1',
         '--epochs', str(steps * batch / (PEOPLE * 0.8)), '--validation-share', '0.2',
         '--evaluate-epochs', '100000', '--checkpoint-steps', '100000'],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def speed(outs: list[Path], runs: list[subprocess.Popen]) -> float:
    """Windows per second of trainings that run side by side, added up; the median step counts."""
    for run in runs:
        assert run.wait() == 0
    logs = [pd.read_csv(out / 'train.csv')['windows_per_second'][WARM:] for out in outs]
    return sum(statistics.median(log) for log in logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--processes', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--model', default='brainlm-demo')
    parser.add_argument('--repeats', type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, rounds = Path(scratch) / 'data', []
        write_noise(data, load_card(options.model).atlas)
        for n in range(options.repeats):
            found = {}
            for count in options.processes:
                outs = [Path(scratch) / f'{n}-{count}']
                run = start(data, outs[0], options.model, count, options.steps, BATCH)
                together = speed(outs, [run])
                outs = [Path(scratch) / f'{n}-{count}-{i}' for i in range(count)]
                alone = [
                    start(data, out, options.model, 1, options.steps, BATCH // count)
                    for out in outs
                ]
                found[count] = together, speed(outs, alone)
            rounds.append(found)
    base = options.processes[0]
    print(f'{options.model}, batch {BATCH} in all, medians of {options.repeats} rounds')
    print('processes  windows/s  of one  of as many alone')
    for count in options.processes:
        rate = statistics.median(found[count][0] for found in rounds)
        gain = statistics.median(found[count][0] / found[base][0] for found in rounds)
        kept = statistics.median(found[count][0] / found[count][1] for found in rounds)
        print(f'{count:9d}  {rate:9.1f}  {gain:5.2f}x  {kept:5.2f}x')


if __name__ == '__main__':
    main()
