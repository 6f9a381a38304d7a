#!/usr/bin/env python
"""Make the weights of the demonstration models by the commands that a user types.

    python tools/make_demo_models.py [FOLDER]

Simulates participants (seeds that the demo does not use) as the demo does, writes their denoised
parcel series as `bids_brainfm DATA OUT participant` does, and pretrains both models on them. The
weights are written next to the cards in bids_brainfm/data/models. Then, on other participants, it
probes Brain-JEPA's embeddings for how fast their simulated fluctuations are, and compares them
with those of an untrained network and with the connectome. The trait of the demo's own
participants, which shows between parcels, is not probed: the mean over tokens of so small a
network does not hold it, trained or not.

Both models are pretrained at the same time, by two processes of one thread each.
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
from bids_brainfm.outputs.registry import BY_NAME
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
            'ResultsVersion': BY_NAME['series'].results_version,
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


def probe(name: str, data: Path, folder: Path) -> None:
    """Probe the embeddings of a model for the trait, and write in its card what came out."""
    out = folder / f'{name}-probe'
    run('finetune', name, out, '--data', data, '--target', 'trait', '--mode', 'probe', *COMMON)
    found = json.loads((out / 'scores.json').read_text())
    scores = {'trained': found['test'], 'untrained': found['test_baselines']['random weights']}
    scores['connectome'] = found['test_baselines']['connectome']
    intervals, difference = found['test_intervals'], found['test_difference']
    probed = {
        'target': 'simulated pace of fluctuations',
        'participants': found['participants'],
        'test_r': {kind: round(values['r'], 3) for kind, values in scores.items()},
        'interval': [round(limit, 3) for limit in intervals['model']['r']],
        'statement': difference['statement'],
    }
    card = yaml.safe_load((MODELS / f'{name}.yml').read_text())
    write_card(name, card['training'] | {'probe': probed}, card['weights'][0]['sha256'])
    print(name, probed)


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
    with ProcessPoolExecutor(2, get_context('spawn')) as pool:
        made = [
            pool.submit(pretrain, name, folder / 'train', folder, options)
            for name, options in PRETRAINING.items()
        ]
        for each in made:
            each.result()
    probe('brain-jepa-demo', folder / 'probe', folder)
    print(f'{(time.monotonic() - started) / 60:.1f} min in all')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
