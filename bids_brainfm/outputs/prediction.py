"""What the head of a fine-tuned model predicts from each window of a run."""

from typing import Any

import numpy as np

from bids_brainfm.bids.files import write_matrix
from bids_brainfm.outputs.products import Context
from bids_brainfm.outputs.words import WINDOW_COLUMNS, as_number, as_words, described, rows_of
from bids_brainfm.reports.report import Figure

FIGURES: dict[str, Figure] = {}


def compute(context: Context) -> np.ndarray:
    """Prediction of each window, (W, C): in the target's units, or probabilities."""
    assert context.encoding.prediction is not None  # the network has a head
    return context.encoding.prediction


def write(context: Context, result: np.ndarray) -> None:
    """Write table and sidecar."""
    card, columns = context.task.spec.card, context.task.spec.predicted
    head, training, table = card.config['head'], card.training or {}, context.table('prediction')
    classes, target = head.get('classes'), head['target']
    rows = rows_of(context.windows, context.source)
    write_matrix(table, result, [*WINDOW_COLUMNS, *columns], rows)
    texts = [f'Probability that {target} is {name}' for name in classes or ()]
    texts = texts or [f'Predicted {target}, in the units of the training data']
    content = {
        'Description': f'What {card.name} predicts of the participant from each window of the '
        f'run: {target} ({head["task"]}).',
        'Target': target, 'Task': head['task'], 'Classes': classes,
        'RunPrediction': dict(zip(columns, result.mean(axis=0, dtype=float), strict=True)),
        'NumberOfWindows': len(result), 'TestScores': training.get('test'),
        'TestBaselines': training.get('test_baselines'),
    }  # fmt: skip
    columns_described = WINDOW_COLUMNS | described(dict(zip(columns, texts, strict=True)))
    context.write_sidecar(table, columns_described | content)


def facts(sidecar: dict[str, Any]) -> dict[str, Any]:
    """The prediction, and how well the model predicted held-out participants."""
    target, n = sidecar['Target'], sidecar['NumberOfWindows']
    values = sidecar['RunPrediction'].values()
    if classes := sidecar.get('Classes'):
        pairs = zip(classes, values, strict=True)
        text = ', '.join(f'{name} with probability {as_number(value)}' for name, value in pairs)
    else:
        text = f'{next(iter(values)):.4g}'
    lines = {f'Predicted {target}': f'{text} (mean of {n} window{"s" * (n > 1)})'}
    if 'TestScores' in sidecar:
        baselines = sidecar.get('TestBaselines') or {}
        scored = {'model': sidecar['TestScores']}
        scored |= baselines if isinstance(baselines, dict) else {'baselines': baselines}
        lines['Held-out participants'] = '; '.join(
            f'{name}: {as_words(scores)}' for name, scores in scored.items()
        )
    return lines
