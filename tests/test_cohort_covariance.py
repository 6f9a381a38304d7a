"""The covariance of a cohort: fitted by the group level, and the baseline that it gives."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.covariance import CohortCorrelation, atlas_of, choose, load
from bids_brainfm.signals.covariance import moments, shrunk, standardised
from bids_brainfm.signals.series import read_series


def group(out, *options):
    from bids_brainfm.cli.run import main

    return main([str(out), str(out), 'group', *map(str, options)])


@pytest.fixture(scope='module')
def cohort(simulated, tmp_path_factory):
    """Parcel series of two participants, and the file of their covariance."""
    from bids_brainfm.cli.run import main

    out = tmp_path_factory.mktemp('cohort') / 'out'
    work = ['-w', str(out.with_name('work'))]
    options = ['--model', 'brainlm-demo', '--stop-after', 'timeseries', *work]
    assert main([str(simulated), str(out), 'participant', *options]) == 0
    assert group(out, '--covariance') == 0
    (path,) = (out / 'group' / 'covariance').glob('*.h5')
    return out, path


def test_everybody_is_left_out_of_their_own_covariance(cohort):
    out, path = cohort
    about = json.loads(path.with_suffix('.json').read_text())
    assert about['Version'] in path.name
    assert about['NumberOfParticipants'] == about['NumberOfFolds'] == 2
    table = pd.read_csv(path.with_suffix('.tsv'), sep='\t')
    assert table['participant_id'].tolist() == ['sub-01', 'sub-02']
    assert table['fold'].tolist() == [0, 1]
    series = [read_series(p) for p in sorted(out.rglob('*_stat-mean_timeseries.tsv'))]
    assert table['volumes'].tolist() == [int((~s.flagged).sum()) for s in series]
    sums = [moments(standardised(s.data, ~s.flagged)) for s in series]
    for person, others in (('01', sums[1]), ('02', sums[0]), ('03', sums[0] + sums[1])):
        found = load(path, person, 424)
        expected = shrunk(others)
        sd = np.sqrt(np.diag(expected))
        np.testing.assert_allclose(found.values, expected / np.outer(sd, sd), atol=1e-5)
        assert found.left_out == (person != '03')
        assert found.participants + found.left_out == 2
    assert isinstance(found, CohortCorrelation)


@pytest.mark.slow
def test_a_reconstruction_is_compared_with_other_people(simulated, cohort, tmp_path, app, capfd):
    out, path = tmp_path / 'out', cohort[1]
    options = ('--outputs', 'reconstruction', '--participant-label', '01')
    assert app(simulated, out, *options, '--covariance', path) == 0
    (sidecar,) = out.rglob('*_stat-r2_desc-brainlmdemo_boldmap.json')
    about = json.loads(sidecar.read_text())
    assert about['Covariance']['Source'] == path.name
    assert about['Covariance']['NumberOfParticipants'] == 1
    assert about['Covariance']['NumberOfParticipantsLeftOut'] == 1
    pooled = {name: scores['R2'] for name, scores in about['Pooled'].items()}
    assert np.isfinite(pooled['covariance'])
    assert path.stem in (out / 'logs' / 'CITATION.md').read_text()
    assert app(simulated, out, *options) == 2  # the baseline of the run would be another one
    assert 'covariance was' in capfd.readouterr().err


def test_files_that_do_not_fit(cohort, simulated, tmp_path, app, capfd):
    path, other = cohort[1], tmp_path / 'other.h5'
    other.write_text('x')
    with pytest.raises(BrainfmError, match=r'other\.h5 is not a file that'):
        atlas_of(other)
    with pytest.raises(BrainfmError, match='None of the files of --covariance are of the atlas A'):
        choose((path,), 'A')
    with pytest.raises(BrainfmError, match='2 of the files'):
        choose((path, path), 'Demo424')
    assert choose((), 'A') is None
    with pytest.raises(BrainfmError, match='has 424 parcels, and the atlas 450'):
        load(path, '01', 450)
    with h5py.File(path) as file:
        assert len(file['participants']) == 2
    out = tmp_path / 'out'
    assert app(simulated, out, '--stop-after', 'timeseries', '--participant-label', '01') == 0
    assert group(out, '--covariance') == 2
    assert 'of one participant only' in capfd.readouterr().err
