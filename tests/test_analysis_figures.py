"""The pictures of the analyses: what they say, where they draw it, and that they always draw."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from bids_brainfm.reports.figures.attention import attention
from bids_brainfm.reports.figures.brain import VIEWS
from bids_brainfm.reports.figures.contrast import contrast
from bids_brainfm.reports.figures.forecast import forecast
from bids_brainfm.reports.figures.networks import knn, networks
from bids_brainfm.reports.figures.perturbation import perturbation
from bids_brainfm.reports.figures.reconstruction import gain, r2_map, reconstruction
from bids_brainfm.reports.style import BLUE, save

DRAWINGS = (
    attention,
    contrast,
    forecast,
    gain,
    knn,
    networks,
    perturbation,
    r2_map,
    reconstruction,
)
P, T, K = 450, 500, 20
NAMES = [f'parcel {number}' for number in range(P)]
STEPS = 0.72 * np.arange(1, 21)


def score(accuracy, balanced=0.2, p=np.nan):
    return SimpleNamespace(accuracy=accuracy, balanced_accuracy=balanced, p=p)


NULL = {'spatial null': score(0.4)}


@pytest.fixture(scope='module')
def xyz():
    """Parcels on an egg as large as a brain, the left ones first."""
    towards = np.random.default_rng(0).normal(0, 1, (P, 3))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    xyz = towards * [60, 75, 55] + [0, -15, 10]
    return xyz[np.argsort(xyz[:, 0])]


def ordinary(xyz):
    """Arguments of every picture as an analysis gives them; one parcel is missing."""
    rng = np.random.default_rng(1)
    series = rng.normal(0, 1, (T, P)).cumsum(0) / 10
    rebuilt = series + rng.normal(0, 0.5, (T, P))
    rebuilt[-10:] = np.nan
    series[:, 7] = rebuilt[:, 7] = np.nan
    value = rng.normal(0, 0.4, P)
    value[7] = np.nan
    target, noise = np.arange(P) < 3, rng.normal(0, 1, (P, 10))
    change = np.where(target, np.nan, value)
    mse = np.linspace(0.2, 1, 20)
    ways = {
        name: {'mse': mse * factor, 'r2': 1 - mse * factor, 'r': 1 - mse}
        for name, factor in (('model', 1), ('persistence', 2), ('mean', 1.2), ('ar', 0.999))
    }
    origins = [(t + STEPS, np.zeros(20), np.linspace(0.1, 1, 20)) for t in (0, 20, 40)]
    example = {'name': 'x', 'time': np.arange(T), 'observed': series[:, 0], 'origins': origins}
    labels = rng.integers(1, K + 1, P)
    labels[7] = 0
    names = [f'network {number // 2}' for number in range(K)]
    reference = np.array([*names, 'not found'])[rng.integers(0, K + 1, P)]
    return {
        'reconstruction': (
            series,
            rng.random((T, P)) < 0.75,
            rebuilt,
            2.0,
            value,
            NAMES,
            np.arange(P),
            'atlas order',
        ),
        'r2_map': (
            xyz,
            {
                'model': value,
                'mean': value - 0.1,
                'linear interpolation': value - 5,
                'covariance': value + 0.1,
            },
        ),
        'gain': (2.0 ** np.arange(-3, 5), np.linspace(-3, 0.5, 8), True),
        'forecast': (STEPS, ways, [example] * 3),
        'networks': (xyz, labels, names, reference, rng.random(P), {'ARI': 0.4}),
        'knn': ({'features': score(0.6, p=0.01), 'xyz': score(0.5), **NULL}, rng.random(1000)),
        'attention': (xyz, np.exp(value[:, None] + noise), np.arange(P) // 16, 'A note. ' * 40),
        'perturbation': (
            xyz,
            change,
            target,
            rng.random(P),
            np.full(P, 0.1),
            NAMES,
            'raised',
            18.0,
        ),
        'contrast': (xyz, value, rng.random(P), np.arange(P), 'task', 'rest', 20, 21),
    }


def degenerate(xyz):
    """Arguments of every picture without any value, and with the same value everywhere."""
    xyz = xyz[::9]
    nan, zero, one = np.full(50, np.nan), np.zeros(50), np.ones(50)
    none, row, order = np.zeros(50, bool), np.arange(50), (np.arange(50), '')
    nothing = {'mse': np.full(1, np.nan), 'r2': np.full(1, np.nan), 'r': np.full(1, np.nan)}
    flat = {'mse': np.ones(1), 'r2': np.full(1, -9.0), 'r': np.zeros(1)}
    blank, level = np.full((30, 50), np.nan), np.ones((30, 50))
    hidden = np.zeros((30, 50), bool)
    lost = score(np.nan, np.nan, np.nan)
    example = {'name': 'x', 'time': np.arange(9), 'observed': nan[:9], 'origins': []}
    return [
        ('reconstruction', (blank, hidden, blank, 2.0, nan, NAMES, *order), 'None of 50 parcels'),
        ('reconstruction', (level, ~hidden, level, 2.0, zero, NAMES, *order), 'R² 0.00 over 50'),
        ('r2_map', (xyz, {'model': nan, 'mean': zero}), 'No parcel has an R²'),
        ('r2_map', (xyz, {'model': zero, 'mean': zero}), 'above mean in 0 of 50 parcels'),
        ('r2_map', (xyz, {'model': one, 'mean': zero}), 'above mean in 50 of 50 parcels'),
        ('gain', (np.ones(1), np.full(1, np.nan), False), 'R² could not be computed'),
        ('gain', (np.ones(1), np.full(1, -5.0), False), '1 of 1 points lie below -1'),
        ('forecast', (np.ones(1), {'model': nothing}, []), 'No step'),
        ('forecast', (np.ones(1), {'model': flat, 'mean': flat}, [example]), 'at 0 of 1 steps'),
        ('networks', (xyz, zero, [], None, nan, None), 'No network was found in 50 parcels'),
        ('networks', (xyz, one, ['a'], None, 3 * one, None), '1 cluster in 50 of 50'),
        ('knn', ({'features': lost, **NULL}, nan), 'features: no parcel could be classified'),
        ('knn', ({'features': score(0.0, 0.0, 1.0), **NULL}, zero), 'not above the spatial null'),
        ('attention', (xyz, np.full((50, 3), np.nan), row, None), 'None of 50 parcels has'),
        ('attention', (xyz, np.ones((50, 1)), row, None), 'All 50 parcels receive the same'),
        ('attention', (xyz, np.zeros((50, 2)), row // 5, None), 'All 10 tokens receive the same'),
        ('perturbation', (xyz, nan, none, nan, nan, NAMES, '', 0), 'no other parcel could be'),
        ('perturbation', (xyz, zero, none, one, zero, NAMES, '', 2), '0 of 50 others change'),
        ('contrast', (xyz, nan, nan, row, 'a', 'b', 2, 2), 'could be compared in no parcel'),
        ('contrast', (xyz, zero, one, row // 5, 'a', 'b', 2, 2), 'differ in none of 10 tokens'),
    ]  # fmt: skip


def draw(name, arguments):
    (drawing,) = (drawing for drawing in DRAWINGS if drawing.__name__ == name)
    return drawing(*arguments)


def title(figure):
    """The finding: the figure's title on one line."""
    return figure.get_suptitle().replace('\n', ' ')


def words(figure):
    """All text in a figure."""
    return ' '.join(text.get_text() for text in figure.findobj(Text))


def panel(figure, label):
    """The axes with a label on x."""
    (found,) = (axes for axes in figure.axes if axes.get_xlabel() == label)
    return found


def views(figure):
    """Axes of the glass brains by the name written below them."""
    names = {name for _, _, name, _ in VIEWS.values()}
    found = {}
    for axes in figure.axes:
        for text in axes.texts:
            if text.get_text() in names:
                found.setdefault(text.get_text(), []).append(axes)
    return found


def dots(axes):
    """Missing parcels, those with a value and those under a star."""
    missing, shown, stars = axes.collections
    return missing.get_offsets(), shown, stars.get_offsets()


NAMES_OF_PICTURES = list(ordinary(np.zeros((P, 3))))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES_OF_PICTURES)
def test_figures_are_small_sound_and_the_same_again(xyz, name, tmp_path):
    """At full size, twice over, and nothing is left in pyplot or in Matplotlib's settings."""
    import matplotlib.pyplot

    settings = dict(matplotlib.rcParams)
    first = save(draw(name, ordinary(xyz)[name]), tmp_path / f'{name}.svg').read_bytes()
    assert len(first) < 800_000
    assert b'mathdefault' not in first  # formulas are shown as they are
    ElementTree.fromstring(first)
    ids = re.findall(rb' id="([^"]+)"', first)
    assert len(ids) == len(set(ids))
    again = save(draw(name, ordinary(xyz)[name]), tmp_path / f'{name}.svg').read_bytes()
    assert again == first
    assert matplotlib.pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.filterwarnings('error')
def test_figures_draw_whatever_is_missing_and_say_so(xyz, tmp_path):
    for name, arguments, said in degenerate(xyz):
        figure = draw(name, arguments)
        save(figure, tmp_path / f'{name}.svg')
        assert said in title(figure)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', NAMES_OF_PICTURES)
def test_nothing_is_cut_off_at_the_edge(xyz, name, tmp_path):
    figure = draw(name, ordinary(xyz)[name])
    figure.savefig(tmp_path / 'figure.png', dpi=60)
    pixels = np.asarray(Image.open(tmp_path / 'figure.png').convert('L'))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()


@pytest.mark.parametrize('chosen', ['TkAgg', ''])
def test_no_backend_is_chosen_or_changed(chosen):
    """A backend that needs a display stays the user's, and so does having none yet."""
    code = """
import warnings
import matplotlib, numpy as np
from bids_brainfm.reports.figures.contrast import contrast
warnings.simplefilter('error')
before = dict.__getitem__(matplotlib.rcParams, 'backend')
contrast(np.zeros((3, 3)), np.ones(3), np.ones(3), np.arange(3), 'a', 'b', 2, 2)
assert dict.__getitem__(matplotlib.rcParams, 'backend') is before, before
"""
    env = {key: os.environ[key] for key in ('PATH', 'HOME') if key in os.environ}
    env |= {'MPLBACKEND': chosen} if chosen else {}
    run = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_left_is_left(xyz):
    """A left parcel is at the L of the view from above and in the left view only."""
    places = np.array([[-40.0, -30, 20], [40, 30, 10]])
    figure = contrast(places, np.array([1.0, -2]), np.ones(2), np.arange(2), 'a', 'b', 2, 2)
    figure.draw_without_rendering()
    seen = views(figure)

    def across(axes, points):
        """From 0 at the left end of the axes as drawn to 1 at the right."""
        return axes.transAxes.inverted().transform(axes.transData.transform(points))[:, 0]

    (above,) = seen['from above']
    left, right = across(above, dots(above)[1].get_offsets()[[1, 0]])  # from below to above
    assert left < 0.3 < 0.7 < right
    marks = {text.get_text(): text.get_window_extent().x0 for text in above.texts}
    middle = above.get_window_extent().x0 + above.get_window_extent().width / 2
    assert marks['L'] < middle < marks['R']
    colours = dots(above)[1].get_facecolors()
    order = np.argsort(across(above, dots(above)[1].get_offsets()))
    red, blue = colours[order]
    assert red[0] > red[2]
    assert blue[2] > blue[0]

    (from_left,), (from_right,) = seen['left side'], seen['right side']
    assert np.allclose(dots(from_left)[1].get_offsets(), [[-30, 20]])
    assert np.allclose(dots(from_right)[1].get_offsets(), [[30, 10]])
    for axes, ends in ((from_left, 'AP'), (from_right, 'PA')):
        marks = {text.get_text(): text.get_window_extent().x0 for text in axes.texts}
        assert marks[ends[0]] < marks[ends[1]]
    # the front is where A is
    assert from_left.get_xlim()[0] > from_left.get_xlim()[1]
    assert from_right.get_xlim()[0] < from_right.get_xlim()[1]


def test_brains_mark_missing_ringed_and_target_parcels(xyz):
    change = np.linspace(-1, 1, P)
    change[[0, 5, 440]] = np.nan
    target = np.zeros(P, bool)
    target[[5, 440]] = True
    p = np.ones(P)
    p[[30, 400, 401]] = 0.05
    p[5] = 0.01
    figure = perturbation(xyz, change, target, p, np.ones(P), NAMES, 'lowered', 17.9)
    assert '2 parcels lowered: 3 of 447 others change' in title(figure)
    assert '18 expected by chance' in title(figure)
    assert '1 without a value (grey)' in title(figure)
    (above,) = views(figure)['from above']
    missing, shown, stars = dots(above)
    assert np.allclose(np.sort(missing, 0), np.sort(xyz[[0, 5, 440], :2], 0))
    assert np.allclose(np.sort(stars, 0), np.sort(xyz[[5, 440], :2], 0))
    ringed = np.array(shown.get_linewidths()) > 1
    assert np.allclose(
        np.sort(shown.get_offsets()[ringed], 0), np.sort(xyz[[30, 400, 401], :2], 0)
    )
    assert (shown.get_facecolors()[ringed, 3] == 1).all()
    assert (shown.get_facecolors()[~ringed, 3] < 0.5).all()

    bars = panel(figure, 'change ± sham RMS (SD)')
    largest = sorted(np.flatnonzero(np.isfinite(change)), key=lambda each: -abs(change[each]))
    assert [tick.get_text() for tick in bars.get_yticklabels()] == [
        NAMES[each] for each in largest[:10]
    ]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(change[largest[:10]])


def test_reconstruction_shows_best_median_and_worst():
    rng = np.random.default_rng(3)
    original = rng.normal(0, 1, (60, 6))
    r2 = np.array([0.1, np.nan, 0.9, -4.0, 0.5, 0.2])
    hidden = np.zeros((60, 6), bool)
    hidden[20:40] = True
    hidden[50:, 3] = True
    figure = reconstruction(
        original, hidden, 0.5 * original, 2.0, r2, NAMES, [5, 4, 3, 2, 1, 0], 'back', start=8.0
    )
    assert 'Median R² 0.20 over 5 of 6 parcels' in title(figure)
    assert f'{130 / 360:.0%} of the points hidden' in title(figure)
    best, median, worst, first, seen, last = figure.axes[:6]
    assert best.get_title('left') == 'best parcel: parcel 2, R² = 0.90'
    assert median.get_title('left') == 'median parcel: parcel 5, R² = 0.20'
    assert worst.get_title('left') == 'worst parcel: parcel 3, R² = -4.00'
    measured, rebuilt = (line.get_ydata() for line in worst.lines)
    assert np.array_equal(measured, original[:, 3])
    assert np.array_equal(rebuilt, 0.5 * original[:, 3])
    spans = [path.get_extents().intervalx.tolist() for path in worst.collections[0].get_paths()]
    assert spans == [[48.0, 88.0], [108.0, 128.0]]

    carpets = [axes.images[0] for axes in (first, seen, last)]
    assert len({image.get_clim() for image in carpets}) == 1
    drawn = [np.ma.filled(image.get_array(), np.nan) for image in carpets]
    assert np.array_equal(drawn[0], original[:, ::-1].T)
    assert np.array_equal(drawn[2], 0.5 * original[:, ::-1].T)
    assert np.array_equal(np.isnan(drawn[1]), hidden[:, ::-1].T)
    cover = np.ma.filled(seen.images[1].get_array(), np.nan)
    assert np.array_equal(np.isfinite(cover), hidden[:, ::-1].T)
    red, green, blue, _ = seen.images[1].cmap(0)
    assert len({red, green, blue}) == 3  # no grey


@pytest.mark.parametrize('count', [1, 2])
def test_reconstruction_of_few_parcels_repeats_none(count):
    series = np.random.default_rng(0).normal(0, 1, (20, count))
    figure = reconstruction(
        series,
        np.zeros((20, count), bool),
        series,
        1.0,
        np.arange(count),
        NAMES,
        np.arange(count),
        'atlas order',
    )
    said = [axes.get_title('left').split(':')[0] for axes in figure.axes[:count]]
    assert said == ['best parcel', 'worst parcel'][:count]
    assert len(figure.axes) == count + 3 + 1


def test_r2_map_counts_parcels_above_each_baseline(xyz):
    rng = np.random.default_rng(2)
    ours, mean, line = rng.normal(0.2, 0.5, (3, P))
    ours[:2], line[1:3], line[10:14] = np.nan, np.nan, -40
    both = np.isfinite(ours) & np.isfinite(line)
    figure = r2_map(xyz, {'model': ours, 'mean': mean, 'interpolation': line})
    first, second = (int((ours > other)[both].sum()) for other in (mean, line))
    assert (
        f'above mean in {first} and above interpolation in {second} of {P - 3} parcels'
    ) in title(figure)
    assert '2 without a value (grey)' in title(figure)
    below = (line < -1).sum() / np.isfinite(line).sum()
    assert f'interpolation ({below:.0%} below -1)' in words(figure)
    curves = panel(figure, 'R²')
    assert curves.get_xlim()[0] == pytest.approx(-1.03)
    across, up = curves.lines[0].get_data()
    middle = np.searchsorted(across, np.nanmedian(ours), side='right') - 1
    assert up[middle] == pytest.approx(50, abs=0.2)


def test_gain_counts_what_it_cuts_off():
    gains = np.array([4.0, 0.5, 1.0, 2.0, 8.0])
    r2 = np.array([0.5, -1.5, 0.1, 0.3, -7.0])
    figure = gain(gains, r2, True)
    assert 'R² is 0.50 at gain 4, against 0.10 at gain 1: the input is not' in title(figure)
    assert '2 of 5 points lie below -1' in title(figure)
    axes = panel(figure, 'gain on the input (1: as it is)')
    assert axes.get_ylim()[0] == -1
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == 'v'] == [
        [0.5, 8.0]
    ]
    assert axes.lines[0].get_xdata() == [1, 1]
    calm = gain(gains, 0.3 - np.log(gains) ** 2 / 9, False)
    assert title(calm) == 'R² is highest at gain 1, 0.30'
    useless = gain(gains, -1 / gains, False)
    assert title(useless).startswith('At no gain is the model nearer than the mean: R² is -0.12')


def test_forecast_counts_steps_and_draws_every_fan():
    mse = np.array([0.1, 0.5, 0.9])
    ways = {
        'model': {'mse': mse, 'r2': 1 - mse, 'r': 1 - mse},
        'mean': {'mse': [1, 0.5, 1], 'r2': [0, 0, -8], 'r': [np.nan] * 3},
        'ar': {'mse': [0.2, 0.6, 1.0], 'r2': [0.8, 0.4, 0], 'r': [0.9, 0.7, 0.5]},
    }
    time = np.arange(30.0)
    spread = np.array([1.0, 2, 3])
    origins = [(time[at : at + 3], np.full(3, 5.0), spread) for at in (10, 13)]
    example = {'name': 'V1', 'time': time, 'observed': np.sin(time), 'origins': origins}
    figure = forecast(np.array([1.0, 2, 3]), ways, [example])
    assert title(figure) == 'The model has the lowest error at 2 of 3 steps'
    fans = figure.axes[0]
    assert fans.get_title('left') == 'V1'
    assert len(fans.collections) == 4
    wide = fans.collections[0].get_paths()[0].vertices
    assert [wide[:, 1].min(), wide[:, 1].max()] == [-1, 11]
    panels = {axes.get_title('left'): axes for axes in figure.axes[1:]}
    assert list(panels) == ['MSE', 'R² (cut off at -1)', 'r']
    assert panels['R² (cut off at -1)'].get_ylim()[0] == -1
    ours, *others = panels['MSE'].lines
    assert np.array_equal(ours.get_ydata(), mse)
    assert ours.get_color() == BLUE
    assert all(ours.get_linewidth() > other.get_linewidth() for other in others)


def test_networks_have_one_colour_in_both_maps(xyz):
    labels = np.arange(P) % 4
    names = ['visual', 'default', 'visual']
    reference = np.array(['default', 'visual', 'limbic', 'n/a', ''])[np.arange(P) % 5]
    confidence = np.where(labels > 0, 0.75, np.nan)
    figure = networks(xyz, labels, names, reference, confidence, {'NMI': 0.5, 'ARI': 0.25})
    assert f'3 clusters in {(labels > 0).sum()} of {P} parcels' in title(figure)
    assert 'NMI 0.50, ARI 0.25' in title(figure)
    shown = words(figure)
    visual = np.isin(labels, [1, 3]).sum()
    assert f'visual ({visual})' in shown
    assert f'default ({(labels == 2).sum()})' in shown
    assert 'limbic (not found)' in shown
    assert 'Median confidence 0.75' in shown

    found, theirs = (dots(axes)[1] for axes in views(figure)['from above'])

    def colour_of(drawn, parcels):
        """The one colour of the parcels."""
        where = {tuple(place): number for number, place in enumerate(drawn.get_offsets())}
        rows = drawn.get_facecolors()[[where[tuple(place)] for place in xyz[parcels, :2]]]
        (colour,) = np.unique(rows, axis=0)
        return colour

    first, default, second = (colour_of(found, labels == each) for each in (1, 2, 3))
    assert np.allclose(first, colour_of(theirs, reference == 'visual'))
    assert np.allclose(default, colour_of(theirs, reference == 'default'))
    assert not np.allclose(first, default)
    assert (second >= first).all()  # the paler shade
    assert second.sum() > first.sum() + 0.5
    assert len(found.get_offsets()) == (labels > 0).sum()
    assert len(theirs.get_offsets()) == np.isin(reference, ['default', 'visual', 'limbic']).sum()
    alone = networks(xyz, labels, names, None, confidence, None)
    assert len(views(alone)['from above']) == 1


@pytest.mark.parametrize(
    ('p', 'said'),
    [(0.004, 'above the spatial null (mean 0.40, p = 0.004)'),
     (0.0001, 'above the spatial null (mean 0.40, p < 0.001)'),
     (0.3, 'not above the spatial null (mean 0.40, p = 0.300)')],
)  # fmt: skip
def test_knn_states_accuracy_and_p(p, said):
    null = np.tile([0.3, 0.5], 20)
    scores = {
        'features': score(0.62, 0.55, p),
        'xyz': score(0.5, 0.4),
        'spatial null': score(0.4, 0.3),
    }
    figure = knn(scores, null)
    assert title(figure) == f'Accuracy of features 0.62, {said}'
    (axes,) = figure.axes
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ['features', 'xyz', 'spatial null']
    heights = [bar.get_height() for bar in axes.patches[:6]]
    assert heights == pytest.approx([0.62, 0.55, 0.5, 0.4, 0.4, 0.3])
    assert np.allclose(axes.collections[0].get_offsets()[:, 1], null)


def test_attention_counts_tokens_and_prints_the_note(xyz):
    """Two parcels a token; one token is missing, and of another one parcel."""
    values = np.full(P, 0.5)
    values[:46] = 4.0
    values[-2:] = values[0] = np.nan
    profile = values[:, None] * [0.5, 1, 1.5]
    figure = attention(xyz, profile, np.arange(P) // 2, 'A token spans 16 parcels.')
    count = f'23 of {P // 2 - 1} tokens receive more than uniform attention; range 0.50 to 4.00'
    assert count in title(figure)
    assert 'A token spans 16 parcels.' in words(figure)
    patches = panel(figure, 'time patch')
    assert patches.lines[0].get_ydata() == pytest.approx(np.nanmean(profile, 0))


def test_contrast_counts_tokens_and_marks_their_parcels(xyz):
    token = np.arange(P) // 10
    difference, q = (token - 20.5), np.where(token >= 40, 0.01, 0.5)
    difference[405] = q[405] = np.nan
    figure = contrast(xyz, difference, q, token, 'task', 'rest', 12, 14)
    assert 'in 5 and below in 0 of 45 tokens at q < .05' in title(figure)
    (seen,) = views(figure)['from above']
    assert (np.array(dots(seen)[1].get_linewidths()) > 1).sum() == 49
    bars = panel(figure, 'difference').patches
    assert [sum(bar.get_height() for bar in half) for half in (bars[:30], bars[30:])] == [45, 5]


def test_contrast_counts_both_directions(xyz):
    difference = np.linspace(-1, 1, P)
    difference[20] = np.nan
    q = np.where(np.abs(difference) > 0.9, 0.01, 0.5)
    q[-1] = 0.05  # not below
    figure = contrast(xyz, difference, q, np.arange(P), 'task', 'rest', 12, 14)
    above = (difference[:-1] > 0.9).sum()
    below = (difference < -0.9).sum()
    assert (
        f'task (n = 12) above rest (n = 14) in {above} and below in {below} of {P - 1} parcels'
    ) in title(figure)
    (seen,) = views(figure)['from above']
    assert (np.array(dots(seen)[1].get_linewidths()) > 1).sum() == above + below
    bars = panel(figure, 'difference').patches
    assert sum(bar.get_height() for bar in bars[:30]) == P - 1
    assert sum(bar.get_height() for bar in bars[30:]) == above + below
