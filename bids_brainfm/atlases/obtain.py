"""Complete an atlas on this machine: fetch its files, make the images that nobody publishes."""

import contextlib
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from bids_brainfm.atlases.atlas import Atlas, check_lookalike, load_atlas
from bids_brainfm.atlases.cards import AtlasCard, AtlasFile
from bids_brainfm.atlases.images import check_image
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import Resource, fetch, forget

if TYPE_CHECKING:
    import nibabel as nib

LABEL_IMAGES = ('.nii', '.nii.gz', '.dlabel.nii')


def obtain_atlas(card: AtlasCard, home: Path, source_dir: Path | None = None) -> None:
    """Fetch the files of an atlas and make the images that have to be made.

    Files with a public address are required. Others are taken from `source_dir` where it has
    them; an image that is then still absent is made from its parts, which are fetched for that.
    Refused as in :func:`bids_brainfm.resources.fetch`; files fetched before stay usable.
    """
    try:
        fetched = [file for file in card.files if file.role not in ('places', 'part')]
        _fetch(card, fetched, home, source_dir)
        _make_images(card, home, source_dir)
    except BrainfmError as error:
        raise BrainfmError(f'{error}{_lookalike_faults(card, home, source_dir)}') from None


def _fetch(
    card: AtlasCard, files: Iterable[AtlasFile], home: Path, source_dir: Path | None
) -> list[Resource]:
    """Fetch files of an atlas; return those that were absent before."""
    resources = [
        Resource(f.name, card.path_of(f, home), f.url, f.sha256, optional=not f.url) for f in files
    ]
    absent = [resource for resource in resources if not resource.target.is_file()]
    fetch(resources, source_dir, f'bids_brainfm_models fetch {card.name}')
    return absent


def _make_images(card: AtlasCard, home: Path, source_dir: Path | None) -> None:
    """Make the images that were not supplied; those that fail do not keep the others back."""
    atlas, folder = load_atlas(card.path, home), card.folder(home)
    failed: dict[str, str] = {}
    for file in card.files:
        if not file.made or (folder / file.name).is_file():
            continue
        made = folder / card.made_name(file)
        with contextlib.suppress(BrainfmError):  # made before, and not damaged
            check_image(made, atlas.name, atlas.places)
            continue
        part = made.with_name(f'part_{made.name}')
        try:
            _make_image(card, file, atlas, home, source_dir).to_filename(part)
            check_image(part, card.name, atlas.places)
        except BrainfmError as error:
            part.unlink(missing_ok=True)
            failed[str(file.space)] = str(error)
        else:
            part.replace(made)
    if failed:
        reasons = ' '.join(dict.fromkeys(failed.values()))
        raise BrainfmError(
            f'Atlas {card.name} is ready except for space {" and ".join(failed)}, whose image was '
            f'neither supplied nor could be made: {reasons}'
        )


def _make_image(
    card: AtlasCard, file: AtlasFile, atlas: Atlas, home: Path, source: Path | None
) -> 'nib.Nifti1Image':
    """Image of labels of a space, by the way that its entry in the card says."""
    import nibabel as nib

    made = file.made
    assert made, 'only images that can be made are asked for'
    parts = [part for name in made.of for part in card.files if part.name == name]
    fetched = {resource.target: resource for resource in _fetch(card, parts, home, source)}
    paths = [card.path_of(part, home) for part in parts]
    if made.by == 'warp':
        grid = nib.affines.from_matvec(np.eye(3) * (file.resolution or 1), made.origin)
        transform = template_transform(made.transform, source)
        return warp_labels(paths[0], transform, made.shape, grid)
    parcels = [part.parcels or (1, card.parcels) for part in parts]
    for path, (first, last) in zip(paths, parcels, strict=True):
        try:
            check_image(path, card.name, atlas.places, np.arange(first - 1, last))
        except BrainfmError as error:
            todo = 'Remove it, then fetch again.'
            if path in fetched:
                forget(fetched[path])
                todo = f'It came from {source or fetched[path].url} and was not kept.'
            raise BrainfmError(f'{error} {todo}') from None
    return overlay_labels(paths, [first for first, _ in parcels])


def _lookalike_faults(card: AtlasCard, home: Path, source_dir: Path | None) -> str:
    """What is wrong with those files of a folder that look like the atlas, in sentences."""
    if not (card.lookalikes and source_dir and source_dir.is_dir()):
        return ''
    parts = [file.name for file in card.files if file.role == 'part']
    faults = []
    for path in sorted(source_dir.rglob(card.lookalikes)):
        if ''.join(path.suffixes) in LABEL_IMAGES and path.name not in parts:
            try:
                check_lookalike(path, card, home)
            except BrainfmError as error:
                faults.append(f' {error}')
    return ''.join(faults[:3])


def template_transform(name: str, source_dir: Path | None = None) -> Path:
    """A transform between templates, ``tpl-TO_from-FROM_mode-image_xfm.h5`` of TemplateFlow.

    Where a `source_dir` is given, which may hold it, the network is not used.
    """
    entities = parse_name(name)[0]
    home = os.environ.get('TEMPLATEFLOW_HOME') or Path.home() / '.cache' / 'templateflow'
    path = Path(home) / f'tpl-{entities["tpl"]}' / name
    if source_dir is not None:
        path = next(source_dir.rglob(glob.escape(name)), path)
    if path.is_file() and path.stat().st_size:  # TemplateFlow keeps empty files as stubs
        return path
    if source_dir is not None:
        raise BrainfmError(
            f"{name} is neither in {source_dir} nor in TemplateFlow's folder {home}: get it from "
            f'TemplateFlow on a machine with internet and put it into {source_dir}.'
        )
    try:
        from templateflow import api

        query = {'suffix': 'xfm', 'mode': 'image', 'extension': '.h5', 'from': entities['from']}
        return Path(api.get(entities['tpl'], raise_empty=True, **query))
    except Exception as error:  # requests' errors and TemplateFlow's own
        raise BrainfmError(
            f'{name} could not be fetched from TemplateFlow ({error}): try again, or run the same '
            f'command on a machine with internet.'
        ) from None


def warp_labels(
    image: Path, transform: Path, shape: tuple[int, ...], affine: np.ndarray
) -> 'nib.Nifti1Image':
    """Nearest-neighbour image of labels (int16) on another template's grid.

    The transform is an ITK composite (.h5) that takes points of the new grid, given by `shape`
    and `affine`, to points of `image`, as TemplateFlow's ``from-`` transforms for images do.
    """
    import nibabel as nib
    from nitransforms.manip import load
    from nitransforms.resampling import apply

    grid = nib.Nifti1Image(np.zeros(shape, np.uint8), affine)
    source = cast('nib.Nifti1Image', nib.load(image))
    labels = nib.Nifti1Image(np.rint(np.asanyarray(source.dataobj)), source.affine)
    warped = apply(load(transform, fmt='itk'), labels, reference=grid, order=0)
    return _label_image(np.asanyarray(warped.dataobj), affine)


def overlay_labels(images: Sequence[Path], first_parcels: Sequence[int]) -> 'nib.Nifti1Image':
    """One image of labels (int16) out of parts that lie in the same space.

    The first gives the grid; each of the others is resampled onto it by affine and nearest
    neighbour, and lies over those before it. `first_parcels` are the parcels of their labels 1.
    """
    import nibabel as nib
    from nibabel.processing import resample_from_to

    volumes = [cast('nib.Nifti1Image', nib.load(image)) for image in images]
    grid = volumes[0]
    labels = np.zeros(grid.shape)
    for volume, first in zip(volumes, first_parcels, strict=True):
        part = np.rint(resample_from_to(volume, grid, order=0).dataobj)
        labels = np.where(part > 0, part + first - 1, labels)
    return _label_image(labels, grid.affine)


def _label_image(labels: np.ndarray, affine: np.ndarray) -> 'nib.Nifti1Image':
    import nibabel as nib

    image = nib.Nifti1Image(labels.astype(np.int16), affine)
    for set_form in (image.set_sform, image.set_qform):
        set_form(affine, 'mni')
    return image
