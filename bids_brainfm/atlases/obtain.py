"""Complete an atlas on this machine: fetch its files, warp the images that nobody publishes."""

import os
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.atlas import AtlasCard, check_image, load_atlas
from bids_brainfm.atlases.fetch import Resource, fetch
from bids_brainfm.errors import BrainfmError


def obtain_atlas(card: AtlasCard, home: Path, source_dir: Path | None = None) -> None:
    """Bring the files of an atlas to their folder and make what has to be made.

    Files with a public address are required. Others are taken from `source_dir` where it has
    them; an image that is then still absent is warped from its source image, with the transform
    out of ``$TEMPLATEFLOW_HOME``, `source_dir` or TemplateFlow's archive.

    Raises
    ------
    BrainfmError
        See :func:`bids_brainfm.atlases.fetch.fetch`. The files fetched before stay usable.
    """
    import nibabel as nib

    folder = card.folder(home)
    command = f'bids_brainfm_models fetch {card.name}'
    resources = {
        file.name: Resource(
            file.name, folder / file.name, file.url, file.sha256, optional=not file.url
        )
        for file in card.files
    }
    transforms = {file.name for file in card.files if file.role == 'transform'}
    fetch([r for r in resources.values() if r.name not in transforms], source_dir, command)

    xyz = load_atlas(card.path, home).xyz
    for file in card.files:
        warped = folder / card.warped_name(file) if file.warp else None
        if warped is None or (folder / file.name).is_file() or warped.is_file():
            continue
        transform = templateflow_file(file.warp['transform'])
        if transform is None:
            try:
                fetch([resources[file.warp['transform']]], source_dir, command)
            except BrainfmError as error:
                raise BrainfmError(
                    f'Atlas {card.name} is ready except for space {file.space}, whose image was '
                    f'neither supplied nor could be made: {error}'
                ) from None
            transform = folder / file.warp['transform']
        image = warp_labels(
            folder / file.warp['source'],
            transform,
            file.warp['shape'],
            nib.affines.from_matvec(np.eye(3) * file.resolution, file.warp['origin']),
        )
        part = warped.with_name(f'part_{warped.name}')
        image.to_filename(part)
        check_image(part, card.name, xyz)
        part.replace(warped)


def templateflow_file(name: str) -> Path | None:
    """A file of the user's TemplateFlow folder; None where it is absent or an empty stub."""
    home = os.environ.get('TEMPLATEFLOW_HOME') or Path.home() / '.cache' / 'templateflow'
    path = Path(home) / name.split('_')[0] / name
    return path if path.is_file() and path.stat().st_size else None


def warp_labels(image: Path, transform: Path, shape: tuple, affine: np.ndarray):
    """Nearest-neighbour image of labels on another template's grid.

    Parameters
    ----------
    image : Path
        Label volume.
    transform : Path
        ITK composite (.h5) that takes points of the new grid to points of `image`, as
        TemplateFlow's ``from-`` transforms for images do.
    shape, affine
        The new grid.

    Returns
    -------
    nibabel.Nifti1Image
        int16 labels.
    """
    import nibabel as nib
    from nitransforms.manip import load
    from nitransforms.resampling import apply

    grid = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    source = nib.load(image)
    labels = nib.Nifti1Image(np.rint(np.asanyarray(source.dataobj)), source.affine)
    warped = apply(load(transform, fmt='itk'), labels, reference=grid, order=0)
    result = nib.Nifti1Image(np.asanyarray(warped.dataobj).astype(np.int16), affine)
    for set_form in (result.set_sform, result.set_qform):
        set_form(affine, 'mni')
    return result
