"""From the derivatives of a participant to the report: everything is read back from disk."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from bids_brainfm.bids.dataset import Record, find_records
from bids_brainfm.bids.files import listed
from bids_brainfm.bids.freshness import read_sidecar
from bids_brainfm.bids.naming import join_name, parcels_name
from bids_brainfm.bids.settings import other_settings, recorded_digest
from bids_brainfm.outputs.outcome import read_failures
from bids_brainfm.outputs.products import facts, report_figures
from bids_brainfm.outputs.registry import BY_NAME, OF_SERIES, PRODUCTS, Product
from bids_brainfm.progress import track
from bids_brainfm.reports.fragments import ModelFacts, RunFacts, Source
from bids_brainfm.reports.methods import read_methods
from bids_brainfm.reports.report import figure_files, read_mark, write_report
from bids_brainfm.signals.connectome import LABEL as CONNECTOME

LOGGER = logging.getLogger('bids_brainfm')
OUTDATED = (
    'the outputs were written by another version of bids_brainfm, with other numbers: run it '
    'again with --recompute.'
)
# Raised where a sidecar lacks an entry, or has one of another type than this program writes
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)
DAMAGED = 'the sidecar {} is damaged: run the participant level again.'
AFTER_FAILURE = (
    ' What is shown below was written before that; networks, training and the group level leave '
    'it out.'
)
EMBEDDING = BY_NAME['embedding']
NEXT_TO_SERIES = tuple(product for product in OF_SERIES if product.name != 'series')
# Products that belong to an embedding, and have lines in the report next to its own
NEXT_TO_EMBEDDING = tuple(
    product for product in PRODUCTS
    if product.scope != 'group' and product not in (*OF_SERIES, EMBEDDING)
)  # fmt: skip


def report(output: Path, subject: str, software: dict[str, str]) -> Path:
    """Write the report of one participant, from what is in the output folder.

    The warnings of all sidecars that it shows go to the log as well.
    """
    # before what it is made from is read: what changes meanwhile makes it another one
    mark = _mark(output, subject, _shared(output, software))
    runs, methods = collect_runs(output, subject), read_methods(output)
    for run in runs:
        for sentence in run.warnings:
            LOGGER.warning('%s: %s', run.name, sentence)
    return write_report(output, subject, runs, report_figures(), methods, software, mark)


def out_of_date(output: Path, subjects: Collection[str], software: dict[str, str]) -> list[str]:
    """Participants whose reports are not those that would be written now."""
    shared = _shared(output, software)
    return [
        subject
        for subject in track(subjects, 'Looking through reports', 'participant')
        if read_mark(output / f'sub-{subject}.html') != _mark(output, subject, shared)
    ]


def _shared(output: Path, software: dict[str, str]) -> str:
    """What the reports of all participants are made from: versions, methods text, settings."""
    records = [path.stem for path in listed(output / 'logs' / 'settings', '*.json')]
    settings = {name: recorded_digest(output, name) for name in records}
    return json.dumps([software, read_methods(output), settings])


def _mark(output: Path, subject: str, shared: str) -> str:
    """Checksum of all that a report is made from: sidecars, failures, names of figures, text."""
    digest = hashlib.sha256(shared.encode())
    folder = output / f'sub-{subject}'
    places = [folder / 'func', *(session / 'func' for session in listed(folder, 'ses-*'))]
    read = [path for place in places for path in listed(place, '*.json')]
    for path in [*read, *listed(folder / 'log', 'failed-*.txt')]:
        digest.update(f'{path.name}\n'.encode())
        digest.update(path.read_bytes())
    names = [path.name for path in figure_files(output, subject)]
    digest.update('\n'.join(names).encode())
    return digest.hexdigest()


def collect_runs(output: Path, subject: str) -> list[RunFacts]:
    """What the sidecars of a participant say, run by run."""
    runs: dict[str, RunFacts] = {}
    sidecars = {'subjects': [subject], 'extension': '.json'}
    series = BY_NAME['series']
    for record in find_records(output, series.suffix, stat=series.stat, **sidecars):
        sidecar, name = read_sidecar(record.path), parcels_name(record.path.name)
        if sidecar is None:
            runs[name] = RunFacts(name, failures=[DAMAGED.format(record.path.name)])
        elif sidecar.get('ResultsVersion') != series.results_version:
            runs[name] = RunFacts(name, failures=[OUTDATED])
        else:
            try:
                runs[name] = _run_facts(name, record, sidecar)
                runs[name].warnings.extend(_other_settings(output, sidecar))
            except MALFORMED:
                runs[name] = RunFacts(name, failures=[DAMAGED.format(record.path.name)])
    for record in find_records(output, EMBEDDING.suffix, **sidecars):
        sidecar, run = read_sidecar(record.path), runs.get(parcels_name(record.path.name))
        connectivity = record.entities['desc'] == CONNECTOME
        version = (BY_NAME[CONNECTOME] if connectivity else EMBEDDING).results_version
        if sidecar is None or run is None or sidecar.get('ResultsVersion') != version:
            continue
        try:
            _add_embedding(run, record, sidecar, connectivity)
        except MALFORMED:
            run.failures.append(DAMAGED.format(record.path.name))
        else:
            others = () if connectivity else _other_settings(output, sidecar)
            run.warnings.extend(words for words in others if words not in run.warnings)
    shown = list(runs.values())
    return shown + _failed(output, subject, shown)


def _other_settings(output: Path, sidecar: dict[str, Any]) -> list[str]:
    """Sentences on outputs that were made with other settings than the recorded ones."""
    words = 'The outputs were made with other settings of {} than those in logs/settings.'
    return [words.format(name) for name in other_settings(output, sidecar)]


def _run_facts(name: str, record: Record, sidecar: dict[str, Any]) -> RunFacts:
    """What the sidecars of the parcel series, and of what is made from them alone, say."""
    atlas, warnings = sidecar['Atlas'], [str(each) for each in sidecar['Warnings']]
    source = Source(*(str(atlas[key]) for key in ('Name', 'License', 'Citation')))
    inputs = facts(BY_NAME['series'], sidecar)
    inputs |= _lines(NEXT_TO_SERIES, record, sidecar, warnings)
    excluded = bool(sidecar['Excluded'])
    return RunFacts(name, inputs, atlas=source, warnings=warnings, excluded=excluded)


def _add_embedding(
    run: RunFacts, record: Record, sidecar: dict[str, Any], connectivity: bool
) -> None:
    """Add what the sidecar of an embedding, or of the connectome as one, says."""
    lines = _lines(NEXT_TO_EMBEDDING, record, sidecar, run.warnings)
    if connectivity:
        run.inputs.update({name: str(line) for name, line in lines.items()})
    else:
        run.models.append(_model_facts(record.entities['desc'], sidecar, lines))
        run.warnings.extend(sidecar['Warnings'])


def _lines(
    products: Iterable[Product], record: Record, sidecar: dict[str, Any], warnings: list[str]
) -> dict[str, Any]:
    """Lines on products that belong to a record and are of the same input; adds to `warnings`."""
    lines: dict[str, Any] = {}
    for product in products:
        content = read_sidecar(_sidecar_of(product, record))
        current = content is not None and content.get('ResultsVersion') == product.results_version
        if content and current and content['InputFiles'] == sidecar['InputFiles']:
            lines |= facts(product, content)
            warnings.extend(content.get('Warnings', []))
    return lines


def _sidecar_of(product: Product, record: Record) -> Path:
    """Sidecar of a product that belongs to a series or an embedding."""
    stat = {'stat': product.stat} if product.stat else {}
    label = {'desc': record.entities['desc']} if 'desc' in record.entities else {}
    others = {k: v for k, v in record.entities.items() if k not in ('stat', 'desc')}
    entities = others | stat | label
    return record.path.with_name(join_name(entities, product.suffix, '.json'))


def _model_facts(label: str, sidecar: dict[str, Any], lines: dict[str, str | int]) -> ModelFacts:
    model, shown = sidecar['Model'], facts(EMBEDDING, sidecar) | lines
    return ModelFacts(
        model['Name'], model['License'], ' '.join(model['Citation']), label=label,
        trained=model['Trained'], windows=sidecar['NumberOfWindows'], facts=shown,
    )  # fmt: skip


def _failed(output: Path, subject: str, listed: list[RunFacts]) -> list[RunFacts]:
    """Put failures on record with the run they belong to; those of no listed run are returned."""
    alone = []
    for outcome in read_failures(output, subject):
        atlas, _, model = outcome.step.partition('_')
        reason = (outcome.error or '').removeprefix(f'{outcome.run}: ')
        begins = f'{outcome.run}_space-'
        own = [r for r in listed if r.name.startswith(begins) and r.name.endswith(atlas)]
        if own:
            labels = [f'desc-{shown.label}' for shown in own[0].models]
            kept = AFTER_FAILURE if not model or model in labels else ''
            own[0].failures.append(reason + kept)
        else:
            alone.append(RunFacts(outcome.run, failures=[reason]))
    return alone
