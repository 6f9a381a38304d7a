"""Pretraining and fine-tuning from derivatives to a checkpoint that ``--model`` takes."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object

from bids_brainfm.bids.files import write_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.protocol import LatentPredicting, Network, Reconstructing
from bids_brainfm.signals.connectome import connectome, connectome_vector
from bids_brainfm.signals.series import read_series
from bids_brainfm.training import finetuning
from bids_brainfm.training.cohort import Targets, count_parts
from bids_brainfm.training.engine import Trainer
from bids_brainfm.training.pretraining import (
    LatentPrediction,
    MaskedAutoencoding,
    parcel_covariance,
)
from bids_brainfm.training.publish import plain, publish, write_predictions
from bids_brainfm.training.recipe import Recipe
from bids_brainfm.training.session import Cohort, TrainingSettings, start
from bids_brainfm.training.store import sample_seed

# Windows of the validation split that are evaluated at most, one of each run first
EVALUATED = 256
# Runs of the training part whose covariance predicts held-out windows, as a baseline
COVARIANCE_RUNS = 1000
# Participants up to whom the connectome baseline is fitted: it holds all connectomes in memory
MOST_CONNECTOMES = 5000


def pretrain(settings: TrainingSettings) -> Path | None:
    """Pretrain a network on the parcel series of a cohort.

    Returns the path of the card of the trained model; None in processes other than the first.
    """
    check = lambda recipe, network: objective_for(settings, recipe, network).draw([0])
    session, _ = start(settings, None, check=check)
    objective = objective_for(settings, session.recipe, session.network)
    asked = {'mask_ratio': settings.mask_ratio, 'loss_fn': settings.loss}
    session.network.config |= {key: value for key, value in asked.items() if value is not None}
    held_out = session.windows('validation', EVALUATED)
    if isinstance(objective, MaskedAutoencoding):
        series = session.series('train', COVARIANCE_RUNS)
        objective.covariance = parcel_covariance(series, session.store.parcels, session.reduce)

    def evaluate() -> dict[str, float]:
        seeds = lambda numbers: [sample_seed(settings.seed, 4, n) for n in numbers]
        batches = ((signal, seeds(numbers)) for signal, numbers in session.batches(held_out))
        with session.accelerator.autocast():
            return objective.evaluate(batches, session.reduce)

    rows = Trainer(session, objective, evaluate).run()
    if not session.accelerator.is_main_process:
        return None
    first, last = ({k: v for k, v in row.items() if k != 'step'} for row in (rows[0], rows[-1]))
    held_out_scores = {'held_out_untrained': plain(first), 'held_out': plain(last)}
    return publish(session, {'held_out_windows': len(held_out)} | held_out_scores, 'Pretrained')


def objective_for(
    settings: TrainingSettings, recipe: Recipe, network: Network
) -> LatentPrediction | MaskedAutoencoding:
    """Choose what a network is pretrained for, by its capabilities and the recipe.

    Refused are a family that cannot be pretrained, and a recipe or masks that do not fit.
    """
    can, config = network.capabilities, network.config
    if not (can.reconstructs or can.predicts_latents):
        raise BrainfmError(
            f'A model of the family {network.model_type} neither reconstructs nor predicts '
            f'latents, so it cannot be pretrained: fine-tune it, or take a model that does.'
        )
    latent = recipe.masks is not None and recipe.momentum is not None
    if not (can.predicts_latents if latent else can.reconstructs):
        raise BrainfmError(
            f'--recipe {settings.recipe or can.recipe}: a model of the family '
            f'{network.model_type} takes a recipe {"without" if latent else "with"} masks and '
            f'momentum, such as {can.recipe}.'
        )
    if recipe.masks is not None:
        return LatentPrediction(cast('LatentPredicting', network), recipe.masks)
    ratio = can.mask_ratio if settings.mask_ratio is None else settings.mask_ratio
    if ratio is None:
        raise BrainfmError(
            f'A model of the family {network.model_type} does not say how much of a window is '
            f'masked: give --mask-ratio.'
        )
    loss, normalise = settings.loss or config.get('loss_fn', 'mse'), config.get('norm_pix_loss')
    network = cast('Reconstructing', network)
    return MaskedAutoencoding(network, ratio, settings.masking, loss, bool(normalise))


def finetune(settings: TrainingSettings) -> Path | None:
    """Fit a head on a network, with or without the network, and test it on held-out people.

    Returns the path of the card of the trained model; None in processes other than the first.
    """
    probe = settings.mode == 'probe'
    recipe = 'probe' if probe else 'finetune'
    session, cohort = start(settings, recipe, partial(head_settings, settings))
    targets = cohort.targets
    assert targets is not None
    objective = finetuning.Supervised(session.network, probe)
    head = objective.head
    centre, spread = head.settings.get('mean', 0.0), head.settings.get('sd', 1.0)
    standardised = lambda label: (targets.values[label] - centre) / spread
    in_training = torch.tensor([standardised(r.participant) for r in session.store.part('train')])

    def score(part: str) -> tuple[list[str], np.ndarray, dict[str, float]]:
        """Participants, predictions and scores of a part."""
        windows = session.windows(part)
        whose = lambda numbers: [windows[n][0].participant for n in numbers]
        batches = ((signal, whose(numbers)) for signal, numbers in session.batches(windows))
        objective.eval()
        with session.accelerator.autocast():
            found = finetuning.outputs_by_participant(objective, batches, gather_object)
        outputs = torch.stack(list(found.values()))
        wanted = torch.tensor([standardised(p) for p in found]).float()
        loss = finetuning.loss_of(outputs, wanted, targets.problem)
        prediction = head.predict(outputs).numpy()
        real = np.array([targets.values[p] for p in found])
        scores = finetuning.scores_of(prediction, real, targets)
        return list(found), prediction, {'loss': float(loss)} | scores

    Trainer(session, objective, lambda: score('validation')[2], in_training.float()).run()
    tested = {part: score(part) for part in ('train', 'validation', 'test')}
    if not session.accelerator.is_main_process:
        return None
    people, _, scores = tested['test']
    facts = {
        'target': targets.column,
        'participants': count_parts(cohort.parts),
        'validation': tested['validation'][2],
        'test': scores,
        'test_baselines': baselines(cohort, targets, people),
    }
    write_predictions(settings.output / 'predictions.tsv', tested, targets, head.columns)
    write_json(settings.output / 'scores.json', plain(facts))
    return publish(session, plain(facts), 'Probed' if probe else 'Fine-tuned')


def head_settings(settings: TrainingSettings, network: Network, cohort: Cohort) -> dict[str, Any]:
    """Settings of a head for a network and targets; statistics are those of the training part."""
    targets, class_token = cohort.targets, network.capabilities.class_token
    assert targets is not None
    found = {
        'kind': 'probe' if settings.mode == 'probe' else 'mlp' if class_token else 'linear',
        'pooling': settings.pooling or ('class-token' if class_token else 'mean'),
        'dropout': settings.dropout,
        'target': targets.column,
        'task': targets.problem,
    }
    if targets.problem == 'classification':
        return found | {'classes': list(targets.classes)}
    values = [targets.values[p] for p in cohort.part('train')]
    if np.std(values) == 0:
        raise BrainfmError(
            f'--target {targets.column}: all participants of the training part have the same '
            f'value: add participants, or choose another --seed.'
        )
    return found | {'mean': float(np.mean(values)), 'sd': float(np.std(values, ddof=1))}


def baselines(cohort: Cohort, targets: Targets, people: list[str]) -> dict[str, dict[str, float]]:
    """Scores on the test part of what needs no model: a constant, and the connectome."""
    train = cohort.part('train')
    known, real = (np.array([targets.values[p] for p in group]) for group in (train, people))
    predictions = {'constant': finetuning.dummy(known, len(people), targets)}
    if len(train) + len(people) <= MOST_CONNECTOMES:
        predictions['connectome ridge'] = finetuning.connectome_ridge(
            _connectomes(cohort, train), known, _connectomes(cohort, people), targets
        )
    return {name: finetuning.scores_of(x, real, targets) for name, x in predictions.items()}


def _connectomes(cohort: Cohort, people: list[str]) -> np.ndarray:
    """Connectome (N, F) of each participant, mean over runs; 0 where a parcel is n/a."""
    of: dict[str, list[np.ndarray]] = {person: [] for person in people}
    for run in cohort.runs:
        if run.participant in of:
            vector = connectome_vector(connectome(read_series(run.path).data))
            of[run.participant].append(np.nan_to_num(vector))
    return np.stack([np.mean(rows, axis=0) for rows in of.values()])
