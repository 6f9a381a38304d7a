"""What a fine-tuned network says of a window: a head on its tokens.

The forms are those of the authors: BrainLM's perceptron, Brain-JEPA's linear layer after a
normalisation, and the linear probe of the latter.
"""

import torch
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.layers import draw_normal

KINDS = ('mlp', 'linear', 'probe')
POOLINGS = ('class-token', 'mean')
TASKS = ('regression', 'classification')
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
        ``dropout``; ``target``: what is predicted; ``task``: ``regression`` with ``mean`` and
        ``sd`` of the target, or ``classification`` with ``classes``.
    width : int
        Of the tokens, H.
    class_token : bool
        Whether the first token is one.

    Raises
    ------
    BrainfmError
        Settings are missing or make no sense.
    """

    def __init__(self, settings: dict, width: int, class_token: bool):
        super().__init__()
        _check(settings, class_token)
        self.settings = settings
        self.task, self.classes = settings['task'], tuple(settings.get('classes', ()))
        n = len(self.classes) or 1
        dropout = nn.Dropout(settings.get('dropout', 0.0))
        if settings['kind'] == 'mlp':
            layers = [nn.Linear(width, width // 2), dropout, nn.ReLU()]
            layers += [nn.Linear(width // 2, width // 2), dropout, nn.ReLU()]
            layers += [nn.Linear(width // 2, n)]
        elif settings['kind'] == 'linear':
            layers = [nn.LayerNorm(width, EPS), dropout, nn.Linear(width, n)]
        else:
            layers = [nn.BatchNorm1d(width, EPS, affine=False), nn.Linear(width, n)]
        self.layers = nn.Sequential(*layers)

    @property
    def columns(self) -> list[str]:
        """Names of what is predicted: the target, or the probability of each class."""
        if self.task == 'regression':
            return [self.settings['target']]
        return [f'{self.settings["target"]}_{name}' for name in self.classes]

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn tokens (B, N, H) into outputs (B, C): standardised values, or logits."""
        first = self.settings['pooling'] == 'class-token'
        return self.layers(hidden[:, 0] if first else hidden.mean(1))

    def predict(self, outputs: Tensor) -> Tensor:
        """Turn outputs (B, C) into the target's units, or into probabilities of the classes."""
        if self.task == 'classification':
            return outputs.softmax(-1)
        return outputs * self.settings['sd'] + self.settings['mean']

    def initial_state(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw initial weights."""
        kind = self.settings['kind']
        state = {}
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
    allowed = {'kind': KINDS, 'pooling': POOLINGS, 'task': TASKS}
    for key, values in allowed.items():
        if settings.get(key) not in values:
            raise BrainfmError(
                f'The head has {key} {settings.get(key)!r}; choose one of {", ".join(values)}.'
            )
    if settings['pooling'] == 'class-token' and not class_token:
        raise BrainfmError('This model has no class token, so its head must have pooling mean.')
    needed = ['target'] + (['mean', 'sd'] if settings['task'] == 'regression' else ['classes'])
    missing = [key for key in needed if key not in settings]
    if missing or len(settings.get('classes', 'ab')) < 2:
        raise BrainfmError(
            f'The head of a {settings["task"]} needs {", ".join(needed)}'
            + (f' and lacks {", ".join(missing)}.' if missing else ', two classes at the least.')
        )
