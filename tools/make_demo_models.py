#!/usr/bin/env python
"""Make the weights of the demonstration models by the commands that a user types.

    python tools/make_demo_models.py [FOLDER]

Simulates participants (seeds that the demo does not use) as the demo does, writes their denoised
parcel series as `bids_brainfm DATA OUT participant` does, and pretrains both models on them. The
weights are put beside the cards in bids_brainfm/data/models. Then, on other participants, it
probes Brain-JEPA's embeddings for two simulated traits, beside those of an untrained network: how
fast the fluctuations of each parcel are (speed), and how much parcels have in common (trait).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from bids_brainfm.atlases.atlas import home, load_atlas
from bids_brainfm.atlases.fetch import sha256_of
from bids_brainfm.bids import writing
from bids_brainfm.signals.denoise import denoise, load_preset, read_confounds
from bids_brainfm.signals.simulate import express, simulate_run

ATLAS, TASK, TR, VOLUMES = 'Demo424', 'rest', 0.735, 490
MODELS = Path(__file__).resolve().parents[1] / 'bids_brainfm' / 'data' / 'models'
SEED, TRAINED_ON, PROBED = 20261125, 400, 300
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
        '3',
    ],
}
PROBE = ['--epochs', '20', '--batch-size', '16', '--lr', '0.1', '--evaluate-epochs', '2']


def write_participant(folder: Path, label: str, trait: float, speed: float, seed: int) -> None:
    """Simulate a participant and write the series that denoising leaves."""
    atlas = load_atlas(ATLAS, home())
    rng = np.random.default_rng(seed)
    run = simulate_run(atlas.xyz, VOLUMES, TR, rng=rng, **express(trait, speed))
    func = folder / f'sub-{label}' / 'func'
    stem = f'sub-{label}_task-{TASK}_space-MNI152NLin2009cAsym_atlas-{ATLAS}'
    with tempfile.TemporaryDirectory() as scratch:
        confounds, facts = Path(scratch) / 'confounds.tsv', Path(scratch) / 'confounds.json'
        run.confounds.to_csv(confounds, sep='\t', index=False, na_rep='n/a')
        writing.write_json(facts, run.components)
        read = read_confounds(confounds, facts, load_preset('simple'), VOLUMES)
    series = denoise(run.series, read)
    names = list(atlas.names)
    writing.write_matrix(func / f'{stem}_stat-mean_timeseries.tsv', series, names)
    writing.write_table(
        func / f'{stem}_stat-coverage_bold.tsv', {'Node': names, 'coverage': np.ones(len(names))}
    )
    writing.write_json(
        func / f'{stem}_stat-mean_timeseries.json',
        {
            'Description': 'SIMULATED parcel series',
            'RepetitionTime': TR,
            'StartTime': read.dummy * TR,
            'FlaggedVolumes': np.flatnonzero(read.flagged[read.dummy :]),
            'BrainMean': float(series.mean()),
        },
    )


def write_derivatives(folder: Path, participants: int, seed: int, vary: float = 0.0) -> None:
    """Write the derivatives of so many participants; they are whole when participants.tsv is.

    All are of the same speed, unless it is to `vary`.
    """
    if (folder / 'participants.tsv').is_file():
        return
    rng = np.random.default_rng(seed)
    labels = [f'{i + 1:04d}' for i in range(participants)]
    traits = rng.standard_normal(participants).round(3)
    seeds = [int(n) for n in rng.integers(2**31, size=participants)]
    speeds = (vary * rng.standard_normal(participants)).round(3)
    with ProcessPoolExecutor() as pool:
        write = partial(write_participant, folder)
        list(pool.map(write, labels, traits, speeds, seeds, chunksize=8))
    writing.write_json(
        folder / 'dataset_description.json',
        {'Name': 'SIMULATED parcel series', 'BIDSVersion': '1.10.0', 'DatasetType': 'derivative'},
    )
    people = {
        'participant_id': [f'sub-{label}' for label in labels],
        'trait': traits,
        'speed': speeds,
    }
    pd.DataFrame(people).to_csv(folder / 'participants.tsv', sep='\t', index=False)


def pretrain(data: Path, folder: Path) -> None:
    """Pretrain the models from random weights, and put what came of them beside their cards."""
    run_side_by_side(
        [
            ['pretrain', name, folder / name, '--data', data, *options]
            for name, options in PRETRAINING.items()
        ]
    )
    for name in PRETRAINING:
        trained = yaml.safe_load((folder / name / 'card.yml').read_text())
        weights = MODELS / f'{name}.safetensors'
        shutil.copyfile(folder / name / 'model.safetensors', weights)
        write_card(name, trained['training'], sha256_of(weights))


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
    """Probe the embeddings for each trait, beside an untrained network, and say so in the card."""
    card = yaml.safe_load((MODELS / f'{name}.yml').read_text())
    probes = {}
    for target in ('speed', 'trait'):
        outs = {
            kind: folder / f'{name}-probe-{target}-{kind}' for kind in ('trained', 'untrained')
        }
        control = {'trained': [], 'untrained': ['--random-weights']}
        run_side_by_side(
            [
                ['finetune', name, out, '--data', data, '--target', target, '--mode', 'probe',
                 '--pooling', 'mean', *PROBE, *control[kind]]
                for kind, out in outs.items()
            ]
        )  # fmt: skip
        found = {kind: json.loads((out / 'scores.json').read_text()) for kind, out in outs.items()}
        scores = {kind: scored['test'] for kind, scored in found.items()}
        scores |= found['trained']['test_baselines']
        probes[target] = {kind: round(values['r'], 3) for kind, values in scores.items()}
    training = card['training'] | {
        'probe': {'participants': found['trained']['participants'], 'test_r': probes}
    }
    write_card(name, training, card['weights'][0]['sha256'])
    print(name, training['probe'])


def run_side_by_side(commands: list[list]) -> None:
    """Run commands of ``bids_brainfm_models`` at a time, with one thread each."""
    common = ['--seed', SEED, '--device', 'cpu', '--nthreads', 1]
    running = []
    for command in commands:
        words = [str(word) for word in (*command, *common)]
        print('bids_brainfm_models', *words, flush=True)
        running.append(subprocess.Popen([sys.executable, '-m', 'bids_brainfm.cli.models', *words]))
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit('A command failed.')


def main(folder: Path) -> None:
    """Make everything, in a folder that may hold what an interrupted attempt made."""
    started = time.monotonic()
    write_derivatives(folder / 'train', TRAINED_ON, SEED)
    write_derivatives(folder / 'probe', PROBED, SEED + 1, vary=1.0)
    pretrain(folder / 'train', folder)
    print(f'Pretrained: {(time.monotonic() - started) / 60:.1f} min since the start')
    probe('brain-jepa-demo', folder / 'probe', folder)
    print(f'{(time.monotonic() - started) / 60:.1f} min in all')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
