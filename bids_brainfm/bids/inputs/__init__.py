"""Where runs come from: one adapter for each preprocessing pipeline.

An adapter is a module with ``FOLDER`` (its folder below ``derivatives/`` of a raw dataset),
``SOURCE`` (what the methods text calls its data) and three functions: ``accepts`` (a dataset's
description), ``open_dataset`` and ``find_runs``, which yields a ``BoldRun`` per recording.
To read another pipeline, write such a module and name it in `ADAPTERS`, before ``fmriprep``,
which accepts every dataset.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from bids_brainfm.bids.description import generators, read_description
from bids_brainfm.bids.inputs.listing import iterate_folders
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.errors import BrainfmError, abridge

ADAPTERS = ('fmriprep',)  # the first that accepts a dataset reads it
Found = tuple[list[BoldRun], dict[str, str]]
FindRuns = Callable[[tuple[str, ...], Mapping[str, Any]], Found]


class Adapter(Protocol):
    """What the module of an adapter provides."""

    FOLDER: str
    SOURCE: str

    def accepts(self, description: Mapping[str, Any]) -> bool:
        """Whether it reads the dataset with this ``dataset_description.json``."""

    def open_dataset(self, root: Path, participants: Collection[str]) -> Any:
        """Prepare a dataset for `find_runs`, with these participants or all where empty."""

    def find_runs(
        self, opened: Any, dataset: str, spaces: tuple[str, ...], filters: Mapping[str, Any]
    ) -> Found:
        """Choose the file in the best space for every recording.

        Returns the runs, and by the name of every recording that cannot be read the reason.
        """


def adapter(name: str) -> Adapter:
    """Return an adapter by its name."""
    return cast(Adapter, importlib.import_module(f'{__name__}.{name}'))


def open_datasets(datasets: Mapping[str, Path], participants: Collection[str]) -> list[FindRuns]:
    """Open all datasets and return, for each, `find_runs` of the adapter that reads it."""
    found: list[FindRuns] = []
    for name, root in datasets.items():
        description = read_description(root)
        pipeline = next(each for each in ADAPTERS if adapter(each).accepts(description))
        opened = adapter(pipeline).open_dataset(root, participants)
        found.append(partial(_find_runs, pipeline, opened, name))
    return found


def _find_runs(
    pipeline: str, opened: Any, dataset: str, spaces: tuple[str, ...], filters: Mapping[str, Any]
) -> Found:
    runs, without = adapter(pipeline).find_runs(opened, dataset, spaces, filters)
    return [dataclasses.replace(run, pipeline=pipeline) for run in runs], without


def find_datasets(bids_dir: Path, derivatives: dict[str, str]) -> dict[str, Path]:
    """Name the preprocessed datasets to read: `derivatives` (name and path), or else `bids_dir`.

    That holds fMRIPrep derivatives, or is a raw dataset with ``derivatives/fmriprep`` inside.
    Raises BrainfmError where it is neither, with what there is.
    """
    if derivatives:
        for name in derivatives:
            if not re.fullmatch('[A-Za-z0-9_-]+', name):
                raise BrainfmError(
                    f'--derivatives names a dataset {name!r}, which becomes part of paths and of '
                    f'BIDS URIs: use letters, digits, - and _ only.'
                )
        datasets = {name: Path(path) for name, path in derivatives.items()}
        for root in datasets.values():
            read_description(root)
        return datasets
    description = read_description(bids_dir)
    if description.get('DatasetType') == 'derivative' or generators(description):
        return {'preprocessed': bids_dir}
    folders = [adapter(name).FOLDER for name in ADAPTERS]
    for folder in folders:
        if (nested := bids_dir / 'derivatives' / folder).is_dir():
            read_description(nested)
            return {folder: nested}
    if _has_preprocessed(bids_dir):  # though its description does not show it
        return {'preprocessed': bids_dir}
    lack = f'{bids_dir} is a raw BIDS dataset without derivatives/{" or ".join(folders)}'
    if others := sorted((bids_dir / 'derivatives').glob('*/')):
        similar = [path for path in others if any(name in path.name for name in folders)]
        example = similar[0] if similar else 'PATH'
        raise BrainfmError(
            f'{lack}, but with {abridge([path.name for path in others])} in its derivatives: name '
            f'the output of fMRIPrep with --derivatives fmriprep={example}.'
        )
    raise BrainfmError(
        f'{lack}: run fMRIPrep first, or name its output with --derivatives fmriprep=PATH.'
    )


def _has_preprocessed(root: Path) -> bool:
    """Whether a folder holds BOLD images with a space or a description, which raw data lack."""
    images = (f for folder in iterate_folders(root) for f in folder.files if f.suffix == 'bold')
    return any({'space', 'desc'} & file.entities.keys() for file in images)
