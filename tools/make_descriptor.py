#!/usr/bin/env python
"""Write the Boutiques descriptor of the command, from its parser: nipoppy/descriptor.json.

    python tools/make_descriptor.py [FILE]

Boutiques' own generator makes a text of every number and file, and an argument with a value of
every counter, so this is one of ours. Run it after a change of the parser; a test compares.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

from bids_brainfm.cli.parser import get_parser

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTOR = ROOT / 'nipoppy' / 'descriptor.json'
TALKING = ('help', 'version')  # they only print


def descriptor() -> dict:
    """Build the descriptor of ``bids_brainfm``."""
    parser = get_parser()
    actions = [action for action in parser._actions if action.dest not in TALKING]
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    return {
        'name': parser.prog,
        'tool-version': project['tool']['hatch']['version']['fallback-version'],
        'description': parser.description,
        'url': project['project']['urls']['Homepage'],
        'schema-version': '0.5',
        'command-line': ' '.join([parser.prog, *map(value_key, actions)]),
        'inputs': [describe(action) for action in actions],
        'output-files': [
            {
                'id': 'outputs_written',
                'name': 'outputs',
                'description': 'Folder of the BIDS derivatives',
                'path-template': '[OUTPUT_DIR]',
            }
        ],
        'error-codes': [
            {'code': 1, 'description': 'Some runs failed; the others are written'},
            {'code': 2, 'description': 'Nothing could be run'},
            {'code': 130, 'description': 'Stopped by Ctrl-C'},
            {'code': 143, 'description': 'Stopped by SIGTERM'},
        ],
        'tags': {'domain': ['neuroinformatics', 'fmri'], 'bids-app': ['participant', 'group']},
    }


def value_key(action: argparse.Action) -> str:
    """Where the value of an argument stands in the command line."""
    return f'[{action.dest.upper()}]'


def describe(action: argparse.Action) -> dict:
    """Build the Boutiques input of an argument of the command line."""
    entry = {
        'id': action.dest,
        'name': action.dest.replace('_', ' '),
        'description': (action.help or '').replace('%%', '%'),
        'optional': not action.required,
        'value-key': value_key(action),
        **type_of(action),
    }
    if action.option_strings:
        entry['command-line-flag'] = max(action.option_strings, key=lambda s: s.startswith('--'))
    if action.choices:
        entry['value-choices'] = list(action.choices)
    if action.nargs in ('+', '*'):
        entry['list'] = True
    elif isinstance(action.nargs, int) and action.nargs > 1:
        size = action.nargs
        entry |= {'list': True, 'min-list-entries': size, 'max-list-entries': size}
    return entry


def type_of(action: argparse.Action) -> dict:
    """Type of an input, as Boutiques names it.

    Only what is read is a File, since Boutiques wants these to exist: our parser calls them FILE,
    and PATH what it makes.
    """
    if action.nargs == 0:
        return {'type': 'Flag'}
    if action.type is Path:
        read = action.metavar == 'FILE' or action.dest == 'bids_dir'
        return {'type': 'File' if read else 'String'}
    if takes(action, '0.5'):
        return {'type': 'Number'}
    if takes(action, '1'):
        return {'type': 'Number', 'integer': True}
    return {'type': 'String'}


def takes(action: argparse.Action, text: str) -> bool:
    """Whether an argument takes a text as the number that it is, not as words or megabytes."""
    try:
        return callable(action.type) and action.type(text) == float(text)
    except argparse.ArgumentTypeError:
        return False


def as_text() -> str:
    """Descriptor as it stands in the file."""
    return json.dumps(descriptor(), indent=2, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DESCRIPTOR
    path.write_text(as_text())
