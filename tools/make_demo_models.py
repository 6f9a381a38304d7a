#!/usr/bin/env python
"""Make the weights of the demonstration models by the commands that a user types.

    python tools/make_demo_models.py [FOLDER]

Simulates participants (seeds that the demo does not use) as the demo does, writes their denoised
parcel series as `bids_brainfm DATA OUT participant` does, and pretrains both models on them. The
weights are put beside the cards in bids_brainfm/data/models. Then, on other participants, it
probes Brain-JEPA's embeddings for how fast their simulated fluctuations are, beside those of an
untrained network. The trait of the demo's own participants, which shows between parcels, is not
probed: the mean over tokens of so small a network does not hold it, trained or not.

What does not depend on each other is made side by side, by two processes of one thread each.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import write_json, write_matrix, write_table
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.cli.models import main as models
from bids_brainfm.resources import home, sha256_of
from bids_brainfm.signals.confounds import Tables, read_confounds
from bids_brainfm.signals.denoise import denoise
from bids_brainfm.signals.simulate import CORNER_HZ, express, simulate_run
from bids_brainfm.signals.strategy import load_strategy

ATLAS, TASK, TR, VOLUMES = 'Demo424', 'rest', 0.735, 490
MODELS = Path(__file__).resolve().parents[1] / 'bids_brainfm' / 'data' / 'models'
SEED, TRAINED_ON, PROBED = 20261125, 400, 400
PACE = 0.5  # change of the logarithm of the corner frequency by one SD of the trait
PRETRAINING = {
    'brainlm-demo': [
        '--epochs',
        '30',
        '--batch-size',
        '4',
        '--lr',
        '1e-3',
        '--evaluate-epochs',
        '3',
    ],
    'brain-jepa-demo': [
        '--recipe',
        str(Path(__file__).with_name('demo_jepa_recipe.yml')),
        '--evaluate-epochs',
        '7',
    ],
}
COMMON = ['--seed', SEED, '--device', 'cpu', '--nthreads', '1']
PROBE = ['--epochs', '20', '--batch-size', '16', '--lr', '0.1', '--evaluate-epochs', '2']


def express_pace(trait: float) -> dict[str, float]:
    """How a trait (standard normal) shows that makes fluctuations fast, and nothing else."""
    return express(0.0) | {'corner_hz': CORNER_HZ * float(np.exp(PACE * trait))}


def write_participant(folder: Path, how: Callable, label: str, trait: float, seed: int) -> None:
    """Simulate a participant and write the series that denoising leaves."""
    atlas = load_atlas(ATLAS, home())
    rng, strategy = np.random.default_rng(seed), load_strategy('simple')
    run = simulate_run(atlas.xyz, VOLUMES, TR, rng=rng, **how(trait))
    func = folder / f'sub-{label}' / 'func'
    stem = f'sub-{label}_task-{TASK}_space-MNI152NLin2009cAsym_atlas-{ATLAS}'
    with tempfile.TemporaryDirectory() as scratch:
        confounds, facts = Path(scratch) / 'confounds.tsv', Path(scratch) / 'confounds.json'
        pd.DataFrame(run.confounds).to_csv(confounds, sep='\t', index=False, na_rep='n/a')
        write_json(facts, run.components)
        read = read_confounds(Tables(confounds, facts), strategy, VOLUMES, TR)
    series, _ = denoise(run.series, read, strategy, TR)
    names = list(atlas.names)
    path = func / f'{stem}_stat-mean_timeseries.tsv'
    write_matrix(path, series, names)
    write_table(
        func / f'{stem}_stat-coverage_bold.tsv', {'Node': names, 'coverage': np.ones(len(names))}
    )
    write_sidecar(
        path,
        {
            'Description': 'SIMULATED parcel series',
            'RepetitionTime': TR,
            'StartTime': read.dummy * TR,
            'FlaggedVolumes': np.flatnonzero(read.flagged[read.dummy :]),
            'BrainMean': float(series.mean()),
        },
    )


def write_derivatives(folder: Path, participants: int, seed: int, how: Callable) -> None:
    """Write the derivatives of so many participants; they are whole when participants.tsv is.

    `how` says how their trait shows, as arguments of the simulation.
    """
    if (folder / 'participants.tsv').is_file():
        return
    rng = np.random.default_rng(seed)
    labels = [f'{i + 1:04d}' for i in range(participants)]
    traits = rng.standard_normal(participants).round(3)
    seeds = [int(n) for n in rng.integers(2**31, size=participants)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_participant, folder, how), labels, traits, seeds, chunksize=8))
    write_json(
        folder / 'dataset_description.json',
        {'Name': 'SIMULATED parcel series', 'BIDSVersion': '1.10.0', 'DatasetType': 'derivative'},
    )
    people = {'participant_id': [f'sub-{label}' for label in labels], 'trait': traits}
    pd.DataFrame(people).to_csv(folder / 'participants.tsv', sep='\t', index=False)


def side_by_side(function: Callable, *calls: tuple) -> list:
    """Call a function several times at once, each in a process of its own."""
    with ProcessPoolExecutor(2, get_context('spawn')) as pool:
        return [made.result() for made in [pool.submit(function, *call) for call in calls]]


def pretrain(name: str, data: Path, folder: Path, options: list[str]) -> None:
    """Pretrain a model from random weights, and put what came of it beside its card."""
    started = time.monotonic()
    out = folder / name
    run('pretrain', name, out, '--data', data, *COMMON, *options)
    trained = yaml.safe_load((out / 'card.yml').read_text())
    weights = MODELS / f'{name}.safetensors'
    shutil.copyfile(out / 'model.safetensors', weights)
    write_card(name, trained['training'], sha256_of(weights))
    print(f'{name}: pretrained in {(time.monotonic() - started) / 60:.1f} min', flush=True)


def write_card(name: str, training: dict, sha256: str) -> None:
    """Say in a card of this package what its weights are; the rest of it stays as it is."""
    path = MODELS / f'{name}.yml'
    head = path.read_text().partition('\nweights:')[0]
    facts = {
        'weights': [{'name': f'{name}.safetensors', 'sha256': sha256}],
        'training': training,
    }
    path.write_text(f'{head}\n{yaml.safe_dump(facts, sort_keys=False)}')


def probe(name: str, data: Path, out: Path, options: list[str]) -> dict:
    """Probe the embeddings of a model for the trait: what its scores.json says."""
    run(
        'finetune', name, out, '--data', data, '--target', 'trait', '--mode', 'probe',
        '--pooling', 'mean', *COMMON, *PROBE, *options,
    )  # fmt: skip
    return json.loads((out / 'scores.json').read_text())


def compare(name: str, data: Path, folder: Path) -> None:
    """Probe a model beside an untrained network of its kind, and say in its card what came out."""
    controls = {'trained': [], 'untrained': ['--random-weights']}
    calls = [(name, data, folder / f'{name}-probe-{kind}', o) for kind, o in controls.items()]
    found = dict(zip(controls, side_by_side(probe, *calls), strict=True))
    scores = {kind: values['test'] for kind, values in found.items()}
    scores |= found['trained']['test_baselines']
    card = yaml.safe_load((MODELS / f'{name}.yml').read_text())
    training = card['training'] | {
        'probe': {
            'target': 'simulated pace of fluctuations',
            'participants': found['trained']['participants'],
            'test_r': {kind: round(values['r'], 3) for kind, values in scores.items()},
        }
    }
    write_card(name, training, card['weights'][0]['sha256'])
    print(name, training['probe'])


def run(*arguments: object) -> None:
    """Run a command of ``bids_brainfm_models``."""
    words = [str(argument) for argument in arguments]
    print('bids_brainfm_models', *words, flush=True)
    if models(words):
        sys.exit(f'{words[0]} failed')


def main(folder: Path) -> None:
    """Make everything, in a folder that may hold what an interrupted attempt made."""
    started = time.monotonic()
    write_derivatives(folder / 'train', TRAINED_ON, SEED, express)
    write_derivatives(folder / 'probe', PROBED, SEED + 1, express_pace)
    calls = [(name, folder / 'train', folder, options) for name, options in PRETRAINING.items()]
    side_by_side(pretrain, *calls)
    compare('brain-jepa-demo', folder / 'probe', folder)
    print(f'{(time.monotonic() - started) / 60:.1f} min in all')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
