"""The training loop of all objectives, on one process or many (Hugging Face accelerate).

What is done in a step follows from the seed and the step alone: which windows, which masks, which
rates. So a run that was interrupted goes on to the very same weights, and several processes do
together what one would do.
"""

import contextlib
import csv
import itertools
import math
import operator
import shutil
import signal as signals
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from bids_brainfm.bids.files import atomic
from bids_brainfm.bids.freshness import (
    check_checksums,
    check_contents,
    write_checksums,
    write_sidecar,
)
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.protocol import Network
from bids_brainfm.training.objective import Objective
from bids_brainfm.training.session import MicroBatch, Session
from bids_brainfm.training.store import WindowStream, sample_seed

BEST = 'best.safetensors'  # weights with the best score, among the checkpoints
KEPT_CHECKPOINTS = 2
# A network has collapsed when its latents differ between windows by so small a proportion of what
# they did at their most, in so many steps on end.
COLLAPSED, COLLAPSED_STEPS = 0.01, 10


class Interrupted(Exception):
    """Training was interrupted (SIGTERM) and has written a checkpoint."""


def parameter_groups(network: Network, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group the parameters that are trained, by what the optimiser does with them.

    Weight decay is for matrices only, not for biases and normalisation. With a `layer_decay`
    below 1, ``scale``, a factor on the learning rate, falls from the top layer downwards.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    depth = {name: _layer(name) for name, _ in named}
    top = 1 + max((layer for layer in depth.values() if math.isfinite(layer)), default=0)
    groups: dict[tuple[bool, float], list[Tensor]] = {}
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


@dataclass
class Progress:
    """How far training is; part of every checkpoint."""

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    ended: bool = False
    highest_sd: float = 0.0
    collapsing: int = 0
    state_dict = asdict  # what a checkpoint holds of it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        vars(self).update(state)


class Log:
    """Metrics as CSV (one row per step) and for TensorBoard; rows beyond `step` are removed."""

    def __init__(self, folder: Path, name: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.name = folder / f'{name}.csv', name
        kept: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline='') as file:
                kept = [row for row in csv.DictReader(file) if int(row['step']) <= step]
        self.columns = list(kept[0]) if kept else []
        with atomic(self.path) as temporary:
            temporary.touch()
            if kept:
                self._append(temporary, kept, header=True)
        self.rows = [{k: float(v) for k, v in row.items() if v} for row in kept]
        self.board = SummaryWriter(str(folder / 'tensorboard' / name), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the row of a step."""
        row, header = {'step': step} | values, not self.columns
        self.columns = self.columns or list(row)
        self._append(self.path, [row], header)
        self.rows.append(row)
        for name, value in values.items():
            self.board.add_scalar(f'{self.name}/{name}', value, step)
        self.board.flush()

    def _append(self, path: Path, rows: list[dict[str, Any]], header: bool) -> None:
        with path.open('a', newline='') as file:
            writer = csv.DictWriter(file, self.columns, extrasaction='ignore')
            if header:
                writer.writeheader()
            writer.writerows(rows)


class Trainer:
    """Trains one objective on the training part of a cohort.

    `evaluate` gives its scores on the validation part. Targets (runs,) of the training part are
    given to the objective in place of what it draws.
    """

    def __init__(
        self, session: Session, objective: Objective, evaluate: Callable[[], dict[str, float]],
        targets: Tensor | None = None,
    ):  # fmt: skip
        settings, recipe = session.settings, session.recipe
        self.session, self.settings, self.recipe = session, settings, recipe
        self.objective, self.evaluate, self.targets = objective, evaluate, targets
        self.accelerator, self.output = session.accelerator, settings.output
        self.checkpoints = settings.output / 'checkpoints'
        runs = session.store.part('train')
        self.steps = recipe.steps(len(runs))
        self.steps_of_epoch = len(runs) / recipe.batch_size
        self.stream = WindowStream(
            session.store, runs, session.spec.card.window, settings.seed, settings.strides,
            session.order,
        )  # fmt: skip
        groups = parameter_groups(objective.network, recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.stopping = False
        self.logs: dict[str, Log] = {}

    def run(self) -> list[dict[str, float]]:
        """Train to the end, from the checkpoint that was asked for or the latest.

        Returns the scores of the validation part at each evaluation. Raises BrainfmError where
        the loss is no number or the latents have collapsed, Interrupted after SIGTERM.
        """
        progress, main = self.progress, self.accelerator.is_main_process
        evaluate_steps = max(1, round(self.settings.evaluate_epochs * self.steps_of_epoch))
        latest = max(self.checkpoints.glob('step-*'), default=None)
        if checkpoint := self.settings.resume or latest:
            check_checksums(checkpoint, f'remove {checkpoint} and run the same command again')
            self.accelerator.load_state(str(checkpoint))
        if main:
            self.logs = {n: Log(self.output, n, progress.step) for n in ('train', 'validation')}
        quiet = None if main else True  # None: where this is no terminal
        bar = tqdm(None, 'Training', self.steps, initial=progress.step, unit='step', disable=quiet)
        with bar, self._listening():
            if progress.step == 0:
                self._evaluate()
            for batches in self._batches():
                started = time.monotonic()
                facts = self._step(batches)
                done = progress.step
                facts['windows_per_second'] = self.recipe.batch_size / (time.monotonic() - started)
                if main:
                    self.logs['train'].write(done, facts)
                bar.update()
                bar.set_postfix(loss=f'{facts["loss"]:.4g}')
                self._watch(facts)
                if done % evaluate_steps == 0 or done == self.steps:
                    self._evaluate()
                last = done == self.steps or progress.ended
                if done % self.settings.checkpoint_steps == 0 or last or self.stopping:
                    self._save()
                if last:
                    break
                if self.stopping:
                    raise Interrupted
        if self.recipe.patience is not None:
            self.accelerator.wait_for_everyone()
            check_contents(self.checkpoints / BEST, remedy='train in another folder')
            best = load_file(self.checkpoints / BEST)
            self.objective.network.load_state_dict(best)
        return self.logs['validation'].rows if main else []

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """This process's micro batches of each step that is left."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        batch, micro = self.recipe.batch_size, self.session.micro_batch
        together, workers = micro * processes, self.settings.workers
        mine = [
            [range(s * batch + g + rank * micro, s * batch + g + (rank + 1) * micro)]
            for s in range(self.progress.step, self.steps)
            for g in range(0, batch, together)
        ]
        loader = torch.utils.data.DataLoader(
            _MicroBatches(self.stream), batch_sampler=mine, collate_fn=operator.itemgetter(0),
            num_workers=workers, multiprocessing_context='spawn' if workers else None,
        )  # fmt: skip
        micro_batches = iter(loader)
        while of_step := list(itertools.islice(micro_batches, batch // together)):
            yield of_step

    def _step(self, batches: list[MicroBatch]) -> dict[str, float]:
        """Take one step of the optimiser."""
        progress, device, seed = self.progress, self.accelerator.device, self.settings.seed
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rates = self.recipe.rates(progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group['lr'] = rates.lr * group['scale']
            group['weight_decay'] = rates.weight_decay * group['decays']
        self.model.train()
        sums: dict[str, Tensor] = {}
        for i, (signal, flagged, numbers) in enumerate(batches):
            given = self._given(i, flagged, numbers)
            # dropout, if any, is that of this step, however often training was interrupted
            torch.manual_seed(sample_seed(seed, 2, progress.step, i, rank))
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
        *pairs, stop = self.accelerator.reduce(gathered, 'sum').cpu()
        self.stopping = bool(stop[0] > 0)
        means = {n: float(pair[0] / pair[1]) for n, pair in zip(names, pairs, strict=True)}
        loss, scored = means.pop('loss'), float(pairs[names.index('loss')][1])
        if scored and not math.isfinite(loss):  # nothing is scored where all is flagged
            raise BrainfmError(
                f'The loss is {loss} at step {progress.step + 1}: lower --lr, or look '
                f'for wrong values in the series; the last checkpoint is in {self.checkpoints}.'
            )
        # gradients are those of a sum, averaged over processes; the mean is what is wanted
        trained = (p for group in self.optimizer.param_groups for p in group['params'])
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norms = [gradient.mul_(processes / max(scored, 1.0)).norm() for gradient in gradients]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(rates.momentum)
        progress.step += 1
        momentum = {} if rates.momentum is None else {'momentum': rates.momentum}
        return {
            'loss': loss, **means, 'lr': rates.lr, 'weight_decay': rates.weight_decay, **momentum,
            'gradient_norm': float(torch.stack(norms).norm()),
            'epoch': progress.step * self.recipe.batch_size / len(self.stream.runs),
        }  # fmt: skip

    def _given(
        self, micro_step: int, flagged: Tensor, numbers: Sequence[int]
    ) -> dict[str, Tensor]:
        """What the objective is given with the windows: targets, or its masks and the flags."""
        device, size = self.accelerator.device, len(flagged)
        if self.targets is not None:
            return {'target': self.targets[numbers].to(device)}
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = self.progress.step * self.recipe.batch_size + micro_step * size * processes
        positions = range(first, first + size * processes)
        seeds = [sample_seed(self.settings.seed, 3, position) for position in positions]
        part = slice(rank * size, (rank + 1) * size)
        drawn = {k: v[part] for k, v in self.objective.draw(seeds).items()}
        return {k: v.to(device) for k, v in (drawn | {'flagged': flagged}).items()}

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
        patience = self.recipe.patience
        if patience is None or progress.step == 0:
            return
        if scores['loss'] < progress.best:
            progress.best, progress.best_step, progress.waited = scores['loss'], progress.step, 0
            if self.accelerator.is_main_process:
                with atomic(best := self.checkpoints / BEST) as temporary:
                    save_weights(self.objective.network, temporary)
                write_sidecar(best, {'Step': progress.step})
        else:
            progress.waited += 1
            progress.ended = progress.waited >= patience

    def _save(self) -> None:
        """Write a checkpoint that has its name only when it is whole."""
        folder = self.checkpoints / f'step-{self.progress.step:08d}'
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
            write_checksums(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
            for old in sorted(self.checkpoints.glob('step-*'))[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Take SIGTERM (Slurm's preemption) as a wish to end after this step."""

        def stop(*_: object) -> None:
            self.stopping = True

        before = signals.signal(signals.SIGTERM, stop)
        try:
            yield
        finally:
            signals.signal(signals.SIGTERM, before)


class _MicroBatches(torch.utils.data.Dataset[MicroBatch]):
    """Micro batches of ranges of positions."""

    def __init__(self, stream: WindowStream):
        self.stream = stream

    def __getitem__(self, positions: range) -> MicroBatch:
        windows, flags, numbers = zip(*map(self.stream.__getitem__, positions), strict=True)
        signal, flagged = (torch.from_numpy(np.stack(arrays)) for arrays in (windows, flags))
        return signal, flagged, list(numbers)


def save_weights(network: Network, path: Path) -> None:
    """Write the state dict of a network as safetensors."""
    save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, path)
