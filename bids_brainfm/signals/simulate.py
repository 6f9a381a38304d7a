"""Simulated resting-state parcel series with the confounds that fMRIPrep would report."""

from dataclasses import dataclass

import numpy as np

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
COHERENCE = 0.65  # share of a parcel's haemodynamic fluctuation that its networks have in common
CORNER_HZ = 0.1  # where the haemodynamic response lets spontaneous fluctuations end


@dataclass(frozen=True)
class SimulatedRun:
    """One run.

    Attributes
    ----------
    series : (T, P) float32
        Parcel series in BOLD units, confounds included.
    confounds : pandas.DataFrame
        T rows; the columns of fMRIPrep's ``desc-confounds_timeseries.tsv``.
    components : dict
        Metadata of the CompCor columns, as in that table's sidecar.
    """

    series: np.ndarray
    confounds: object
    components: dict


def network_loadings(xyz: np.ndarray) -> np.ndarray:
    """How strongly each parcel takes part in each network, (P, K), rows of unit length.

    Falls off with the distance from the network's nearest centre.
    """
    loadings = []
    for centres in NETWORKS.values():
        both = np.array([*centres, *[(-x, y, z) for x, y, z in centres]], float)
        distance = np.linalg.norm(xyz[:, None] - both, axis=2).min(1)
        loadings.append(np.exp(-0.5 * (distance / REACH_MM) ** 2))
    loadings = np.stack(loadings, axis=1) + 0.02
    return loadings / np.linalg.norm(loadings, axis=1, keepdims=True)


def haemodynamic_noise(
    volumes: int, tr: float, n: int, rng: np.random.Generator, corner_hz: float = CORNER_HZ
) -> np.ndarray:
    """Noise (T, n) of unit variance with a 1/f power spectrum that ends at `corner_hz`.

    The usual description of spontaneous BOLD: scale-free fluctuation seen through the slow
    haemodynamic response.
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
    """How a simulated trait (standard normal) shows in the fluctuations of a participant.

    >>> express(0.0)
    {'coupling': 0.3, 'coherence': 0.65}
    """
    return {
        'coupling': float(np.clip(0.3 + 0.25 * trait, -0.9, 0.9)),
        'coherence': float(np.clip(COHERENCE + 0.1 * trait, 0.3, 0.95)),
    }


def neural_series(
    xyz: np.ndarray,
    volumes: int,
    tr: float,
    coupling: float,
    rng: np.random.Generator,
    coherence: float = COHERENCE,
    corner_hz: float = CORNER_HZ,
) -> np.ndarray:
    """Parcel fluctuations (T, P) of unit variance without confounds.

    Parameters
    ----------
    xyz : (P, 3) float
        Parcel centres in mm.
    coupling : float
        Correlation of the default-mode with the frontoparietal source, -1 to 1.
    coherence : float
        Share of each parcel's haemodynamic fluctuation that comes from its networks, 0 to 1; the
        rest is its own, of the same spectrum, so that no parcel alone tells it.
    corner_hz : float
        Where the spectrum of all of them ends: the higher, the faster the fluctuations.
    """
    sources = haemodynamic_noise(volumes, tr, len(NETWORKS), rng, corner_hz)
    default, frontal = (list(NETWORKS).index(n) for n in ('default mode', 'frontoparietal'))
    sources[:, frontal] = (
        coupling * sources[:, default] + np.sqrt(1 - coupling**2) * sources[:, frontal]
    )
    shared = sources @ network_loadings(xyz).T
    own = haemodynamic_noise(volumes, tr, len(xyz), rng, corner_hz)
    thermal = rng.standard_normal((volumes, len(xyz)))
    common, apart = (0.93 * np.sqrt(share) for share in (coherence, 1 - coherence))
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


def framewise_displacement(motion: np.ndarray) -> np.ndarray:
    """Power et al. 2012: sum of absolute shifts, rotations on a sphere of 50 mm; first is NaN."""
    shift = np.abs(np.diff(motion, axis=0)) @ np.array([1, 1, 1, 50, 50, 50.0])
    return np.r_[np.nan, shift]


def simulate_run(
    xyz: np.ndarray,
    volumes: int,
    tr: float,
    coupling: float,
    rng: np.random.Generator,
    coherence: float = COHERENCE,
    corner_hz: float = CORNER_HZ,
) -> SimulatedRun:
    """Simulate one run of resting-state fMRI at the level of parcels.

    Parameters
    ----------
    xyz : (P, 3) float
        Parcel centres in mm.
    volumes : int
    tr : float
        Repetition time in seconds.
    coupling, coherence, corner_hz : float
        See :func:`neural_series`.
    rng : numpy.random.Generator

    Returns
    -------
    SimulatedRun
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


def _expanded(name, values):
    """A regressor with its derivative and the squares of both, as fMRIPrep names them."""
    derivative = np.r_[np.nan, np.diff(values)]
    return {
        name: values,
        f'{name}_derivative1': derivative,
        f'{name}_power2': values**2,
        f'{name}_derivative1_power2': derivative**2,
    }


def _confounds_table(series, motion, tissue, physiological, tr, rng):
    import pandas as pd

    volumes = len(series)
    columns = {}
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
    for name, values in zip(
        ('trans_x', 'trans_y', 'trans_z', 'rot_x', 'rot_y', 'rot_z'), motion.T, strict=True
    ):
        columns |= _expanded(name, values)
    outliers = np.flatnonzero((fd > FD_OUTLIER_MM) | (std_dvars > DVARS_OUTLIER))
    for i, t in enumerate(outliers):
        columns[f'motion_outlier{i:02d}'] = (np.arange(volumes) == t).astype(float)
    return pd.DataFrame(columns)


def _component_metadata(confounds):
    masks = {'a': 'combined', 'c': 'CSF', 'w': 'WM'}
    share = 0.5 ** np.arange(1, N_PHYSIOLOGICAL + 1)  # of the variance, a plausible decline
    return {
        name: {
            'Method': 'aCompCor',
            'Mask': masks[name[0]],
            'Retained': True,
            'SingularValue': float(100 * np.sqrt(share[int(name[-2:])])),
            'VarianceExplained': float(share[int(name[-2:])]),
            'CumulativeVarianceExplained': float(share[: int(name[-2:]) + 1].sum()),
        }
        for name in confounds
        if '_comp_cor_' in name
    }
