"""What every objective of a training provides to the engine."""

from collections.abc import Sequence

from torch import Tensor, nn

from bids_brainfm.models.protocol import Network


class Objective(nn.Module):
    """What a network is trained for.

    Calling it with windows (B, P, T) and what :meth:`draw` returned gives the error as a sum, the
    number of its terms, and what else is to be logged as pairs of sum and number, so that the
    mean is the same however a batch is split over processes and micro batches.
    """

    network: Network

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Draw masks for a batch by a seed for each window, (B, ...)."""
        raise NotImplementedError

    def after_step(self, momentum: float | None) -> None:
        """Do what follows a step of the optimiser: nothing."""
