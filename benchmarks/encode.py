"""Time of one window through each encoder, beside its matrix products alone.

The products are the very same ones (each linear layer's and each attention's shapes, with the
network's own weights) run back to back. Weights are random, the sizes official. Repeats of both
are interleaved and medians printed, so that a busy machine disturbs the ratio little. With
``--block``, so is encoding with latent prediction, of families that have it.

Example: python benchmarks/encode.py --sizes 111m --precisions float32
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bids_brainfm.models import brain_jepa, layers
from bids_brainfm.models.encoder import Encoder, resolve_device, set_positions
from bids_brainfm.models.masking import BLOCKS
from bids_brainfm.models.weights import build, initialise

WINDOW = {'num_brain_voxels': 424, 'num_timepoints_per_voxel': 200, 'num_channels': 3}
DECODER = {
    'decoder_hidden_size': 512,
    'decoder_num_hidden_layers': 1,  # only the encoder is timed
    'decoder_num_attention_heads': 4,
    'decoder_intermediate_size': 1024,
}
Attention = layers.Attention | brain_jepa.Attention
COMMON = WINDOW | DECODER | {'layer_norm_eps': 1e-12}


def sizes(hidden: int, layers: int, heads: int, intermediate: int) -> dict:
    return {
        'hidden_size': hidden,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'intermediate_size': intermediate,
    }


CONFIGS = {
    '13m': COMMON
    | sizes(512, 4, 4, 1024)
    | {'model_type': 'brainlm_mae', 'patch_size': 16, 'timepoint_patching_size': 20}
    | {'conv_kernel_size': 65},
    '111m': COMMON
    | sizes(768, 12, 12, 3072)
    | {'model_type': 'vit_mae', 'image_size': [432, 432], 'patch_size': 16},
    '650m': COMMON
    | sizes(1280, 32, 16, 5120)
    | {'model_type': 'vit_mae', 'image_size': [434, 434], 'patch_size': 14},
    'jepa-vitb': {
        'model_type': 'brain_jepa',
        'crop_size': [450, 160],
        'patch_size': 16,
        'embed_dim': 768,
        'depth': 12,
        'num_heads': 12,
        'predictor_embed_dim': 384,
        'predictor_depth': 6,
        'predictor_num_heads': 12,
        'add_w': 'mapping',
    },
}


def products(encoder: Encoder, windows: np.ndarray) -> list[Callable[[], object]]:
    """Record the matrix products of one pass; return one function per product."""
    calls: list[Callable[[], object]] = []
    hooks, buffers = [], {}

    def buffer(name: str | int, like: Tensor, weight: Tensor) -> Tensor:
        """One tensor per role and shape, so that the products find it in the cache."""
        key = name, like.shape
        if key not in buffers:
            buffers[key] = torch.randn_like(like, dtype=weight.dtype)
        return buffers[key]

    def linear(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, out = buffer('x', inputs[0], module.weight), buffer('out', output, module.weight)
        x, out, weight = x.flatten(0, -2), out.flatten(0, -2), module.weight.t()
        calls.append(lambda: torch.mm(x, weight, out=out))

    def attention(module: Attention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = next(module.parameters())
        if isinstance(module, brain_jepa.Attention):
            q, k, v = module.split(buffer('qkv', inputs[0].repeat(1, 1, 3), weight))
        else:
            q, k, v = (module.split(buffer(i, inputs[0], weight)) for i in range(3))
        calls.append(lambda: F.scaled_dot_product_attention(q, k, v))

    for module in cast(nn.Module, encoder.network).modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(linear))
        elif isinstance(module, (layers.Attention, brain_jepa.Attention)):
            hooks.append(module.register_forward_hook(attention))
    encoder.encode(windows)
    for hook in hooks:
        hook.remove()
    return calls


def measure(
    encoder: Encoder, predicting: Encoder | None, windows: np.ndarray, repeats: int
) -> dict[str, float]:
    """Return median seconds of encoding, of the products alone, and with latent prediction."""

    def run_products() -> None:
        for product in calls:
            product()
        if encoder.device.type == 'cuda':
            torch.cuda.synchronize()

    with torch.inference_mode():
        calls = products(encoder, windows)
        run_products()
        jobs: dict[str, Callable[[], object]] = {
            'encode': lambda: encoder.encode(windows),
            'products': run_products,
        }
        if predicting:
            jobs['predict'] = lambda: predicting.encode(windows)
        taken: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--sizes', nargs='+', choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument(
        '--precisions',
        nargs='+',
        choices=['float32', 'bfloat16'],
        default=['float32', 'bfloat16'],
    )
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='cpu')
    parser.add_argument('--windows', type=int, default=1, help='windows per call (default 1)')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--block', choices=BLOCKS, help='time latent prediction of it, too')
    parser.add_argument('--threads', type=int, help="default: PyTorch's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)

    print(f'{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    columns = ['size', 'precision', 'seconds per window', 'products alone', 'ratio']
    print(*columns, *['with prediction', 'ratio to without'] * bool(args.block), sep='\t')
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-70, 70, (424, 3)).astype(np.float32)
    gradients = rng.standard_normal((450, 30), dtype=np.float32)
    for size in args.sizes:
        for precision in args.precisions:
            network = initialise(build(CONFIGS[size]), seed=0)
            set_positions(network, xyz, None, gradients)
            shape = (args.windows, *network.capabilities.window)
            windows = rng.standard_normal(shape, dtype=np.float32)
            encoder, predicting = Encoder(network, None, device, precision, size), None
            if args.block and network.capabilities.predicts_latents:
                predicting = Encoder(network, None, device, precision, size, args.block)
            taken = measure(encoder, predicting, windows, args.repeats)
            row = [f'{taken[name] / args.windows:.4f}' for name in ('encode', 'products')]
            row.append(f'{taken["encode"] / taken["products"]:.3f}')
            if predicting:
                row.append(f'{taken["predict"] / args.windows:.4f}')
                row.append(f'{taken["predict"] / taken["encode"]:.3f}')
            print(size, precision, *row, sep='\t', flush=True)


if __name__ == '__main__':
    main()
