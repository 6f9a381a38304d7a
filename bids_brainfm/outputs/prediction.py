"""What the head of a fine-tuned model says of a run: a table with a row a window."""

from pathlib import Path

import numpy as np

from bids_brainfm.bids.files import write_matrix
from bids_brainfm.bids.freshness import input_fingerprints, is_current, write_sidecar
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.outputs.context import model_metadata, table_path
from bids_brainfm.outputs.series import WINDOW_COLUMNS


def prediction_path(run: BoldRun, task) -> Path:
    """Path of the table of predictions of a run."""
    return table_path(run, task, 'prediction')


def prediction_current(run: BoldRun, task) -> bool:
    """Whether the predictions of a run stand and fit the inputs."""
    return is_current(prediction_path(run, task), input_fingerprints(run))


def remove_prediction(run: BoldRun, task) -> None:
    """Remove the predictions of a run, the sidecar first, so that nothing half old stays."""
    path = prediction_path(run, task)
    for old in (path.with_suffix('.json'), path):
        old.unlink(missing_ok=True)


def write_prediction(
    run: BoldRun, task, prediction: np.ndarray, rows: list[str], common: dict
) -> None:
    """Write the predictions of a run: table and sidecar.

    Parameters
    ----------
    run : BoldRun
    task : EncodeTask
        Of a model with a head.
    prediction : (W, C) float32
        In the target's units, or probabilities of the classes.
    rows : list of str
        First columns of the W rows, see :func:`bids_brainfm.outputs.series.window_rows`.
    common : dict
        What all sidecars of the run say.
    """
    card, columns, path = task.spec.card, task.spec.predicted, prediction_path(run, task)
    head, training = card.config['head'], card.training or {}
    classes, target = head.get('classes'), head['target']
    write_matrix(path, prediction, [*WINDOW_COLUMNS, *columns], rows)
    if classes:
        said = [f'Probability that {target} is {name}' for name in classes]
    else:
        said = [f'Predicted {target}, in the units of the training data']
    described = {c: {'Description': text} for c, text in zip(columns, said, strict=True)}
    content = {
        'Description': f'What {card.name} predicts of the participant from each window of the '
        f'run: {target} ({head["task"]}).',
        'Target': target,
        'Task': head['task'],
        'Classes': classes,
        'RunPrediction': dict(zip(columns, prediction.mean(axis=0, dtype=float), strict=True)),
        'NumberOfWindows': len(prediction),
        'TestScores': training.get('test'),
        'TestBaselines': training.get('test_baselines'),
    }
    write_sidecar(
        path,
        WINDOW_COLUMNS | described | content | model_metadata(task, task.precision) | common,
    )
