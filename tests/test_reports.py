"""The report: its pictures, its words and the page, opened as a user would."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bids_brainfm.reports import fragments, style
from bids_brainfm.reports.figures.connectome import connectivity
from bids_brainfm.reports.figures.embedding import embedding, principal_components, windows
from bids_brainfm.reports.figures.order import order_check as draw_order_check
from bids_brainfm.reports.figures.prediction_error import latent_error
from bids_brainfm.reports.figures.series import carpet, coverage
from bids_brainfm.reports.fragments import ModelFacts, RunFacts, Source
from bids_brainfm.reports.report import Figure, figure_path, write_report
from bids_brainfm.reports.style import save
from bids_brainfm.signals.order import order_check

P, T = 424, 200
RUN = 'sub-01_task-rest_run-{}_space-MNI152NLin6Asym_atlas-A424'
ORDER = np.arange(P), 'atlas order'
FIGURES = {
    'carpet': Figure('Carpet', "A parcel's row"),
    'coverage': Figure('Coverage'),
    'connectivity': Figure('Connectivity'),
    'windows': Figure('Windows', 'R² < 0 & {title}, {x}'),
    'embedding': Figure('Embedding'),
}


@pytest.fixture(scope='module')
def arrays():
    """A run with drift, one spike and two missing parcels."""
    rng = np.random.default_rng(0)
    after = 10_000 + rng.normal(0, 50, (T, P))
    before = after + 100 * np.linspace(-1, 1, T)[:, None]
    flagged = np.zeros(T, bool)
    flagged[40] = True
    before[flagged] += 900
    coverage = np.ones(P)
    for parcel in (3, 200):
        before[:, parcel] = after[:, parcel] = np.nan
        coverage[parcel] = 0.2
    with np.errstate(invalid='ignore'):
        relmat = np.corrcoef(after.T)
    return {
        'before': before,
        'after': after,
        'flagged': flagged,
        'coverage': coverage,
        'relmat': relmat,
        'xyz': rng.normal(0, 30, (P, 3)),
        'embedding': rng.normal(0, 1, (6, 64)),
    }


def draw_all(a):
    """Every picture once, by the name it has in the specification."""
    onset = 20.0 * np.arange(6)
    return {
        'carpet': carpet(
            a['before'], a['after'], 2.0, a['flagged'], np.arange(P)[::-1], 'backwards'
        ),
        'coverage': coverage(a['xyz'], a['coverage'], 0.5),
        'connectivity': connectivity(a['relmat'], *ORDER),
        'windows': windows(
            onset, [20.0] * 5 + [10.0], [1.0] * 5 + [0.5], [0.1] * 6, [False] * 6, 130.0
        ),
        'embedding': embedding(a['embedding'], onset),
    }


def words(figure):
    """All text in a figure."""
    from matplotlib.text import Text

    return ' '.join(text.get_text() for text in figure.findobj(Text))


def a_run(name, **changes):
    """One run as `write_report` takes it."""
    model = ModelFacts(
        name='Demo',
        licence='Apache-2.0',
        citation='Someone 2026',
        label='demo',
        trained=True,
        windows=6,
        facts={'Scaling': 'run-robust'},
    )
    inputs = {'BOLD': f'{name}_bold.nii.gz'}
    run = RunFacts(name, inputs, [model], Source('A424', 'GPL-3', 'Others 2020'))
    return replace(run, **changes)


def write_figures(out, names, pictures):
    """The same pictures for every run."""
    for what, figure in pictures.items():
        model = 'demo' if what in ('windows', 'embedding') else None
        first = save(figure, figure_path(out, names[0], what, model))
        for name in names[1:]:
            shutil.copy(first, figure_path(out, name, what, model))


class Page(HTMLParser):
    """What a page loads, its ids, its headings and its text."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.tags, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += [attributes['id']] if 'id' in attributes else []
        if tag in ('link', 'script', 'img', 'object', 'iframe', 'source'):
            self.loads += [attributes.get(key) for key in ('src', 'href', 'data')]
        self.loads = [load for load in self.loads if load]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope='module')
def report(arrays, tmp_path_factory):
    """Folder, page and parsed page of a participant with runs 1, 2 and 10, and 3 failed."""
    # entities in the folder's own name must not be taken for the files'
    out = tmp_path_factory.mktemp('out') / 'run-7' / 'my-model-test'
    names = [RUN.format(run) for run in (10, 1, 2)]
    write_figures(out, names, draw_all(arrays))
    runs = [a_run(name) for name in names]
    runs[1].warnings.append('Two parcels <script>alert(1)</script> are missing.')
    runs[1].inputs['BOLD'] = '"><img src=x onerror=alert(2)>'
    failed = {'models': [], 'atlas': None, 'failures': ['The file ends early: copy it again.']}
    runs.append(a_run('sub-01_task-rest_run-3', **failed))
    path = write_report(
        out, 'sub-01', runs, FIGURES, '# Methods\n\nDone & done.', {'bids_brainfm': '1'}
    )
    text = path.read_text(encoding='utf-8')
    return out, text, Page(text)


def test_page_loads_only_its_figures(report):
    out, text, page = report
    assert len(page.loads) == 3 * 5
    for load in page.loads:
        assert '://' not in load
        assert (out / load).is_file()
    assert not {'script', 'link', 'iframe'} & set(page.tags)
    policy = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}' in text
    assert '@import' not in text
    assert 'url(' not in text


def test_page_has_all_sections_in_order(report):
    _, text, page = report
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections == ['summary', 'warnings', 'runs', 'methods', 'citations']
    assert len(page.ids) == len(set(page.ids))
    for link in re.findall(r'href="#([^"]+)"', text):
        assert link in page.ids
    shown = ' '.join(page.text)
    for sentence in (
        'The file ends early: copy it again.',
        '3 written, 1 failed',
        'Done & done.',
        'Apache-2.0',
        'GPL-3',
        'Others 2020',
        'run-robust',
    ):
        assert sentence in shown


def test_runs_come_in_numerical_order_each_with_its_model(report):
    _, text, _ = report
    headings = re.findall(r'<h3 class="run[^"]*">(.*?)</h3>', text)
    plain = [re.sub('<[^>]+>', '', heading) for heading in headings]
    place = 'task rest, run {}, space MNI152NLin6Asym, atlas A424'
    one, two, ten = (place.format(run) for run in (1, 2, 10))
    assert plain == [
        one, f'{one}, model demo', two, f'{two}, model demo', 'task rest, run 3', ten,
        f'{ten}, model demo',
    ]  # fmt: skip
    figures_shown = re.findall(r'src="./sub-01/figures/(\S+)_bold.svg"', text)
    assert [name.split('desc-')[1] for name in figures_shown[:5]] == [
        'carpet', 'coverage', 'connectivity', 'windows', 'embedding',
    ]  # fmt: skip
    assert all('run-1_' in name for name in figures_shown[:5])


def test_titles_and_captions_are_plain_text(report):
    """Neither HTML nor a template's braces in them mean anything."""
    _, text, page = report
    assert ' '.join(page.text).count('R² < 0 & {title}, {x}') == 3
    assert ' '.join(page.text).count("A parcel's row") == 3
    assert text.count('<h4>Windows</h4>') == 3


def test_labels_are_escaped(report):
    _, text, page = report
    assert 'alert(1)' in ' '.join(page.text)
    assert '<script' not in text
    assert 'onerror' not in re.sub('&lt;.*?&gt;', '', text)


def test_only_the_page_is_written_and_the_second_run_changes_nothing(report, arrays):
    out, text, _ = report
    files = sorted(path for path in out.rglob('*') if path.is_file())
    assert [path for path in files if path.suffix != '.svg'] == [out / 'sub-01.html']
    before = {path: path.read_bytes() for path in files}
    names = [RUN.format(run) for run in (1, 2, 10)]
    write_figures(out, names, draw_all(arrays))
    assert {path: path.read_bytes() for path in files} == before
    pieces = [a_run(name) for name in names]
    first = write_report(out / 'again', '01', pieces, FIGURES).read_bytes()
    assert write_report(out / 'again', '01', pieces[::-1], FIGURES).read_bytes() == first
    assert str(out) not in text


def test_report_without_a_figure_says_why(tmp_path):
    run = a_run('sub-02_task-rest', models=[], atlas=None, failures=['No BOLD <here>.'], inputs={})
    text = write_report(tmp_path, '02', [run], FIGURES).read_text(encoding='utf-8')
    assert text.count('No BOLD &lt;here&gt;.') == 2
    assert '<img' not in text


def test_sessions_and_models_make_blocks(tmp_path):
    names = [f'sub-01_ses-{s}_task-rest_atlas-A424' for s in ('b', 'a')]
    runs = [a_run(name) for name in names]
    runs[0].models.append(replace(runs[0].models[0], label='other', name='Other'))
    text = write_report(tmp_path, '01', runs, FIGURES).read_text(encoding='utf-8')
    blocks = [re.sub('<[^>]+>', '', h) for h in re.findall(r'<h3 class="run.*?</h3>', text)]
    assert [block.replace(', task rest, atlas A424', '') for block in blocks] == [
        'session a', 'session a, model demo',
        'session b', 'session b, model demo', 'session b, model other',
    ]  # fmt: skip


def test_untrained_and_clean_are_said_plainly():
    clean = a_run(RUN.format(1))
    assert 'Untrained' not in fragments.summary('01', [clean], {})
    assert 'None: every run was written' in fragments.warnings([clean])
    raw = a_run(RUN.format(1), models=[replace(clean.models[0], trained=False)])
    assert fragments.summary('01', [raw], {}).startswith(
        '<div class="notice failure"><p>Untrained'
    )
    assert 'random weights' in fragments.model(raw.models[0])


def test_svgs_are_small_and_well_formed(report):
    from xml.etree import ElementTree

    out, _, _ = report
    for path in (out / 'sub-01' / 'figures').iterdir():
        assert path.stat().st_size < 400_000, path
        ElementTree.parse(path)


def test_palette_keeps_the_pixels(arrays, tmp_path):
    """The smaller PNGs inside an SVG hold the very colours that Matplotlib drew."""
    import base64
    import io

    from PIL import Image

    figure = connectivity(arrays['relmat'], *ORDER)
    path = save(figure, tmp_path / 'small.svg')
    figure.savefig(tmp_path / 'large.svg')

    def pixels(path):
        found = re.findall(r'base64,\s*([A-Za-z0-9+/=\s]+)', path.read_text())
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert('RGBA'))
            for one in found
        ]

    small, large = pixels(path)[0], pixels(tmp_path / 'large.svg')[0]
    assert np.array_equal(small, large)
    assert Image.open(
        io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', path.read_text())[1]))
    ).mode == 'P'  # fmt: skip


def test_dollar_signs_in_names_are_text(arrays, tmp_path):
    """Matplotlib would take what is between two of them for a formula, and fail."""
    figure = connectivity(arrays['relmat'], np.arange(P), r'a $\foo$ <b> & "c"')
    text = save(figure, tmp_path / 'x.svg').read_text()
    assert r'$\foo$ &lt;b&gt; &amp; "c"' in text


def test_carpet_counts_what_it_shows(arrays):
    shown = words(
        carpet(arrays['before'], arrays['after'], 2.0, arrays['flagged'], *ORDER, start=8.0)
    )
    assert '1 of 200 volumes flagged' in shown
    assert '2 without usable signal' in shown
    left = np.nanmedian(arrays['after'].var(0) / arrays['before'].var(0))
    assert f'{left:.0%} of the variance left' in shown
    same = carpet(arrays['before'], arrays['before'], 2.0, arrays['flagged'], *ORDER)
    assert 'unchanged' in words(same)


def test_carpet_follows_the_order(arrays):
    """The parcel put first lies in the first row of both panels."""
    few = np.tile(np.arange(T, dtype=float)[:, None], (1, 3)) * [1, -1, 1]
    figure = carpet(few, few, 1.0, np.zeros(T, bool), [1, 0, 2], 'mixed')
    for axes in figure.axes[1:3]:
        picture = np.asarray(axes.images[0].get_array())
        assert picture[0, 0] > 0 > picture[1, 0]


def test_carpet_has_room_for_its_panels(arrays, tmp_path):
    """With and without missing parcels the two panels fill most of the picture."""
    whole = np.nan_to_num(arrays['before'])
    for series in (arrays['before'], whole):
        figure = carpet(series, series, 2.0, arrays['flagged'], *ORDER)
        save(figure, tmp_path / 'carpet.svg')
        assert sum(axes.get_position().height for axes in figure.axes[1:3]) > 0.5


def test_carpet_survives_nothing_but_missing_parcels():
    nothing = np.full((20, 4), np.nan)
    assert '4 without' in words(
        carpet(nothing, nothing, 1.0, np.zeros(20, bool), np.arange(4), 'any')
    )


def test_coverage_counts_low_parcels(arrays):
    figure = coverage(arrays['xyz'], arrays['coverage'], 0.5)
    assert '2 of 424 parcels below 50%' in words(figure)
    rings = figure.axes[0].collections[-1].get_offsets()
    assert np.allclose(rings, arrays['xyz'][[3, 200]][:, [1, 2]])


@pytest.mark.parametrize(
    ('run', 'said'), [(130.0, '30 s in no window'), (100.0, 'nothing left over')]
)
def test_windows_say_what_is_left_over(run, said):
    figure = windows([0.0, 50.0], [50.0, 50.0], [1.0, 1.0], [0.0, 0.0], [False, False], run)
    assert said in words(figure)
    assert 'none' in words(figure)


def test_excluded_windows_are_grey_and_counted():
    figure = windows([0.0, 50.0], [50.0, 50.0], [1.0, 1.0], [0.0, 0.6], [False, True], 100.0)
    assert 'nothing left over, 1 excluded (grey)' in words(figure)
    kept, excluded = (bar.get_facecolor()[:3] for bar in figure.axes[0].patches)
    assert kept == to_rgb(style.BLUE)
    assert excluded == to_rgb(style.GREY)


def test_windows_count_time_from_the_first_volume_that_was_used():
    figure = windows([10.0, 60.0], [50.0, 50.0], [1.0, 1.0], [0, 0], [False, False], 130.0, 10.0)
    assert '2 windows in 120 s, 20 s in no window' in words(figure)
    assert figure.axes[0].get_xlim()[0] == 10


def test_padded_window_is_drawn_to_its_full_length():
    lanes = windows([0.0], [100.0], [0.5], [0.25], [False], 100.0).axes[0]
    recorded, padded = lanes.patches
    assert (recorded.get_x(), recorded.get_width()) == (0, 100)
    assert (padded.get_x(), padded.get_width()) == (100, 100)


@pytest.mark.parametrize(('count', 'said'), [(1, 'One window'), (2, 'Two windows')])
def test_few_windows_show_their_values(arrays, count, said):
    figure = embedding(arrays['embedding'][:count], np.arange(count))
    assert said in words(figure)
    drawn = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 64]
    assert np.array_equal(drawn[0].get_ydata(), arrays['embedding'][0])


def test_embedding_explains_the_variance(arrays):
    scores, explained = principal_components(arrays['embedding'])
    centred = arrays['embedding'] - arrays['embedding'].mean(0)
    values = np.linalg.eigvalsh(centred @ centred.T)[::-1]
    assert np.allclose(explained, values / values.sum(), atol=1e-12)
    assert np.allclose((scores**2).sum(0), values, atol=1e-9)
    alike = embedding(np.ones((4, 8)), np.arange(4))
    assert 'All windows have the same embedding' in words(alike)


def test_missing_parcels_are_grey_in_the_matrix(arrays):
    figure = connectivity(arrays['relmat'], *ORDER)
    assert '2 without signal' in words(figure)
    image = figure.axes[0].images[0]
    colours = image.cmap(image.norm(image.get_array()))
    assert np.allclose(colours[3], [0xBD / 255] * 3 + [1])


@pytest.fixture(scope='module')
def order(arrays):
    """Gradients whose distances the connectivity follows, but for two missing parcels."""
    gradients = arrays['xyz'] / 100
    fc = np.exp(-np.linalg.norm(gradients[:, None] - gradients, axis=2))
    return gradients, np.where(np.isnan(arrays['relmat']), np.nan, fc)


def test_order_check_shows_every_reading(order):
    gradients, fc = order
    found = order_check(gradients, fc, {'backwards': np.arange(P)[::-1]})
    figure = draw_order_check(found, gradients, fc)
    shown = words(figure)
    assert 'The connectivity fits the order as read' in shown
    pairs = (P - 2) * (P - 3) // 2
    assert f'{pairs} pairs of parcels: r = {found["as read"]:.2f}' in shown
    assert np.nansum(figure.axes[0].images[0].get_array()) == pairs
    near, mean = figure.axes[0].lines[0].get_data()
    assert len(near) == 20
    assert mean == pytest.approx(np.exp(near), rel=0.1)
    bars = figure.axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx(list(found.values()))
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == list(found)
    assert 'expected' not in shown


def test_order_check_names_doubt_and_what_is_expected(order):
    gradients, fc = order
    rows = np.random.default_rng(0).permutation(P)
    shuffled = fc[np.ix_(rows, rows)]
    found = order_check(gradients, shuffled, {'7-network order': rows})
    expected = {'right order': 0.41, '7-network order': 0.16}
    shown = words(draw_order_check(found, gradients, shuffled, expected))
    assert 'does not bear out' in shown
    assert 'right order: 0.41' in shown
    assert '7-network order: 0.16' in shown
    assert 'expected' not in words(draw_order_check(found, gradients, shuffled))


@pytest.mark.parametrize('count', [1, 3])
def test_latent_error_counts_what_the_model_gained(count):
    """Odd parcels are predicted at the last three patches; two do worse than the baseline."""
    baseline = np.full((count, 40, 10), np.nan)
    baseline[:, 1::2, 7:] = 0.4
    error = 0.5 * baseline
    error[:, [1, 39]] *= 3
    figure = latent_error(
        error, baseline, np.arange(len(error)), np.arange(40)[::-1], order_label='backwards'
    )
    assert '18 of 20 parcels below the baseline' in words(figure)
    assert ('mean of 3 windows' in words(figure)) == (count > 1)
    drawn = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    assert np.isfinite(drawn[:20, 7:]).all()
    assert np.isnan(drawn[20:]).all()
    assert np.isnan(drawn[:, :7]).all()
    assert drawn[[0, 1, 19], 7] == pytest.approx([0.6, 0.2, 0.6])  # parcels 39, 37 and 1
    panels = [axes for axes in figure.axes if axes.get_xlabel() == 'window']
    assert len(panels) == (count > 1)
    for axes in panels:
        means = [line.get_ydata() for line in axes.lines]
        assert np.allclose(means, [[0.4] * 3, [0.24] * 3])


def test_model_figures_are_small_and_the_same_again(order, tmp_path):
    gradients, fc = order
    rng = np.random.default_rng(0)
    error = rng.random((4, 450, 10))
    found = order_check(gradients, fc, {})
    draw = {
        'order': lambda: draw_order_check(found, gradients, fc),
        'latent': lambda: latent_error(
            error, error + 0.1, np.arange(len(error)), np.arange(450), 'atlas order'
        ),
    }
    for name, figure in draw.items():
        first = save(figure(), tmp_path / f'{name}.svg').read_bytes()
        assert len(first) < 400_000
        assert b'mathdefault' not in first  # formulas are shown as they are
        assert save(figure(), tmp_path / f'{name}.svg').read_bytes() == first


def test_pictures_leave_no_global_state(arrays):
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    coverage(arrays['xyz'], arrays['coverage'], 0.5)
    assert dict(matplotlib.rcParams) == before
    if 'matplotlib.pyplot' in sys.modules:
        assert not sys.modules['matplotlib.pyplot'].get_fignums()


def test_browser_shows_the_figures(tmp_path):
    """Moved elsewhere and opened from disk, the page displays its images and runs no script."""
    browser = shutil.which('chromium') or shutil.which('chromium-browser')
    if not browser:
        pytest.skip('needs chromium')
    from matplotlib.figure import Figure
    from PIL import Image

    picture = Figure(figsize=(4, 2))
    # a raster, as most figures have one
    picture.add_axes((0, 0, 1, 1)).imshow([[[255, 0, 255]]], aspect='auto')
    save(picture, figure_path(tmp_path / 'here', RUN.format(1), 'carpet'))
    write_report(tmp_path / 'here', '01', [a_run(RUN.format(1))], FIGURES)
    page = tmp_path / 'here' / 'sub-01.html'
    attack = 'document.querySelectorAll("img").forEach(image => image.remove())'
    hostile = f'<script>{attack}</script><img src="data:," onerror=\'{attack}\'></body>'
    page.write_text(page.read_text().replace('</body>', hostile))
    shutil.move(tmp_path / 'here', tmp_path / 'moved away')
    shot = tmp_path / 'page.png'
    subprocess.run(
        [
            browser, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
            '--disable-background-networking', '--disable-component-update', '--disable-sync',
            f'--user-data-dir={tmp_path / "profile"}', '--window-size=1200,2400',
            f'--screenshot={shot}', (tmp_path / 'moved away' / 'sub-01.html').as_uri(),
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert('RGB'))
    magenta = (pixels == (255, 0, 255)).all(2)
    assert magenta.any(1).sum() > 300
    assert magenta.any(0).sum() > 600


def test_methods_of_jobs_side_by_side(tmp_path, monkeypatch):
    """The text has the part that another process adds while this one writes."""
    from bids_brainfm.bids.files import write_json
    from bids_brainfm.reports import methods

    def write_late(path, text, write=methods.write_text):
        write_json(tmp_path / 'logs/methods/desc-b.json', {'Text': 'Of B.', 'References': []})
        return write(path, text)

    monkeypatch.setattr(methods, 'write_text', write_late)
    path = methods.write_methods(tmp_path, {'desc-a': ('Of A.', ['Somebody 2020'])})
    text = path.read_text()
    assert 'Of A.\n\nOf B.' in text
    assert '- Somebody 2020' in text
