"""Heads of fine-tuned networks, which predict targets from the tokens of a window.

Forms as published: BrainLM's perceptron, Brain-JEPA's normalised linear layer and linear probe.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.layers import draw_normal
from bids_brainfm.validation import SMALLEST, is_number

# What only heads of a task have: statistics of the target in the training data, or the classes
TASKS = {'regression': ('mean', 'sd'), 'classification': ('classes',)}
POOLINGS = ('class-token', 'mean')
CHOICES = {'kind': ('mlp', 'linear', 'probe'), 'pooling': POOLINGS, 'task': tuple(TASKS)}
# Other columns of the tables of predictions; a predicted value has another name
TAKEN = ('window', 'onset', 'duration', 'real', 'flagged', 'excluded', 'part')
EPS = 1e-6
LINEAR_SD, PROBE_SD = 2e-5, 0.01  # of initial weights


class Head(nn.Module):
    """Predicts something of the participant from the tokens of a window.

    Parameters
    ----------
    settings : dict
        ``kind``: ``mlp`` (H -> H/2 -> H/2 -> C with ReLU), ``linear`` (LayerNorm, one layer) or
        ``probe`` (BatchNorm without weights, one layer); ``pooling``: ``class-token`` or
        ``mean`` (over all tokens, class token and padding too, as in the official code);
        ``dropout`` (default 0); ``target``: what is predicted; ``task``: ``regression`` with
        ``mean`` and ``sd`` of the target, or ``classification`` with ``classes``. What is missing,
        not known, or makes no sense is refused.
    width : int, of the tokens (H), of which the first may be a class token
    """

    def __init__(self, settings: dict, width: int, class_token: bool):
        super().__init__()
        _check(settings, class_token)
        self.settings = settings
        self.task, self.classes = settings['task'], tuple(settings.get('classes', ()))
        n = len(self.classes) or 1
        dropout, half = nn.Dropout(settings.get('dropout', 0.0)), width // 2
        if settings['kind'] == 'mlp':
            layers = [nn.Linear(width, half), dropout, nn.ReLU()]
            layers += [nn.Linear(half, half), dropout, nn.ReLU(), nn.Linear(half, n)]
        else:
            linear = settings['kind'] == 'linear'
            norm = nn.LayerNorm(width, EPS) if linear else nn.BatchNorm1d(width, EPS, affine=False)
            layers = [norm, dropout, nn.Linear(width, n)]
        self.layers = nn.Sequential(*layers)

    @property
    def columns(self) -> list[str]:
        """Names of what is predicted: the target, or the probability of each class."""
        if self.task == 'regression':
            return [self.settings['target']]
        return [f'{self.settings["target"]}_{name}' for name in self.classes]

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn tokens (B, N, H) into outputs (B, C): standardised values, or logits."""
        return self.layers(self.pooled(hidden))

    def pooled(self, hidden: Tensor) -> Tensor:
        """Features (B, H) of windows: their class token, or the mean over all tokens."""
        first = self.settings['pooling'] == 'class-token'
        return hidden[:, 0] if first else hidden.mean(1)

    def predict(self, outputs: Tensor) -> Tensor:
        """Turn outputs (B, C) into the target's units, or into probabilities of the classes."""
        if self.task == 'classification':
            return outputs.softmax(-1)
        return outputs * self.settings['sd'] + self.settings['mean']

    @torch.no_grad()
    def set_linear(self, weight: np.ndarray, bias: np.ndarray, centre: np.ndarray) -> None:
        """Make a probe give weight (x - centre) + bias of features x (H,).

        Weight (C, H) and bias (C,) are in the target's units, or of logits.
        """
        if self.task == 'regression':
            sd = self.settings['sd']
            weight, bias = weight / sd, (bias - self.settings['mean']) / sd
        norm, _, layer = self.layers
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(layer, nn.Linear)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(torch.from_numpy(centre))
        norm.running_var.fill_(1 - EPS)
        # the rounding of the centre goes into the bias
        bias = bias + weight @ (norm.running_mean.double().numpy() - centre)
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw initial weights."""
        kind, state = self.settings['kind'], {}
        for name, tensor in self.state_dict().items():
            if name.endswith('weight') and tensor.ndim > 1:
                if kind == 'mlp':  # Kaiming-uniform for ReLU
                    bound = (6 / tensor.shape[1]) ** 0.5
                    drawn = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
                else:
                    sd = LINEAR_SD if kind == 'linear' else PROBE_SD
                    drawn = draw_normal(name, tensor.shape, generator) * (sd / 0.02)
            elif name.endswith(('running_var', 'weight')):
                drawn = torch.ones(tensor.shape)
            else:
                drawn = torch.zeros(tensor.shape, dtype=tensor.dtype)
            state[name] = drawn
        return state


def _check(settings: dict, class_token: bool) -> None:
    if not isinstance(settings, dict):
        raise BrainfmError(
            f'The head of the configuration is {settings!r}; give a mapping with kind, pooling, '
            f'target and task.'
        )
    for key, values in CHOICES.items():
        if settings.get(key) not in values:
            raise BrainfmError(
                f'The head has {key} {settings.get(key)!r}; choose one of {", ".join(values)}.'
            )
    if settings['pooling'] == 'class-token' and not class_token:
        raise BrainfmError('This model has no class token, so its head must have pooling mean.')
    task = settings['task']
    needed = ('kind', 'pooling', 'task', 'target', *TASKS[task])
    faults = {
        'lacks': [key for key in needed if key not in settings],
        'does not know': [str(key) for key in settings if key not in (*needed, 'dropout')],
    }
    found = [f'{fault} {", ".join(keys)}' for fault, keys in faults.items() if keys]
    if found:
        raise BrainfmError(
            f'The head of a {task} {" and ".join(found)}; it has {", ".join(needed)} and dropout.'
        )
    taken = TAKEN if task == 'regression' else ()
    wanted = {
        'target': (
            lambda value: _is_text(value) and value not in taken,
            f'the name of a column{" other than " * bool(taken)}{", ".join(taken)}',
        ),
        'dropout': (lambda value: is_number(value) and 0 <= value < 1, 'a proportion below 1'),
        'mean': (is_number, 'a number'),
        'sd': (lambda value: is_number(value) and value >= SMALLEST, 'a number above 0'),
        'classes': (_are_classes, 'two classes or more, as a list of different texts'),
    }
    for key, (fits, what) in wanted.items():
        if key in settings and not fits(settings[key]):
            raise BrainfmError(f'The head has {key} {settings[key]!r}; give {what}.')


def _is_text(value: object) -> bool:
    """Whether it can be in the heading of a table."""
    return isinstance(value, str) and value.isprintable() and value.strip() != ''


def _are_classes(value: object) -> bool:
    if not isinstance(value, list) or not all(map(_is_text, value)):
        return False
    return len(value) == len(set(value)) > 1
