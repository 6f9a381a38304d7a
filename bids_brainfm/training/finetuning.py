"""Fine-tuning: a head that predicts something of participants, trained by gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bids_brainfm.models.head import Head
from bids_brainfm.models.protocol import Network
from bids_brainfm.training.cohort import Targets
from bids_brainfm.training.objective import Objective


class Supervised(Objective):
    """Predict a target of each window's participant by a network with a head.

    Where it is `frozen`, only the head learns.
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
def mean_by_participant(
    encode: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Sequence[str]]],
    gather: Callable[[list[Any]], list[Any]],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Mean (C,) over all windows of each participant of what `encode` gives for each, (B, C).

    `batches` are this process's; `gather` joins the lists of all processes.
    """
    sums: dict[str, tuple[np.ndarray, int]] = {}
    for signal, people in batches:
        for person, row in zip(people, encode(signal).double().cpu().numpy(), strict=True):
            total, n = sums.get(person, (0.0, 0))
            sums[person] = total + row, n + 1
    joined: dict[str, tuple[np.ndarray, int]] = {}
    for person, (more, count) in sorted(gather(list(sums.items())), key=lambda item: item[0]):
        total, n = joined.get(person, (0.0, 0))
        joined[person] = total + more, n + count
    return {person: total / n for person, (total, n) in joined.items()}


def dummy(train: np.ndarray, n: int, targets: Targets) -> np.ndarray:
    """Predict the mean of the training part, or its most frequent class, for `n` participants."""
    if targets.problem == 'regression':
        return np.full((n, 1), train.mean())
    counts = np.bincount(train.astype(int), minlength=len(targets.classes))
    largest = counts == counts.max()
    return np.tile(largest / largest.sum(), (n, 1))
