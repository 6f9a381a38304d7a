"""What the outputs of a run cost beside its embeddings: passes of the network, and the rest.

For each analysis the time of a run of noise is printed as a multiple of the time that its passes
of the network take alone (same tokens, same windows, back to back), so that what masks, baselines
and scores add is seen. Weights are random, the sizes official.

Example: python benchmarks/analyses.py --sizes 111m --samples 490
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bids_brainfm.analyses.forecast import forecast
from bids_brainfm.analyses.knn import knn_protocol
from bids_brainfm.analyses.networks import cluster_parcels, fc_features
from bids_brainfm.analyses.perturb import perturb
from bids_brainfm.analyses.reconstruct import gain_check, reconstruct
from bids_brainfm.models.cards import load_card
from bids_brainfm.models.encoder import Encoder, resolve_device, set_positions
from bids_brainfm.models.weights import build, initialise
from bids_brainfm.signals.connectome import connectome


class Recorder(Encoder):
    """An encoder that keeps what it was asked to reconstruct."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def reconstruct(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.asked.append((args, kwargs))
        return super().reconstruct(*args, **kwargs)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(size: str, samples: int, shams: int, repeats: int, device: torch.device) -> None:
    card = load_card(f'brainlm-{size}')
    rng = np.random.default_rng(0)
    xyz = rng.normal(0, 40, (424, 3))
    network = initialise(build(card.config), 0)
    set_positions(network, xyz)
    encoder = Recorder(network, device=device)
    data = rng.standard_normal((samples, 424)).astype(np.float32) / card.divide_by
    window = np.ascontiguousarray(data[: card.window].T)
    ratio, target = card.config['mask_ratio'], np.arange(424) == 7
    mean, sd = data.mean(0), data.std(0)
    analyses = {
        'reconstruction': lambda: reconstruct(encoder, data, ratio),
        'gain check': lambda: gain_check(encoder, window, ratio),
        'forecast': lambda: forecast(encoder, data, 20),
        'perturbation': lambda: perturb(
            encoder, window, target, mean, sd, xyz, 1, ratio, shams=shams
        ),
    }
    encode = statistics.median(seconds(lambda: encoder.encode(window[None])) for _ in range(3))
    print(f'{size}: encoding a window {encode:.2f} s')
    for name, work in analyses.items():
        whole, alone = [], []
        for _ in range(repeats):
            encoder.asked.clear()
            whole.append(seconds(work))
            calls = list(encoder.asked)
            again = lambda calls=calls: [Encoder.reconstruct(encoder, *a, **k) for a, k in calls]
            alone.append(seconds(again))
        windows = sum(len(args[0]) for args, _ in calls)
        ratio_of = statistics.median(a / b for a, b in zip(whole, alone, strict=True))
        print(
            f'  {name}: {statistics.median(whole):.1f} s, {windows} windows through the network, '
            f'{ratio_of:.2f} x their time alone (goal 1.2)'
        )


def measure_networks() -> None:
    rng = np.random.default_rng(0)
    series = rng.standard_normal((490, 424))
    xyz, names = rng.normal(0, 40, (424, 3)), [f'network {k}' for k in rng.integers(7, size=424)]
    make = lambda: fc_features(connectome(series))
    features = make()
    once = seconds(make)
    for name, work in (
        ('7 clusters', lambda: cluster_parcels(features, 7, 0)),
        ('k-NN with 100 surrogates', lambda: knn_protocol(features, names, xyz)),
    ):
        took = seconds(work)
        print(f'networks, {name}: {took:.1f} s, {took / once:.0f} x the connectivity itself')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--sizes', nargs='+', default=['13m', '111m'])
    parser.add_argument('--samples', type=int, default=490)
    parser.add_argument('--shams', type=int, default=1, help='sham targets (default: 1)')
    parser.add_argument('--repeats', type=int, default=1)
    parser.add_argument('--device', default='auto')
    options = parser.parse_args()
    measure_networks()
    for size in options.sizes:
        measure(
            size, options.samples, options.shams, options.repeats, resolve_device(options.device)
        )


if __name__ == '__main__':
    main()
