"""What all products share: the form of their modules, freshness, removal, records, writing.

A product is an entry of :data:`bids_brainfm.outputs.registry.PRODUCTS` and a module of plain
functions, :class:`ProductModule`. Everything that follows from these is here, once.
"""

import importlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.bids import freshness
from bids_brainfm.bids.dataset import Record, iterate_records
from bids_brainfm.bids.files import write_table
from bids_brainfm.bids.naming import own_uri
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.bids.settings import (
    SETTINGS,
    claim_settings,
    other_settings,
    record_path,
    recorded_digest,
    settings_digest,
)
from bids_brainfm.config import Settings
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.registry import BY_NAME, PRODUCTS, Product
from bids_brainfm.outputs.tasks import ModelTask, Place, SeriesTask, Task
from bids_brainfm.reports.report import Figure
from bids_brainfm.signals.contract import ModelInput
from bids_brainfm.signals.series import Windows

if TYPE_CHECKING:
    from matplotlib import figure as mpl

    from bids_brainfm.models.encoder import Encoding
    from bids_brainfm.models.model import Model


class ProductModule(Protocol):
    """What the module of a product made for each run provides."""

    FIGURES: Mapping[str, Figure]  # in the report, by name, in their order

    def parameters(self, settings: Settings, spec: ModelSpec | None, atlas: Atlas) -> Any:
        """Settle options for a model, or refuse them (BrainfmError); of products with options.

        `spec` is None for a product that is made without a model.
        """

    def companions(self, run: BoldRun, place: Place, task: Any = None) -> list[Path]:
        """Files next to table and map that a task asks for; without a task all; if any."""

    def settings(self, task: Any) -> dict[str, Any]:
        """What all its outputs in one folder must agree on, where that is not all parameters."""

    def methods(self, task: Any) -> str:
        """Sentences for the methods text; only of products with a record."""

    def compute(self, context: Any) -> Any:
        """Compute what is written."""

    def write(self, context: Any, result: Any) -> None:
        """Write it: files and figures, and last the sidecar of the table."""

    def facts(self, sidecar: dict[str, Any]) -> dict[str, Any]:
        """Lines of the report, from the sidecar of the table; if any."""


class GroupModule(Protocol):
    """What the module of a product of the group level provides."""

    def wanted(self, settings: Settings) -> bool:
        """Whether the settings ask for it."""

    def find(self, dataset: Path, filters: dict[str, tuple[str, ...]], settings: Settings) -> Any:
        """Read what the participant level wrote, or refuse it."""

    def write(self, found: Any, dataset: Path, settings: Settings, version: str) -> list[Path]:
        """Compute and write, and report on the log."""


def group_modules() -> list[GroupModule]:
    """Functions of the products of the group level."""
    return [cast(GroupModule, module_of(p)) for p in PRODUCTS if p.scope == 'group']


def module_of(product: Product) -> ProductModule:
    """Return the functions of a product."""
    return cast(ProductModule, importlib.import_module(f'bids_brainfm.outputs.{product.module}'))


def companions(
    product: Product, run: BoldRun, place: Place, task: Task | None = None
) -> list[Path]:
    """Files next to the table of a product that a task asks for; without a task all."""
    module = module_of(product)
    own = module.companions(run, place, task) if hasattr(module, 'companions') else []
    return [place.image(run, place.table(run, product.name))] * product.image + own


def facts(product: Product, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Lines of the report on a product; none where its module has no such function."""
    module = module_of(product)
    return module.facts(sidecar) if hasattr(module, 'facts') else {}


def product_current(
    product: Product, run: BoldRun, task: Task, inputs: dict[str, dict[str, Any]] | None = None,
    contents: bool = False,
) -> bool:  # fmt: skip
    """Whether all files of a product are whole and made from `inputs` (by default the run's).

    With `contents`, files are compared with their checksums. Raises BrainfmError where outputs
    that would be current were made with other settings than the recorded ones.
    """
    table = task.place.table(run, product.name)
    inputs = freshness.input_fingerprints(run) if inputs is None else inputs
    if not freshness.is_current(table, inputs, product.results_version, contents):
        return False
    sidecar = freshness.read_sidecar(freshness.sidecar_path(table)) or {}
    written = sidecar.get('Arrays')
    files = companions(product, run, task.place, None if written else task)
    if not all(freshness.is_whole(file, contents) for file in files):
        return False
    if others := other_settings(task.place.output, sidecar):
        raise BrainfmError(
            f'{table} was made with other settings of {others[0]} than those in logs/settings: '
            f'remove the outputs of other settings, or use another output folder.'
        )
    return written is None or set(getattr(task, 'arrays', ())) <= set(written)


def damaged_files(product: Product, run: BoldRun, place: Place) -> dict[Path, str]:
    """Files of a product that exist but are not as they were written, and what is wrong."""
    files = [place.table(run, product.name), *companions(product, run, place)]
    there = [path for path in files if path.is_file() and freshness.sidecar_path(path).is_file()]
    found = {path: freshness.damage(path, contents=True) for path in there}
    return {path: words for path, words in found.items() if words}


def remove(product: Product, run: BoldRun, place: Place) -> None:
    """Remove all files of a product, sidecars first, so that nothing half old stays."""
    files = [place.table(run, product.name), *companions(product, run, place)]
    figures = [place.figure(run, name) for name in module_of(product).FIGURES]
    for path in (*map(freshness.sidecar_path, files), *files, *figures):
        path.unlink(missing_ok=True)


def write_products(
    products: Iterable[Product], run: BoldRun, task: Task, wanted: Container[str], context: Any
) -> None:
    """Write the products of a run that are wanted and not current; remove what is out of date."""
    for product in products:
        if not product_current(product, run, task, contents=True):
            remove(product, run, task.place)
            if product.name in wanted:
                module = module_of(product)
                version, settings = product.results_version, agreed_settings(product, task)
                own = replace(context, results_version=version, settings=settings)
                module.write(own, module.compute(own))


def record_name(product: Product, place: Place) -> str:
    """Name of a product's settings record and part of the methods text."""
    return product.record.format(atlas=place.atlas, label=place.label)


def records_of(product: Product, place: Place) -> Iterable[Record]:
    """Outputs that a product's settings record speaks for."""
    if product.record == 'atlas-{atlas}':
        return iterate_records(place.output, '*', atlas=place.atlas)
    if product.record == 'desc-{label}':
        return iterate_records(place.output, '*', desc=place.label)
    entities: dict[str, Any] = {'stat': product.stat or None, 'atlas': place.atlas}
    if '{label}' in product.record:
        entities['desc'] = place.label
    return iterate_records(place.output, product.suffix, **entities)


def settings_of(product: Product, task: Task) -> dict[str, Any]:
    """What all outputs of a product in one folder must agree on."""
    module, settings = module_of(product), {}
    if hasattr(module, 'settings'):
        settings = module.settings(task)
    elif asked := cast(ModelTask | SeriesTask, task).parameters[product.name]:
        settings = asdict(asked)
    return settings | {'results_version': product.results_version}


def claim(product: Product, task: Task, recompute: bool = False) -> None:
    """Hold the outputs of a product in one folder to one set of settings, or refuse to mix.

    With `recompute`, the record of an earlier version of the results is replaced; its outputs are
    out of date, and are made again.
    """
    if product.record:
        place, settings = task.place, settings_of(product, task)
        name = record_name(product, place)
        claim_settings(place.output, name, settings, records_of(product, place), recompute)


def agreed_settings(product: Product, task: Task) -> dict[str, str]:
    """Checksums of the recorded settings that a product is about to be made with, by record.

    Raises BrainfmError where they are not those of the task, since another command changed them.
    """
    place, records = task.place, (product, BY_NAME['series'], BY_NAME['embedding'])
    names = dict.fromkeys(record_name(each, place) for each in records if each.record)
    recorded = {name: recorded_digest(place.output, name) for name in names}
    found = {name: digest for name, digest in recorded.items() if digest is not None}
    if product.record:
        name, own = record_name(product, place), settings_digest(settings_of(product, task))
        if found.setdefault(name, own) != own:
            raise BrainfmError(
                f'{record_path(place.output, name)} no longer has the settings that this '
                f'command started with: use the same settings, or another output folder.'
            )
    return found


def save_figure(figure: 'mpl.Figure', path: Path) -> None:
    """Write a figure where the report finds it."""
    from bids_brainfm.reports import style

    style.save(figure, path)


@dataclass(frozen=True)
class Context:
    """One run and what a model makes of it: what the products of a model are made from."""

    run: BoldRun
    task: ModelTask
    model: 'Model'
    data: ModelInput  # the run in the model's units
    windows: Windows  # what was encoded
    encoding: 'Encoding'
    # what PrecisionCheck found so far; None where the encoder computes in float32
    precision_check: dict[str, Any] | None = None
    results_version: int | None = None  # of the product that is being made
    settings: Mapping[str, str] | None = None  # as recorded, see `agreed_settings`

    @property
    def atlas(self) -> Atlas:
        """Atlas of the model."""
        return self.model.atlas

    @cached_property
    def source(self) -> dict[str, Any]:
        """Sidecar of the run's parcel series."""
        series = self.task.place.of_series.table(self.run, 'series')
        return freshness.read_sidecar(freshness.sidecar_path(series)) or {}

    @cached_property
    def common(self) -> dict[str, Any]:
        """What all sidecars of the run and model say."""
        place, source = self.task.place, self.source
        series = own_uri(place.output, place.of_series.table(self.run, 'series'))
        return {
            'InputFiles': source['InputFiles'], 'SoftwareVersion': self.task.version,
            'ResultsVersion': self.results_version, SETTINGS: self.settings,
            'Sources': [series, *source['Sources']], 'Excluded': bool(self.windows.excluded.all()),
        }  # fmt: skip

    @property
    def series_metadata(self) -> dict[str, Any]:
        """What a sidecar takes over from the parcel series, for a table with the same rows."""
        names = ('RepetitionTime', 'SamplingFrequency', 'StartTime', 'Atlas')
        return {name: self.source[name] for name in names}

    @cached_property
    def image(self) -> Path:
        """Image of the atlas in the run's space."""
        from bids_brainfm.signals.bold import voxel_size

        return self.atlas.image_for(self.run.space, voxel_size(self.run.bold)).path

    def mean_of_windows(self, values: np.ndarray) -> np.ndarray:
        """Mean of values (W, ...) over the windows that are not excluded, NaN without any."""
        kept = values[~self.windows.excluded]
        return kept.mean(axis=0, dtype=float) if len(kept) else np.full(values.shape[1:], np.nan)

    @property
    def scored(self) -> np.ndarray:
        """Samples of the run and parcels that were measured, (S, P) bool.

        Flagged volumes were interpolated, and parcels without signal filled from others.
        """
        return ~self.data.flagged[:, None] & self.data.own

    def own(self, values: np.ndarray) -> np.ndarray:
        """Return values (P, ...) with NaN for the parcels that were filled from others."""
        shown = np.array(values, dtype=float)
        shown[~self.data.own] = np.nan
        return shown

    def table(self, product: str) -> Path:
        """Path of the table of a product."""
        return self.task.place.table(self.run, product)

    def save_figure(self, figure: 'mpl.Figure', name: str) -> None:
        """Write a figure where the report finds it."""
        save_figure(figure, self.task.place.figure(self.run, name))

    def write_sidecar(self, path: Path, content: dict[str, Any], exact: bool = False) -> None:
        """Write the sidecar of a file; `exact`: computed with the encoder in float32."""
        task, spec = self.task, self.task.spec
        made = {
            'Model': {'Name': spec.card.name, 'Trained': spec.trained, 'Weights': spec.weights},
            'Precision': 'float32' if exact else task.precision,
            'Device': task.device,
        }
        freshness.write_sidecar(path, content | made | self.common)

    def write_map(self, path: Path, columns: dict[str, Any], values: np.ndarray) -> None:
        """Write a table with one row per parcel, and values (P,) as an image."""
        from bids_brainfm.signals.paint import paint_map

        write_table(path, {'Node': list(self.atlas.names)} | columns)
        name = path.name.partition('_stat-')[2].partition('_boldmap')[0].replace('_desc-', ' ')
        paint_map(self.task.place.image(self.run, path), self.image, values, name)


def known_mean(values: Sequence[np.ndarray] | np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN, NaN where there is nothing.

    >>> known_mean(np.array([[1.0, 2], [np.nan, 4], [np.nan, np.nan]]), axis=1)
    array([1.5, 4. , nan])
    """
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def display_order(xyz: np.ndarray) -> tuple[np.ndarray, str]:
    """Order in which figures show parcels, from their centres (P, 3) in mm, and its name."""
    return np.lexsort((xyz[:, 1], xyz[:, 0] > 0)), 'left then right, back to front'


def report_figures() -> dict[str, Figure]:
    """Figures of all products in the order of the report."""
    modules = [module_of(product) for product in PRODUCTS if product.scope != 'group']
    return {name: figure for module in modules for name, figure in module.FIGURES.items()}
