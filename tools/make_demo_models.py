#!/usr/bin/env python
"""Make the weights of the demonstration models by the commands that a user types.

    python tools/make_demo_models.py [FOLDER]

Simulates participants (seeds that the demo does not use) as the demo does, writes their denoised
parcel series as `bids_brainfm DATA OUT participant` does, and pretrains both models on them. The
weights are put beside the cards in bids_brainfm/data/models. Then, on other participants, it
probes their embeddings for the simulated trait, beside those of untrained networks. Takes less
than 20 minutes on 2 cores.
"""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from bids_brainfm.atlases.atlas import home, load_atlas
from bids_brainfm.bids import writing
from bids_brainfm.signals.denoise import denoise, load_preset, read_confounds
from bids_brainfm.signals.simulate import express, simulate_run

ATLAS, TASK, TR, VOLUMES = 'Demo424', 'rest', 0.735, 490


def write_participant(folder: Path, label: str, trait: float, seed: int) -> None:
    """Simulate a participant and write the series that denoising leaves."""
    atlas = load_atlas(ATLAS, home())
    rng = np.random.default_rng(seed)
    run = simulate_run(atlas.xyz, VOLUMES, TR, rng=rng, **express(trait))
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


def write_derivatives(folder: Path, participants: int, seed: int) -> None:
    """Write the derivatives of so many participants; they are whole when participants.tsv is."""
    if (folder / 'participants.tsv').is_file():
        return
    rng = np.random.default_rng(seed)
    labels = [f'{i + 1:04d}' for i in range(participants)]
    traits = rng.standard_normal(participants).round(3)
    seeds = [int(n) for n in rng.integers(2**31, size=participants)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write_participant, folder), labels, traits, seeds, chunksize=8))
    writing.write_json(
        folder / 'dataset_description.json',
        {'Name': 'SIMULATED parcel series', 'BIDSVersion': '1.10.0', 'DatasetType': 'derivative'},
    )
    people = {'participant_id': [f'sub-{label}' for label in labels], 'trait': traits}
    pd.DataFrame(people).to_csv(folder / 'participants.tsv', sep='\t', index=False)
