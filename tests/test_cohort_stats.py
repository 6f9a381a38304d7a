"""Statistics of a cohort: fitted run after run, written by the group level, taken by --scale."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest

from bids_brainfm.bids.description import write_dataset_files
from bids_brainfm.bids.files import read_matrix
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.registry import BY_NAME
from bids_brainfm.outputs.scale_stats import find
from bids_brainfm.signals.cohort_stats import CohortFit, Sketch
from bids_brainfm.signals.scale import fit_scaling, load_scale_stats, stats_content


def heavy_tailed(seed, shape, size=80.0):
    return size * np.random.default_rng(seed).standard_t(4, shape)


@pytest.mark.parametrize('share', [0.001, 0.25, 0.5, 0.75, 0.99])
def test_quantiles_are_those_of_all_values_at_once(share):
    parts = [heavy_tailed(i, (n, 3)) * (1, 1e-1, 1e3) for i, n in enumerate((400, 90, 1200))]
    sketch = Sketch(3)
    for part in parts:
        sketch.add(part)
    exact = np.quantile(np.concatenate(parts), share, axis=0)
    np.testing.assert_allclose(sketch.quantile(share), exact, rtol=2.6e-4, atol=2.6e-4)


def test_few_values_missing_ones_and_constants():
    sketch = Sketch(5)
    sketch.add(np.array([[5, np.nan, 7, np.nan, np.nan], [9, np.nan, 7, 3, 4.01]]))
    sketch.add(np.array([[7, np.nan, 7, np.nan, 4.01]]))
    np.testing.assert_allclose(sketch.quantile(0.5), [7, np.nan, 7, 3, 4.01], rtol=2.6e-4)
    np.testing.assert_array_equal((sketch.quantile(0.75) - sketch.quantile(0.25))[2:], 0)
    assert sketch.count.tolist() == [3, 0, 3, 1, 2]


def test_counts_do_not_run_over():
    """Two hours of runs at one value, beside a little more at another."""
    sketch = Sketch(1)
    for value, times in ((1.0, 40_000), (2.0, 70_000)):
        sketch.add(np.full((times, 1), value))
    assert sketch.quantile(0.5) == pytest.approx(2, rel=1e-3)


def cohort(people=5, runs=2, parcels=6):
    """Series in BOLD units of differing levels, by participant and run."""
    rng = np.random.default_rng(7)
    size = np.linspace(20, 120, parcels)
    for person in range(people):
        level = rng.uniform(400, 12000)
        for run in range(runs):
            noise = size * rng.standard_t(5, (150 + 100 * run, parcels)) + 3 * rng.random(parcels)
            yield f'{person:02d}', level * (rng.uniform(0.8, 1.2, parcels) + noise / 1e4), level


def test_statistics_of_series_are_those_of_the_pooled_samples():
    fit, pooled = CohortFit('A'), []
    for person, data, level in cohort():
        fit.add(person, data, level)
        pooled.append((data - data.mean(0)) * 1e4 / level)
    every = np.concatenate(pooled)
    first, median, third = np.quantile(every, [0.25, 0.5, 0.75], axis=0)
    stats = fit.series()
    iqr = third - first
    np.testing.assert_allclose(stats.median / iqr, median / iqr, atol=3e-3)
    np.testing.assert_allclose(stats.iqr, iqr, rtol=5e-3)
    sd = np.sqrt((every**2).mean(0))
    np.testing.assert_allclose(stats.lower * stats.iqr, -3.6 * sd, rtol=1e-9)
    np.testing.assert_allclose(stats.upper * stats.iqr, 3.7 * sd, rtol=1e-9)
    assert stats.provenance['NumberOfSamples'] == [5 * 150 + 5 * 250] * 6


@pytest.mark.parametrize('units', [1, 1e-6, 1e4])
def test_statistics_of_means_count_people_not_runs(units):
    fit, people = CohortFit('A'), {}
    for person, data, level in cohort(people=30):
        data, level = units * data, units * level
        data[:, 2] = np.nan if person == '03' else data[:, 2]
        fit.add(person, data, level)
        people.setdefault(person, []).append(data.mean(0) * 1e4 / level)
    means = np.array([np.mean(runs, axis=0) for runs in people.values()])
    first, median, third = np.nanquantile(means, [0.25, 0.5, 0.75], axis=0)
    stats = fit.temporal_means()
    np.testing.assert_allclose(stats.median, median, rtol=1e-3)
    np.testing.assert_allclose(stats.iqr, third - first, rtol=5e-3)
    assert stats.lower is None
    assert stats.statistic == 'temporal mean'
    assert stats.provenance['NumberOfParticipantsWithParcel'] == [30, 30, 29, 30, 30, 30]


def test_a_cohort_of_one_run_scales_as_the_run_by_itself():
    ((person, data, level),) = cohort(people=1, runs=1)
    data -= np.median(data, axis=0)  # run-robust takes no median out
    fit = CohortFit('A')
    fit.add(person, data, level)
    stats = fit.series()
    alone, by_cohort = (
        fit_scaling(data, 'run-robust', level),
        fit_scaling(data, 'cohort', level, 1.0, stats),
    )
    np.testing.assert_allclose(by_cohort.gain, alone.gain, rtol=0.02)
    np.testing.assert_allclose(by_cohort.lower, alone.lower, rtol=0.02)
    np.testing.assert_allclose(by_cohort.upper, alone.upper, rtol=0.02)


def test_the_order_of_runs_is_of_no_matter_and_a_bad_level_is_told():
    forward, backward = CohortFit('A'), CohortFit('A')
    runs = list(cohort())
    for fit, order in ((forward, runs), (backward, runs[::-1])):
        for run in order:
            fit.add(*run)
    np.testing.assert_array_equal(forward.series().iqr, backward.series().iqr)
    with pytest.raises(BrainfmError, match='not a BOLD level'):
        forward.add('09', runs[0][1], 0.0)


def test_memory_does_not_grow_with_runs():
    def peak(people):
        fit = CohortFit('A')
        tracemalloc.start()
        for run in cohort(people, parcels=40):
            fit.add(*run)
        fit.series(), fit.temporal_means()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(60) < 1.02 * peak(3)


def test_files_are_read_back_as_they_were_fitted(tmp_path):
    fit = CohortFit('A')
    for person, data, level in cohort():
        data[:, 1] = np.nan
        fit.add(person, data, level)
    for stats in (fit.series(), fit.temporal_means()):
        file = tmp_path / 'stats.json'
        file.write_text(json.dumps(stats_content(stats), allow_nan=False))
        back = load_scale_stats(file, 'A', 6)
        assert back.statistic == stats.statistic
        for found, fitted in zip(back.columns.values(), stats.columns.values(), strict=True):
            np.testing.assert_allclose(found, fitted, rtol=1e-8)
        assert np.isnan(back.iqr[1])
    file.write_text(json.dumps(stats_content(stats) | {'FormatVersion': 3}))
    with pytest.raises(BrainfmError, match='of format 3'):
        load_scale_stats(file, 'A', 6)


BOTH = ('--model', 'brainlm-demo', 'brain-jepa-demo')


def group(out, *options):
    from bids_brainfm.cli.run import main

    return main([str(out), str(out), 'group', *map(str, options)])


def tables(out):
    """Bytes of every file but for logs, which hold times and folders' names."""
    return {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob('*')
        if path.is_file() and path.relative_to(out).parts[0] != 'logs' and path.suffix != '.html'
    }


@pytest.mark.slow
def test_two_stages_make_the_files_of_one(simulated, tmp_path, app):
    """Series first, where there are no weights; then the same command without --stop-after."""
    whole, staged = tmp_path / 'whole', tmp_path / 'staged'
    assert app(simulated, whole) == 0
    away = ('--model', 'brainlm-demo=/nowhere')
    assert app(simulated, staged, *away) == 2
    assert app(simulated, staged, *away, '--stop-after', 'timeseries') == 0
    series = sorted(staged.rglob('*_timeseries.tsv'))
    assert len(series) == 2
    assert not list(staged.rglob('*_desc-brainlmdemo_*'))
    report = (staged / 'sub-01.html').read_text()
    assert 'desc-carpet' in report
    before = [path.stat().st_mtime_ns for path in series]
    assert app(simulated, staged) == 0
    assert [path.stat().st_mtime_ns for path in series] == before
    assert tables(staged) == tables(whole)


def test_missing_atlases_are_told_before_the_first_stage(simulated, tmp_path, app, capsys):
    models = ('--model', 'brainlm-111m', 'brain-jepa-vitb')
    assert app(simulated, tmp_path / 'out', *models, '--stop-after', 'timeseries') == 2
    said = capsys.readouterr().err
    assert 'fetch A424' in said
    assert 'fetch Schaefer2018Tian2020' in said
    assert 'fetch brainlm-111m' not in said


@pytest.mark.slow
def test_fitted_statistics_scale_the_runs_they_are_of(simulated, tmp_path, app, capsys):
    """From the group level to --scale cohort, and the numbers are those of the series."""
    out, other = tmp_path / 'out', tmp_path / 'other'
    assert app(simulated, out, '--stop-after', 'timeseries') == 0
    assert group(out, '--scale-stats') == 0
    assert 'participants only' in capsys.readouterr().err
    files = sorted((out / 'group' / 'scale').glob('*.json'))
    assert [path.name.split('_')[1] for path in files] == ['stat-series', 'stat-temporalmean']
    about = json.loads(files[0].read_text())
    assert about['NumberOfRuns'] == about['NumberOfParticipants'] == 2
    assert about['Version'] in files[0].name
    assert about['Denoising'] == ['simple']
    runs = out / about['Runs'].removeprefix('bids::')
    assert [line.split('\t')[0] for line in runs.read_text().splitlines()] == [
        'run',
        *(f'sub-{i}_task-rest_space-MNI152NLin2009cAsym_atlas-Demo424' for i in ('01', '02')),
    ]

    pooled, brain = [], {}
    for path in sorted(out.rglob('*_stat-mean_timeseries.tsv')):
        sidecar = json.loads(path.with_suffix('.json').read_text())
        brain[path] = sidecar['BrainMean']
        assert sidecar['FlaggedVolumes']
        data = np.delete(read_matrix(path)[0].astype(float), sidecar['FlaggedVolumes'], axis=0)
        pooled.append((data - data.mean(0)) * 1e4 / brain[path])
    first, third = np.quantile(np.concatenate(pooled), [0.25, 0.75], axis=0)
    np.testing.assert_allclose(about['IQR'], third - first, rtol=2e-3)
    stats = load_scale_stats(files[0], 'Demo424', 424)
    series = read_matrix(path)[0]
    scaled = fit_scaling(series, 'cohort', brain[path], 1.0, stats).apply(series)
    assert np.std(scaled) == pytest.approx(0.75, abs=0.1)  # about 0.74 for a normal distribution

    # Again makes no other file; both models find their own of them
    assert group(out, '--scale-stats') == 0
    assert sorted((out / 'group' / 'scale').glob('*.json')) == files
    assert group(out, '--scale-stats', '--participant-label', '01') == 0
    assert len(list((out / 'group' / 'scale').glob('*_stat-series_*.json'))) == 2
    options = ('--scale', 'cohort', '--scale-stats', *files)
    assert app(simulated, other, *options) == 0
    sidecar = json.loads(next(other.rglob('sub-01_*_desc-brainlmdemo_embedding.json')).read_text())
    assert sidecar['Scaling'] == 'cohort'


@pytest.mark.slow
def test_statistics_of_the_training_part_only(simulated, tmp_path, app, capsys):
    """They are those of its participants alone, and say so; nobody of the test part is seen."""
    out, table = tmp_path / 'out', tmp_path / 'participants.tsv'
    assert app(simulated, out, '--stop-after', 'timeseries') == 0
    listed = ('--scale-stats', '--participants-file', table)
    table.write_text('participant_id\tpart\nsub-01\ttrain\nsub-02\ttest\nsub-77\ttrain\n')
    capsys.readouterr()
    assert group(out, *listed, '--part', 'train') == 0
    assert 'has 1 of the 2 participants' in capsys.readouterr().err
    (path,) = (out / 'group' / 'scale').glob('*_stat-series_*.json')
    found = json.loads(path.read_text())
    assert found['NumberOfParticipants'] == 1
    assert found['ParticipantsFile']['Name'] == 'participants.tsv'
    assert found['ParticipantsFile']['Part'] == 'train'
    assert 'sub-02' not in path.with_suffix('.tsv').read_text()
    alone = {path.name}
    shutil.rmtree(out / 'group')
    assert group(out, '--scale-stats', '--participant-label', '01') == 0
    assert {p.name for p in (out / 'group' / 'scale').glob('*_stat-series_*.json')} == alone
    assert group(out, *listed) == 0
    assert len(list((out / 'group' / 'scale').glob('*_stat-series_*.json'))) == 2

    capsys.readouterr()
    for options, words in (
        ((*listed, '--part', 'validation'), 'nobody of this part; its parts are test, train'),
        ((*listed, '--part', 'train', '--participant-label', '01'), 'both name participants'),
        (('--scale-stats', '--part', 'train'), 'add --participants-file'),
    ):
        assert group(out, *options) == 2
        assert words in capsys.readouterr().err
    assert app(simulated, out, *listed[1:]) == 2
    assert 'an option of the group level' in capsys.readouterr().err
    for content, words in (
        ('participant_id\nsub-01\n', 'no column part'),
        ('participant_id\tpart\nsub-77\ttrain\n', 'none of the 1 participants'),
        ('', 'cannot be read'),
    ):
        table.write_text(content)
        assert group(out, *listed, '--part', 'train') == 2
        assert words in capsys.readouterr().err


def test_what_the_group_level_refuses(simulated, tmp_path, app, capsys):
    out = tmp_path / 'out'
    assert group(simulated, '--scale-stats') == 2
    assert 'was not written by bids_brainfm' in capsys.readouterr().err
    assert app(simulated, out, '--stop-after', 'timeseries', '--participant-label', '01') == 0
    for options, words in (
        ((), 'one thing at a time'),
        (('--scale-stats', 'file.json'), 'name no file'),
        (('--scale-stats', '--contrast', 'task', 'a', 'b'), 'one thing at a time'),
        (('--scale-stats', '--task-id', 'nback'), 'no parcel series of nback'),
        (('--scale-stats', '--participant-label', '77'), '77'),
    ):
        assert group(out, *options) == 2
        assert words in capsys.readouterr().err
    assert app(simulated, out, '--scale-stats') == 2
    assert 'takes a FILE' in capsys.readouterr().err
    # A mean over one participant has no range
    assert group(out, '--scale-stats') == 0
    assert 'Not written, for cohort-means' in capsys.readouterr().err
    assert [p.name.split('_')[1] for p in (out / 'group' / 'scale').glob('*.json')] == [
        'stat-series'
    ]


@pytest.mark.slow
def test_broken_series_are_not_counted_silently(simulated, tmp_path, app, capfd):
    """One that breaks off, in a row or between two, is left out and named."""
    out = tmp_path / 'out'
    assert app(simulated, out, '--stop-after', 'timeseries') == 0
    path = next(out.rglob('sub-01_*_timeseries.tsv'))
    whole, sidecar = path.read_bytes(), path.with_suffix('.json').read_text()
    capfd.readouterr()

    for part in (whole[: int(0.6 * len(whole))], b''.join(whole.splitlines(keepends=True)[:100])):
        path.write_bytes(part)
        assert group(out, '--scale-stats') == 0
        assert f'{path} is left out' in capfd.readouterr().err
        (table,) = (out / 'group' / 'scale').glob('*_stat-series_*.tsv')
        assert 'sub-01' not in table.read_text()
        logs = [log.read_text() for log in out.glob('logs/*/bids_brainfm.log')]
        assert any(f'{path} is left out' in log for log in logs)
        shutil.rmtree(out / 'group')

    path.write_bytes(whole)
    left_out = ('BrainMean', 'FileChecksums')
    lacking = {k: v for k, v in json.loads(sidecar).items() if k not in left_out}
    path.with_suffix('.json').write_text(json.dumps(lacking))
    assert group(out, '--scale-stats') == 2
    assert f'The sidecar (.json) of {path} lacks' in capfd.readouterr().err


def test_a_recording_in_two_spaces_counts_once(tmp_path):
    write_dataset_files(tmp_path, '1', {}, ())
    for space in ('MNI152NLin6Asym', 'fsLR'):
        stem = f'sub-01_task-rest_space-{space}_atlas-A424_stat-mean_timeseries'
        path = tmp_path / 'sub-01' / 'func' / f'{stem}.tsv'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('a\n1\n2\n')
        write_sidecar(path, {'ResultsVersion': BY_NAME['series'].results_version})
    with pytest.raises(BrainfmError, match='choose one with --space'):
        find(tmp_path, {}, None)
    assert len(find(tmp_path, {'space': ('fsLR',)}, None)['A424']) == 1
