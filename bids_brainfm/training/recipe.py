"""How a network is trained: a recipe (YAML), and the rates that follow from it at every step."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bids_brainfm import validation
from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import Condition, NotNegative, Positive, PositiveInt, Proportion

FOLDER = 'training'
Momentum = Annotated[float, Condition(lambda value: 0 <= value <= 1, 'from 0 to 1')]


@dataclass(frozen=True)
class Rates:
    """What the optimiser works with in one step; ``momentum`` is the target encoder's."""

    lr: float
    weight_decay: float
    momentum: float | None


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; rates are given at the start and at the end of it."""

    epochs: Positive  # an epoch takes one window of each run
    batch_size: PositiveInt  # windows in one step of the optimiser, over all processes
    lr: tuple[NotNegative, NotNegative, NotNegative]  # start, after warm-up (linear), end (cosine)
    warmup: Annotated[float, Condition(lambda value: 0 <= value < 1, 'from 0 to below 1')]
    weight_decay: tuple[NotNegative, NotNegative]  # cosine; of matrices only
    # Batch that `lr` is meant for: it grows in proportion with the batch. None: as it is.
    lr_batch: PositiveInt | None = None
    # Windows that a process takes at once, whose gradients are added up. None: its whole part.
    micro_batch_size: PositiveInt | None = None
    # Of the moving average that the target encoder is (linear), and Brain-JEPA's way to draw
    # masks, see training.masking.draw_blocks; only together.
    momentum: tuple[Momentum, Momentum] | None = None
    masks: Literal['fixed', 'official'] | None = None
    layer_decay: Proportion = 1.0  # factor on the learning rate from each layer to the one below
    # Epochs without a better score on the validation split after which training ends; the best
    # weights are taken. None: it runs to its end and the last are taken.
    patience: PositiveInt | None = None

    def __post_init__(self) -> None:
        if (self.masks is None) != (self.momentum is None):
            raise BrainfmError(
                f'masks {self.masks!r} and momentum {self.momentum!r} belong together: compare '
                'it with the recipe finetune, which has neither, or fixed, which has both.'
            )

    def steps(self, runs: int) -> int:
        """Steps of the optimiser for so many runs, at least one."""
        return max(1, int(self.epochs * runs / self.batch_size))

    def rates(self, step: int, steps: int) -> Rates:
        """Return the rates after `step` of `steps` steps.

        >>> [round(load_recipe('fixed').rates(n, 18825).lr, 6) for n in (0, 2509, 18824)]
        [5e-05, 0.001, 1e-06]
        """
        first, peak, last = self.lr
        warm = round(self.warmup * steps)
        if step < warm:
            lr = first + (peak - first) * (step + 1) / warm
        else:
            lr = _cosine(peak, last, (step + 1 - warm) / max(1, steps - warm))
        momentum = None
        if self.momentum is not None:
            low, high = self.momentum
            momentum = low + (high - low) * step / steps
        grown = self.batch_size / self.lr_batch if self.lr_batch else 1.0
        return Rates(lr * grown, _cosine(*self.weight_decay, (step + 1) / steps), momentum)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def load_recipe(name: str | Path, **changes: object) -> Recipe:
    """Load a recipe by its name, or the user's own by its path.

    `changes` are fields of :class:`Recipe` to take instead; one that is None stays as it is. What
    does not exist, or has unknown fields or values that make no sense, is refused.

    >>> load_recipe('brainlm-vit', batch_size=64).batch_size
    64
    """
    _, content = validation.read_card(name, FOLDER, 'recipe')
    content |= {key: value for key, value in changes.items() if value is not None}
    return validation.build(Recipe, content, f'The recipe {name}')
