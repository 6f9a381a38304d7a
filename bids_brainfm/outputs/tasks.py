"""How outputs are made: settled before anything starts, and handed to the nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.atlases.reference import NONE, reference_networks
from bids_brainfm.bids.naming import derivative_path
from bids_brainfm.bids.run import BoldRun
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.reports.report import figure_path
from bids_brainfm.signals.connectome import LABEL as CONNECTOME
from bids_brainfm.signals.contract import Contract
from bids_brainfm.signals.strategy import Strategy


@dataclass(frozen=True)
class Place:
    """Where the outputs of one atlas, or of one model, go."""

    output: Path  # the output dataset
    atlas: str  # name of the atlas
    label: str | None = None  # BIDS label of the model; None for what comes from series alone

    @property
    def of_series(self) -> 'Place':
        """Where the parcel series go."""
        return Place(self.output, self.atlas)

    @property
    def step(self) -> str:
        """What making its outputs is called in the log folder."""
        return f'atlas-{self.atlas}' + (f'_desc-{self.label}' if self.label else '')

    def path(
        self, run: BoldRun, suffix: str, stat: str | None = None, extension: str = '.tsv',
        desc: str | None = None,
    ) -> Path:  # fmt: skip
        """Path of an output of a run; its ``desc`` is the label of the model where not given."""
        label = desc or self.label
        return derivative_path(
            self.output, run, suffix, extension, atlas=self.atlas, stat=stat, desc=label
        )

    def table(self, run: BoldRun, product: str) -> Path:
        """Path of the table of a product, whose sidecar is written last."""
        found = BY_NAME[product]
        return self.path(run, found.suffix, found.stat, desc=found.desc)

    def image(self, run: BoldRun, table: Path) -> Path:
        """Path of the image of a map, next to its table."""
        return table.with_suffix('.dscalar.nii' if run.is_cifti else '.nii.gz')

    def figure(self, run: BoldRun, name: str) -> Path:
        """Path of a figure of a run, which the report knows by name, space and atlas."""
        whose = f'{run.name}_space-{run.space}_atlas-{self.atlas}'
        return figure_path(self.output, whose, name, self.label)


class Task(Protocol):
    """What all tasks have: where outputs go, and the version of this program."""

    @property
    def place(self) -> Place: ...

    @property
    def version(self) -> str: ...


@dataclass(frozen=True)
class SeriesTask:
    """How parcel series are made, for all runs of one atlas."""

    place: Place
    card: str  # name of the atlas, or the path of its card
    home: Path  # where fetched atlases are kept
    strategy: Strategy = field(hash=False)  # of denoising
    min_coverage: float  # proportion of a parcel below which it is n/a
    max_flagged: float  # proportion of flagged volumes above which a run is excluded
    version: str
    custom_confounds: Path | None = None  # folder of further confounds
    denoised: bool = False  # whether the pipeline that wrote the runs had denoised them
    parcel_voxels: str = 'mask'  # that parcel means are taken over, of signals.parcellate.VOXELS
    # ``Parameters`` by the name of each product asked for; None for a product without options
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ModelTask:
    """How one model is run, for all runs."""

    place: Place
    spec: ModelSpec
    contract: Contract
    home: Path  # where fetched atlases are kept
    device: str  # as resolved: cpu or cuda
    precision: str  # as resolved: float32, tf32 or bfloat16
    batch_size: int  # windows at once
    threads: int
    tokens: bool  # whether to write token embeddings
    version: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)  # as in SeriesTask

    @property
    def arrays(self) -> list[str]:
        """What is written as HDF5 next to the table of embeddings."""
        per_parcel = self.spec.capabilities.patches is not None
        return ['parcels'] * per_parcel + ['tokens'] * self.tokens


@dataclass(frozen=True)
class Search:
    """How networks are found, for all runs of one atlas."""

    card: str  # name of the atlas, or the path of its card
    home: Path  # where fetched atlases are kept
    # Number of clusters, or 'auto' for the best silhouette; None: that of reference networks
    n_clusters: str | None
    reference: Path | None  # table of reference networks; None: the atlas's own
    seed: int

    @cached_property
    def atlas(self) -> Atlas:
        """The atlas."""
        return load_atlas(self.card, self.home)

    @cached_property
    def networks(self) -> tuple[str, ...] | None:
        """Reference network of each parcel, None where nothing is known."""
        return reference_networks(self.atlas, self.reference)

    @property
    def clusters(self) -> int | None:
        """Number of clusters to make, None for the best silhouette."""
        if self.n_clusters not in (None, 'auto'):
            return int(self.n_clusters)
        if self.n_clusters == 'auto' or self.networks is None:
            return None
        return len(set(self.networks) - {NONE})


@dataclass(frozen=True)
class NetworksTask:
    """Networks of one atlas from one source of features."""

    place: Place  # its label is that of the model, or of the connectome
    search: Search
    kind: str  # of features: 'connectome', 'attention' or 'parcels'
    gradients: Path | None  # table by which the model is given the places of parcels
    version: str

    def step(self, of: BoldRun) -> str:
        """What finding the networks of a run, or of a participant in a space, is called."""
        whose = '' if 'task' in of.entities else f'-{of.space}'
        return f'atlas-{self.place.atlas}_networks{whose}_desc-{self.place.label}'

    @property
    def feature_product(self) -> str:
        """Name of the product that features are read from."""
        return 'embedding' if self.kind == 'parcels' else self.kind

    def features_file(self, run: BoldRun) -> Path:
        """File that features of a run are read from."""
        if self.kind == 'parcels':
            return self.place.path(run, 'embedding', extension='.h5')
        place = self.place.of_series if self.kind == CONNECTOME else self.place
        return place.table(run, self.kind)
