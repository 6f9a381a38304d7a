"""What the transformer families share: attention, angles of position tables, initial weights."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.errors import BrainfmError


class Box(nn.Module):
    """Gives its children a place in the state dict, as in ``attention.output.dense.weight``."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def boxed(**children: nn.Module) -> Box:
    """Put modules into a box."""
    box = Box()
    for name, child in children.items():
        box.add_module(name, child)
    return box


def angles(length: int, channels: int) -> Tensor:
    """Return the angles of a sinusoidal position table (Vaswani et al. 2017, section 3.5).

    Its `channels` are half sines and half cosines of position × 10000 ** (-2i / channels):
    (length, channels // 2) float64.
    """
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


def draw_state(
    module: nn.Module,
    tables: dict[str, Tensor],
    matrix: Callable[[str, torch.Size, torch.Generator], Tensor],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw initial weights for a module, by their names in its state dict.

    Position tables are taken as they are; `matrix` draws matrices and convolutions. The families
    agree on the rest: zero biases, unit LayerNorm, N(0, 0.02) class and mask tokens.
    """

    def draw(name: str, shape: torch.Size) -> Tensor:
        if name in tables:
            return tables[name]
        if name.endswith('_token'):
            return draw_normal(name, shape, generator)
        if name.endswith('bias'):
            return torch.zeros(shape)
        return torch.ones(shape) if len(shape) == 1 else matrix(name, shape, generator)

    return {name: draw(name, tensor.shape) for name, tensor in module.state_dict().items()}


def draw_normal(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw from N(0, 0.02)."""
    # In double precision, where PyTorch draws normals by the same code on every processor.
    return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64).float()


def draw_uniform(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw Xavier-uniform; the token convolution as PyTorch has it."""
    fan_out, fan_in = shape[0], shape[1:].numel()
    bound = fan_in**-0.5 if name.endswith('conv.weight') else (6 / (fan_in + fan_out)) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def stack(
    kind: Callable[..., nn.Module], config: dict[str, Any], part: str, *rest: Any
) -> nn.ModuleList:
    """Make the layers of a BrainLM's encoder (``''``) or of its decoder (``'decoder_'``)."""
    names = ('hidden_size', 'num_attention_heads', 'intermediate_size')
    sizes = [config[part + name] for name in names]
    return nn.ModuleList(kind(*sizes, *rest) for _ in range(config[part + 'num_hidden_layers']))


def relate(
    layers: Iterable[Any], norm: nn.Module, x: Tensor, return_attention: bool
) -> tuple[Tensor, Tensor | None]:
    """Pass tokens through layers and a last norm; with them comes the last layer's attention."""
    *before, last = layers
    for layer in before:
        x = layer(x)
    attention = last.attention_row(x) if return_attention else None
    return norm(last(x)), attention


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which operations on ``x`` keep the precision they are given."""
    return torch.autocast(x.device.type, enabled=False)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, in place without gradients: fresh memory costs more than the arithmetic."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def convolve_tokens(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve along tokens with one kernel per head, zeros beyond both ends.

    A product with a banded matrix over chunks of tokens takes a tenth of the time of PyTorch's
    depth-wise convolution. `x` is (B, heads, N, d) and stays so; `kernel` is (heads, K), K odd.

    >>> x, kernel = torch.rand(1, 2, 100, 3), torch.rand(2, 65)
    >>> expected = F.conv2d(x, kernel[:, None, :, None], padding=(32, 0), groups=2)
    >>> torch.allclose(convolve_tokens(x, kernel), expected, atol=1e-5)
    True
    """
    (heads, span), tokens = kernel.shape, x.shape[2]
    reach = (chunk := 64) + span - 1
    # Rows one longer than the band is wide, read as rows of its width, each start one further on.
    band = F.pad(kernel, (0, chunk)).repeat(1, chunk)[:, : chunk * reach]
    band = band.view(heads, 1, chunk, reach)
    padded = F.pad(x, (0, 0, span // 2, span // 2 + -tokens % chunk))
    chunks = padded.unfold(2, reach, chunk).transpose(3, 4)  # (B, heads, N / chunk, reach, d)
    return (band @ chunks).flatten(2, 3)[:, :, :tokens]


class Attention(nn.Module):
    """Multi-head self-attention without its output projection.

    With a `kernel`, a depth-wise convolution of the values over so many tokens, one kernel per
    head, is added to the context (Xiong et al. 2021, Nyströmformer).
    """

    def __init__(self, hidden: int, heads: int, bias: bool = True, kernel: int | None = None):
        super().__init__()
        if hidden % heads:
            raise BrainfmError(
                f'The configuration asks for a width of {hidden} in {heads} attention heads, '
                'which does not divide; correct hidden_size or num_attention_heads.'
            )
        self.heads = heads
        self.query = nn.Linear(hidden, hidden, bias=bias)
        self.key = nn.Linear(hidden, hidden, bias=bias)
        self.value = nn.Linear(hidden, hidden, bias=bias)
        self.conv: nn.Conv2d | None = None
        if kernel:
            # Holds the weight under its official name; convolve_tokens uses it.
            self.conv = nn.Conv2d(heads, heads, (kernel, 1), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the context (B, N, H) of tokens (B, N, H)."""
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(q, k, v)
        if self.conv is not None:
            context = context + convolve_tokens(v, self.conv.weight[:, 0, :, 0])
        return context.transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, H) -> (B, heads, N, H / heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def cls_row(self, x: Tensor) -> Tensor:
        """Return how the first of tokens (B, N, H) attends to all: (B, N) float32.

        This is the mean over heads; each row sums to 1. Softmax cancels the key bias, which adds
        the same to every score; the key weights are applied to the one query, not to all tokens.
        """
        query = self.query(x[:, 0]).float().unflatten(-1, (self.heads, -1))
        key = self.key.weight.float().unflatten(0, (self.heads, -1))
        with without_autocast(x):
            asked = torch.einsum('bhd,hdc->bhc', query, key) / query.shape[-1] ** 0.5
            return (asked @ x.float().transpose(1, 2)).softmax(-1).mean(1)
