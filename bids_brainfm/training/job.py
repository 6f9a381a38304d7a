"""Pretraining and fine-tuning from derivatives to a checkpoint that ``--model`` takes."""

from functools import partial
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import write_json
from bids_brainfm.errors import BrainfmError
from bids_brainfm.signals.series import read_series
from bids_brainfm.training.cohort import count_parts
from bids_brainfm.training.publish import plain, publish, write_predictions
from bids_brainfm.training.recipe import OF_FAMILY, Recipe
from bids_brainfm.training.session import Cohort, Session, TrainingSettings, start, train

# Windows of the validation split that are evaluated at most, one of each run first
EVALUATED = 256
# Participants up to whom the connectome baseline is fitted: it holds all connectomes in memory
MOST_CONNECTOMES = 5000


def pretrain(settings: TrainingSettings) -> Path | None:
    """Pretrain a network on the parcel series of a cohort.

    Returns
    -------
    Path or None
        The card of the trained model; None in processes other than the first.

    Raises
    ------
    BrainfmError
        Something is wrong with the settings or the data.
    """
    from bids_brainfm.training.store import sample_seed

    check = lambda recipe, network: objective_for(settings, recipe, network).draw([0])
    session, _ = start(settings, None, check=check)
    objective = objective_for(settings, session.recipe, session.network, session.xyz)
    asked = {'mask_ratio': settings.mask_ratio, 'loss_fn': settings.loss}
    session.network.config |= {key: value for key, value in asked.items() if value is not None}
    held = session.windows('validation', EVALUATED)

    def evaluate():
        batches = (
            (signal, [sample_seed(settings.seed, 4, n) for n in numbers])
            for signal, numbers in session.batches(held)
        )
        with session.accelerator.autocast():
            return objective.evaluate(batches, session.reduce)

    rows = train(session, objective, evaluate)
    if not session.accelerator.is_main_process:
        return None
    first, last = ({k: v for k, v in row.items() if k != 'step'} for row in (rows[0], rows[-1]))
    facts = {
        'held_out_windows': len(held),
        'held_out_untrained': plain(first),
        'held_out': plain(last),
    }
    return publish(session, facts, 'Pretrained')


def objective_for(settings: TrainingSettings, recipe: Recipe, network, xyz=None):
    """The objective that a network of a family is pretrained with.

    Raises
    ------
    BrainfmError
        Masks cannot be had for this network, or the recipe is for another family.
    """
    from bids_brainfm.training.pretraining import LatentPrediction, MaskedAutoencoding

    config, latent = network.config, hasattr(network, 'latent_error')
    if latent != (recipe.masks is not None and recipe.momentum is not None):
        raise BrainfmError(
            f'--recipe {settings.recipe}: a model of the family {config["model_type"]} takes a '
            f'recipe {"with" if latent else "without"} masks and momentum, such as '
            f'{OF_FAMILY[config["model_type"]]}.'
        )
    if latent:
        return LatentPrediction(network, recipe.masks)
    return MaskedAutoencoding(
        network,
        config['mask_ratio'] if settings.mask_ratio is None else settings.mask_ratio,
        settings.masking,
        settings.loss or config.get('loss_fn', 'mse'),
        config.get('norm_pix_loss', False),
        xyz,
    )


def finetune(settings: TrainingSettings) -> Path | None:
    """Fit a head on a network, with or without the network, and test it on held-out people.

    Returns
    -------
    Path or None
        The card of the trained model; None in processes other than the first.

    Raises
    ------
    BrainfmError
        Something is wrong with the settings or the data.
    """
    import torch
    from accelerate.utils import gather_object

    from bids_brainfm.training import finetuning

    probe = settings.mode == 'probe'
    session, cohort = start(
        settings, 'probe' if probe else 'finetune', partial(head_settings, settings)
    )
    targets, head = cohort.targets, session.network.head
    objective = finetuning.Supervised(session.network, probe, session.xyz)
    centre, spread = head.settings.get('mean', 0.0), head.settings.get('sd', 1.0)
    wanted = lambda label: (targets.values[label] - centre) / spread
    in_training = torch.tensor([wanted(r.participant) for r in session.store.part('train')])

    def outputs(part):
        windows = session.windows(part)
        batches = (
            (signal, [windows[n][0].participant for n in numbers])
            for signal, numbers in session.batches(windows)
        )
        objective.eval()
        with session.accelerator.autocast():
            return finetuning.outputs_by_participant(objective, batches, gather_object)

    def scored(part):
        found = outputs(part)
        made = torch.stack(list(found.values()))
        loss = finetuning.loss_of(
            made, torch.tensor([wanted(p) for p in found]).float(), targets.problem
        )
        prediction = head.predict(made).numpy()
        real = np.array([targets.values[p] for p in found])
        scores = finetuning.scores_of(prediction, real, targets)
        return list(found), prediction, {'loss': float(loss)} | scores

    train(session, objective, lambda: scored('validation')[2], in_training.float())
    tested = {part: scored(part) for part in ('train', 'validation', 'test')}
    if not session.accelerator.is_main_process:
        return None
    people, _, scores = tested['test']
    facts = {
        'target': targets.column,
        'participants': count_parts(cohort.parts),
        'validation': tested['validation'][2],
        'test': scores,
        'test_baselines': baselines(cohort, session, people),
    }
    write_predictions(settings.output / 'predictions.tsv', tested, targets, head.columns)
    write_json(settings.output / 'scores.json', plain(facts))
    return publish(session, plain(facts), 'Probed' if probe else 'Fine-tuned')


def head_settings(settings: TrainingSettings, network, cohort: Cohort) -> dict:
    """Settings of a head for a network and targets; statistics are those of the training part."""
    targets = cohort.targets
    classes = network.has_class_token
    kind = 'probe' if settings.mode == 'probe' else 'mlp' if classes else 'linear'
    found = {
        'kind': kind,
        'pooling': settings.pooling or ('class-token' if classes else 'mean'),
        'dropout': settings.dropout,
        'target': targets.column,
        'task': targets.problem,
    }
    if targets.problem == 'classification':
        return found | {'classes': list(targets.classes)}
    values = [targets.values[p] for p, part in cohort.parts.items() if part == 'train']
    if np.std(values) == 0:
        raise BrainfmError(
            f'--target {targets.column}: all participants of the training part have the same '
            f'value: add participants, or choose another --seed.'
        )
    return found | {'mean': float(np.mean(values)), 'sd': float(np.std(values, ddof=1))}


def baselines(cohort: Cohort, session: Session, people: list[str]) -> dict[str, dict]:
    """Scores on the test part of what needs no model: a constant, and the connectome."""
    from bids_brainfm.training import finetuning

    targets = cohort.targets
    train = [p for p, part in cohort.parts.items() if part == 'train']
    known, real = (np.array([targets.values[p] for p in group]) for group in (train, people))
    found = {'constant': finetuning.dummy(known, len(people), targets)}
    if len(train) + len(people) <= MOST_CONNECTOMES:
        of = {group: _connectomes(cohort, group) for group in (tuple(train), tuple(people))}
        found['connectome ridge'] = finetuning.connectome_ridge(
            of[tuple(train)], known, of[tuple(people)], targets
        )
    return {n: finetuning.scores_of(made, real, targets) for n, made in found.items()}


def _connectomes(cohort: Cohort, people: tuple[str, ...]) -> np.ndarray:
    """Connectome (N, F) of each participant, mean over runs; 0 where a parcel is n/a."""
    from bids_brainfm.models.connectome import connectome, connectome_vector

    of: dict[str, list] = {person: [] for person in people}
    for run in cohort.runs:
        if run.participant in of:
            vector = connectome_vector(connectome(read_series(run.path).data))
            of[run.participant].append(np.nan_to_num(vector))
    return np.stack([np.mean(rows, axis=0) for rows in of.values()])
