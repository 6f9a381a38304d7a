"""The table of products and what follows from it."""

import argparse
import importlib
import inspect

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
    from pathlib import Path

    allowed = {'models/protocol.py', 'models/layers.py', 'outputs/products.py'}
    asking = {
        str(path.relative_to(package))
        for path in Path(package).rglob('*.py')
        if 'hasattr(' in path.read_text()
    }
    assert asking <= allowed
