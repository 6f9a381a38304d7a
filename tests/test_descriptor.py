"""The Boutiques descriptor and nipoppy's files say what the parser takes."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from bids_brainfm.cli.parser import get_parser

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / 'nipoppy'
MADE = 'python tools/make_descriptor.py makes it anew'


@pytest.fixture(scope='module')
def tool():
    """The script that makes the descriptor."""
    spec = importlib.util.spec_from_file_location(
        'make_descriptor', ROOT / 'tools' / 'make_descriptor.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def descriptor():
    """The descriptor as it is in the repository."""
    return json.loads((BUNDLE / 'descriptor.json').read_text())


def render(descriptor: dict, invocation: dict) -> list[str]:
    """Command line of an invocation, as Boutiques makes it; without the program."""
    line = descriptor['command-line']
    for entry in descriptor['inputs']:
        value = invocation.get(entry['id'])
        words = [entry['command-line-flag']] if 'command-line-flag' in entry else []
        if entry['type'] != 'Flag':
            words += map(str, value if isinstance(value, list) else [value])
        given = value is not None and value is not False
        line = line.replace(entry['value-key'], shlex.join(words) if given else '')
    return shlex.split(line)[1:]


def example(entry: dict):
    """A value that an input takes."""
    if entry['type'] == 'Flag':
        return True
    value = 3 if entry.get('integer') else 0.5 if entry['type'] == 'Number' else '4'
    value = entry.get('value-choices', [value])[0]
    return [value] * entry.get('min-list-entries', 2) if entry.get('list') else value


def test_descriptor_is_that_of_the_parser(tool):
    assert (BUNDLE / 'descriptor.json').read_text() == tool.as_text(), MADE


def test_types(descriptor):
    """Numbers, files, flags and lists are called so; what is to be made is no file to be there."""
    entries = {entry['id']: entry for entry in descriptor['inputs']}
    types = {name: entry['type'] for name, entry in entries.items()}
    assert types['bids_dir'] == types['config_file'] == 'File'
    assert types['output_dir'] == types['work_dir'] == types['mem'] == 'String'
    assert types['min_coverage'] == types['mask_ratio'] == types['stride'] == 'Number'
    assert types['tokens'] == types['verbose'] == 'Flag'
    assert {n for n, e in entries.items() if e.get('integer')} == {
        'stride', 'forecast_points', 'random_seed', 'batch_size', 'nprocs', 'omp_nthreads',
        'scrub', 'motion_filter_order', 'min_dof', 'token_shuffles',
    }  # fmt: skip
    assert {n for n, e in entries.items() if not e['optional']} == {
        'bids_dir', 'output_dir', 'analysis_level',
    }  # fmt: skip
    assert entries['work_dir']['command-line-flag'] == '--work-dir'
    assert entries['contrast']['max-list-entries'] == 3


def test_invocation_parses_to_what_it_says(descriptor):
    """Every input at once, through the command line of the descriptor."""
    invocation = {entry['id']: example(entry) for entry in descriptor['inputs']}
    parsed = vars(get_parser().parse_args(render(descriptor, invocation)))
    assert parsed.keys() == invocation.keys() | {'version'}
    for action in get_parser()._actions:
        if action.dest not in invocation:
            continue
        value = invocation[action.dest]
        if action.nargs == 0:
            wanted = True
        elif isinstance(value, list):
            wanted = [action.type(v) if action.type else v for v in value]
        else:
            wanted = action.type(str(value)) if action.type else value
        assert parsed[action.dest] == wanted, action.dest
    required = {k: v for k, v in invocation.items() if k in ('bids_dir', 'output_dir')}
    parsed = vars(
        get_parser().parse_args(render(descriptor, required | {'analysis_level': 'group'}))
    )
    assert {k for k, v in parsed.items() if v is not None} == {*required, 'analysis_level'}


def test_boutiques_takes_the_descriptor(descriptor):
    """By the validator and the command line of Boutiques itself."""
    boutiques = pytest.importorskip('boutiques')
    text = json.dumps(descriptor)
    boutiques.validate(text)
    invocation = {entry['id']: example(entry) for entry in descriptor['inputs']}
    boutiques.invocation('--invocation', json.dumps(invocation), text)
    line = boutiques.execute('simulate', text, '-i', json.dumps(invocation)).shell_command
    assert shlex.split(line)[1:] == render(descriptor, invocation)


def test_nipoppy_gives_arguments_that_there_are(descriptor):
    """The invocation for nipoppy, with its variables filled in, is a command line of ours."""
    config = json.loads((BUNDLE / 'config.json').read_text())
    assert config['VERSION'] == descriptor['tool-version']
    text = (BUNDLE / 'invocation.json').read_text()
    text = text.replace('[[NIPOPPY_BIDS_PARTICIPANT_ID]]', 'sub-01')
    invocation = json.loads(re.sub(r'\[\[[A-Z_]+\]\]', '/some/where', text))
    parsed = get_parser().parse_args(render(descriptor, invocation))
    assert invocation.keys() <= {entry['id'] for entry in descriptor['inputs']}
    assert parsed.participant_label == ['01']
    assert parsed.analysis_level == 'participant'
