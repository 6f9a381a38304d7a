"""The table of products and what follows from it."""

import argparse
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bids_brainfm.cli.parser import get_parser
from bids_brainfm.outputs import products, registry
from bids_brainfm.outputs.products import module_of
from bids_brainfm.reports.report import Figure

OF_RUNS = [product for product in registry.PRODUCTS if product.scope == 'run']
OF_GROUPS = [product for product in registry.PRODUCTS if product.scope == 'group']


@pytest.mark.parametrize('product', OF_RUNS, ids=lambda product: product.name)
def test_modules_of_runs_have_what_the_protocol_says(product):
    module = module_of(product)
    needed = {'compute', 'write'}
    needed |= {'parameters'} if product.options else set()
    needed |= {'methods'} if product.record else set()
    assert needed <= {name for name, _ in inspect.getmembers(module, inspect.isfunction)}
    assert all(isinstance(figure, Figure) for figure in module.FIGURES.values())


@pytest.mark.parametrize('product', OF_GROUPS, ids=lambda product: product.name)
def test_modules_of_groups_have_what_the_protocol_says(product):
    module = module_of(product)
    assert all(callable(getattr(module, name)) for name in ('wanted', 'find', 'write'))


def test_names_on_disk_are_told_apart():
    """No two products have the same table, and no two figures the same name."""
    tables = [(p.suffix, p.stat) for p in registry.PRODUCTS if p.scope != 'group']
    assert len(set(tables)) == len(tables)
    named = [
        name for p in registry.PRODUCTS if p.scope != 'group' for name in module_of(p).FIGURES
    ]
    assert len(set(named)) == len(named) == len(products.report_figures())


def test_every_option_is_in_the_help_once():
    actions = [action for action in get_parser()._actions if action.dest in registry.options()]
    assert sorted(action.dest for action in actions) == sorted(registry.options())
    (outputs,) = [action for action in get_parser()._actions if action.dest == 'outputs']
    assert list(outputs.choices) == [*registry.OUTPUTS, registry.ALL]


def test_a_new_entry_is_a_new_option_and_output(monkeypatch):
    """The command line follows from the table alone."""
    option = registry.Option('fingerprint_norm', 'its norm', choices=('l1', 'l2'))
    entry = registry.Product(
        'fingerprint', 'run', 'embedding', 'embedding', 'fingerprint',
        record='fingerprint_desc-{label}', output='fingerprint', options=(option,),
    )  # fmt: skip
    monkeypatch.setattr(registry, 'PRODUCTS', (*registry.PRODUCTS, entry))
    assert registry.options()['fingerprint_norm'] is option
    assert registry.used_by('fingerprint_norm') == ('fingerprint',)
    parser = argparse.ArgumentParser()
    option.add_to(parser.add_argument_group('x'))
    assert parser.parse_args(['--fingerprint-norm', 'l2']).fingerprint_norm == 'l2'


def test_nothing_asks_a_network_what_it_is():
    """Capabilities say it: only the protocol itself looks for members of a network."""
    package = importlib.import_module('bids_brainfm').__path__[0]
    allowed = {'models/protocol.py', 'models/layers.py', 'outputs/products.py'}
    asking = {
        str(path.relative_to(package))
        for path in Path(package).rglob('*.py')
        if 'hasattr(' in path.read_text()
    }
    assert asking <= allowed


def test_facts_may_be_left_out(monkeypatch):
    """A module without lines for the report is no fault."""
    embedding = registry.BY_NAME['embedding']
    monkeypatch.delattr(module_of(embedding), 'facts')
    assert products.facts(embedding, {}) == {}


ENTRY = """    Product(
        'fingerprint', 'run', 'fingerprint', 'fingerprint', record='{record}',
        output='fingerprint', about='one vector for each run', needs='{needs}',
        options=(Option('fingerprint_norm', 'norm (default: l2)', choices=('l1', 'l2')),),
    ),
"""
MODULE = """
from dataclasses import dataclass

import numpy as np

from bids_brainfm.bids.files import write_table
from bids_brainfm.outputs import products
from bids_brainfm.reports import style
from bids_brainfm.reports.report import Figure

FIGURES = {{'fingerprint': Figure('Fingerprint', 'A vector of length one.')}}


@dataclass(frozen=True)
class Parameters:
    norm: str


def parameters(settings, spec, atlas):
    return Parameters(settings.options.get('fingerprint_norm') or 'l2')


def methods(task):
    return f'Fingerprints have the norm {{task.parameters["fingerprint"].norm}}.'


def compute(context):
    norm = context.task.parameters['fingerprint'].norm
    values = {values}
    return values / np.linalg.norm(values, {{'l1': 1, 'l2': 2}}[norm])


def write(context, result):
    run, place = context.run, context.task.place
    table = place.table(run, 'fingerprint')
    write_table(table, {{'value': result}})
    figure = style.new_figure(2)
    figure.subplots().plot(result)
    products.save_figure(figure, place.figure(run, 'fingerprint'))
    context.write_sidecar(table, {{'Length': len(result)}})


def facts(sidecar):
    return {{'Fingerprint': f'{{sidecar["Length"]}} values'}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('needs', 'record', 'values'),
    [
        ('series', 'atlas-{atlas}_fingerprint', 'np.nanstd(context.series.data, axis=0)'),
        ('model', 'fingerprint_desc-{label}', 'context.encoding.summary.mean(axis=0)'),
    ],
)
def test_an_output_is_an_entry_and_a_module(simulated, tmp_path, needs, record, values):
    """As docs/architecture.md says: option, record, methods text and report follow from them."""
    source = Path(importlib.import_module('bids_brainfm').__path__[0])
    package = Path(shutil.copytree(source, tmp_path / 'bids_brainfm'))
    table = package / 'outputs' / 'registry.py'
    text, before = table.read_text(), "    Product('scale_stats'"
    assert before in text
    table.write_text(text.replace(before, ENTRY.format(record=record, needs=needs) + before))
    (package / 'outputs' / 'fingerprint.py').write_text(MODULE.format(values=values))
    out = tmp_path / 'out'

    def run(*options):
        command = [sys.executable, '-m', 'bids_brainfm.cli.run', simulated, out, 'participant']
        command += ['--participant-label', '01', '--model', 'brainlm-demo', '--nprocs', '1']
        return subprocess.run(
            [*command, *options], cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    asked = ('--outputs', 'fingerprint', '--fingerprint-norm', 'l1')
    ended = run()
    assert ended.returncode == 0, ended.stderr
    assert not list(out.rglob('*fingerprint*'))
    ended = run(*asked)
    assert ended.returncode == 0, ended.stderr
    (written,) = out.glob('sub-01/func/*_fingerprint.tsv')
    assert pd.read_csv(written, sep='\t')['value'].abs().sum() == pytest.approx(1)
    length = json.loads(written.with_suffix('.json').read_text())['Length']
    page = (out / 'sub-01.html').read_text()
    (figure,) = out.glob('sub-01/figures/*_desc-fingerprint_bold.svg')
    assert figure.name in page
    assert f'{length} values' in page
    assert 'Fingerprints have the norm l1' in (out / 'logs' / 'CITATION.md').read_text()
    made = written.stat().st_mtime_ns
    assert run(*asked).returncode == 0
    assert written.stat().st_mtime_ns == made
    ended = run('--outputs', 'fingerprint')
    assert ended.returncode == 2
    assert "norm was 'l1' and is now 'l2'" in ended.stderr
