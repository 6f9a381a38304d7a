"""Simulated resting-state parcel series with the confounds that fMRIPrep would report."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bids_brainfm.signals.motion import framewise_displacement

if TYPE_CHECKING:
    import pandas as pd

# Centres in mm (MNI) of well-known resting-state networks; each is mirrored to the other side.
NETWORKS = {
    'visual': [(14, -88, 4), (34, -78, -6)],
    'somatomotor': [(40, -22, 56), (56, -8, 26)],
    'dorsal attention': [(26, -62, 54), (28, -4, 54)],
    'salience': [(38, 18, 0), (4, 20, 38), (58, -34, 30)],
    'frontoparietal': [(42, 34, 26), (44, -52, 48)],
    'default mode': [(6, -54, 28), (6, 52, 6), (46, -66, 32), (58, -12, -18)],
    'limbic': [(30, -10, -24), (22, 32, -16), (40, 12, -34)],
    'subcortical': [(12, -18, 8), (24, 4, 2)],
    'cerebellum': [(22, -62, -32), (36, -54, -42)],
}
REACH_MM = 22.0
FD_OUTLIER_MM, DVARS_OUTLIER = 0.5, 1.5  # fMRIPrep's own thresholds of motion outliers
N_PHYSIOLOGICAL = 5
COHERENCE = 0.65  # proportion of a parcel's haemodynamic fluctuation shared in its networks
CORNER_HZ = 0.1  # where the haemodynamic response lets spontaneous fluctuations end


@dataclass(frozen=True)
class SimulatedRun:
    """One run."""

    series: np.ndarray  # (T, P) float32, in BOLD units, confounds included
    confounds: 'pd.DataFrame'  # T rows; columns of fMRIPrep's desc-confounds_timeseries.tsv
    components: dict[str, dict]  # metadata of the CompCor columns, as in that table's sidecar


def network_loadings(xyz: np.ndarray) -> np.ndarray:
    """Part of each parcel in each network by its distance, (P, K), rows of unit length."""
    by_network = []
    for centres in NETWORKS.values():
        both = np.array([*centres, *[(-x, y, z) for x, y, z in centres]], float)
        distance = np.linalg.norm(xyz[:, None] - both, axis=2).min(1)
        by_network.append(np.exp(-0.5 * (distance / REACH_MM) ** 2))
    loadings = np.stack(by_network, axis=1) + 0.02
    return loadings / np.linalg.norm(loadings, axis=1, keepdims=True)


def haemodynamic_noise(
    volumes: int, tr: float, n: int, rng: np.random.Generator, corner_hz: float = CORNER_HZ
) -> np.ndarray:
    """Noise (T, n) of unit variance with a 1/f power spectrum that ends at `corner_hz`.

    So is spontaneous BOLD: scale-free fluctuation seen through the slow haemodynamic response.
    """
    length = 2 * volumes  # cropped to half, so that the ends do not join
    frequency = np.fft.rfftfreq(length, tr)
    amplitude = np.zeros_like(frequency)
    amplitude[1:] = frequency[1:] ** -0.5 * np.exp(-((frequency[1:] / corner_hz) ** 2))
    amplitude[frequency < 1 / 200] = 0
    spectrum = np.fft.rfft(rng.standard_normal((length, n)), axis=0) * amplitude[:, None]
    noise = np.fft.irfft(spectrum, length, axis=0)[:volumes]
    return (noise - noise.mean(0)) / noise.std(0)


def express(trait: float) -> dict[str, float]:
    """How a simulated trait (standard normal) shows in the fluctuations of a participant."""
    coupling = float(np.clip(0.3 + 0.25 * trait, -0.9, 0.9))
    return {'coupling': coupling, 'coherence': float(np.clip(COHERENCE + 0.1 * trait, 0.3, 0.95))}


def neural_series(
    xyz: np.ndarray, volumes: int, tr: float, coupling: float, rng: np.random.Generator,
    coherence: float = COHERENCE, corner_hz: float = CORNER_HZ,
) -> np.ndarray:  # fmt: skip
    """Parcel fluctuations (T, P) of unit variance without confounds.

    Parameters
    ----------
    xyz : (P, 3), parcel centres in mm
    coupling : correlation of the default-mode with the frontoparietal source, -1 to 1
    coherence : proportion of each parcel's haemodynamic fluctuation that comes from its networks;
        the rest is its own, of the same spectrum, so that no parcel alone reveals it
    corner_hz : where the spectrum of all of them ends
    """
    sources = haemodynamic_noise(volumes, tr, len(NETWORKS), rng, corner_hz)
    default, frontal = (list(NETWORKS).index(n) for n in ('default mode', 'frontoparietal'))
    rest = np.sqrt(1 - coupling**2)
    sources[:, frontal] = coupling * sources[:, default] + rest * sources[:, frontal]
    shared = sources @ network_loadings(xyz).T
    own = haemodynamic_noise(volumes, tr, len(xyz), rng, corner_hz)
    thermal = rng.standard_normal((volumes, len(xyz)))
    common, apart = (0.93 * np.sqrt(part) for part in (coherence, 1 - coherence))
    series = common * shared / shared.std(0) + apart * own + 0.35 * thermal
    return series / series.std(0)


def motion_parameters(volumes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Six rigid-body parameters (T, 6) in mm and rad, and the volumes of sudden motion."""
    steps = rng.standard_normal((volumes, 6)) * ([0.015] * 3 + [2e-4] * 3)
    motion = np.zeros((volumes, 6))
    for t in range(1, volumes):
        motion[t] = 0.98 * motion[t - 1] + steps[t]
    n_spikes = max(1, volumes // 100)
    spikes = np.sort(rng.choice(np.arange(10, volumes - 10), n_spikes, replace=False))
    motion[spikes, :3] += rng.uniform(0.3, 0.8, (n_spikes, 3)) * rng.choice([-1, 1], (n_spikes, 3))
    return motion, spikes


def simulate_run(
    xyz: np.ndarray, volumes: int, tr: float, coupling: float, rng: np.random.Generator,
    coherence: float = COHERENCE, corner_hz: float = CORNER_HZ,
) -> SimulatedRun:  # fmt: skip
    """Simulate one run of resting-state fMRI at the level of parcels, as :func:`neural_series`.

    Levels lie between 8000 and 12000, fluctuations are 0.5 to 1 % of them; head motion,
    physiological noise and scanner drift are mixed in.
    """
    n = len(xyz)
    level = rng.uniform(8000, 12000, n)
    scale = level * rng.uniform(0.005, 0.01, n)
    motion, spikes = motion_parameters(volumes, rng)
    physiological = haemodynamic_noise(volumes, tr, N_PHYSIOLOGICAL, rng, corner_hz=0.4)
    drift = np.cumsum(rng.standard_normal((volumes, 2)), axis=0)
    drift = (drift - drift.mean(0)) / drift.std(0)

    fluctuation = neural_series(xyz, volumes, tr, coupling, rng, coherence, corner_hz)
    fluctuation += (motion / motion.std(0)) @ (0.15 * rng.standard_normal((6, n)))
    fluctuation += physiological @ (0.2 * rng.standard_normal((N_PHYSIOLOGICAL, n)))
    fluctuation += drift @ (0.2 + 0.2 * rng.standard_normal((2, n)))
    fluctuation /= fluctuation.std(0)
    fluctuation[spikes] -= rng.uniform(2, 5, (len(spikes), n))
    series = (level + scale * fluctuation).astype(np.float32)

    tissue = {
        'csf': 9500 + 60 * (physiological[:, 0] + drift[:, 0]),
        'white_matter': 9000 + 30 * (physiological[:, 1] + drift[:, 1]),
        'global_signal': series.mean(1),
    }
    confounds = _confounds_table(series, motion, tissue, physiological, tr, rng)
    return SimulatedRun(series, confounds, _component_metadata(confounds))


def _expanded(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """A regressor with its derivative and the squares of both, as fMRIPrep names them."""
    derivative = f'{name}_derivative1'
    both = {name: values, derivative: np.r_[np.nan, np.diff(values)]}
    return both | {f'{key}_power2': column**2 for key, column in both.items()}


def _confounds_table(
    series: np.ndarray, motion: np.ndarray, tissue: dict[str, np.ndarray],
    physiological: np.ndarray, tr: float, rng: np.random.Generator,
) -> 'pd.DataFrame':  # fmt: skip
    import pandas as pd

    columns: dict[str, np.ndarray] = {}
    volumes = len(series)
    for name, values in tissue.items():
        columns |= _expanded(name, values.astype(float))
    dvars = np.r_[np.nan, np.sqrt(np.mean(np.diff(series, axis=0) ** 2, axis=1))]
    fd = framewise_displacement(motion)
    std_dvars = dvars / np.nanmedian(dvars)
    columns |= {'std_dvars': std_dvars, 'dvars': dvars, 'framewise_displacement': fd}
    for kind in 'acw':
        mixed = physiological + 0.3 * rng.standard_normal(physiological.shape)
        basis = np.linalg.svd(mixed - mixed.mean(0), full_matrices=False)[0]
        columns |= {f'{kind}_comp_cor_{i:02d}': c for i, c in enumerate(basis.T)}
    # Discrete cosines slower than 128 s, as fMRIPrep and SPM have them.
    for k in range(1, int(2 * volumes * tr / 128) + 1):
        wave = np.cos(np.pi * k * (np.arange(volumes) + 0.5) / volumes)
        columns[f'cosine{k - 1:02d}'] = wave * np.sqrt(2 / volumes)
    axes = [f'{kind}_{axis}' for kind in ('trans', 'rot') for axis in 'xyz']
    for name, values in zip(axes, motion.T, strict=True):
        columns |= _expanded(name, values)
    outliers = np.flatnonzero((fd > FD_OUTLIER_MM) | (std_dvars > DVARS_OUTLIER))
    for i, t in enumerate(outliers):
        columns[f'motion_outlier{i:02d}'] = (np.arange(volumes) == t).astype(float)
    return pd.DataFrame(columns)


def _component_metadata(confounds: 'pd.DataFrame') -> dict[str, dict]:
    masks = {'a': 'combined', 'c': 'CSF', 'w': 'WM'}
    explained = 0.5 ** np.arange(1, N_PHYSIOLOGICAL + 1)  # of the variance, a plausible decline
    metadata: dict[str, dict] = {}
    for name in confounds.filter(like='_comp_cor_'):
        upto = explained[: int(name[-2:]) + 1]
        metadata[name] = {'Method': 'aCompCor', 'Mask': masks[name[0]], 'Retained': True}
        metadata[name] |= {'SingularValue': float(100 * np.sqrt(upto[-1])),
                           'VarianceExplained': float(upto[-1]),
                           'CumulativeVarianceExplained': float(upto.sum())}  # fmt: skip
    return metadata
