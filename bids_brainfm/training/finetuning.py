"""Fine-tuning and probing: a head that predicts something of participants."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.training.cohort import Targets


class Supervised(nn.Module):
    """Predict a target of each window's participant.

    Parameters
    ----------
    network : nn.Module
        With a head (:class:`bids_brainfm.models.head.Head`).
    frozen : bool
        Whether only the head learns (a probe).
    xyz : (1, P, 3) Tensor, optional
        Parcel centres in mm, for the family that needs them.
    """

    selects = 'loss'

    def __init__(self, network: nn.Module, frozen: bool, xyz: Tensor | None = None):
        super().__init__()
        self.network, self.frozen = network, frozen
        self.register_buffer('xyz', xyz, persistent=False)
        tables = network.position_tables()
        network.requires_grad_(False)
        if not frozen:
            for name, parameter in network.named_parameters():
                if name.startswith(f'{network.trunk}.') and name not in tables:
                    parameter.requires_grad_(True)
        network.head.requires_grad_(True)

    @property
    def trained(self) -> nn.Module:
        """What is optimised, where it asks for gradients."""
        return self.network

    def train(self, mode: bool = True) -> 'Supervised':
        """Leave a network that does not learn as it is when it is used."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
            self.network.head.train(mode)
        return self

    def forward(self, signal: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Return the summed loss, the number of windows, and nothing else to log.

        Parameters
        ----------
        signal : (B, P, T)
        target : (B,) float
            Standardised, or the number of the class.
        """
        total = loss_of(self.outputs(signal), target, self.network.head.task, 'sum')
        return total, torch.tensor(len(signal), device=signal.device), {}

    def outputs(self, signal: Tensor) -> Tensor:
        """Outputs of the head (B, C): standardised, or logits."""
        place = () if self.xyz is None else (self.xyz,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.network.encode(signal, *place)[0]
        return self.network.head(hidden.float())

    def after_step(self, momentum: float | None) -> None:
        """Nothing follows a step."""


def loss_of(outputs: Tensor, target: Tensor, problem: str, reduction: str = 'mean') -> Tensor:
    """Squared error of standardised values, or cross-entropy of classes.

    Parameters
    ----------
    outputs : (B, C)
    target : (B,) float
    problem : {'regression', 'classification'}
    """
    if problem == 'regression':
        return F.mse_loss(outputs[:, 0].float(), target, reduction=reduction)
    return F.cross_entropy(outputs.float(), target.long(), reduction=reduction)


@torch.no_grad()
def outputs_by_participant(
    objective: Supervised,
    batches: Iterable[tuple[Tensor, Sequence[str]]],
    gather: Callable[[list], list],
) -> dict[str, Tensor]:
    """Mean output (C,) over all windows of each participant; of classes, log of mean probability.

    Parameters
    ----------
    objective : Supervised
    batches : iterable of (signal (B, P, T), participants of the B windows)
        This process's.
    gather : callable
        Joins the lists of all processes.
    """
    found = []
    for signal, people in batches:
        outputs = objective.outputs(signal).float().cpu()
        found += list(zip(people, outputs.tolist(), strict=True))
    by_person: dict[str, list] = {}
    for person, outputs in sorted(gather(found)):
        by_person.setdefault(person, []).append(outputs)
    regressed = objective.network.head.task == 'regression'
    joined = {person: torch.tensor(rows) for person, rows in by_person.items()}
    return {
        person: rows.mean(0) if regressed else rows.softmax(1).mean(0).log()
        for person, rows in joined.items()
    }


def scores_of(prediction: np.ndarray, target: np.ndarray, targets: Targets) -> dict[str, float]:
    """Score predictions of participants.

    Parameters
    ----------
    prediction : (N, 1) in the target's units, or (N, C) scores of classes
    target : (N,) float
    targets : Targets

    Returns
    -------
    dict
        Regression: ``mse``, ``mae``, ``r2``, ``r`` (NaN where the prediction is constant).
        Classification: ``accuracy``, ``balanced_accuracy``, ``f1`` (mean over classes), and
        ``auroc`` for two classes.
    """
    if targets.problem == 'regression':
        from bids_brainfm.analyses.scores import score

        found = score(prediction[:, 0], target)
        mae = float(np.abs(prediction[:, 0] - target).mean())
        return {'mse': float(found.mse), 'mae': mae, 'r2': float(found.r2), 'r': float(found.r)}
    from sklearn import metrics

    real, chosen = target.astype(int), prediction.argmax(1)
    found = {
        'accuracy': metrics.accuracy_score(real, chosen),
        'balanced_accuracy': metrics.balanced_accuracy_score(real, chosen),
        'f1': metrics.f1_score(real, chosen, average='macro'),
    }
    if len(targets.classes) == 2 and len(set(real)) == 2:
        found['auroc'] = metrics.roc_auc_score(real, prediction[:, 1] - prediction[:, 0])
    return {name: float(value) for name, value in found.items()}


def dummy(train: np.ndarray, n: int, targets: Targets) -> np.ndarray:
    """Predict the mean of the training part, or its most frequent class, for `n` participants."""
    if targets.problem == 'regression':
        return np.full((n, 1), train.mean())
    counts = np.bincount(train.astype(int), minlength=len(targets.classes))
    return np.tile((counts == counts.max()) / (counts == counts.max()).sum(), (n, 1))


def connectome_ridge(
    train: np.ndarray, target: np.ndarray, test: np.ndarray, targets: Targets
) -> np.ndarray:
    """Predict from functional connectivity by ridge regression: what any model must beat.

    The penalty is chosen on the training part alone (leave one out).

    Parameters
    ----------
    train, test : (N, F) and (M, F) float
        Connectome of each participant, mean over runs.
    target : (N,) float
    targets : Targets

    Returns
    -------
    (M, 1) or (M, C) float
    """
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV

    penalties = np.logspace(-1, 6, 15)
    if targets.problem == 'regression':
        return RidgeCV(penalties).fit(train, target).predict(test)[:, None]
    found = RidgeClassifierCV(penalties).fit(train, target).decision_function(test)
    return np.stack([-found, found], axis=1) if found.ndim == 1 else found
