"""The training loop of all objectives, on one process or many (Hugging Face accelerate).

What is done in a step follows from the seed and the step alone: which windows, which masks, which
rates. So a run that was interrupted goes on to the very same weights, and several processes do
together what one would do.
"""

import contextlib
import csv
import json
import math
import shutil
import signal as signals
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bids_brainfm.bids.files import atomic
from bids_brainfm.errors import BrainfmError
from bids_brainfm.training.recipe import Recipe
from bids_brainfm.training.store import WindowStream, sample_seed

# Other processes wait while the first prepares the data of a large cohort.
PATIENCE = timedelta(days=2)
KEPT_CHECKPOINTS = 2
# A network has collapsed when its latents differ between windows by so small a share of what
# they did at their most, in so many steps on end.
COLLAPSED, COLLAPSED_STEPS = 0.01, 10


@dataclass(frozen=True)
class Plan:
    """How long and where to train, and what of it is kept.

    Attributes
    ----------
    recipe : Recipe
    seed : int
    steps : int
        Steps of the optimiser in all.
    checkpoint_steps, evaluate_steps : int
        Steps between two checkpoints, and between two evaluations.
    micro_batch : int
        Windows that a process takes at once.
    output : Path
        Folder of the training.
    workers : int
        Processes that read windows ahead; 0 reads in between.
    """

    recipe: Recipe
    seed: int
    steps: int
    checkpoint_steps: int
    evaluate_steps: int
    micro_batch: int
    output: Path
    workers: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.output / 'checkpoints'


class Interrupted(Exception):
    """Training was told to end (SIGTERM) and has written a checkpoint."""


def make_accelerator(device: str, precision: str):
    """Join the processes of this training.

    Parameters
    ----------
    device : {'cpu', 'cuda'}
    precision : {'float32', 'bfloat16'}
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(
        cpu=device == 'cpu',
        mixed_precision='bf16' if precision == 'bfloat16' else 'no',
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def micro_batch_of(recipe: Recipe, processes: int) -> int:
    """Windows that a process takes at once.

    Raises
    ------
    BrainfmError
        The batch does not divide.
    """
    each, rest = divmod(recipe.batch_size, processes)
    micro = recipe.micro_batch_size or each
    if rest or not each or each % micro:
        raise BrainfmError(
            f'A batch of {recipe.batch_size} windows does not divide into {processes} '
            f'process(es) with {micro or "any"} windows at once: change --batch-size or '
            f'--micro-batch-size.'
        )
    return micro


def parameter_groups(module: nn.Module, layer_decay: float = 1.0) -> list[dict]:
    """Group the parameters that are trained, by what the optimiser does with them.

    Weight decay is for matrices only, not for biases and normalisation. With a `layer_decay`
    below 1, a layer learns more slowly the farther it is from the top.

    Returns
    -------
    list of dict
        With ``params``, ``decays`` (bool) and ``scale`` (factor on the learning rate).
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = {name: _layer(name) for name, _ in named}
    top = 1 + max((layer for layer in depth.values() if math.isfinite(layer)), default=0)
    groups: dict[tuple[bool, float], list] = {}
    for name, parameter in named:
        decays = parameter.ndim > 1 and not name.endswith('bias')
        scale = layer_decay ** (top - min(depth[name], top))
        groups.setdefault((decays, scale), []).append(parameter)
    return [{'params': p, 'decays': d, 'scale': s} for (d, s), p in groups.items()]


def _layer(name: str) -> float:
    """Number of the layer of a parameter: 0 for embeddings, infinite above the last layer."""
    parts = name.split('.')
    for kind in ('layer', 'blocks'):
        if kind in parts:
            return 1 + int(parts[parts.index(kind) + 1])
    embedded = {'embeddings', 'patch_embed', 'pos_embed_proj'} & set(parts)
    return 0 if embedded else math.inf


class Log:
    """Metrics as CSV (a row a step) and for TensorBoard.

    What an earlier attempt wrote beyond `step` is taken back.
    """

    def __init__(self, folder: Path, name: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.name = folder / f'{name}.csv', name
        kept = []
        if self.path.is_file():
            with self.path.open(newline='') as file:
                kept = [row for row in csv.DictReader(file) if int(row['step']) <= step]
        self.columns = list(kept[0]) if kept else None
        with atomic(self.path) as temporary, temporary.open('w', newline='') as file:
            if kept:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)
        self.rows = [{k: float(v) for k, v in row.items() if v} for row in kept]
        self.board = SummaryWriter(str(folder / 'tensorboard' / name), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the row of a step."""
        row = {'step': step} | values
        first = self.columns is None
        self.columns = self.columns or list(row)
        with self.path.open('a', newline='') as file:
            writer = csv.DictWriter(file, self.columns)
            if first:
                writer.writeheader()
            writer.writerow({name: row.get(name, '') for name in self.columns})
        self.rows.append(row)
        for name, value in values.items():
            self.board.add_scalar(f'{self.name}/{name}', value, step)
        self.board.flush()


@dataclass
class Progress:
    """Where training stands; part of every checkpoint."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    highest_sd: float = 0.0
    collapsing: int = 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Trainer:
    """Trains one objective.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
    objective : nn.Module
        See :mod:`bids_brainfm.training.pretraining`.
    stream : WindowStream
    targets : (runs,) Tensor, optional
        Of each run of the stream, given to the objective where it has them.
    evaluate : callable
        Gives the scores of the objective on the validation split.
    plan : Plan
    """

    def __init__(
        self,
        accelerator,
        objective: nn.Module,
        stream: WindowStream,
        evaluate: Callable[[], dict[str, float]],
        plan: Plan,
        targets: Tensor | None = None,
    ):
        self.accelerator, self.plan, self.stream = accelerator, plan, stream
        self.evaluate, self.targets = evaluate, targets
        self.objective = objective
        groups = parameter_groups(objective.trained, plan.recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        self.model, self.optimizer = accelerator.prepare(objective, optimizer)
        self.progress = Progress()
        accelerator.register_for_checkpointing(self.progress)
        self.stopping = False

    def run(self, resume: Path | None = None) -> list[dict]:
        """Train to the end.

        Parameters
        ----------
        resume : Path, optional
            Checkpoint to go on from; the latest, if there is one, where not given.

        Returns
        -------
        list of dict
            Scores of the validation split at each evaluation.

        Raises
        ------
        BrainfmError
            The loss is no number, or the latents have collapsed.
        Interrupted
            SIGTERM came; a checkpoint was written.
        """
        from tqdm import tqdm

        plan, progress, main = self.plan, self.progress, self.accelerator.is_main_process
        checkpoint = resume or latest_checkpoint(plan.checkpoints)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
        self.logs = (
            {n: Log(plan.output, n, progress.step) for n in ('train', 'validation')}
            if main
            else {}
        )
        bar = tqdm(
            total=plan.steps, initial=progress.step, desc='Training', unit='step',
            disable=None if main else True,
        )  # fmt: skip
        with bar, self._listening():
            if progress.step == 0:
                self._evaluate()
            for batches in self._batches():
                started = time.monotonic()
                facts = self._step(batches)
                done = progress.step
                facts['windows_per_second'] = plan.recipe.batch_size / (time.monotonic() - started)
                if main:
                    self.logs['train'].write(done, facts)
                bar.update()
                bar.set_postfix(loss=f'{facts["loss"]:.4g}')
                self._watch(facts)
                if done % plan.evaluate_steps == 0 or done == plan.steps:
                    self._evaluate()
                last = done == plan.steps or progress.ended
                if done % plan.checkpoint_steps == 0 or last or self.stopping:
                    self._save()
                if last:
                    break
                if self.stopping:
                    raise Interrupted
        if plan.recipe.patience is not None:
            self._take_best()
        return self.logs['validation'].rows if main else []

    def _batches(self):
        """This process's micro batches of each step that is left: [(signal, numbers)] a step."""
        plan, progress = self.plan, self.progress
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        batch, micro = plan.recipe.batch_size, plan.micro_batch
        together = micro * processes
        mine = [
            [range(s * batch + g + rank * micro, s * batch + g + (rank + 1) * micro)]
            for s in range(progress.step, plan.steps)
            for g in range(0, batch, together)
        ]
        loader = torch.utils.data.DataLoader(
            _Micro(self.stream),
            batch_sampler=mine,
            collate_fn=lambda found: found[0],
            num_workers=plan.workers,
            multiprocessing_context='spawn' if plan.workers else None,
        )
        of_step = []
        for found in loader:
            of_step.append(found)
            if len(of_step) == batch // together:
                yield of_step
                of_step = []

    def _step(self, batches: list) -> dict[str, float]:
        """One step of the optimiser."""
        plan, progress, device = self.plan, self.progress, self.accelerator.device
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rates = plan.recipe.rates(progress.step, plan.steps)
        for group in self.optimizer.param_groups:
            group['lr'] = rates.lr * group['scale']
            group['weight_decay'] = rates.weight_decay * group['decays']
        self.model.train()
        sums: dict[str, Tensor] = {}
        for i, (signal, numbers) in enumerate(batches):
            given = self._given(i, len(signal), numbers)
            # dropout, if any, is that of this step, however often training was interrupted
            torch.manual_seed(sample_seed(plan.seed, 2, progress.step, i, rank))
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    total, count, facts = self.model(signal.to(device), **given)
                self.accelerator.backward(total)
            facts['loss'] = torch.stack([total.detach().float(), count.float()])
            for name, pair in facts.items():
                sums[name] = sums.get(name, 0) + pair.float()
        names = sorted(sums)
        stop = torch.tensor([float(self.stopping), 0], device=device)
        gathered = torch.stack([sums[name] for name in names] + [stop])
        gathered = self.accelerator.reduce(gathered, 'sum').cpu()
        means = {
            name: float(pair[0] / pair[1]) for name, pair in zip(names, gathered, strict=False)
        }
        self.stopping = bool(gathered[-1, 0] > 0)
        if not math.isfinite(means['loss']):
            raise BrainfmError(
                f'The loss is {means["loss"]} at step {progress.step + 1}: lower --lr, or look '
                f'for wrong values in the series; the last checkpoint is in {plan.checkpoints}.'
            )
        # gradients are those of a sum, averaged over processes; the mean is what is wanted
        scored = float(gathered[names.index('loss'), 1])
        norms = []
        for group in self.optimizer.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    parameter.grad.mul_(processes / scored)
                    norms.append(parameter.grad.norm())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(rates.momentum)
        progress.step += 1
        facts = {'loss': means.pop('loss')} | means
        facts |= {'lr': rates.lr, 'weight_decay': rates.weight_decay}
        if rates.momentum is not None:
            facts['momentum'] = rates.momentum
        epoch = progress.step * plan.recipe.batch_size / len(self.stream.runs)
        return facts | {'gradient_norm': float(torch.stack(norms).norm()), 'epoch': epoch}

    def _given(self, micro_step: int, size: int, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What the objective is given beside the signal: its masks, or targets."""
        device = self.accelerator.device
        if self.targets is not None:
            return {'target': self.targets[numbers].to(device)}
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = self.progress.step * self.plan.recipe.batch_size + micro_step * size * processes
        positions = range(first, first + size * processes)
        seeds = [sample_seed(self.plan.seed, 3, position) for position in positions]
        part = slice(rank * size, (rank + 1) * size)
        return {k: v[part].to(device) for k, v in self.objective.draw(seeds).items()}

    def _watch(self, facts: dict[str, float]) -> None:
        """Stop where the latents of all windows have become the same."""
        sd, progress = facts.get('target_sd'), self.progress
        if sd is None:
            return
        progress.highest_sd = max(progress.highest_sd, sd)
        low = sd <= COLLAPSED * progress.highest_sd
        progress.collapsing = progress.collapsing + 1 if low else 0
        if progress.collapsing >= COLLAPSED_STEPS:
            raise BrainfmError(
                f'The latents have collapsed at step {progress.step}: between windows they differ '
                f'by {sd:.2g} (SD), where it was {progress.highest_sd:.2g} before; lower --lr, '
                f'take a larger batch, or check that the series differ between runs.'
            )

    def _evaluate(self) -> None:
        self.objective.eval()
        scores, progress = self.evaluate(), self.progress
        if self.logs:
            self.logs['validation'].write(progress.step, scores)
        patience = self.plan.recipe.patience
        if patience is None or progress.step == 0:
            return
        if scores[self.objective.selects] < progress.best:
            progress.best, progress.best_step = scores[self.objective.selects], progress.step
            progress.waited = 0
            if self.accelerator.is_main_process:
                with atomic(self.plan.checkpoints / 'best.safetensors') as temporary:
                    _save_state(self.objective.network, temporary)
        else:
            progress.waited += 1
            progress.ended = progress.waited >= patience

    def _take_best(self) -> None:
        from safetensors.torch import load_file

        self.accelerator.wait_for_everyone()
        best = load_file(self.plan.checkpoints / 'best.safetensors')
        self.objective.network.load_state_dict(best)

    def _save(self) -> None:
        """Write a checkpoint that has its name only when it is whole."""
        folder = self.plan.checkpoints / f'step-{self.progress.step:08d}'
        part = folder.with_name(f'.{folder.name}.part')
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(part))
        except OSError as error:
            raise BrainfmError(
                f'{folder} cannot be written ({error.strerror or error}): check the free space.'
            ) from error
        self.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
            for old in sorted(self.plan.checkpoints.glob('step-*'))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _listening(self):
        """Take SIGTERM (Slurm's preemption) as a wish to end after this step."""

        def stop(*_):
            self.stopping = True

        before = signals.signal(signals.SIGTERM, stop)
        try:
            yield
        finally:
            signals.signal(signals.SIGTERM, before)


class _Micro(torch.utils.data.Dataset):
    """Micro batches (B, P, T) and run numbers of ranges of positions."""

    def __init__(self, stream: WindowStream):
        self.stream = stream

    def __getitem__(self, positions: range) -> tuple[Tensor, list[int]]:
        found = [self.stream[position] for position in positions]
        return torch.from_numpy(np.stack([w for w, _ in found])), [n for _, n in found]


def latest_checkpoint(folder: Path) -> Path | None:
    """Last checkpoint of a training, None where there is none yet."""
    found = sorted(folder.glob('step-*'))
    return found[-1] if found else None


def _save_state(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, path)


def save_network(network: nn.Module, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` in Hugging Face's layout."""
    with atomic(folder / 'config.json') as temporary:
        temporary.write_text(json.dumps(network.config, indent=2) + '\n')
    with atomic(folder / 'model.safetensors') as temporary:
        _save_state(network, temporary)
