"""Quality metrics of a run, and runs that are excluded for their flagged volumes."""

import json

import numpy as np
import pandas as pd
import pytest

from bids_brainfm.outputs.quality import COLUMNS

STEM = 'sub-01/func/sub-01_task-rest_space-MNI152NLin2009cAsym_atlas-Demo424'


def read(out, name):
    return pd.read_csv(out / f'{STEM}_{name}.tsv', sep='\t', na_values='n/a')


def describe(out, name):
    return json.loads((out / f'{STEM}_{name}.json').read_text())


@pytest.fixture(scope='module')
def excluded(simulated, tmp_path_factory):
    """Outputs of a participant of whose 210 volumes 4 are flagged, with a limit of 1 %."""
    from bids_brainfm.cli.run import main

    folder = tmp_path_factory.mktemp('quality')
    out, work = folder / 'out', folder / 'work'
    arguments = [simulated, out, 'participant', '-w', work, '--nprocs', '1']
    arguments += ['--participant-label', '01', '--model', 'brainlm-demo', '--max-flagged', '0.01']
    assert main([*map(str, arguments), '--outputs', 'networks']) == 0
    return out


def test_quality_is_one_row_of_the_known_columns(excluded, simulated):
    table = read(excluded, 'desc-quality_bold')
    assert list(table) == list(COLUMNS)
    (row,) = table.to_dict('records')
    confounds = pd.read_csv(
        simulated / 'sub-01/func/sub-01_task-rest_desc-confounds_timeseries.tsv',
        sep='\t', na_values='n/a',
    )  # fmt: skip
    fd = confounds['framewise_displacement']
    assert row['mean_fd'] == pytest.approx(fd.mean())
    assert row['median_fd'] == pytest.approx(fd.median())
    assert row['max_fd'] == pytest.approx(fd.max())
    assert row['mean_std_dvars'] == pytest.approx(confounds['std_dvars'].mean())
    flagged = (fd > 0.5) | (confounds['std_dvars'] > 1.5)
    assert (row['num_volumes'], row['num_censored_volumes']) == (210, flagged.sum())
    assert row['minutes_retained'] == pytest.approx((210 - flagged.sum()) * 0.735 / 60)
    assert row['degrees_of_freedom'] == 210 - flagged.sum() - row['num_regressors'] - 1
    for name in ('stat-pearsoncorrelation_relmat', 'desc-connectome_embedding'):
        sidecar = describe(excluded, name)
        assert sidecar['NumberOfSamples'] == 210 - flagged.sum()
        assert sidecar['DegreesOfFreedom'] == row['degrees_of_freedom']
    assert 30 < row['median_tsnr'] < 300
    assert 0.1 < row['order_r'] < 1
    assert row['min_coverage'] == 1


def test_the_sidecar_of_the_series_holds_the_same_metrics(excluded):
    (row,) = read(excluded, 'desc-quality_bold').to_dict('records')
    stored = describe(excluded, 'stat-mean_timeseries')['Quality']
    assert {k: pytest.approx(v) for k, v in stored.items() if v is not None} == {
        k: v for k, v in row.items() if not np.isnan(v)
    }
    relmat = describe(excluded, 'stat-pearsoncorrelation_relmat')
    assert relmat['DegreesOfFreedom'] == row['degrees_of_freedom']
    assert relmat['NumberOfSamples'] == row['num_volumes'] - row['num_censored_volumes']
    described = describe(excluded, 'desc-quality_bold')
    assert all(described[name]['Description'] for name in COLUMNS)


@pytest.mark.slow
def test_an_excluded_run_stays_in_the_tables_and_is_marked(excluded):
    for name in ('desc-brainlmdemo_embedding', 'desc-connectome_embedding'):
        table = read(excluded, name)
        assert table['excluded'].tolist() == [1]
        assert table.filter(like='dim').notna().any(axis=None)
    series = describe(excluded, 'stat-mean_timeseries')
    for path in excluded.glob('sub-01/func/*.json'):  # of series and models alike
        assert json.loads(path.read_text())['Excluded'] is True, path.name
    (warning,) = [w for w in series['Warnings'] if '--max-flagged' in w]
    assert warning.startswith('2% of the volumes are flagged, more than --max-flagged 0.01')
    report = (excluded / 'sub-01.html').read_text()
    assert '<td>written, excluded</td>' in report
    assert report.count('--max-flagged 0.01 allows') == 1


def test_an_excluded_run_adds_to_no_summary(excluded):
    """Its attention map is empty, and there are no networks of it."""
    attention = read(excluded, 'stat-attention_desc-brainlmdemo_boldmap')
    assert attention['attention'].isna().all()
    assert not list(excluded.glob('sub-01/func/*stat-network*'))


def test_the_group_level_leaves_out_excluded_runs_by_name(excluded, tmp_path, monkeypatch, capfd):
    from bids_brainfm.cli.run import main

    monkeypatch.chdir(tmp_path)
    assert main([str(excluded), str(excluded), 'group', '--scale-stats']) == 2
    error = capfd.readouterr().err
    assert 'left out, since more of its volumes are flagged than --max-flagged allows' in error
