"""``bids_brainfm_models``: what models and atlases there are, fetching and training them."""

import argparse
import glob
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bids_brainfm import surroundings
from bids_brainfm.atlases.cards import AtlasCard, atlas_names, images_here, missing_files
from bids_brainfm.atlases.cards import load_card as load_atlas_card
from bids_brainfm.atlases.obtain import obtain_atlas
from bids_brainfm.cli import training
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import ModelCard, checkpoint_dir, load_card, model_names
from bids_brainfm.models.files import WEIGHTS_FILES, is_weights
from bids_brainfm.models.spec import resolve_model
from bids_brainfm.resources import Resource, fetch, forget, home, inside

SIZES = ('model_type', 'hidden_size', 'num_hidden_layers')


def get_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog='bids_brainfm_models',
        description='Show, fetch and train the models of bids_brainfm. What is fetched is kept in '
        '$BIDS_BRAINFM_HOME (default: ~/.cache/bids_brainfm).',
    )
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='models and atlases, and what is present')
    fetching = commands.add_parser('fetch', help='download models or atlases')
    fetching.add_argument('names', nargs='+', metavar='NAME', help='a model, an atlas or a card')
    words = 'take the files from this folder instead of the internet, by sha256 whatever their '
    words += 'names, by name where no sha256 is known'
    fetching.add_argument('--from', dest='source_dir', metavar='DIR', type=Path, help=words)
    training.add_commands(commands)
    return parser


def _resource(card: ModelCard, file: dict[str, str], home: Path) -> Resource:
    target = inside(checkpoint_dir(card, home), file['name'])
    return Resource(file['name'], target, file.get('url'), file.get('sha256'))


def weights_resources(
    card: ModelCard, home: Path, source_dir: Path | None = None
) -> list[Resource]:
    """Files of a model's checkpoint, except those in the same folder as its card.

    The weights may be in any of the formats: what `source_dir` or the model's folder has is taken.
    """
    folder = checkpoint_dir(card, home)
    searched = [folder, *([source_dir] if source_dir else [])]
    has = lambda name: any(any(place.rglob(glob.escape(name))) for place in searched)
    resources = []
    for file in card.weights:
        if Path(file['name']).is_absolute():
            continue
        resource = _resource(card, file, home)
        if is_weights(resource.name) and resource.sha256 is None and not has(resource.name):
            other = next(filter(has, WEIGHTS_FILES), None)
            resource = Resource(other, folder / other) if other else resource
        resources.append(resource)
    return resources


def gradient_resources(card: ModelCard, home: Path) -> list[Resource]:
    """The table of gradients, for a model that needs one that is not in its card's folder."""
    file = card.gradients
    if not file or Path(file['name']).is_absolute():
        return []
    resource = _resource(card, file, home)
    return [replace(resource, name=resource.target.name)]


def model_present(card: ModelCard, home: Path) -> str:
    """Whether a model can be used, in words."""
    needed = [*weights_resources(card, home), *gradient_resources(card, home)]
    if not needed:
        return f'yes (embedded{"" if card.weights else ", untrained"})'
    return 'yes' if all(resource.target.is_file() for resource in needed) else 'no'


def atlas_present(card: AtlasCard, home: Path) -> str:
    """Whether an atlas can be used, and in which spaces where not in all, in words."""
    if card.embedded:
        return 'yes (embedded)'
    if not missing_files(card, home):
        return 'yes'
    spaces = dict.fromkeys(image.space for image in images_here(card, home))
    if missing_files(card, home, spaces=[]) or not spaces:
        return 'no'
    return f'only for {", ".join(spaces)}'


def megabytes(paths: Iterable[Path]) -> str:
    """Size on disk of those files that exist."""
    total = sum(path.stat().st_size for path in set(paths) if path.is_file())
    return f'{total / 1e6:.1f} MB' if total else '-'


def list_all(home: Path) -> str:
    """Table of all models and atlases."""
    rows = [('name', 'kind', 'present', 'size here', 'licence')]
    for name in model_names():
        card = load_card(name)
        needed = [*weights_resources(card, home), *gradient_resources(card, home)]
        files = [resource.target for resource in needed]
        listed = [*card.weights, *filter(None, [card.gradients])]
        # files in the card's folder have their whole path for a name
        files += [checkpoint_dir(card, home) / file['name'] for file in listed]
        rows.append((name, 'model', model_present(card, home), megabytes(files), card.licence))
    for name in atlas_names():
        atlas = load_atlas_card(name)
        files = [atlas.folder(home) / file.name for file in atlas.files]
        files += [image.path for image in images_here(atlas, home)]
        rows.append((name, 'atlas', atlas_present(atlas, home), megabytes(files), atlas.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return '\n'.join([line.rstrip() for line in lines] + ['', f'fetched files: {home}'])


def fetch_model(text: str, home: Path, source_dir: Path | None) -> None:
    """Fetch what a card (name or path) needs, and see that it is that model."""
    card = load_card(text)
    command = f'bids_brainfm_models fetch {text}'
    weights = weights_resources(card, home, source_dir)
    present = any(resource.target.is_file() for resource in weights)
    fetch([*weights, *gradient_resources(card, home)], source_dir, command)
    try:
        if weights:
            _check_weights(card, home, source_dir)
    except BrainfmError:
        for resource in weights:
            forget(resource)
        if not present:
            raise
        return fetch_model(text, home, source_dir)  # what an earlier fetch left was wrong
    resolve_model(text, home)
    if missing := missing_files(load_atlas_card(card.atlas), home):
        need = f'{card.name} needs the atlas {card.atlas}, which lacks {", ".join(missing)}'
        print(f'{need}: run `bids_brainfm_models fetch {card.atlas}`.')


def _check_weights(card: ModelCard, home: Path, source_dir: Path | None) -> None:
    """See that the weights are those that the card describes, to the last tensor."""
    from bids_brainfm.models.weights import build, load_checkpoint, read_config

    folder = checkpoint_dir(card, home)
    found = read_config(folder, default=card.config)
    for key in SIZES:
        if key in found and key in card.config and found[key] != card.config[key]:
            theirs = f'{source_dir or "the download"} says {key} {found[key]}'
            words = f'The config.json of {theirs}, but {card.name} has {card.config[key]}'
            raise BrainfmError(f'{words}: it is another model and was not kept.')
    load_checkpoint(build(found), folder)


def fetch_named(name: str, home: Path, source_dir: Path | None) -> None:
    """Fetch a model or an atlas, its licence printed first."""
    is_atlas = name in atlas_names()
    if not is_atlas and name not in model_names() and not Path(name).is_file():
        choice = f'{", ".join([*model_names(), *atlas_names()])}, or give the path of a card'
        raise BrainfmError(f'There is no model or atlas {name}: choose {choice}.')
    if Path(name).is_file():
        is_atlas = '\nparcels:' in Path(name).read_text()
    card = load_atlas_card(name) if is_atlas else load_card(name)
    print(f'{card.name}: licence {card.licence}', flush=True)
    if isinstance(card, AtlasCard):
        complete, folder = card.embedded, card.folder(home)
    else:
        complete = not weights_resources(card, home) + gradient_resources(card, home)
        folder = checkpoint_dir(card, home)
    if complete:
        print(f'{card.name} comes with its card: nothing to fetch.')
        return
    if isinstance(card, AtlasCard):
        obtain_atlas(card, home, source_dir)
    else:
        fetch_model(name, home, source_dir)
    print(f'{card.name} is in {folder}')


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if all went well, 2 or 130 with one sentence on stderr if not."""
    try:
        with surroundings.explained():
            if argv is None:
                surroundings.prepare()
            return run(get_parser().parse_args(argv))
    except BrainfmError as error:
        print(f'bids_brainfm_models: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('bids_brainfm_models was stopped.', file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    if options.command in training.COMMANDS:
        return training.run(options)
    if options.command == 'list':
        print(list_all(home()))
    else:
        for name in options.names:
            fetch_named(name, home(), options.source_dir)
    return 0


if __name__ == '__main__':
    sys.exit(main())
