"""Complete an atlas on this machine: fetch its files, warp the images that nobody publishes."""

import os
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.atlas import AtlasCard, check_image, load_atlas
from bids_brainfm.atlases.fetch import Resource, fetch
from bids_brainfm.bids.reading import parse_name
from bids_brainfm.errors import BrainfmError


def obtain_atlas(card: AtlasCard, home: Path, source_dir: Path | None = None) -> None:
    """Bring the files of an atlas to their folder and make what has to be made.

    Files with a public address are required. Others are taken from `source_dir` where it has
    them; an image that is then still absent is warped from its source image.

    Raises
    ------
    BrainfmError
        See :func:`bids_brainfm.atlases.fetch.fetch`. The files fetched before stay usable.
    """
    import nibabel as nib

    folder = card.folder(home)
    resources = [
        Resource(file.name, folder / file.name, file.url, file.sha256, optional=not file.url)
        for file in card.files
    ]
    fetch(resources, source_dir, f'bids_brainfm_models fetch {card.name}')

    xyz = load_atlas(card.path, home).xyz
    for file in card.files:
        warped = folder / card.warped_name(file) if file.warp else None
        if warped is None or (folder / file.name).is_file() or warped.is_file():
            continue
        try:
            transform = template_transform(file.warp['transform'], source_dir)
        except BrainfmError as error:
            raise BrainfmError(
                f'Atlas {card.name} is ready except for space {file.space}, whose image was '
                f'neither supplied nor could be made: {error}'
            ) from None
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


def template_transform(name: str, source_dir: Path | None = None) -> Path:
    """A transform between templates: out of a folder, or from TemplateFlow.

    Parameters
    ----------
    name : str
        As TemplateFlow names it, ``tpl-TO_from-FROM_mode-image_xfm.h5``.
    source_dir : Path, optional
        Folder that may hold it. Then the network is not used.

    Raises
    ------
    BrainfmError
        It is not here and cannot be fetched.
    """
    entities = parse_name(name)[0]
    home = os.environ.get('TEMPLATEFLOW_HOME') or Path.home() / '.cache' / 'templateflow'
    path = Path(home) / f'tpl-{entities["tpl"]}' / name
    if source_dir is not None:
        path = next(source_dir.rglob(name), path)
    if path.is_file() and path.stat().st_size:  # TemplateFlow keeps empty files as stubs
        return path
    if source_dir is not None:
        raise BrainfmError(
            f"{name} is neither in {source_dir} nor in TemplateFlow's folder {home}: get it from "
            f'TemplateFlow on a machine with internet and put it into {source_dir}.'
        )
    try:
        from templateflow import api

        return Path(
            api.get(
                entities['tpl'], suffix='xfm', mode='image', extension='.h5', raise_empty=True,
                **{'from': entities['from']},
            )
        )  # fmt: skip
    except Exception as error:  # requests' errors and TemplateFlow's own
        raise BrainfmError(
            f'{name} could not be fetched from TemplateFlow ({error}): try again, or run the same '
            f'command on a machine with internet.'
        ) from None


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
