#!/usr/bin/env python
"""Make the embedded demo atlas: nilearn's grey-matter mask cut into 424 parcels.

    python tools/make_demo_atlas.py [FOLDER]

Each hemisphere's voxels are halved again and again across their widest axis until 212 parcels of
equal size (one voxel more or less) are left: a k-d tree, exact in integers, so that every
machine makes the same file. The template is symmetric: the right is the mirror image of the
left, and parcel i and i + 212 are homologous. Ordered left then right, posterior to anterior.
"""

import gzip
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nilearn.datasets import load_mni152_gm_mask

from bids_brainfm.signals.simulate import NETWORKS, network_loadings

FOLDER = Path(__file__).resolve().parents[1] / 'bids_brainfm' / 'data' / 'atlases'
PER_SIDE = 212
VOXEL_MM = 2


def bisect(voxels: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut (n, 3) integer voxel indices into `parts` groups of equal size (to one voxel)."""
    if parts == 1:
        return [voxels]
    spread = len(voxels) * (voxels**2).sum(0) - voxels.sum(0) ** 2  # n² variance, exact
    axis = int(np.argmax(spread))
    order = np.lexsort((voxels[:, (axis + 2) % 3], voxels[:, (axis + 1) % 3], voxels[:, axis]))
    cut = len(voxels) * (parts // 2) // parts
    first, second = voxels[order[:cut]], voxels[order[cut:]]
    return bisect(first, parts // 2) + bisect(second, parts - parts // 2)


def label_volume(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Labels 1..424 of a mask that is symmetric about x = 0, on a grid that is as well."""
    x = affine[0, 0] * np.arange(mask.shape[0]) + affine[0, 3]
    left = np.argwhere(mask & (x < 0)[:, None, None])
    parcels = bisect(left, PER_SIDE)
    parcels.sort(key=lambda voxels: tuple(voxels.mean(0)[[1, 2, 0]]))
    labels = np.zeros(mask.shape, np.int16)
    # Index of the voxel at -x: the mirror image of index i.
    mirror = np.rint((-x - affine[0, 3]) / affine[0, 0]).astype(int)
    for label, (i, j, k) in enumerate((voxels.T for voxels in parcels), start=1):
        labels[i, j, k] = label
        labels[mirror[i], j, k] = label + PER_SIDE
    return labels


def parcel_table(labels: np.ndarray, affine: np.ndarray) -> pd.DataFrame:
    """Index, name, hemisphere, centre of mass (mm, one decimal) and network of each parcel."""
    rows = []
    for label in range(1, 2 * PER_SIDE + 1):
        side = 'L' if label <= PER_SIDE else 'R'
        centre = nib.affines.apply_affine(affine, np.argwhere(labels == label).mean(0))
        name = f'{side}_{(label - 1) % PER_SIDE + 1:03d}'
        rows.append((label, name, side, *np.round(centre, 1)))
    table = pd.DataFrame(rows, columns=['index', 'name', 'hemisphere', 'x', 'y', 'z'])
    # What the demo's simulated series are made of, so that networks can be found again
    loadings = network_loadings(table[['x', 'y', 'z']].to_numpy())
    return table.assign(network=[list(NETWORKS)[k] for k in loadings.argmax(axis=1)])


def main(folder: Path) -> None:
    """Write the image and the table."""
    image = load_mni152_gm_mask(resolution=VOXEL_MM)
    labels = label_volume(np.asanyarray(image.dataobj) > 0, image.affine)
    result = nib.Nifti1Image(labels, image.affine)
    result.header.set_xyzt_units('mm')
    for set_form in (result.set_sform, result.set_qform):
        set_form(image.affine, 'mni')
    path = folder / 'Demo424_dseg.nii.gz'
    path.write_bytes(gzip.compress(result.to_bytes(), 9, mtime=0))
    table = parcel_table(labels, image.affine)
    table.to_csv(folder / 'Demo424_dseg.tsv', sep='\t', index=False, lineterminator='\n')
    sizes = np.bincount(labels[labels > 0])[1:]
    print(f'{path}: {len(sizes)} parcels of {sizes.min()} to {sizes.max()} voxels of 2 mm')


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
