"""What the products that need no model are made from: the parcel series of one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bids_brainfm.atlases.atlas import Atlas
from bids_brainfm.atlases.export import export_atlas
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.bids.naming import own_uri
from bids_brainfm.bids.run import BoldRun, metadata
from bids_brainfm.bids.settings import SETTINGS
from bids_brainfm.errors import abridge
from bids_brainfm.outputs import quality
from bids_brainfm.outputs.tasks import SeriesTask
from bids_brainfm.signals.connectome import connectome
from bids_brainfm.signals.parcellate import DEMEANED

if TYPE_CHECKING:
    from bids_brainfm.signals.bold import BoldSeries


@dataclass(frozen=True)
class SeriesContext:
    """Parcel series of one run: what the products are made from that need no model."""

    run: BoldRun
    task: SeriesTask
    atlas: Atlas
    series: 'BoldSeries'  # denoised; NaN for parcels without enough coverage
    inputs: Mapping[str, dict[str, Any]]  # fingerprints of what was read, by URI
    results_version: int | None = None  # of the product that is being made
    settings: Mapping[str, str] | None = None  # as recorded, see `products.agreed_settings`

    @property
    def assessed(self) -> bool:
        """Whether outliers are known: confounds were read, or volumes hold no signal."""
        return bool(self.task.strategy.outliers) or bool(self.series.flagged.any())

    @property
    def excluded(self) -> bool:
        """Whether a larger proportion of the volumes is flagged than allowed."""
        return bool(self.series.flagged.mean() > self.task.max_flagged)

    @cached_property
    def relmat(self) -> np.ndarray:
        """Correlations between parcels over unflagged volumes, (P, P) float32."""
        return connectome(self.series.data, self.series.flagged)

    @property
    def degrees_of_freedom(self) -> float:
        """Residual degrees of freedom; NaN where a pipeline regressed confounds out."""
        done = None if self.task.denoised else self.series.denoised
        return done.freedom.residual if done else float('nan')

    @cached_property
    def quality(self) -> dict[str, float]:
        """Quality metrics by name, see :mod:`bids_brainfm.outputs.quality`."""
        return quality.metrics(self)

    @property
    def uncovered(self) -> list[str]:
        """Names of the parcels that are n/a."""
        missing = np.flatnonzero(np.isnan(self.series.data).all(axis=0))
        return [self.atlas.names[i] for i in missing]

    @property
    def voxels(self) -> str:
        """What coverage counts, for sentences."""
        if self.run.is_cifti:
            return 'grayordinates varying over the run'
        return 'voxels inside the brain mask and varying over the run'

    @property
    def warnings(self) -> list[str]:
        """What is out of the ordinary, one sentence each."""
        found, tr, sentences = self.series.found, self.series.tr, list(self.run.notes)
        if 'RepetitionTime' not in metadata(self.run):
            sentences.append(
                f'No sidecar gives the repetition time; that of the header, {tr:g} s, was used.'
            )
        if found.demeaned and not self.run.denoised:
            sentences.append(DEMEANED)
        if found.header_tr and abs(found.header_tr - tr) > 1e-3 * tr:
            sentences.append(
                f'The header gives a repetition time of {found.header_tr:g} s, the sidecar '
                f'{tr:g} s; the sidecar was used.'
            )
        if found.n_nonfinite:
            sentences.append(
                f'{found.n_nonfinite} voxels hold NaN or infinite values and were left out.'
            )
        if names := self.uncovered:
            sentences.append(
                f'{len(names)} of {self.atlas.n_parcels} parcels have less than '
                f'{self.task.min_coverage:.0%} of their {self.voxels}, or none, and are n/a: '
                f'{abridge(names)}.'
            )
        if self.excluded:
            sentences.append(
                f'{self.series.flagged.mean():.0%} of the volumes are flagged, more than '
                f'--max-flagged {self.task.max_flagged:g} allows: the run is excluded from '
                f'summaries, networks, training and the group level.'
            )
        if dummy := self.series.dummy:
            what = 'non-steady-state volumes' if self.task.strategy.finds_dummies else 'volumes'
            sentences.append(f'{dummy} {what} at the start were left out.')
        return sentences + list(self.series.denoised.warnings if self.series.denoised else ())

    @cached_property
    def sources(self) -> list[str]:
        """URIs of what the outputs are made from; the last one is the atlas."""
        output = self.task.place.output
        sources = [self.run.uri(path) for path in self.run.companions()]
        return [*sources, own_uri(output, export_atlas(output, self.atlas, self.series.image))]

    def write_sidecar(self, path: Path, content: dict[str, Any], from_series: bool = True) -> None:
        """Write the sidecar of a file, which is made from the series or from the BOLD file."""
        place = self.task.place
        own = [own_uri(place.output, place.table(self.run, 'series'))]
        common = {
            'Sources': own * from_series + self.sources,
            'InputFiles': self.inputs,
            'SoftwareVersion': self.task.version,
            'ResultsVersion': self.results_version,
            SETTINGS: self.settings,
            'Excluded': self.excluded,
        }
        write_sidecar(path, content | common)
