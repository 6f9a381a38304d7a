"""What a training leaves: weights with their card, and predictions."""

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from bids_brainfm.bids.files import atomic, write_table
from bids_brainfm.models.files import CONFIG_FILE
from bids_brainfm.resources import sha256_of
from bids_brainfm.training.cohort import Targets
from bids_brainfm.training.engine import save_weights
from bids_brainfm.training.preparation import PARTICIPANTS
from bids_brainfm.training.session import Session


def publish(session: Session, facts: dict[str, Any], how: str) -> Path:
    """Write the network in Hugging Face's layout, and its card, which goes to ``--model``."""
    settings, card, output = session.settings, session.spec.card, session.settings.output
    weights = output / 'model.safetensors'
    described = output / CONFIG_FILE
    with atomic(described) as temporary:
        temporary.write_text(json.dumps(session.network.config, indent=2) + '\n')
    with atomic(weights) as temporary:
        save_weights(session.network, temporary)
    name = settings.name or re.sub(r'[^A-Za-z0-9-]', '-', output.absolute().name).lower()
    started = session.spec.trained
    training = {
        'how': f'{how} with bids_brainfm {version("bids_brainfm")}',
        'from': f'{card.name}, {session.spec.weights}' if started else 'random weights',
        'runs': len(session.store.part('train')),
        'runs_left_out': len(session.store.left_out),
        'flagged': session.store.flagged_proportion('train'),
        'seed': settings.seed,
        'group_column': list(settings.group_column) or None,
        'precision': session.precision,
        'processes': session.accelerator.num_processes,
        'torch': f'{torch.__version__}, Python {platform.python_version()}',
    } | facts
    training = {key: value for key, value in training.items() if value is not None}
    fields = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    content = {key: value for key, value in fields.items() if value is not None} | {
        'name': name,
        'label': re.sub(r'[^A-Za-z0-9]', '', name),
        'description': f'{how} from {card.name} with bids_brainfm',
        'config': session.network.config,
        'licence': card.licence if started else 'not stated',
        'weights': [
            {'name': path.name, 'sha256': sha256_of(path)} for path in (described, weights)
        ],
        'participants': {'name': PARTICIPANTS, 'sha256': sha256_of(output / PARTICIPANTS)},
        'training': training,
    }
    if session.spec.gradients is not None:
        shutil.copyfile(session.spec.gradients.path, output / 'gradients.csv')
        content['gradients'] = {'name': 'gradients.csv', 'sha256': session.spec.gradients.sha256}
    with atomic(output / 'card.yml') as temporary:
        temporary.write_text(yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True))
    return output / 'card.yml'


def schedule_of(session: Session) -> dict[str, Any]:
    """What a card says of training by gradients."""
    steps = session.recipe.steps(len(session.store.part('train')))
    return {'recipe': dataclasses.asdict(session.recipe), 'steps': steps}


def plain(content: Any) -> Any:
    """As YAML and JSON can say it, numbers of six digits."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, (float, np.floating)):
        return float(f'{content:.6g}')
    return content.item() if isinstance(content, np.generic) else content


Tested = dict[str, tuple[list[str], np.ndarray]]  # participants and predictions (N, C), by part


def write_predictions(
    path: Path, tested: Tested, targets: Targets, columns: Sequence[str]
) -> None:
    """Write what was predicted of each participant, and what is real, by part of the split."""
    people = [person for labels, _ in tested.values() for person in labels]
    real = [targets.values[person] for person in people]
    table = {
        'participant_id': [f'sub-{person}' for person in people],
        'part': [part for part, (labels, _) in tested.items() for _ in labels],
        'real': [targets.classes[int(v)] for v in real] if targets.classes else real,
    }
    values = np.concatenate([prediction for _, prediction in tested.values()])
    write_table(path, table | {f'predicted_{c}': values[:, i] for i, c in enumerate(columns)})
