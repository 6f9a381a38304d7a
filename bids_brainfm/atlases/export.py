"""Put the atlas that was used next to the outputs, as a BIDS atlas dataset."""

import filecmp
import shutil
from pathlib import Path

from bids_brainfm.atlases.atlas import Atlas, AtlasImage
from bids_brainfm.bids.files import atomic, write_json, write_table


def export_atlas(output: Path, atlas: Atlas, image: AtlasImage) -> Path:
    """Copy an image of the atlas and its table under ``sourcedata/atlases``; return the copy."""
    folder = output / 'sourcedata' / 'atlases'
    version = 'den-91k' if image.resolution is None else f'res-{round(image.resolution):02d}'
    stem = f'tpl-{image.space}_atlas-{atlas.name}_{version}_dseg'
    volume = '.nii' if image.path.name.endswith('.nii') else '.nii.gz'
    extension = '.dlabel.nii' if image.resolution is None else volume
    copy = folder / f'tpl-{image.space}' / f'{stem}{extension}'
    if copy.is_file() and filecmp.cmp(copy, image.path, shallow=False):
        return copy
    facts = {'Name': atlas.name, 'License': atlas.licence, 'ReferencesAndLinks': atlas.citation}
    description = folder / f'atlas-{atlas.name}_description.json'
    write_json(description, facts | {'BIDSVersion': '1.10.1'})
    table = copy.with_name(f'{stem}.tsv')
    write_table(table, {name: column.tolist() for name, column in atlas.table().items()})
    about = {'Description': f'{atlas.name} in {image.space}', 'Provenance': image.provenance}
    write_json(table.with_suffix('.json'), about)
    with atomic(copy) as temporary:
        shutil.copyfile(image.path, temporary)
    return copy
