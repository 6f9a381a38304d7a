"""Reading fMRIPrep's layout and writing ours."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bids_brainfm.bids.dataset import check_participants, iterate_records
from bids_brainfm.bids.files import atomic, read_matrix, write_matrix
from bids_brainfm.bids.inputs import find_datasets
from bids_brainfm.bids.inputs.fmriprep import find_runs
from bids_brainfm.bids.inputs.listing import list_dataset
from bids_brainfm.bids.naming import parse_name
from bids_brainfm.bids.run import BoldRun, start_time
from bids_brainfm.bids.settings import claim_settings
from bids_brainfm.errors import BrainfmError

SPACES = ('MNI152NLin6Asym', 'fsLR', 'MNI152NLin2009cAsym')


def make_tree(root: Path, *names: str) -> Path:
    """An fMRIPrep-like tree of empty files."""
    (root).mkdir(parents=True, exist_ok=True)
    description = {'Name': 'x', 'BIDSVersion': '1.4.0', 'DatasetType': 'derivative'}
    (root / 'dataset_description.json').write_text(json.dumps(description))
    for name in names:
        entities = parse_name(name)[0]
        folder = root / f'sub-{entities["sub"]}'
        folder = folder / f'ses-{entities["ses"]}' if 'ses' in entities else folder
        (folder / 'func').mkdir(parents=True, exist_ok=True)
        (folder / 'func' / name).touch()
    return root


def found(root, spaces=SPACES, **filters):
    runs, without = find_runs(list_dataset(root), 'fmriprep', spaces, filters)
    return [run.bold.name for run in runs], without


BOLD = 'desc-preproc_bold.nii.gz'


def test_best_space_and_resolution_win(tmp_path):
    """The first space of the list, then 2 mm however it is written, then native."""
    root = make_tree(
        tmp_path / 'd',
        f'sub-01_task-rest_space-MNI152NLin2009cAsym_{BOLD}',
        f'sub-01_task-rest_space-MNI152NLin6Asym_{BOLD}',
        f'sub-01_task-rest_space-MNI152NLin6Asym_res-02_{BOLD}',
        f'sub-01_task-rest_space-MNI152NLin6Asym_res-1_{BOLD}',
        f'sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_{BOLD}',
        'sub-02_task-rest_space-fsLR_den-91k_bold.dtseries.nii',
        f'sub-03_task-rest_space-MNI152NLin2009cAsym_{BOLD}',
        'sub-03_task-rest_space-fsLR_den-170k_bold.dtseries.nii',
    )
    names, without = found(root)
    assert names == [
        f'sub-01_task-rest_space-MNI152NLin6Asym_res-02_{BOLD}',
        'sub-02_task-rest_space-fsLR_den-91k_bold.dtseries.nii',
        f'sub-03_task-rest_space-MNI152NLin2009cAsym_{BOLD}',
    ]
    assert without == {}


def test_sessions_runs_echoes_and_parts(tmp_path):
    """Each recording once; single echoes, phase images and surfaces are not recordings."""
    mni = f'space-MNI152NLin6Asym_res-2_{BOLD}'
    root = make_tree(
        tmp_path / 'd',
        f'sub-01_ses-a_task-rest_run-01_{mni}',
        f'sub-01_ses-a_task-rest_run-02_{mni}',
        f'sub-01_ses-b_task-nback_{mni}',
        f'sub-01_ses-b_task-nback_echo-1_{mni}',
        f'sub-01_ses-b_task-rest_part-mag_{mni}',
        f'sub-01_ses-b_task-rest_part-phase_{mni}',
        'sub-01_ses-b_task-nback_hemi-L_space-fsaverage_bold.func.gii',
        'sub-01_ses-b_task-nback_space-MNI152NLin6Asym_res-2_boldref.nii.gz',
    )
    names, _ = found(root)
    assert len(names) == 4
    assert not any('echo' in n or 'phase' in n for n in names)
    assert found(root, run=['1'])[0] == [f'sub-01_ses-a_task-rest_run-01_{mni}']
    assert found(root, session=['b'], task='nback')[0] == [f'sub-01_ses-b_task-nback_{mni}']
    assert len(found(root, run=None)[0]) == 2
    assert len(found(root, run='*')[0]) == 2


def test_run_without_an_accepted_space_is_named(tmp_path):
    root = make_tree(
        tmp_path / 'd',
        f'sub-01_task-rest_space-T1w_{BOLD}',
        f'sub-01_task-rest_{BOLD}',
    )
    names, without = found(root)
    assert names == []
    (sentence,) = without.values()
    assert 'found: T1w, native' in sentence
    assert '--output-spaces MNI152NLin6Asym:res-2' in sentence


def test_link_without_its_file_is_named(tmp_path):
    """A DataLad dataset holds links to files that may not have been fetched."""
    name = f'sub-01_task-rest_space-MNI152NLin6Asym_{BOLD}'
    root = make_tree(tmp_path / 'd', name)
    path = root / 'sub-01' / 'func' / name
    path.unlink()
    path.symlink_to('../../.git/annex/not-here')
    names, without = found(root)
    assert names == []
    assert 'datalad get' in without['sub-01_task-rest']


def test_companions_belong_to_the_run(tmp_path):
    stem = 'sub-01_task-rest_run-01'
    root = make_tree(
        tmp_path / 'd',
        f'{stem}_space-MNI152NLin6Asym_res-2_{BOLD}',
        f'{stem}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.json',
        f'{stem}_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz',
        f'{stem}_desc-confounds_regressors.tsv',
        'sub-01_task-rest_run-02_desc-confounds_timeseries.tsv',
    )
    (run,), _ = find_runs(list_dataset(root), 'fmriprep', SPACES, {})
    assert run.name == stem
    assert run.mask.name == f'{stem}_space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz'
    assert run.confounds.name == f'{stem}_desc-confounds_regressors.tsv'
    assert run.confounds_json is None
    assert run.uri(run.bold).startswith('bids:fmriprep:sub-01/func/')


def test_start_time_is_that_of_the_sidecar(tmp_path):
    """BIDS allows times before the first sample; unknown is None; other values are refused."""
    sidecar = tmp_path / 'sub-01_task-rest_bold.json'
    entities = {'sub': '01', 'task': 'rest', 'space': 'X'}
    run = BoldRun('sub-01_task-rest', entities, 'x', tmp_path, tmp_path / 'b', sidecars=(sidecar,))
    for written, expected in ((0.3675, 0.3675), (0, 0.0), (-1.5, -1.5), (None, None)):
        sidecar.write_text(json.dumps({'StartTime': written}))
        assert start_time(run) == expected
    sidecar.write_text('{"RepetitionTime": 2}')
    assert start_time(run) is None
    for nonsense in ('0.3675', 'first', True, [0], float('nan'), float('inf')):
        sidecar.write_text(json.dumps({'StartTime': nonsense}))
        with pytest.raises(
            BrainfmError, match=r'sub-01_task-rest_bold\.json has StartTime .*seconds'
        ):
            start_time(run)


def test_only_the_participants_that_are_asked_for_are_listed(tmp_path):
    mni = f'space-MNI152NLin6Asym_{BOLD}'
    root = make_tree(
        tmp_path / 'd',
        f'sub-01_task-rest_{mni}',
        f'sub-011_task-rest_{mni}',
        f'sub-02_task-a_{mni}',
    )
    runs, _ = find_runs(list_dataset(root, ('01',)), 'x', SPACES, {})
    assert [run.name for run in runs] == ['sub-01_task-rest']
    with pytest.raises(BrainfmError, match=r'no participant 03 .* 01, 011, 02'):
        check_participants({'a': root}, ('03', '01'))
    other = make_tree(tmp_path / 'e', f'sub-03_task-rest_{mni}')
    check_participants({'a': root, 'b': other}, ('03', '01'))
    for i in range(20):
        (root / f'sub-x{i:02}').mkdir()
    with pytest.raises(BrainfmError, match=r'has 01, 011, 02, x00, x01 and 18 more\.$'):
        check_participants({'a': root}, ('03',))


def test_filters_of_fmriprep(tmp_path):
    """Its filter files name datatype and suffix too; a slip is named, not taken for no match."""
    mni = f'space-MNI152NLin6Asym_{BOLD}'
    root = make_tree(tmp_path / 'd', f'sub-01_ses-A_task-rest_acq-mb_{mni}')
    listing = list_dataset(root)
    filters = {'datatype': 'func', 'suffix': 'bold', 'session': 'A', 'acquisition': ['mb', None]}
    runs, _ = find_runs(listing, 'x', SPACES, filters | {'reconstruction': None})
    assert len(runs) == 1
    with pytest.raises(BrainfmError, match='sesion'):
        find_runs(listing, 'x', SPACES, {'sesion': 'A'})


def test_raw_dataset_with_derivatives_inside(tmp_path):
    raw = tmp_path / 'raw'
    raw.mkdir()
    (raw / 'dataset_description.json').write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    with pytest.raises(BrainfmError, match='run fMRIPrep first'):
        find_datasets(raw, {})
    nested = make_tree(raw / 'derivatives' / 'fmriprep', f'sub-01_task-rest_{BOLD}')
    assert find_datasets(raw, {}) == {'fmriprep': nested}
    assert find_datasets(raw, {'prep': str(nested)}) == {'prep': nested}


def test_nothing_half_written(tmp_path):
    """A writer that fails leaves neither its file nor a temporary one."""
    path = tmp_path / 'table.tsv'

    def fail():
        with atomic(path) as temporary:
            temporary.write_text('half')
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_matrix_reads_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((7, 5)) * 1e4).astype(np.float32)
    matrix[2, 3] = np.nan
    path = write_matrix(tmp_path / 'm.tsv', matrix, list('abcde'))
    assert path.read_text().splitlines()[3].split('\t')[3] == 'n/a'
    values, header = read_matrix(path)
    np.testing.assert_array_equal(values, matrix)
    assert header == list('abcde')


def test_settings_are_claimed_once(tmp_path):
    """Of many processes one writes the record; others must agree, once there are outputs."""
    claim = lambda value: claim_settings(
        tmp_path, 'desc-x', {'a': value}, iterate_records(tmp_path, 'x')
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: claim(1), range(32)))
    files = [path.name for path in (tmp_path / 'logs' / 'settings').iterdir()]
    assert files == ['desc-x.json']
    claim(2)  # nothing was written with the first settings
    make_tree(tmp_path, 'sub-01_task-rest_x.tsv')
    with pytest.raises(BrainfmError, match='a was 2 and is now 3'):
        claim(3)
    claim(2)
