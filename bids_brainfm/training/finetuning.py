"""Fine-tuning and probing: a head that predicts something of participants."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bids_brainfm.analyses.scores import score
from bids_brainfm.models.head import Head
from bids_brainfm.models.protocol import Network
from bids_brainfm.training.cohort import Targets
from bids_brainfm.training.objective import Objective


class Supervised(Objective):
    """Predict a target of each window's participant by a network with a head.

    Where it is `frozen`, only the head learns (a probe).
    """

    def __init__(self, network: Network, frozen: bool):
        super().__init__()
        self.network, self.frozen = network, frozen
        tables = network.position_tables()
        network.requires_grad_(False)
        if not frozen:
            for name, parameter in network.named_parameters():
                if name.startswith(f'{network.trunk}.') and name not in tables:
                    parameter.requires_grad_(True)
        self.head.requires_grad_(True)

    @property
    def head(self) -> Head:
        """The head of the network."""
        assert self.network.head is not None
        return self.network.head

    def train(self, mode: bool = True) -> 'Supervised':
        """Leave a network that does not learn as it is when it is used."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
            self.head.train(mode)
        return self

    def forward(self, signal: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed loss, the number of windows, and nothing else to log.

        Targets (B,) are standardised values, or numbers of classes.
        """
        total = loss_of(self.outputs(signal), target, self.head.task, 'sum')
        return total, torch.tensor(len(signal), device=signal.device), {}

    def outputs(self, signal: Tensor) -> Tensor:
        """Outputs of the head (B, C): standardised, or logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.network.encode(signal)[0]
        return self.head(hidden.float())


def loss_of(outputs: Tensor, target: Tensor, problem: str, reduction: str = 'mean') -> Tensor:
    """Squared error or cross-entropy of outputs (B, C) and targets (B,) float."""
    if problem == 'regression':
        return F.mse_loss(outputs[:, 0].float(), target, reduction=reduction)
    return F.cross_entropy(outputs.float(), target.long(), reduction=reduction)


@torch.no_grad()
def outputs_by_participant(
    objective: Supervised, batches: Iterable[tuple[Tensor, Sequence[str]]],
    gather: Callable[[list[Any]], list[Any]],
) -> dict[str, Tensor]:  # fmt: skip
    """Mean output (C,) over all windows of each participant; of classes, log of mean probability.

    `batches` are this process's; `gather` joins the lists of all processes.
    """
    found: list[tuple[str, list[float]]] = []
    for signal, people in batches:
        outputs = objective.outputs(signal).float().cpu()
        found += list(zip(people, outputs.tolist(), strict=True))
    regressed = objective.head.task == 'regression'
    joined: dict[str, Tensor] = {}
    for person, group in itertools.groupby(sorted(gather(found)), lambda item: item[0]):
        rows = torch.tensor([output for _, output in group])
        joined[person] = rows.mean(0) if regressed else rows.softmax(1).mean(0).log()
    return joined


def scores_of(prediction: np.ndarray, target: np.ndarray, targets: Targets) -> dict[str, float]:
    """Score predictions of participants, (N, 1) in the target's units or (N, C) of classes.

    Regression: ``mse``, ``mae``, ``r2``, ``r`` (NaN where the prediction is constant); else
    ``accuracy``, ``balanced_accuracy``, ``f1`` (mean over classes), ``auroc`` for two classes.
    """
    if targets.problem == 'regression':
        found = score(prediction[:, 0], target)
        mae = float(np.abs(prediction[:, 0] - target).mean())
        return {'mse': float(found.mse), 'mae': mae, 'r2': float(found.r2), 'r': float(found.r)}
    from sklearn import metrics

    real, chosen = target.astype(int), prediction.argmax(1)
    scores = {
        'accuracy': metrics.accuracy_score(real, chosen),
        'balanced_accuracy': metrics.balanced_accuracy_score(real, chosen),
        'f1': metrics.f1_score(real, chosen, average='macro'),
    }
    if len(targets.classes) == 2 and len(set(real)) == 2:
        scores['auroc'] = metrics.roc_auc_score(real, prediction[:, 1] - prediction[:, 0])
    return {name: float(value) for name, value in scores.items()}


def dummy(train: np.ndarray, n: int, targets: Targets) -> np.ndarray:
    """Predict the mean of the training part, or its most frequent class, for `n` participants."""
    if targets.problem == 'regression':
        return np.full((n, 1), train.mean())
    counts = np.bincount(train.astype(int), minlength=len(targets.classes))
    largest = counts == counts.max()
    return np.tile(largest / largest.sum(), (n, 1))


def connectome_ridge(
    train: np.ndarray, target: np.ndarray, test: np.ndarray, targets: Targets
) -> np.ndarray:
    """Ridge regression on connectomes (N, F) and (M, F), penalty by leave one out: (M, 1 or C)."""
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV

    penalties = np.logspace(-1, 6, 15)
    if targets.problem == 'regression':
        return RidgeCV(penalties).fit(train, target).predict(test)[:, None]
    decision = RidgeClassifierCV(penalties).fit(train, target).decision_function(test)
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
