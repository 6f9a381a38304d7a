"""Pretraining and fine-tuning from derivatives to a checkpoint that ``--model`` takes."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object

from bids_brainfm.bids.files import write_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import read_parts
from bids_brainfm.models.protocol import LatentPredicting, Network, Reconstructing
from bids_brainfm.signals.connectome import (
    connectome,
    connectome_vector,
    fisher_z,
    mean_connectome,
)
from bids_brainfm.signals.series import read_series
from bids_brainfm.training import evaluation, finetuning, linear
from bids_brainfm.training.cohort import CohortRun, Targets
from bids_brainfm.training.engine import Trainer
from bids_brainfm.training.preparation import Cohort
from bids_brainfm.training.pretraining import (
    LatentPrediction,
    MaskedAutoencoding,
    parcel_covariance,
)
from bids_brainfm.training.publish import (
    Tested,
    plain,
    publish,
    schedule_of,
    write_predictions,
)
from bids_brainfm.training.recipe import Recipe
from bids_brainfm.training.session import Session, start
from bids_brainfm.training.settings import TrainingSettings
from bids_brainfm.training.split import count_parts
from bids_brainfm.training.store import sample_seed

# Windows of the validation split that are evaluated at most, one of each run first
EVALUATED = 256
LOGGER = logging.getLogger('bids_brainfm')
# Runs of the training part whose covariance predicts held-out windows, as a baseline
COVARIANCE_RUNS = 1000
# Participants up to whom the connectome baseline is fitted: it holds all connectomes in memory
MOST_CONNECTOMES = 5000

Predictions = dict[str, np.ndarray]  # of the participants of the test part, by predictor


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
        batches = ((x, flagged, seeds(n)) for x, flagged, n in session.batches(held_out))
        with session.accelerator.autocast():
            return objective.evaluate(batches, session.reduce)

    rows = Trainer(session, objective, evaluate).run()
    if not session.accelerator.is_main_process:
        return None
    first, last = ({k: v for k, v in row.items() if k != 'step'} for row in (rows[0], rows[-1]))
    facts = {'held_out_windows': len(held_out), 'held_out_untrained': first, 'held_out': last}
    return publish(session, schedule_of(session) | facts, 'Pretrained')


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
    if settings.mode == 'probe':
        refuse_schedule(settings)
    recipe = 'finetune' if settings.mode == 'full' else 'head'
    session, cohort = start(settings, recipe, partial(head_settings, settings))
    targets, probed = cohort.targets, settings.mode == 'probe'
    assert targets is not None
    tested, controls = (probe if probed else tune)(session, cohort, targets)
    if not session.accelerator.is_main_process:
        return None
    people, prediction = tested['test']
    real, _ = cohort.known(people)
    predictions = {'model': prediction} | controls
    predictions |= baselines(session, cohort, targets, people)
    facts: dict[str, Any] = {'target': targets.column, 'participants': count_parts(cohort.parts)}
    if (before := read_parts(session.spec.card)) is not None:
        facts['test_participants_in_pretraining'] = sum(before.get(p) == 'train' for p in people)
    if 'validation' in tested:
        people_there, found = tested['validation']
        facts['validation'] = evaluation.scores_of(found, cohort.known(people_there)[0], targets)
    facts |= evaluation.describe_test(predictions, real, targets, settings.seed)
    assert session.network.head is not None
    columns = session.network.head.columns
    write_predictions(settings.output / 'predictions.tsv', tested, targets, columns)
    write_json(settings.output / 'scores.json', plain(facts))
    schedule = {} if probed else schedule_of(session)
    return publish(session, schedule | facts, 'Probed' if probed else 'Fine-tuned')


def tune(session: Session, cohort: Cohort, targets: Targets) -> tuple[Tested, Predictions]:
    """Train a head, and in full mode the network, by gradients; predict all participants."""
    objective = finetuning.Supervised(session.network, session.settings.mode == 'head')
    head = objective.head
    centre, spread = head.settings.get('mean', 0.0), head.settings.get('sd', 1.0)
    standardised = lambda label: (targets.values[label] - centre) / spread
    in_training = torch.tensor([standardised(r.participant) for r in session.store.part('train')])

    def outputs(part: str) -> tuple[list[str], torch.Tensor]:
        objective.eval()
        encode = lambda signal: objective.outputs(signal).float()
        found = by_participant(session, part, encode)
        return list(found), torch.from_numpy(np.stack(list(found.values()))).float()

    def evaluate() -> dict[str, float]:
        people, found = outputs('validation')
        wanted = torch.tensor([standardised(person) for person in people]).float()
        loss = finetuning.loss_of(found, wanted, targets.problem)
        real = np.array([targets.values[person] for person in people])
        scores = evaluation.scores_of(head.predict(found).numpy(), real, targets)
        return {'loss': float(loss)} | scores

    Trainer(session, objective, evaluate, in_training.float()).run()
    tested: Tested = {}
    for part in cohort.names:
        people, found = outputs(part)
        tested[part] = people, head.predict(found).numpy()
    return tested, {}


def probe(session: Session, cohort: Cohort, targets: Targets) -> tuple[Tested, Predictions]:
    """Fit ridge or logistic regression on frozen embeddings, and on those of random weights.

    Nothing is returned in processes other than the first.
    """
    settings, head = session.settings, session.network.head
    assert head is not None
    networks = {'model': session.network}
    if session.spec.trained:
        networks['random weights'] = session.untrained()
    predictions: dict[str, Tested] = {}
    for name, network in networks.items():
        network.to(session.accelerator.device).eval()
        encode = lambda signal, network=network: head.pooled(network.encode(signal)[0].float())
        found = {part: by_participant(session, part, encode) for part in cohort.names}
        if not session.accelerator.is_main_process:
            continue
        features = {part: np.stack(list(of.values())) for part, of in found.items()}
        people = list(found['train'])
        fitted = linear.fit_linear(
            features['train'], *cohort.known(people), targets, settings.seed
        )
        predictions[name] = {
            part: (list(of), fitted.predict(features[part])) for part, of in found.items()
        }
        if name == 'model':
            head.cpu().set_linear(fitted.weight, fitted.bias, fitted.centre)
    tested = predictions.pop('model', {})
    return tested, {name: found['test'][1] for name, found in predictions.items()}


def by_participant(
    session: Session, part: str, encode: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, np.ndarray]:
    """Mean over the windows of each participant of a part, of what `encode` gives for windows."""
    windows = session.windows(part)
    whose = lambda numbers: [windows[n][0].participant for n in numbers]
    batches = ((signal, whose(numbers)) for signal, _, numbers in session.batches(windows))
    with session.accelerator.autocast():
        return finetuning.mean_by_participant(encode, batches, gather_object)


def refuse_schedule(settings: TrainingSettings) -> None:
    """Refuse options of training by gradients, which a probe does not use."""
    asked = {
        '--recipe': settings.recipe, '--epochs': settings.epochs, '--lr': settings.lr,
        '--patience': settings.patience, '--dropout': settings.dropout or None,
        '--validation-share': settings.validation_share, '--resume': settings.resume,
        '--strides': None if settings.strides == (1,) else settings.strides,
    }  # fmt: skip
    if unused := [option for option, value in asked.items() if value is not None]:
        raise BrainfmError(
            f'--mode probe fits a linear model without {unused[0]}: leave it out, or choose '
            f'--mode head to train the head by gradient descent.'
        )


def head_settings(settings: TrainingSettings, network: Network, cohort: Cohort) -> dict[str, Any]:
    """Settings of a head for a network and targets; statistics are those of the training part."""
    targets, class_token = cohort.targets, network.capabilities.class_token
    assert targets is not None
    values, groups = cohort.known(cohort.part('train'))
    linear.folds_of(values, targets, settings.seed, groups)  # refused before anything is written
    trained = 'mlp' if class_token else 'linear'
    found = {
        'kind': trained if settings.mode == 'full' else 'probe',
        'pooling': settings.pooling or ('class-token' if class_token else 'mean'),
        'dropout': settings.dropout,
        'target': targets.column,
        'task': targets.problem,
    }
    if targets.problem == 'classification':
        return found | {'classes': list(targets.classes)}
    if np.std(values) == 0:
        raise BrainfmError(
            f'--target {targets.column}: all participants of the training part have the same '
            f'value: add participants, or choose another --seed.'
        )
    return found | {'mean': float(np.mean(values)), 'sd': float(np.std(values, ddof=1))}


def baselines(
    session: Session, cohort: Cohort, targets: Targets, people: list[str]
) -> Predictions:
    """Predictions for the test part that need no model: a constant, and the connectome's.

    The connectome is fitted to all participants who are not in the test part.
    """
    fitted = sorted({r.participant for r in session.store.runs if r.part != 'test'})
    known = cohort.known(fitted)
    found = {'constant': finetuning.dummy(known[0], len(people), targets)}
    if len(fitted) + len(people) <= MOST_CONNECTOMES:
        names = {run.name for run in session.store.runs}
        of = _connectomes([run for run in cohort.runs if run.name in names])
        x, new = (np.stack([of[person] for person in group]) for group in (fitted, people))
        model = linear.fit_linear(x, *known, targets, session.settings.seed)
        found['connectome'] = model.predict(new)
    else:
        LOGGER.warning(
            'The connectome is not fitted as a baseline: it holds the connectomes of all '
            'participants in memory, which is done for up to %d.', MOST_CONNECTOMES,
        )  # fmt: skip
    return found


def _connectomes(runs: list[CohortRun]) -> dict[str, np.ndarray]:
    """Fisher z (F,) float32 of each participant's connectome, mean over runs; 0 where n/a."""
    of: dict[str, list[CohortRun]] = {}
    for run in runs:
        of.setdefault(run.participant, []).append(run)
    return {person: _features(own) for person, own in of.items()}


def _features(runs: list[CohortRun]) -> np.ndarray:
    read = (read_series(run.path) for run in runs)
    mean = mean_connectome(connectome_vector(connectome(s.data, s.flagged)) for s in read)
    return np.nan_to_num(fisher_z(mean)).astype(np.float32)
