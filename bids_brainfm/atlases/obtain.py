"""Complete an atlas on this machine: fetch its files, make the images that nobody publishes."""

import os
from pathlib import Path

import numpy as np

from bids_brainfm.atlases.atlas import AtlasCard, check_lookalike, load_atlas
from bids_brainfm.atlases.images import check_image
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.resources import Resource, fetch, forget

LABEL_IMAGES = ('.nii', '.nii.gz', '.dlabel.nii')


def obtain_atlas(card: AtlasCard, home: Path, source_dir: Path | None = None) -> None:
    """Bring the files of an atlas to their folder and make what has to be made.

    Files with a public address are required. Others are taken from `source_dir` where it has
    them; an image that is then still absent is made from its parts, which are fetched for that.

    Raises
    ------
    BrainfmError
        See :func:`bids_brainfm.atlases.fetch.fetch`. The files fetched before stay usable.
    """
    try:
        fetched = [file for file in card.files if file.role not in ('places', 'part')]
        fetch([_resource(card, file, home) for file in fetched], source_dir, _command(card))
        _make_images(card, home, source_dir)
    except BrainfmError as error:
        raise BrainfmError(f'{error}{_lookalike_faults(card, home, source_dir)}') from None


def _command(card):
    return f'bids_brainfm_models fetch {card.name}'


def _resource(card, file, home):
    target = card.path_of(file, home)
    return Resource(file.name, target, file.url, file.sha256, optional=not file.url)


def _make_images(card, home, source_dir):
    """Make the images that were not supplied; those that fail do not keep the others back."""
    atlas, folder, failed = load_atlas(card.path, home), card.folder(home), {}
    for file in card.files:
        if not file.made or (folder / file.name).is_file():
            continue
        made = folder / card.made_name(file)
        if _is_made(made, atlas):
            continue
        part = made.with_name(f'part_{made.name}')
        try:
            _make_image(card, file, atlas, home, source_dir).to_filename(part)
            check_image(part, card.name, atlas.places)
        except BrainfmError as error:
            part.unlink(missing_ok=True)
            failed[file.space] = str(error)
        else:
            part.replace(made)
    if failed:
        reasons = ' '.join(dict.fromkeys(failed.values()))
        raise BrainfmError(
            f'Atlas {card.name} is ready except for space {" and ".join(failed)}, whose image was '
            f'neither supplied nor could be made: {reasons}'
        )


def _is_made(path, atlas):
    """Whether an image was made before, and is not damaged."""
    try:
        check_image(path, atlas.name, atlas.places)
    except BrainfmError:
        return False
    return True


def _make_image(card, file, atlas, home, source_dir):
    """Image of labels of a space, by the way that its entry in the card says."""
    import nibabel as nib

    made = file.made
    sources = [source for name in made['of'] for source in card.files if source.name == name]
    resources = [_resource(card, source, home) for source in sources]
    brought = [resource for resource in resources if not resource.target.is_file()]
    fetch(resources, source_dir, _command(card))
    paths = [resource.target for resource in resources]
    if made['by'] == 'overlay':
        for source, path in zip(sources, paths, strict=True):
            rows = np.arange(source.parcels[0] - 1, source.parcels[1])
            try:
                check_image(path, card.name, atlas.places, rows)
            except BrainfmError as error:
                raise BrainfmError(f'{error} {_rejected(path, brought, source_dir)}') from None
        return overlay_labels(paths, [source.parcels[0] for source in sources])
    grid = nib.affines.from_matvec(np.eye(3) * file.resolution, made['origin'])
    transform = template_transform(made['transform'], source_dir)
    return warp_labels(paths[0], transform, made['shape'], grid)


def _rejected(path, brought, source_dir):
    """Remove a wrong part if it is this call that brought it; what there is to do, in words."""
    for resource in brought:
        if resource.target == path:
            forget(resource)
            return f'It came from {source_dir or resource.url} and was not kept.'
    return 'Remove it, then fetch again.'


def _lookalike_faults(card, home, source_dir):
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
    return _label_image(np.asanyarray(warped.dataobj), affine)


def overlay_labels(images: list[Path], first_parcels: list[int]):
    """One image of labels out of parts that lie in the same space.

    Parameters
    ----------
    images : list of Path
        The first gives the grid; each of the others is brought onto it by affine and nearest
        neighbour, and lies over those before it.
    first_parcels : list of int
        The parcel that label 1 of each image stands for.

    Returns
    -------
    nibabel.Nifti1Image
        int16 labels.
    """
    import nibabel as nib
    from nibabel.processing import resample_from_to

    grid = nib.load(images[0])
    labels = np.zeros(grid.shape)
    for image, first in zip(images, first_parcels, strict=True):
        part = np.rint(resample_from_to(nib.load(image), grid, order=0).dataobj)
        labels = np.where(part > 0, part + first - 1, labels)
    return _label_image(labels, grid.affine)


def _label_image(labels, affine):
    import nibabel as nib

    image = nib.Nifti1Image(labels.astype(np.int16), affine)
    for set_form in (image.set_sform, image.set_qform):
        set_form(affine, 'mni')
    return image
