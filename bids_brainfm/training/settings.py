"""The options of a training, and what belongs to them: its folder and its recipe."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.recipe import Recipe, load_recipe
from bids_brainfm.training.split import PARTS
from bids_brainfm.training.store import FORMAT

SETTINGS = 'settings.json'


@dataclass(frozen=True)
class TrainingSettings:
    """The options of the command; None: the default of the recipe, the model or the family."""

    model: str
    output: Path
    data: tuple[Path, ...]
    home: Path
    recipe: str | None = None
    epochs: float | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    lr: float | None = None
    patience: int | None = None
    seed: int = 0
    name: str | None = None
    scale: str | None = None
    scale_stats: Path | None = None
    min_coverage: float = 0.5
    mix_trs: bool = False
    max_flagged: float | None = None
    strides: tuple[int, ...] = (1,)
    group_column: tuple[str, ...] = ()
    validation_share: float | None = None
    test_share: float = 0.2
    checkpoint_steps: int = 200
    evaluate_epochs: float = 1.0
    resume: Path | None = None
    device: str = 'cpu'
    precision: str | None = None
    workers: int = 0
    nthreads: int = 1
    # pretraining
    mask_ratio: float | None = None
    masking: str = 'random'
    loss: str | None = None
    warm_start: bool = False
    # fine-tuning
    target: str | None = None
    problem: str | None = None
    drop_missing: bool = False
    mode: str = 'full'  # or head, probe
    pooling: str | None = None
    dropout: float = 0.0
    random_weights: bool = False

    # What may change between the start of a training and its continuation.
    FREE: ClassVar[tuple[str, ...]] = (
        'home', 'resume', 'device', 'workers', 'nthreads', 'checkpoint_steps', 'micro_batch_size',
        'output',
    )  # fmt: skip

    @property
    def proportions(self) -> dict[str, float]:
        """Proportion of participants in each part. A probe needs no validation part."""
        validation = 0.0 if self.mode == 'probe' else self.validation_share
        if validation is None:
            validation = 0.1 if self.target is None else 0.2
        test = 0.0 if self.target is None else self.test_share
        parts = zip(PARTS, (1 - validation - test, validation, test), strict=True)
        return {name: proportion for name, proportion in parts if proportion}

    def recorded(self) -> dict[str, Any]:
        """What must stay the same when a training is continued."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.FREE}
        return json.loads(json.dumps(values, default=str))


def claim_output(settings: TrainingSettings) -> None:
    """Refuse a folder that holds something other than this very training."""
    output, path = settings.output, settings.output / SETTINGS
    if not output.exists() or not any(output.iterdir()):
        return
    if not path.is_file():
        raise BrainfmError(f'{output} is not empty and holds no training: name another folder.')
    record = read_sidecar(path)
    if record is None:
        raise BrainfmError(
            f'{path} is damaged, so the settings of this training are not known: name another '
            f'folder.'
        )
    if record.get('format') != FORMAT:
        raise BrainfmError(
            f'{output} holds a training by bids_brainfm {record.get("software")}, which scored '
            f'flagged volumes: name another folder.'
        )
    before, now = record['settings'], settings.recorded()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise BrainfmError(
            f'{output} holds a training with {changed[0]} {before.get(changed[0])!r}, now it is '
            f'{now[changed[0]]!r}: continue with the same settings, or name another folder.'
        )


def choose_recipe(settings: TrainingSettings, default: str) -> Recipe:
    """Load the recipe with the changes that were asked for."""
    fields = ('epochs', 'batch_size', 'micro_batch_size', 'patience')
    changes = {field: getattr(settings, field) for field in fields}
    recipe = load_recipe(settings.recipe or default, **changes)
    if settings.lr is not None:  # asked for in so many words: not scaled by the batch
        first, peak, last = recipe.lr
        ratio = settings.lr / peak
        lr = (first * ratio, settings.lr, last * ratio)
        recipe = dataclasses.replace(recipe, lr=lr, lr_batch=None)
    return recipe
