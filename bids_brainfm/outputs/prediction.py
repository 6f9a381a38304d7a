"""What the head of a fine-tuned model predicts from each window of a run."""

from typing import Any

import numpy as np

from bids_brainfm.bids.files import write_matrix
from bids_brainfm.models.cards import read_parts
from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.words import WINDOW_COLUMNS, as_number, as_words, described, rows_of
from bids_brainfm.reports.report import Figure

FIGURES: dict[str, Figure] = {}
PARTS = {
    'train': 'The model was fitted to these participants',
    'validation': 'The best epoch was chosen by the predictions of these participants',
    'test': 'The model was tested on these participants, and not fitted to them',
    'unseen': 'No participant with this label took part in the training',
}
HELD_OUT = ('test', 'unseen')


def compute(context: Context) -> np.ndarray:
    """Prediction of each window, (W, C): in the target's units, or probabilities."""
    assert context.encoding.prediction is not None  # the network has a head
    return context.encoding.prediction


def part_of(context: Context) -> str:
    """Part of the participant in the training of the model, ``n/a`` if that is not known.

    Participants are matched by their label. A label of another dataset may belong to another
    person, but a prediction is never taken for held out where it is not.
    """
    spec = context.task.spec
    if not spec.trained:
        return 'unseen'
    parts = read_parts(spec.card)
    return 'n/a' if parts is None else parts.get(context.run.entities['sub'], 'unseen')


def run_prediction(windows: np.ndarray, task: str) -> np.ndarray:
    """Prediction (C,) of a run from those of its windows (W, C).

    It is their mean; for classes the mean of the logits, as in training.
    """
    if task == 'regression':
        return windows.mean(axis=0, dtype=float)
    logits = np.log(np.maximum(windows, np.finfo(np.float32).tiny), dtype=float).mean(axis=0)
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def write(context: Context, result: np.ndarray) -> None:
    """Write table and sidecar."""
    card, columns = context.task.spec.card, context.task.spec.predicted
    head, training, table = card.config['head'], card.training or {}, context.table('prediction')
    classes, target, part = head.get('classes'), head['target'], part_of(context)
    rows = [f'{row}\t{part}' for row in rows_of(context.windows, context.source)]
    write_matrix(table, result, [*WINDOW_COLUMNS, 'part', *columns], rows)
    texts = [f'Probability that {target} is {name}' for name in classes or ()]
    texts = texts or [f'Predicted {target}, in the units of the training data']
    kept = result[~context.windows.excluded]
    mean = run_prediction(kept, head['task']) if len(kept) else np.full(len(columns), np.nan)
    of_run = dict(zip(columns, mean, strict=True))
    content = {
        'Description': f'What {card.name} predicts of the participant from each window of the '
        f'run: {target} ({head["task"]}).',
        'part': {'Description': 'Part of the participant in the training of the model, by label',
                 'Levels': PARTS},
        'Target': target, 'Task': head['task'], 'Classes': classes, 'Part': part,
        'RunPrediction': of_run | {'part': part}, 'NumberOfWindows': len(kept),
        'TestScores': training.get('test'), 'TestBaselines': training.get('test_baselines'),
        'TestIntervals': training.get('test_intervals'),
        'TestDifference': training.get('test_difference'),
        'Warnings': _warnings(part, card.name, context.run.entities['sub']),
    }  # fmt: skip
    columns_described = WINDOW_COLUMNS | described(dict(zip(columns, texts, strict=True)))
    context.write_sidecar(table, columns_described | content)


def _warnings(part: str, model: str, label: str) -> list[str]:
    """Warnings of a prediction that is not held out, or may not be."""
    if part in HELD_OUT:
        return []
    text = (
        f'sub-{label} is in the {part} part of the training of {model}: the prediction is not '
        f'held out, unless this is another person with the same label.'
    )
    if part == 'n/a':
        text = (
            f'The card of {model} does not list the participants of its training, so the '
            f'prediction for sub-{label} may not be held out.'
        )
    return [text]


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """The prediction, whether it is held out, and how well held-out participants are predicted."""
    target, n, part = sidecar['Target'], sidecar['NumberOfWindows'], sidecar['Part']
    values = [value for name, value in sidecar['RunPrediction'].items() if name != 'part']
    if classes := sidecar.get('Classes'):
        pairs = zip(classes, values, strict=True)
        text = ', '.join(f'{name} with probability {as_number(value)}' for name, value in pairs)
    else:
        text = 'n/a' if values[0] is None else f'{values[0]:.4g}'
    lines = {f'Predicted {target}': f'{text} (mean of {n} window{"s" * (n != 1)})'}
    if part in PARTS and part not in HELD_OUT:
        return lines | {'In the training': f'{part} part: not held out, test scores do not apply'}
    lines['In the training'] = {'n/a': 'not known'}.get(part, part)
    if 'TestScores' in sidecar:
        baselines = sidecar.get('TestBaselines') or {}
        scored = {'model': sidecar['TestScores']}
        scored |= baselines if isinstance(baselines, dict) else {'baselines': baselines}
        lines['Test participants'] = '; '.join(
            f'{name}: {as_words(scores)}' for name, scores in scored.items()
        )
        difference = sidecar.get('TestDifference')
        if isinstance(difference, dict) and 'statement' in difference:
            lines['Model and connectome'] = str(difference['statement'])
    return lines
