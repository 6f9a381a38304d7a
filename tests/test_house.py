"""The plan of the house: who imports whom, and what importing costs."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'bids_brainfm'
# From the top down; a room imports what is below it. errors.py is below all of them.
ROOMS = (
    'cli', 'workflows', 'outputs', 'reports', 'training', 'api', 'analyses', 'models', 'signals',
    'atlases', 'bids', 'config', 'images', 'resources', 'validation', 'documents', 'arguments',
    'progress', 'surroundings', 'stopping', 'errors',
)  # fmt: skip


def imported(path: Path) -> set[str]:
    """Modules of this package, and names in them, that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f'bids_brainfm.{path.parent.name}')
    return {name for name in names if name.startswith('bids_brainfm.')}


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=str)
def test_rooms_import_downwards(path):
    """No room imports one above it."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    if room == '__init__':
        return
    allowed = ROOMS[ROOMS.index(room) :]
    assert {name.split('.')[1] for name in imported(path)} <= set(allowed)


@pytest.mark.parametrize('room', ['analyses', 'models', 'signals'])
def test_arrays_know_no_pipeline(room):
    """Only the API and the command look up what a pipeline writes next to a BOLD file."""
    for path in (PACKAGE / room).rglob('*.py'):
        assert not [name for name in imported(path) if name.startswith('bids_brainfm.bids.inputs')]


def test_help_is_instant():
    """--help imports nothing heavy."""
    code = (
        'import sys; from bids_brainfm.cli.parser import get_parser; get_parser().format_help();'
        'print([m for m in ("numpy", "torch", "nipype", "pandas", "bids") if m in sys.modules])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'


def test_no_import_uses_the_network(tmp_path):
    """Every module imports where no name can be looked up and no connection made."""
    modules = [
        '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
        for path in PACKAGE.rglob('*.py')
        if path.name != '__init__.py'
    ]
    code = f"""
import socket
def refuse(*args, **kwargs):
    raise SystemExit(f'network: {{args}}')
socket.getaddrinfo = socket.gethostbyname = refuse
socket.socket.connect = refuse
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    env = {'PATH': '/usr/bin', 'HOME': str(tmp_path), 'PYTHONPATH': str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr


def written_imports() -> list[tuple[str, str, str]]:
    """File, module and name of all imports of the package outside it, scripts and docs too."""
    folders = ('benchmarks', 'docker', 'docs', 'singularity', 'tests/containers', 'tools', '')
    found = []
    for folder in folders:
        for path in sorted((PACKAGE.parent / folder).glob('*.*')):
            if path.suffix not in ('.py', '.sh', '.md', '.def'):
                continue
            pattern = r'^ *from (bids_brainfm[\w.]*) import (\([^)]*\)|[^\n#(]+)'
            for module, names in re.findall(pattern, path.read_text(), re.M):
                for name in re.findall(r'(\w+)(?: as \w+)?\s*(?:,|\)|$)', names.strip()):
                    found.append((path.name, module, name))
    return [each for each in found if each[2] != 'fingerprint']  # the example of a recipe


@pytest.mark.parametrize(('file', 'module', 'name'), written_imports())
def test_scripts_and_docs_import_what_there_is(file, module, name):
    """Image recipes, benchmarks, tools and documentation follow the package."""
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f'{module}.{name}')
