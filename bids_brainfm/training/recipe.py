"""How a network is trained: a recipe (YAML), and the rates that follow from it at every step."""

import dataclasses
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bids_brainfm.errors import BrainfmError

# What is taken for a family where no recipe is named.
OF_FAMILY = {
    'vit_mae': 'brainlm-vit', 'brainlm_mae': 'brainlm-legacy', 'brain_jepa': 'fixed',
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What the optimiser works with in one step; ``momentum`` is the target encoder's."""

    lr: float
    weight_decay: float
    momentum: float | None


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    epochs : float
        An epoch takes one window of each run.
    batch_size : int
        Windows in one step of the optimiser, over all processes.
    lr : (float, float, float)
        Learning rate at the start, after warming up (linear), and at the end (cosine).
    warmup : float
        Share of all steps.
    weight_decay : (float, float)
        At the start and at the end (cosine); of matrices only.
    lr_batch : int or None
        Batch that `lr` is meant for: it grows in proportion with the batch. None: as it is.
    micro_batch_size : int or None
        Windows that a process takes at once; gradients of several are added up. None: its part of
        the batch.
    momentum : (float, float) or None
        Of the exponential moving average that the target encoder is, at the start and at the end
        (linear).
    masks : {'fixed', 'official'} or None
        Of Brain-JEPA, see :func:`bids_brainfm.training.masking.draw_blocks`.
    layer_decay : float
        Factor on the learning rate from each layer to the one below.
    patience : int or None
        Epochs without a better score on the validation split after which training ends; the best
        weights are taken. None: it runs to its end and the last are taken.
    """

    epochs: float
    batch_size: int
    lr: tuple[float, float, float]
    warmup: float
    weight_decay: tuple[float, float]
    lr_batch: int | None = None
    micro_batch_size: int | None = None
    momentum: tuple[float, float] | None = None
    masks: str | None = None
    layer_decay: float = 1.0
    patience: int | None = None

    def steps(self, runs: int) -> int:
        """Steps of the optimiser for so many runs, at least one."""
        return max(1, int(self.epochs * runs / self.batch_size))

    def rates(self, step: int, steps: int) -> Rates:
        """Return the rates of a step.

        Parameters
        ----------
        step : int
            Steps done before it.
        steps : int
            Steps in all.

        Examples
        --------
        >>> recipe = load_recipe('fixed')
        >>> [round(recipe.rates(n, 18825).lr, 6) for n in (0, 2509, 18824)]
        [5e-05, 0.001, 1e-06]
        >>> [recipe.rates(n, 100).momentum for n in (0, 50)]
        [0.996, 0.998]
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


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def recipe_names() -> list[str]:
    """Names of the recipes that come with this package.

    >>> 'official' in recipe_names()
    True
    """
    names = (entry.name for entry in (files('bids_brainfm') / 'data' / 'training').iterdir())
    return sorted(name.removesuffix('.yml') for name in names if name.endswith('.yml'))


def load_recipe(name: str | Path, **changes) -> Recipe:
    """Load a recipe by its name, or one's own by its path, with changes to it.

    Parameters
    ----------
    name : str or path-like
    **changes
        Fields of :class:`Recipe`; one that is None stays as it is.

    Raises
    ------
    BrainfmError
        There is no such recipe, it has unknown or missing fields, or a value makes no sense.

    Examples
    --------
    >>> load_recipe('brainlm-vit', batch_size=64).batch_size
    64
    """
    import yaml

    source = Path(name)
    if str(name) in recipe_names():
        source = files('bids_brainfm') / 'data' / 'training' / f'{name}.yml'
    elif not source.is_file():
        raise BrainfmError(
            f'There is no recipe {name}: the recipes are {", ".join(recipe_names())}, or give the '
            f'path of one of your own (.yml).'
        )
    try:
        content = dict(yaml.safe_load(source.read_text(encoding='utf-8')))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise BrainfmError(f'The recipe {name} is not a YAML mapping: {error}.') from None
    content |= {key: value for key, value in changes.items() if value is not None}
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    needed = {key for key, field in known.items() if field.default is dataclasses.MISSING}
    wrong = sorted(needed - set(content)) + sorted(set(content) - set(known))
    if wrong:
        raise BrainfmError(
            f'The recipe {name} lacks or does not know: {", ".join(wrong)}; a recipe has the '
            f'fields {", ".join(known)}.'
        )
    content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    recipe = Recipe(**content)
    _check(recipe, name)
    return recipe


def _check(recipe: Recipe, name: str | Path) -> None:
    lengths = {'lr': 3, 'weight_decay': 2, 'momentum': 2}
    for key, length in lengths.items():
        value = getattr(recipe, key)
        numbers = isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)
        if value is not None and not (numbers and len(value) == length and min(value) >= 0):
            raise BrainfmError(
                f'The recipe {name}: {key} must be a list of {length} numbers from 0 upwards, '
                f'not {value!r}.'
            )
    whole = ('batch_size', 'micro_batch_size', 'lr_batch', 'patience')
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        kinds = (int,) if field.name in whole else (int, float)
        if field.name == 'masks' or (value is None and field.default is None):
            continue
        if not all(type(n) in kinds and math.isfinite(n) for n in numbers):
            raise BrainfmError(
                f'The recipe {name}: {field.name} {value!r} is not made of '
                f'{"whole " * (field.name in whole)}numbers (YAML reads 1e-3 as text: write '
                f'1.0e-3).'
            )
    sizes = {
        'epochs': recipe.epochs > 0,
        'batch_size': recipe.batch_size >= 1,
        'micro_batch_size': recipe.micro_batch_size is None or recipe.micro_batch_size >= 1,
        'lr_batch': recipe.lr_batch is None or recipe.lr_batch >= 1,
        'warmup': 0 <= recipe.warmup < 1,
        'layer_decay': 0 < recipe.layer_decay <= 1,
        'momentum': max(recipe.momentum or (0,)) <= 1,
        'patience': recipe.patience is None or recipe.patience >= 1,
        'masks': (recipe.masks is None) == (recipe.momentum is None),
    }
    for key, fits in sizes.items():
        if not fits:
            raise BrainfmError(
                f'The recipe {name}: {key} {getattr(recipe, key)!r} makes no sense; compare it '
                f'with the recipe finetune or fixed.'
            )
