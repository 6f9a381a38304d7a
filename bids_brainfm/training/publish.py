"""What a training leaves: weights with their card, and predictions."""

import dataclasses
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import atomic, write_table
from bids_brainfm.resources import sha256_of
from bids_brainfm.training.cohort import Targets
from bids_brainfm.training.session import Session


def publish(session: Session, facts: dict, how: str) -> Path:
    """Write the network and its card, which goes to ``--model``."""
    import torch
    import yaml

    from bids_brainfm.training.engine import save_network

    settings, card, output = session.settings, session.spec.card, session.settings.output
    save_network(session.network, output)
    name = settings.name or re.sub(r'[^A-Za-z0-9-]', '-', output.absolute().name).lower()
    gradients = None
    if session.spec.gradients is not None:
        shutil.copyfile(session.spec.gradients.path, output / 'gradients.csv')
        gradients = {'name': 'gradients.csv', 'sha256': session.spec.gradients.sha256}
    started = session.spec.trained
    training = {
        'how': f'{how} with bids_brainfm {version("bids_brainfm")}',
        'from': f'{card.name}, {session.spec.weights}' if started else 'random weights',
        'runs': len(session.store.part('train')),
        'seed': settings.seed,
        'recipe': plain(dataclasses.asdict(session.recipe)),
        'steps': session.recipe.steps(len(session.store.part('train'))),
        'precision': {'bf16': 'bfloat16'}.get(session.accelerator.mixed_precision, 'float32'),
        'processes': session.accelerator.num_processes,
        'torch': f'{torch.__version__}, Python {platform.python_version()}',
    } | facts
    content = {
        field.name: getattr(card, field.name)
        for field in dataclasses.fields(card)
        if getattr(card, field.name) is not None
    } | {
        'name': name,
        'label': re.sub(r'[^A-Za-z0-9]', '', name),
        'description': f'{how} from {card.name} with bids_brainfm',
        'config': session.network.config,
        'licence': card.licence if started else 'not stated',
        'weights': [
            {'name': 'model.safetensors', 'sha256': sha256_of(output / 'model.safetensors')}
        ],
        'training': training,
    }
    if gradients:
        content['gradients'] = gradients
    with atomic(output / 'card.yml') as temporary:
        temporary.write_text(yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True))
    return output / 'card.yml'


def plain(content):
    """As YAML and JSON can say it, numbers of six digits."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    if isinstance(content, (float, np.floating)):
        return float(f'{content:.6g}')
    return content.item() if isinstance(content, np.generic) else content


def write_predictions(path: Path, tested: dict, targets: Targets, columns) -> None:
    """Write what was predicted of each participant, by part of the split, beside what is real."""
    rows = [
        (person, part, targets.values[person], row)
        for part, (people, prediction, _) in tested.items()
        for person, row in zip(people, prediction, strict=True)
    ]
    real = [targets.classes[int(v)] if targets.classes else v for _, _, v, _ in rows]
    table = {
        'participant_id': [f'sub-{person}' for person, *_ in rows],
        'part': [part for _, part, *_ in rows],
        'real': real,
    }
    table |= {f'predicted_{c}': [row[i] for *_, row in rows] for i, c in enumerate(columns)}
    write_table(path, table)
