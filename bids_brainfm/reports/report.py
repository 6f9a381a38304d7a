"""One HTML report per participant.

The page is ``data/reports/template.html``. Figures lie in ``sub-XX/figures``, named by
`figure_path`; the page next to that folder shows them by relative links.
"""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_brainfm.bids.files import listed, write_text
from bids_brainfm.bids.naming import LONG_NAMES, parse_name
from bids_brainfm.reports import fragments
from bids_brainfm.reports.fragments import RunFacts

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = Path(__file__).parents[1] / 'data' / 'reports' / 'template.html'
# Of runs: a block per combination found, in this order; what belongs to a model follows its run
ORDER = (
    'ses',
    'task',
    'acq',
    'ce',
    'rec',
    'dir',
    'run',
    'echo',
    'part',
    'space',
    'atlas',
    'model',
)
MARK_SIZE = 200  # bytes at the end of a page: more than its last line


@dataclass(frozen=True)
class Figure:
    """A picture of a product as the report shows it; both are plain text."""

    title: str
    caption: str = ''


def figure_path(
    out_dir: str | PathLike[str], run: str, name: str, model: str | None = None
) -> Path:
    """Where a figure of a run lies, so that the report finds it.

    `run` is the name of a `RunFacts`, `name` the key of the figure in `write_report`, and `model`
    the label of the model, letters and digits.

    >>> figure_path('out', 'sub-01_task-rest_atlas-A424', 'windows', 'demo').as_posix()
    'out/sub-01/figures/sub-01_task-rest_atlas-A424_model-demo_desc-windows_bold.svg'
    """
    return (
        Path(out_dir) / run.split('_')[0] / 'figures' / f'{_stem(run, model)}_desc-{name}_bold.svg'
    )


def figure_files(out_dir: Path, subject: str) -> list[Path]:
    """Figures of a participant, sorted by name."""
    return listed(out_dir / f'sub-{subject}' / 'figures', f'sub-{subject}_*.svg')


def _stem(run: str, model: str | None) -> str:
    return f'{run}_model-{model}' if model else run


def write_report(
    out_dir: str | PathLike[str],
    subject: str,
    runs: Iterable[RunFacts],
    figures: Mapping[str, Figure],
    methods: str = '',
    software: dict[str, str] | None = None,
    mark: str = '',
) -> Path:
    """Write ``sub-<subject>.html`` into `out_dir`, where the figures are already.

    Parameters
    ----------
    subject : label, with or without ``sub-``
    runs : one for each run and atlas, in any order
    figures : dict of Figure
        By the ``desc`` entity of their files, in the order in which they appear: those of a run
        after its inputs, those of a model on that run after the facts of the model.
    methods : text as :func:`bids_brainfm.reports.fragments.methods` takes it
    software : further lines of the summary: versions, command, settings
    mark : what the page was made from, in a word; :func:`read_mark` finds it in the page
    """
    out_dir, subject = Path(out_dir), subject.removeprefix('sub-')
    name = f'sub-{subject}'
    runs = sorted(runs, key=lambda run: _natural(run.name))
    sources = [source for run in runs for source in (*run.models, run.atlas) if source]
    sections = [
        ('summary', 'Summary', fragments.summary(subject, runs, software or {})),
        ('warnings', 'Warnings and failures', fragments.warnings(runs)),
        ('runs', 'Runs', _blocks(runs, figure_files(out_dir, subject), figures)),
        ('methods', 'Methods', fragments.methods(methods)),
        ('citations', 'Citations and licences', fragments.citations(sources)),
    ]
    page = _template().render(title=f'{name} · bids_brainfm', subject=name, sections=sections)
    return write_text(out_dir / f'{name}.html', f'{page}\n<!-- {mark} -->\n')


def read_mark(page: Path) -> str | None:
    """Return the mark of a page; None where there is no page, or its end is missing."""
    try:
        with page.open('rb') as file:
            file.seek(-min(page.stat().st_size, MARK_SIZE), os.SEEK_END)
            found = re.search(rb'<!-- (\S*) -->\n$', file.read())
    except OSError:
        return None
    return found[1].decode() if found else None


@functools.cache
def _template() -> 'Template':
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding='utf-8'))


def _blocks(
    runs: Iterable[RunFacts], files: Iterable[Path], figures: Mapping[str, Figure]
) -> list[dict[str, Any]]:
    """Blocks of the page, one for each run and each model on it: facts first, then figures."""
    parts: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        facts = {'title': 'Inputs and what was done to them', 'html': fragments.inputs(run)}
        parts.setdefault(run.name, []).append(facts)
        for model in run.models:
            facts = {'title': 'Model', 'html': fragments.model(model)}
            parts.setdefault(_stem(run.name, model.label), []).append(facts)
    found: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        stem, _, desc = file.stem.removesuffix('_bold').rpartition('_desc-')
        found.setdefault(desc, []).append((stem, file.name))
    for name, figure in figures.items():
        for stem, file_name in found.get(name, []):
            shown = {'title': figure.title, 'caption': figure.caption, 'file': file_name}
            parts.setdefault(stem, []).append(shown)
    blocks = [{'id': s, 'entities': _entities(s), 'parts': own} for s, own in parts.items()]
    return sorted(blocks, key=lambda block: _place(block['entities']))


def _entities(stem: str) -> dict[str, str]:
    """Entities of a block except its participant, by their long names, in the page's order."""
    found = parse_name(f'{stem}_x')[0]
    return {LONG_NAMES.get(key, key): found[key] for key in ORDER if key in found}


def _place(entities: Mapping[str, str]) -> list[list[int | str]]:
    """Sort key: run 2 before run 10; what lacks an entity before what has it."""
    return [_natural(entities.get(LONG_NAMES.get(key, key))) for key in ORDER]


def _natural(value: str | None) -> list[int | str]:
    """Sort key under which 2 comes before 10 and nothing before something.

    >>> sorted(['run-10', 'run-2', None], key=_natural)
    [None, 'run-2', 'run-10']
    >>> _natural('run-²')
    ['run-²']
    """
    parts = re.split(r'(\d+)', value or '')
    return [int(part) if part.isdecimal() else part for part in parts]
