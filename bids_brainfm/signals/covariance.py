"""Covariance between parcels: from sums that can be added up run after run, shrunk."""

import numpy as np

LEAST_SHRINKAGE = 1e-6  # keeps the matrix invertible where a parcel never varies


def moments(series: np.ndarray) -> np.ndarray:
    """Sums over the samples of centred series (T, P), for each pair of parcels: (3, P, P).

    They are the number of samples, the products, and the products of squares. Those of several
    runs are added. Samples that are NaN are left out.
    """
    known = np.isfinite(series)
    values = np.where(known, series, 0.0).astype(float)
    return np.stack([x.T @ x for x in (known.astype(float), values, values**2)])


def standardised(data: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Parcel series (T, P) at the samples `used` (T,), with mean 0 and variance 1, float64.

    A parcel without data (NaN) or without variance is NaN.
    """
    series = np.asarray(data, float)[used]
    spread = series.std(axis=0)
    varies = spread > 1e-6 * np.abs(series).max(axis=0, initial=0)
    return (series - series.mean(axis=0)) / np.where(varies, spread, np.nan)


def shrunk(sums: np.ndarray) -> np.ndarray:
    """Covariance (P, P) of which :func:`moments` are the sums, shrunk towards equal variances.

    The intensity is that of Ledoit & Wolf (2004, Journal of Multivariate Analysis 88:365-411). On
    complete data the result is that of ``sklearn.covariance.ledoit_wolf``, which needs all samples
    at once. A pair of parcels without a common sample has covariance 0.
    """
    count = np.maximum(sums[0], 1)
    products, squares = sums[1:] / count
    size = len(products)
    target = np.eye(size) * np.trace(products) / size
    noise = ((squares - products**2) / count).sum()
    distance = ((products - target) ** 2).sum()
    intensity = np.clip(noise / distance, LEAST_SHRINKAGE, 1) if distance > 0 else 1.0
    return (1 - intensity) * products + intensity * target


def positive_definite(covariance: np.ndarray) -> np.ndarray:
    """Nearest matrix (P, P) that can be inverted; pairs from different samples may give none."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, LEAST_SHRINKAGE * values.max())) @ vectors.T
