"""The report's words as HTML: facts in, one fragment of a page out.

Labels, paths and messages come from other people's files, so everything is escaped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 run, 3 runs."""
    return f'{number} {noun}' + ('' if number == 1 else 's')


def percent(proportion: float) -> str:
    """A proportion in whole percent, without rounding a few down to none: 25%, <1%, 0%."""
    return '<1%' if 0 < proportion < 0.01 else f'{proportion:.0%}'


def shorten(name: str) -> str:
    """A name that leaves room for the figure."""
    return name if len(name) <= 26 else name[:25] + '…'


@dataclass(frozen=True)
class Source:
    """What has to be cited: an atlas or a model, and the licence under which it may be used."""

    name: str
    licence: str
    citation: str


@dataclass(frozen=True)
class ModelFacts(Source):
    """What the report says of a model on a run."""

    label: str  # as in the names of its figures
    trained: bool
    windows: int  # number of windows
    facts: Mapping[str, str | int]  # shown as a table


@dataclass(frozen=True)
class RunFacts:
    """What the report says of a run and atlas."""

    name: str  # entities that begin the names of its figures: sub-01_task-rest_atlas-A424
    inputs: dict[str, str] = field(default_factory=dict)  # what was read and done, as a table
    models: list[ModelFacts] = field(default_factory=list)
    atlas: Source | None = None
    warnings: list[str] = field(default_factory=list)  # one sentence each
    failures: list[str] = field(default_factory=list)  # one sentence for each step that failed
    excluded: bool = False  # from summaries, for its flagged volumes


def table(rows: Mapping[str, str | int]) -> str:
    """Two columns, what and how much.

    >>> table({'TR': '2 s', 'a<b': 1})
    '<table><tr><th>TR</th><td>2 s</td></tr><tr><th>a&lt;b</th><td>1</td></tr></table>'
    """
    row = '<tr><th>{}</th><td>{}</td></tr>'
    cells = (row.format(escape(what), escape(str(value))) for what, value in rows.items())
    return f'<table>{"".join(cells)}</table>' if rows else ''


def grid(head: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table with a heading for each column; cells are text."""
    cells = lambda tag, row: ''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in row)
    body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
    return f'<table class="grid"><tr>{cells("th", head)}</tr>{body}</table>'


def notice(sentences: Iterable[str], kind: Literal['good', 'warning', 'failure']) -> str:
    """Sentences in a coloured box."""
    lines = ''.join(f'<p>{escape(sentence)}</p>' for sentence in sentences)
    return f'<div class="notice {kind}">{lines}</div>' if lines else ''


def untrained(models: Iterable[ModelFacts]) -> str:
    """The banner for models whose numbers mean nothing yet, empty where there is none."""
    names = sorted({model.name for model in models if not model.trained})
    if not names:
        return ''
    verb, their = ('has', 'Its') if len(names) == 1 else ('have', 'Their')
    meaning = 'embeddings show that the pipeline works, and nothing about this brain.'
    weights = f'{", ".join(names)} {verb} random weights.'
    return notice([f'Untrained: {weights} {their} {meaning}'], 'failure')


def summary(subject: str, runs: Sequence[RunFacts], software: dict[str, str]) -> str:
    """Who, how many runs, which models, what ran; one line per run."""
    models = [model for run in runs for model in run.models]
    failed = sum(bool(run.failures) for run in runs)
    facts = {
        'Participant': f'sub-{subject}',
        'Runs': f'{len(runs) - failed} written' + (f', {failed} failed' if failed else ''),
        'Models': ', '.join(dict.fromkeys(model.name for model in models)) or 'none',
    }
    windows = lambda run: ', '.join(f'{m.name}: {count(m.windows, "window")}' for m in run.models)
    rows = [(run.name, result(run), windows(run), len(run.warnings) or 'none') for run in runs]
    overview = grid(('Run', 'Result', 'Windows', 'Warnings'), rows)
    return untrained(models) + table(facts | software) + overview


def result(run: RunFacts) -> str:
    """Whether a run was written, failed, or both: a model may fail where another does not."""
    if not run.failures:
        return 'written' + ', excluded' * run.excluded
    return 'failed in part' if run.inputs else 'failed'


def warnings(runs: Iterable[RunFacts]) -> str:
    """Each failure and each warning as one sentence with its run, or that there were none."""
    failures = [f'{run.name}: {failure}' for run in runs for failure in run.failures]
    sentences = [f'{run.name}: {warning}' for run in runs for warning in run.warnings]
    if not failures and not sentences:
        return notice(['None: every run was written and nothing was out of the ordinary.'], 'good')
    return notice(failures, 'failure') + notice(sentences, 'warning')


def inputs(run: RunFacts) -> str:
    """What was read for a run and what was done to it."""
    return notice(run.failures, 'failure') + table(run.inputs)


def model(facts: ModelFacts) -> str:
    """One model on one run: whether it is trained, its windows and its facts."""
    rows = {'Model': facts.name, 'Windows': facts.windows, **facts.facts}
    return untrained([facts]) + table(rows | {'Licence': facts.licence})


def methods(text: str) -> str:
    r"""Plain text with ``#`` headings, ``-`` lists and blank lines between paragraphs.

    >>> methods('# Methods\n\nTwo lines\nof one paragraph.\n\n- one\n- two')
    '<h3>Methods</h3><p>Two lines of one paragraph.</p><ul><li>one</li><li>two</li></ul>'
    """
    blocks = []
    for block in text.replace('\r\n', '\n').split('\n\n'):
        lines = [line.strip() for line in block.strip().split('\n') if line.strip()]
        while lines and lines[0].startswith('#'):
            blocks.append(f'<h3>{escape(lines.pop(0).lstrip("# "))}</h3>')
        if lines and lines[0].startswith(('- ', '* ')):
            items = []
            for line in lines:
                if line.startswith(('- ', '* ')):
                    items.append(line[2:])
                else:
                    items[-1] += f' {line}'
            blocks.append(f'<ul>{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>')
        elif lines:
            blocks.append(f'<p>{escape(" ".join(lines))}</p>')
    return ''.join(blocks) or '<p>No methods text was written.</p>'


def citations(sources: Iterable[Source]) -> str:
    """What to cite and under which licence each model and atlas may be used, once each."""
    rows = dict.fromkeys((s.name, s.citation, s.licence) for s in sources)
    return grid(('What', 'Citation', 'Licence'), rows) if rows else '<p>Nothing to cite.</p>'
