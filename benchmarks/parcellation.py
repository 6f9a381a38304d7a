"""How long does a run take from file to parcel series?

    python benchmarks/parcellation.py [--volumes 300] [--repeats 3] [--keep DIR]

Two runs on the 2 mm MNI grid (91 x 109 x 91, float32, gzip) are synthesised, one with signal
outside the brain and one without, which compresses better. Each way of reading them has a fresh
Python process, in turns, and the medians stand side by side:

- inflate: the gzip stream alone, by the decompressor we use;
- ours: `parcellate`, with a brain mask;
- nilearn: `NiftiLabelsMasker`.

"in process" is the work without imports, "whole process" is from start to end of Python.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPE, N_PARCELS, TR = (91, 109, 91), 424, 0.735
AFFINE = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
WAYS = ('inflate', 'ours', 'nilearn')

Work = Callable[[], np.ndarray | None]


def synthesise(folder: Path, volumes: int) -> dict[str, Path]:
    """Write atlas, mask and both runs into a folder; files that exist are kept."""
    import nibabel as nib
    from isal import igzip
    from scipy.spatial import cKDTree

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centre, radius = np.array([45, 54, 42]), np.array([35, 43, 34])
    voxels = np.argwhere(np.ones(SHAPE))
    voxels = voxels[(((voxels - centre) / radius) ** 2).sum(1) < 1]
    brain, labels = np.zeros((2, *SHAPE), np.int16)
    brain[tuple(voxels.T)] = 1

    grey = voxels[(((voxels - centre) / radius) ** 2).sum(1) > 0.3]
    seeds = grey[rng.choice(len(grey), N_PARCELS, replace=False)].astype(float)
    for _ in range(5):
        parcel = cKDTree(seeds).query(grey)[1]
        size = np.bincount(parcel, minlength=N_PARCELS)
        seeds = np.stack([np.bincount(parcel, x, N_PARCELS) / size for x in grey.T], axis=1)
    labels[tuple(grey.T)] = parcel + 1
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / 'atlas.nii.gz')
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), AFFINE), folder / 'mask.nii.gz')

    header = nib.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE).header
    header.set_data_shape((*SHAPE, volumes))
    header.set_zooms((2, 2, 2, TR))
    header.set_xyzt_units('mm', 'sec')
    header['magic'], header['vox_offset'] = b'n+1', 352
    level = (9000 + 1500 * rng.random(brain.size)).astype(np.float32)
    noise = 40 * rng.standard_normal((8, brain.size), dtype=np.float32)
    inside = {'signal outside the brain': 1, 'zero outside the brain': brain.ravel(order='F')}
    runs = {name: folder / f'bold{i}_{volumes}.nii.gz' for i, name in enumerate(inside)}
    for name, path in runs.items():
        if path.exists():
            continue
        with igzip.open(path, 'wb', compresslevel=1) as out:
            out.write(header.binaryblock + bytes(4))
            for t in range(volumes):
                a, b = rng.standard_normal(2).astype(np.float32)
                frame = (level + a * noise[t % 8] + b * noise[(t + 3) % 8]) * inside[name]
                out.write(frame.astype(np.float32).tobytes())
    return runs


def inflate(bold: Path, folder: Path) -> Work:
    """Read the gzip stream to its end."""
    from isal import igzip

    buffer = bytearray(4 << 20)

    def work() -> None:
        with igzip.open(bold, 'rb') as stream:
            while stream.readinto(buffer):
                pass

    return work


def ours(bold: Path, folder: Path) -> Work:
    """Parcel means by this package."""
    from bids_brainfm.signals.parcellate import parcellate

    atlas, mask = folder / 'atlas.nii.gz', folder / 'mask.nii.gz'
    return lambda: parcellate(bold, atlas, N_PARCELS, mask).data


def nilearn(bold: Path, folder: Path) -> Work:
    """Parcel means by nilearn."""
    from nilearn.maskers import NiftiLabelsMasker

    masker = NiftiLabelsMasker(str(folder / 'atlas.nii.gz'), standardize=None)
    return lambda: masker.fit_transform(str(bold))


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    try:  # ru_maxrss also counts the parent up to the moment Python starts
        status = Path('/proc/self/status').read_text()
        return int(status.split('VmHWM:')[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, bold: Path, folder: Path) -> None:
    """In a process of its own: do the work, save its result, print time and memory."""
    work = {'inflate': inflate, 'ours': ours, 'nilearn': nilearn}[way](bold, folder)
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    if result is not None:
        np.save(folder / f'{way}.npy', result)
    print(json.dumps({'work': seconds, 'peak': peak_mb()}))


def compare(bold: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians over interleaved repeats of each way."""
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            start = time.perf_counter()
            command = [
                sys.executable,
                __file__,
                '--measure',
                way,
                str(bold),
                '--keep',
                str(folder),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            whole = time.perf_counter() - start
            rows[way].append({**json.loads(done.stdout.splitlines()[-1]), 'whole': whole})
    return {
        way: {key: statistics.median(row[key] for row in taken) for key in taken[0]}
        for way, taken in rows.items()
    }


def report(name: str, bold: Path, folder: Path, repeats: int) -> None:
    """Print one run's table."""
    found = compare(bold, folder, repeats)
    print(f'\n{name} ({bold.stat().st_size / 1e6:.0f} MB on disk)')
    print(f'{"":10}{"in process":>12}{"whole process":>15}{"peak memory":>13}')
    for way, row in found.items():
        print(f'{way:10}{row["work"]:10.2f} s{row["whole"]:13.2f} s{row["peak"]:10.0f} MB')
    inflate, ours, nilearn = (found[way] for way in WAYS)
    for what, value, good, limit in [
        ('ours / inflate, in process', ours['work'] / inflate['work'], False, 1.25),
        ('nilearn / ours, in process', nilearn['work'] / ours['work'], True, 8),
        ('nilearn / ours, whole process', nilearn['whole'] / ours['whole'], True, 4.5),
        ('peak memory of ours, MB', ours['peak'], False, 150),
    ]:
        met = value >= limit if good else value <= limit
        print(f'{what:32}{value:8.2f}  (at {"least" if good else "most"} {limit:g}: ', end='')
        print('yes)' if met else 'NO)')
    a, b = (np.load(folder / f'{way}.npy').astype(float) for way in ('ours', 'nilearn'))
    print(f'{"largest relative difference":32}{np.abs(a / b - 1).max():8.0e}')


def main() -> None:
    """Synthesise, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--volumes', type=int, default=300)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--keep', type=Path, metavar='DIR', help='keep the files here')
    parser.add_argument('--measure', nargs=2, metavar=('WAY', 'FILE'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, bold = options.measure
        measure(way, Path(bold), options.keep)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for name, bold in synthesise(folder, options.volumes).items():
            report(name, bold, folder, options.repeats)


if __name__ == '__main__':
    main()
