"""Put the atlas that was used next to the outputs, as a BIDS atlas dataset."""

import filecmp
import shutil
from pathlib import Path

from bids_brainfm.atlases.atlas import Atlas, AtlasImage
from bids_brainfm.bids.files import atomic, write_json, write_table
from bids_brainfm.bids.freshness import is_whole, write_sidecar
from bids_brainfm.errors import BrainfmError

FOLDER = ('sourcedata', 'atlases')


def find_exported(output: Path, space: str, atlas: str) -> tuple[Path, Path]:
    """Image and table that `export_atlas` wrote; raises BrainfmError where they are not there."""
    folder = output.joinpath(*FOLDER, f'tpl-{space}')
    images = sorted(folder.glob(f'tpl-{space}_atlas-{atlas}_*_dseg*.nii*'))
    if not images:
        raise BrainfmError(
            f'The image of atlas {atlas} is not in {folder}, where the participant level '
            f'puts it: run that again.'
        )
    return images[0], images[0].with_name(images[0].name.partition('.')[0] + '.tsv')


def export_atlas(output: Path, atlas: Atlas, image: AtlasImage) -> Path:
    """Copy an image of the atlas and its table under ``sourcedata/atlases``; return the copy."""
    folder = output.joinpath(*FOLDER)
    version = 'den-91k' if image.resolution is None else f'res-{round(image.resolution):02d}'
    stem = f'tpl-{image.space}_atlas-{atlas.name}_{version}_dseg'
    volume = '.nii' if image.path.name.endswith('.nii') else '.nii.gz'
    extension = '.dlabel.nii' if image.resolution is None else volume
    copy = folder / f'tpl-{image.space}' / f'{stem}{extension}'
    table = copy.with_name(f'{stem}.tsv')
    if copy.is_file() and filecmp.cmp(copy, image.path, shallow=False) and is_whole(table, True):
        return copy
    facts = {'Name': atlas.name, 'License': atlas.licence, 'ReferencesAndLinks': atlas.citation}
    description = folder / f'atlas-{atlas.name}_description.json'
    write_json(description, facts | {'BIDSVersion': '1.10.1'})
    write_table(table, {name: column.tolist() for name, column in atlas.table().items()})
    with atomic(copy) as temporary:
        shutil.copyfile(image.path, temporary)
    about = {'Description': f'{atlas.name} in {image.space}', 'Provenance': image.provenance}
    write_sidecar(table, about)
    return copy
