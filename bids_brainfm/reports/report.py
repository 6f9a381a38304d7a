"""One HTML report per participant, assembled by nireports from a specification.

The specification is ``data/reports/participant.yml``, the page ``data/reports/template.html``:
nireports' own page takes its style from the internet. Figures lie in ``sub-XX/figures``, named
by `figure_path`; the page beside that folder shows them by relative links.
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from bids_brainfm.bids.files import write_text
from bids_brainfm.reports import fragments

DATA = Path(__file__).parents[1] / 'data' / 'reports'


def figure_path(out_dir, run, what, model=None):
    """Where a picture of a run lies, so that the report finds it.

    Parameters
    ----------
    out_dir : path-like
    run : str
        Name of the run as in `write_report`: entities up to the atlas, without suffix.
    what : str
        What is shown, as in the specification: carpet, coverage, connectivity, windows, ...
    model : str, optional
        Label of the model, letters and digits.

    Returns
    -------
    pathlib.Path

    Examples
    --------
    >>> figure_path('out', 'sub-01_task-rest_atlas-A424', 'windows', 'demo').as_posix()
    'out/sub-01/figures/sub-01_task-rest_atlas-A424_model-demo_desc-windows_bold.svg'
    """
    folder = Path(out_dir) / run.split('_')[0] / 'figures'
    return folder / (_stem(run, what, model) + '.svg')


def _stem(name, what, model=None):
    return f'{name}{f"_model-{model}" if model else ""}_desc-{what}_bold'


def write_report(out_dir, subject, runs, methods='', software=None):
    """Write ``sub-<subject>.html`` into `out_dir`, beside the participant's folder.

    Parameters
    ----------
    out_dir : path-like
        The output dataset; the figures are there already.
    subject : str
        Label, with or without ``sub-``.
    runs : list of dict
        One entry per run and atlas, in any order:

        ``name`` : str
            Entities that begin the names of its figures, such as
            ``sub-01_task-rest_run-1_space-MNI152NLin6Asym_atlas-A424``.
        ``inputs`` : dict of str to str
            What was read and what was done to it, shown as a table.
        ``models`` : list of dict
            Each with ``label`` (as in the names of its figures), ``name``, ``trained`` (bool),
            ``licence``, ``citation``, ``windows`` (int) and ``facts`` (dict of str to str).
        ``atlas`` : dict or None
            With ``name``, ``licence`` and ``citation``.
        ``warnings`` : list of str
            One sentence each.
        ``failures`` : list of str
            One sentence for each step that failed.
    methods : str
        Methods text: paragraphs between blank lines, ``#`` headings, ``-`` lists.
    software : dict of str to str, optional
        Further lines of the summary: versions, command, settings.

    Returns
    -------
    pathlib.Path
        The report.
    """
    out_dir, subject = Path(out_dir), subject.removeprefix('sub-')
    name = f'sub-{subject}'
    runs = sorted(runs, key=lambda run: _natural(run['name']))
    sources = [s for run in runs for s in (*run['models'], run['atlas']) if s]
    pieces = {
        _stem(name, 'summary'): fragments.summary(subject, runs, software or {}),
        _stem(name, 'warnings'): fragments.warnings(runs),
        _stem(name, 'methods'): fragments.methods(methods),
        _stem(name, 'citations'): fragments.citations(sources),
    }
    for run in runs:
        pieces[_stem(run['name'], 'inputs')] = fragments.inputs(run)
        for model in run['models']:
            pieces[_stem(run['name'], 'model', model['label'])] = fragments.model(model)

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
        page = _assemble(Path(scratch), shown, f'{name} · bids_brainfm')
    return write_text(out_dir / f'{name}.html', page)


def _assemble(root, figures, title):
    """Let nireports make the page of one folder of figures; links are relative to `root`."""
    from nireports.assembler.report import Report

    class Ordered(Report):
        @staticmethod
        def _process_orderings(orderings, hits):
            """Runs 2 and 10 in this order; what lacks an entity before what has it."""
            entities, blocks = Report._process_orderings(orderings, hits)
            return entities, sorted(blocks, key=lambda block: [_natural(v) for v in block])

    report = Ordered(
        root,
        run_uuid=None,
        bootstrap_file=DATA / 'participant.yml',
        out_filename='report.html',
        reportlets_dir=figures,
        # JSON strings are YAML strings, whatever the path holds
        metadata={'title': json.dumps(title), 'template': json.dumps(str(DATA / 'template.html'))},
    )
    report.generate_report()
    return report.out_filename.read_text(encoding='utf-8')


def _natural(value):
    """Sort key under which 2 comes before 10 and nothing before something.

    >>> sorted(['run-10', 'run-2', None], key=_natural)
    [None, 'run-2', 'run-10']
    """
    parts = re.split(r'(\d+)', '' if value is None else str(value))
    return [int(part) if part.isdigit() else part for part in parts]
