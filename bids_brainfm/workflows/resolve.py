"""Which models are run and how: weights, contracts, and what is asked of each product."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bids_brainfm.atlases import reference as references
from bids_brainfm.atlases.atlas import Atlas, load_atlas
from bids_brainfm.config import Settings, split_name
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models import spec as specs
from bids_brainfm.models.cards import ModelCard, load_card
from bids_brainfm.models.model import contract_of
from bids_brainfm.models.spec import ModelSpec
from bids_brainfm.outputs.products import module_of
from bids_brainfm.outputs.registry import (
    ALL,
    BY_NAME,
    DENOISING,
    EMBEDDINGS,
    LACKING,
    OF_MODELS,
    Product,
)  # fmt: skip
from bids_brainfm.outputs.tasks import ModelTask, NetworksTask, Place, Search
from bids_brainfm.signals.connectome import LABEL as CONNECTOME
from bids_brainfm.signals.contract import Contract
from bids_brainfm.signals.scale import STATISTICS, kind_of
from bids_brainfm.signals.strategy import Strategy, load_strategy, override

LOGGER = logging.getLogger('bids_brainfm')


def denoising(settings: Settings, name: str) -> Strategy:
    """Settle how series are denoised: a strategy by name or file, and the options for it."""
    given = {option.name: settings.options.get(option.name) for option in DENOISING}
    given.pop('custom_confounds')  # tables of runs
    return override(load_strategy(name), **given)


def find_resources(settings: Settings, home: Path) -> list[ModelCard]:
    """Cards of the models that were asked for, once all that they need is on this machine.

    Raises BrainfmError that names all missing atlases and, where something is to be encoded,
    weights.
    """
    cards, missing = [], []
    for text in settings.model:
        name, path = split_name(text)
        card = load_card(name)
        cards.append(card)
        needs: list[Callable[[], object]] = [
            partial(specs.find_checkpoint, name, path, home, settings.random_weights),
            partial(specs.find_gradients, name, path, home),
            partial(load_atlas, card.atlas, home),
        ]
        for find in needs if settings.stop_after is None else needs[-1:]:
            try:
                find()
            except BrainfmError as error:
                missing.append(str(error))
    if missing:
        raise BrainfmError(' '.join(dict.fromkeys(missing)))
    return cards


def resolve_models(settings: Settings, home: Path, version: str) -> list[ModelTask]:
    """Settle how each model is run; raises BrainfmError where one cannot do what is asked."""
    from bids_brainfm.models.encoder import resolve_device
    from bids_brainfm.models.precision import resolve_precision

    device = resolve_device(settings.device)
    tasks = []
    for text in settings.model:
        name, path = split_name(text)
        spec = specs.resolve_model(name, home, path, settings.random_weights)
        atlas = load_atlas(spec.card.atlas, home)
        task = ModelTask(
            place=Place(settings.output_dir, atlas.name, spec.label), spec=spec,
            contract=_contract(settings, spec.card, atlas.name), home=home, device=str(device),
            precision=resolve_precision(settings.precision, device),
            batch_size=settings.batch_size, threads=settings.omp_nthreads or 1,
            tokens=settings.tokens, version=version,
            parameters=parameters(OF_MODELS, settings, spec, atlas),
        )  # fmt: skip
        tasks.append(task)
    labels = [task.spec.label for task in tasks]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise BrainfmError(
            f'--model names {", ".join(sorted(twice))} twice, and both would write the same '
            f'files: name it once.'
        )
    if settings.temporal == 'official' and not any(t.spec.card.official_volumes for t in tasks):
        raise BrainfmError(
            f'--temporal official picks frames as Brain-JEPA does, and '
            f'{", ".join(settings.model)} has no such recipe: leave it out.'
        )
    ordered = any(task.spec.capabilities.ordered_tokens for task in tasks)
    if settings.options.get('token_shuffles') and not ordered:
        raise BrainfmError(
            f'--token-shuffles averages over orders of the tokens, which do not matter to '
            f'{", ".join(settings.model)}: leave it out.'
        )
    _check_asked(settings, tasks)
    return tasks


def can(spec: ModelSpec | None, needs: str) -> bool:
    """Whether a model, None for what is made without one, has what a product needs."""
    if spec is None:
        return True
    if needs == 'head':
        return bool(spec.predicted)
    return needs not in LACKING or bool(getattr(spec.capabilities, needs))


def parameters(
    products: Iterable[Product], settings: Settings, spec: ModelSpec | None, atlas: Atlas
) -> dict[str, Any]:
    """Products that are asked for and that the model can make, with their parameters.

    `spec` is None for products that are made without a model.
    """
    found: dict[str, Any] = {}
    for product in products:
        asked = not product.output or {product.output, ALL} & set(settings.outputs)
        if not asked or not can(spec, product.needs):
            continue
        options = product.options
        settled = module_of(product).parameters(settings, spec, atlas) if options else None
        if settled is not None or not options:
            found[product.name] = settled
    return found


def _check_asked(settings: Settings, tasks: list[ModelTask]) -> None:
    """Refuse what no model can make, and options that fit no atlas."""
    models, outputs = ', '.join(settings.model), set(settings.outputs) - {EMBEDDINGS, ALL}
    for product in OF_MODELS:
        if product.needs in LACKING and not any(can(t.spec, product.needs) for t in tasks):
            same = [p.output for p in OF_MODELS if p.needs == product.needs]
            lacking = [name for name in settings.outputs if name in outputs.intersection(same)]
            if lacking:
                raise BrainfmError(
                    f'--outputs {" ".join(lacking)}: {models} {LACKING[product.needs]}'
                )
            for option in product.options:
                value = settings.options.get(option.name)
                if not product.output and value not in (None, 'none'):
                    raise BrainfmError(f'{option.flag} {value}: {models} {LACKING[product.needs]}')
    _check_references(settings, tasks)
    clusters = settings.options.get('network_clusters') or ''
    for task in tasks:
        if clusters.isdigit() and int(clusters) >= task.spec.capabilities.window[0]:
            raise BrainfmError(
                f'--network-clusters {clusters}: the atlas {task.place.atlas} has '
                f'{task.spec.capabilities.window[0]} parcels; ask for fewer clusters than that.'
            )


def _check_references(settings: Settings, tasks: list[ModelTask]) -> None:
    """See that every table of networks is of some model's atlas; report what it leaves out."""
    atlases = {task.place.atlas: load_atlas(task.spec.card.atlas, task.home) for task in tasks}
    for path in settings.options.get('reference_networks') or ():
        of = [atlas for atlas in atlases.values() if references.reference_for(atlas, (path,))]
        if not of:
            raise BrainfmError(
                f'--reference-networks {path} names no parcel of {" or ".join(atlases)}: give a '
                f'table of the atlas of a model that is run.'
            )
        for atlas in of:
            unnamed = (references.reference_networks(atlas, path) or ()).count(references.NONE)
            if unnamed:
                LOGGER.warning(
                    '%s names no network of %d parcels of %s.', path, unnamed, atlas.name
                )


def _contract(settings: Settings, card: ModelCard, atlas: str) -> Contract:
    official = settings.temporal == 'official' and card.official_volumes
    contract = contract_of(
        card, settings.scale, stride=settings.stride, short_runs=settings.short_runs,
        temporal='official' if official else 'resample', min_coverage=settings.min_coverage,
        max_flagged=settings.max_flagged,
    )  # fmt: skip
    return replace(contract, stats=_stats_of(settings.scale_stats or (), atlas, contract.scaling))


def _stats_of(files: tuple[Path, ...], atlas: str, scaling: str) -> Path | None:
    """The file of statistics that a model takes; a single one is checked where it is read."""
    if len(files) < 2:
        return files[0] if files else None
    found: dict[tuple[str, str], Path] = {}
    for path in files:
        if (kind := kind_of(path)) in found:
            raise BrainfmError(
                f'--scale-stats names {found[kind]} and {path}, both of the {kind[1]} of the '
                f'atlas {kind[0]}: give one of them.'
            )
        found[kind] = path
    wanted = (atlas, STATISTICS[scaling])
    if wanted not in found:
        raise BrainfmError(
            f'None of the files of --scale-stats is of the {wanted[1]} of the atlas {atlas}: they '
            f'are of {", ".join(f"{kind} of {name}" for name, kind in found)}.'
        )
    return found[wanted]


def networks_tasks(
    settings: Settings, version: str, home: Path, card: str, tasks: list[ModelTask]
) -> list[NetworksTask]:
    """How networks are found in one atlas, from each source; none where they are not asked for."""
    if not tasks or not {BY_NAME['networks'].output, ALL} & set(settings.outputs):
        return []
    atlas = load_atlas(card, home)
    reference = references.reference_for(atlas, settings.options.get('reference_networks') or ())
    clusters = settings.options.get('network_clusters')
    search = Search(card, home, clusters, reference, settings.random_seed)
    if search.networks is None:
        LOGGER.warning(
            'No reference networks of the atlas %s are on this machine: clusters are not named '
            'and the k-NN protocol is left out (see --reference-networks).', atlas.name,
        )  # fmt: skip
    place = Place(settings.output_dir, atlas.name, CONNECTOME)
    found = [NetworksTask(place, search, CONNECTOME, None, version)]
    for task in tasks:
        kind = task.spec.capabilities.parcel_features
        if kind is not None:
            table = task.spec.gradients.path if task.spec.gradients else None
            found.append(NetworksTask(task.place, search, kind, table, version))
    return found
