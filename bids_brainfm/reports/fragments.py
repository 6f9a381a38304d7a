"""The report's words as HTML: plain dictionaries in, one fragment of a page out.

Labels, paths and messages come from other people's files, so everything is escaped. What a run is
made of is told in `bids_brainfm.reports.report.write_report`.
"""

from html import escape


def table(rows):
    """Two columns, what and how much.

    Parameters
    ----------
    rows : dict of str to str

    Examples
    --------
    >>> table({'TR': '2 s', 'a<b': 1})
    '<table><tr><th>TR</th><td>2 s</td></tr><tr><th>a&lt;b</th><td>1</td></tr></table>'
    >>> table({})
    ''
    """
    cells = (
        f'<tr><th>{escape(str(what))}</th><td>{escape(str(value))}</td></tr>'
        for what, value in rows.items()
    )
    return f'<table>{"".join(cells)}</table>' if rows else ''


def grid(head, rows):
    """A table with a heading for each column; cells are text."""
    cells = lambda tag, row: ''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in row)
    body = ''.join(f'<tr>{cells("td", row)}</tr>' for row in rows)
    return f'<table class="grid"><tr>{cells("th", head)}</tr>{body}</table>'


def notice(sentences, kind):
    """Sentences in a coloured box; `kind` is good, warning or failure."""
    lines = ''.join(f'<p>{escape(sentence)}</p>' for sentence in sentences)
    return f'<div class="notice {kind}">{lines}</div>' if lines else ''


def count(number, what):
    """A number and its noun.

    Examples
    --------
    >>> count(1, 'run'), count(3, 'run')
    ('1 run', '3 runs')
    """
    return f'{number} {what}' + ('' if number == 1 else 's')


def untrained(models):
    """The banner for models whose numbers mean nothing yet, empty where there is none."""
    names = sorted({model['name'] for model in models if not model['trained']})
    if not names:
        return ''
    verb, their = ('has', 'Its') if len(names) == 1 else ('have', 'Their')
    sentence = (
        f'Untrained: {", ".join(names)} {verb} random weights. {their} embeddings show that the '
        'pipeline works, and nothing about this brain.'
    )
    return notice([sentence], 'failure')


def summary(subject, runs, software):
    """Who, how many runs, which models, what ran; one line per run."""
    models = [model for run in runs for model in run['models']]
    failed = sum(bool(run['failures']) for run in runs)
    facts = {
        'Participant': f'sub-{subject}',
        'Runs': f'{len(runs) - failed} written' + (f', {failed} failed' if failed else ''),
        'Models': ', '.join(dict.fromkeys(model['name'] for model in models)) or 'none',
    }
    rows = [
        (
            run['name'],
            result(run),
            ', '.join(f'{m["name"]}: {count(m["windows"], "window")}' for m in run['models']),
            len(run['warnings']) or 'none',
        )
        for run in runs
    ]
    return (
        untrained(models)
        + table(facts | software)
        + grid(('Run', 'Result', 'Windows', 'Warnings'), rows)
    )


def result(run):
    """Whether a run was written, failed, or both: a model may fail where another does not."""
    if not run['failures']:
        return 'written'
    return 'failed in part' if run['inputs'] else 'failed'


def warnings(runs):
    """Each failure and each warning as one sentence with its run, or that there were none."""
    failures = [f'{run["name"]}: {failure}' for run in runs for failure in run['failures']]
    sentences = [f'{run["name"]}: {warning}' for run in runs for warning in run['warnings']]
    if not failures and not sentences:
        return notice(['None: every run was written and nothing was out of the ordinary.'], 'good')
    return notice(failures, 'failure') + notice(sentences, 'warning')


def inputs(run):
    """What was read for a run and what was done to it."""
    return notice(run['failures'], 'failure') + table(run['inputs'])


def model(facts):
    """One model on one run: whether it is trained, its windows and its facts."""
    return untrained([facts]) + table(
        {'Model': facts['name'], 'Windows': facts['windows']}
        | facts['facts']
        | {'Licence': facts['licence']}
    )


def methods(text):
    r"""Plain text with ``#`` headings, ``-`` lists and blank lines between paragraphs.

    Examples
    --------
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


def citations(sources):
    """What to cite and under which licence each model and atlas may be used.

    Parameters
    ----------
    sources : iterable of dict
        Keys name, licence, citation; the same source may come several times.
    """
    rows = dict.fromkeys((s['name'], s['citation'], s['licence']) for s in sources)
    return grid(('What', 'Citation', 'Licence'), rows) if rows else '<p>Nothing to cite.</p>'
