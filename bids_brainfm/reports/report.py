"""One HTML report per participant, assembled by nireports.

The page is ``data/reports/template.html``: nireports' own takes its style from the internet.
Figures lie in ``sub-XX/figures``, named by `figure_path`; the page next to that folder shows them
by relative links.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from bids_brainfm.bids.files import write_text
from bids_brainfm.reports import fragments
from bids_brainfm.reports.fragments import RunFacts

TEMPLATE = Path(__file__).parents[1] / 'data' / 'reports' / 'template.html'
SECTIONS = {
    'summary': 'Summary',
    'warnings': 'Warnings and failures',
    'runs': 'Runs',
    'methods': 'Methods',
    'citations': 'Citations and licences',
}
# Of runs: a block per combination found, in this order; what belongs to a model follows its run
ORDER = 'session,task,acquisition,ceagent,reconstruction,direction,run,echo,part,space,atlas,model'


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
    return Path(out_dir) / run.split('_')[0] / 'figures' / f'{_stem(run, name, model)}.svg'


def _stem(run: str, name: str, model: str | None = None) -> str:
    return f'{run}{f"_model-{model}" if model else ""}_desc-{name}_bold'


def write_report(
    out_dir: str | PathLike[str],
    subject: str,
    runs: Iterable[RunFacts],
    figures: Mapping[str, Figure],
    methods: str = '',
    software: dict[str, str] | None = None,
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
    """
    out_dir, subject = Path(out_dir), subject.removeprefix('sub-')
    name = f'sub-{subject}'
    runs = sorted(runs, key=lambda run: _natural(run.name))
    sources = [source for run in runs for source in (*run.models, run.atlas) if source]
    pieces = {
        _stem(name, 'summary'): fragments.summary(subject, runs, software or {}),
        _stem(name, 'warnings'): fragments.warnings(runs),
        _stem(name, 'methods'): fragments.methods(methods),
        _stem(name, 'citations'): fragments.citations(sources),
    }
    for run in runs:
        pieces[_stem(run.name, 'inputs')] = fragments.inputs(run)
        for model in run.models:
            pieces[_stem(run.name, 'model', model.label)] = fragments.model(model)

    # nireports looks for entities in the whole path (a folder /data/run-3/out would make every
    # file run 3) and rewrites the figures it finds. So it is shown a folder of its own: our
    # fragments, and the figures as empty files, since the page needs their names only.
    with TemporaryDirectory(prefix='report') as scratch:
        shown = Path(scratch) / name / 'figures'
        shown.mkdir(parents=True)
        for figure in (out_dir / name / 'figures').glob(f'{name}_*.svg'):
            (shown / figure.name).touch()
        for stem, piece in pieces.items():
            (shown / f'{stem}.html').write_text(piece, encoding='utf-8')
        specification = Path(scratch) / 'specification.yml'
        specification.write_text(_specification(f'{name} · bids_brainfm', figures))
        page = _assemble(Path(scratch), shown, specification)
    return write_text(out_dir / f'{name}.html', page)


def _specification(title: str, figures: Mapping[str, Figure]) -> str:
    """Sections of the page in nireports' YAML: what to look for, by the desc of its name."""
    import yaml

    # nireports fills in entities: {{ is a brace
    caption = lambda text: escape(text, quote=False).replace('{', '{{').replace('}', '}}')
    runs = [
        {'bids': {'desc': 'inputs'}, 'subtitle': 'Inputs and what was done to them'},
        {'bids': {'desc': 'model'}, 'subtitle': 'Model'},
    ]
    runs += [
        {'bids': {'desc': name}, 'subtitle': figure.title, 'caption': caption(figure.caption)}
        for name, figure in figures.items()
    ]
    sections = [
        {'name': name, 'title': words, 'reportlets': [{'bids': {'desc': name}}]}
        for name, words in SECTIONS.items()
    ]
    sections[list(SECTIONS).index('runs')] |= {'ordering': ORDER, 'reportlets': runs}
    content = {'title': title, 'template_path': str(TEMPLATE), 'sections': sections}
    # It also fills in {title} and the like in the lines of the file: no brace is left in them
    text = yaml.safe_dump(content, sort_keys=False, default_style='"')
    return text.replace('{', r'\x7b').replace('}', r'\x7d')


def _assemble(root: Path, figures: Path, specification: Path) -> str:
    """Let nireports make the page of one folder of figures; links are relative to `root`."""
    from nireports.assembler.report import Report

    class Ordered(Report):
        @staticmethod
        def _process_orderings(orderings: list[str], hits: list) -> tuple[list[str], list[tuple]]:
            """Runs 2 and 10 in this order; what lacks an entity before what has it."""
            entities, blocks = Report._process_orderings(orderings, hits)
            return entities, sorted(blocks, key=lambda block: [_natural(v) for v in block])

    report = Ordered(root, None, specification, reportlets_dir=figures)
    report.generate_report()
    return report.out_filename.read_text(encoding='utf-8')


def _natural(value: str | int | None) -> list[int | str]:
    """Sort key under which 2 comes before 10 and nothing before something.

    >>> sorted(['run-10', 'run-2', None], key=_natural)
    [None, 'run-2', 'run-10']
    """
    parts = re.split(r'(\d+)', '' if value is None else str(value))
    return [int(part) if part.isdigit() else part for part in parts]
