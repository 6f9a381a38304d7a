"""Which files of a dataset are read, and which of them belong together.

Datasets are lists of names, as fMRIPrep writes them: no file is opened to find the runs.
"""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_brainfm.bids.description import read_description
from bids_brainfm.bids.inputs import find_datasets
from bids_brainfm.bids.inputs.filters import read_filters
from bids_brainfm.bids.inputs.fmriprep import find_runs, run_of
from bids_brainfm.bids.inputs.listing import Folder, Listing, is_regular, list_dataset, parse_file
from bids_brainfm.bids.naming import join_name, parse_name
from bids_brainfm.bids.run import BoldRun, metadata, repetition_time
from bids_brainfm.bids.tables import ica_tables
from bids_brainfm.errors import BrainfmError

SPACES = ('MNI152NLin6Asym', 'fsLR', 'MNI152NLin2009cAsym')
PEDIATRIC = 'MNIPediatricAsym_cohort-3'
STEM = 'sub-01_task-rest'
MNI = f'{STEM}_space-MNI152NLin6Asym'
IMAGE = f'{MNI}_desc-preproc_bold'

# What tells the recordings of one session apart, and names that fMRIPrep 20.2.3 put after desc
KINDS = ('', '_acq-mb', '_acq-sb', '_dir-AP', '_dir-PA', '_acq-mb_dir-AP', '_rec-x')
VERSIONS = (20.2, 21, 22, 23, 24, 25)
MODES = ('volumes', 'minimal', 'me-output-echos', 'cifti', 'part', 'sole-echo')


@pytest.fixture
def exists(monkeypatch):
    """Take all files that are listed for real ones."""
    monkeypatch.setattr(Path, 'exists', lambda self: True)


def listing(*names):
    """A dataset in which each file lies where BIDS puts it."""
    root, folders = Path('/data'), {}
    for name in names:
        levels = {key: parse_name(name)[0].get(key) for key in ('sub', 'ses')}
        levels = {key: label for key, label in levels.items() if label}
        folders.setdefault(tuple(levels.items()), []).append(name)
    top = Folder(root, ())
    return Listing(root, [
        Folder(root.joinpath(*map('-'.join, levels), 'func'), tuple(sorted(names)), (top,),
               dict(levels))
        for levels, names in folders.items()
    ])  # fmt: skip


def find(*names, spaces=SPACES, **filters):
    """Runs by name, and sentences on the others."""
    runs, without = find_runs(listing(*names), 'fmriprep', spaces, filters)
    return {run.name: run for run in runs}, without


def written(stem, version, mode, space):
    """Names that fMRIPrep writes for one recording, and those of its run (none where minimal)."""
    part = '_part-mag' if mode == 'part' else ''
    echo = '_echo-1' if mode == 'sole-echo' else ''
    # 20.2.3 put part after desc, and into the table of confounds, too; others leave it out there
    before, after = ('', part) if version == 20.2 else (part, '')
    table = f'{stem}_desc-confounds{after}_timeseries'
    native = f'{stem}{echo}{before}'
    names = []
    if version >= 23:
        names += [f'{native}_desc-{label}_boldref.{e}' for label in ('hmc', 'coreg')
                  for e in ('nii.gz', 'json')]  # fmt: skip
        names += [f'{native}_desc-brain_mask.{extension}' for extension in ('nii.gz', 'json')]
        if mode == 'minimal':
            return names, None
    names += [f'{table}.tsv', f'{table}.json', f'{stem}_desc-carpetplot_bold.svg']
    if mode == 'me-output-echos':
        names += [f'{stem}_echo-{i}_desc-preproc_bold.{e}' for i in (1, 2, 3)
                  for e in ('nii.gz', 'json')]  # fmt: skip
    for place in (space, 'T1w', 'MNI152NLin2009cAsym_res-1'):
        spaced = f'{native}_space-{place}'
        names += [f'{spaced}_desc-preproc{after}_bold.{e}' for e in ('nii.gz', 'json')]
        names += [f'{spaced}_desc-brain{after}_mask.{e}' for e in ('nii.gz', 'json')]
        names += [f'{spaced}_boldref.nii.gz']
    names += [f'{stem}_part-phase_space-{space}_bold.nii.gz'] * (mode == 'part')
    names += [f'{native}_hemi-{side}_space-fsaverage_bold.func.gii' for side in 'LR']
    grayordinates = f'{native}_space-fsLR_den-91k_bold'
    if mode == 'cifti':
        names += [f'{grayordinates}.dtseries.nii', f'{grayordinates}.json']
        names += [f'{grayordinates}.dtseries.json'] * (version < 21)
    jsons = [f'{grayordinates}.json'] + [f'{grayordinates}.dtseries.json'] * (version < 21)
    if mode == 'cifti' and not space.startswith('MNI152NLin6Asym'):
        run = [f'{grayordinates}.dtseries.nii', None, jsons]
    else:
        spaced = f'{native}_space-{space}'
        image = f'{spaced}_desc-preproc{after}_bold'
        run = [f'{image}.nii.gz', f'{spaced}_desc-brain{after}_mask.nii.gz', [f'{image}.json']]
    return names, [*run, f'{table}.tsv', f'{table}.json']


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('mode', MODES)
def test_each_run_gets_its_own_files(exists, version, mode):
    """Sessions, runs, acquisitions and directions, in all spaces, by all versions of fMRIPrep."""
    templates = [SPACES[2], f'{SPACES[2]}_res-02', f'{SPACES[0]}_res-2']
    templates += [f'{PEDIATRIC}_res-2'] * (mode != 'cifti')
    people = itertools.product(('01', '02_ses-1', '02_ses-2'), KINDS, ('', '_run-1', '_run-2'))
    stems = [f'sub-{person}_task-rest{kind}{run}' for person, kind, run in people]
    name_of = lambda path: path and path.name
    for space in templates:
        files, wanted = zip(*(written(stem, version, mode, space) for stem in stems), strict=True)
        spaces = (space.partition('_')[0],) if space.startswith(PEDIATRIC) else SPACES
        runs, without = find(*itertools.chain(*files), spaces=spaces)
        if mode == 'minimal' and version >= 23:
            assert not runs
            assert len(without) == len(stems)
            assert all('--level full' in sentence for sentence in without.values())
            continue
        assert without == {}
        found = [
            [run.bold.name, name_of(run.mask), [path.name for path in run.sidecars],
             name_of(run.confounds), name_of(run.confounds_json)]
            for run in runs.values()
        ]  # fmt: skip
        key = lambda files: files[0]
        assert sorted(found, key=key) == sorted(wanted, key=key)


LABELS = st.text('abcXYZ0123456789', min_size=1, max_size=4)
ENTITIES = st.dictionaries(
    st.sampled_from(['task', 'acq', 'ce', 'rec', 'dir', 'run']), LABELS, min_size=1
)


@given(
    st.dictionaries(st.text('abcdef', min_size=1), st.text('abcXYZ019+', min_size=1)),
    st.text('abcXYZ', min_size=1),
    st.sampled_from(['', '.nii', '.nii.gz', '.dtseries.nii', '.tsv']),
)
def test_a_name_is_put_together_again(entities, suffix, extension):
    name = join_name(entities, suffix, extension)
    assert parse_name(name) == (entities, suffix, extension)
    assert is_regular(parse_file(Path('/data'), name))


@given(st.text(st.characters(exclude_characters='/\0'), min_size=1))
def test_any_name_of_a_file_is_parsed_or_left_aside(name):
    file = parse_file(Path('/data'), name)
    folder = Folder(Path('/data'), (name,), (), {'sub': '01'})
    assert folder.files == ([file] if is_regular(file) and file.entities == {'sub': '01'} else [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ENTITIES, st.randoms(), st.booleans()), min_size=1, max_size=6))
def test_pairs_are_right_whatever_the_entities_and_their_order(recordings):
    """With and without part-mag in the images, which confounds then lack."""
    names, wanted = [], {}
    for entities, random, has_part in recordings:
        if (own := frozenset(entities.items())) in wanted:
            continue
        order = list(entities.items())
        random.shuffle(order)
        stem = {'sub': '01'} | dict(order)
        part = {'part': 'mag'} if has_part else {}
        image = stem | part | {'space': 'MNI152NLin6Asym', 'res': '2'}
        files = [
            join_name(image | {'desc': 'preproc'}, 'bold', '.nii.gz'),
            join_name(image | {'desc': 'brain'}, 'mask', '.nii.gz'),
            join_name(image | {'desc': 'preproc'}, 'bold', '.json'),
            join_name(stem | {'desc': 'confounds'}, 'timeseries', '.tsv'),
        ]
        names += files
        wanted[own] = files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, 'exists', lambda self: True)
        runs, without = find(*names)
    assert without == {}
    found = [[run.bold, run.mask, *run.sidecars, run.confounds] for run in runs.values()]
    assert sorted([p.name for p in files] for files in found) == sorted(wanted.values())


def test_copies_and_names_that_do_not_fit_are_not_read(tmp_path, caplog, monkeypatch):
    """Only sub-X/[ses-Y/]func is read, and names must agree with it; what is left out is named."""
    monkeypatch.setattr('bids_brainfm.bids.inputs.listing.LOGGER.propagate', True)
    name = f'{IMAGE}.nii.gz'
    for place in ('backup/sub-01/func', 'sub-01/backup', 'sub-01/func', 'sub-01/func/old',
                  'sourcedata/sub-01/func', 'sub-02/func', 'sub-03/ses-1/func'):  # fmt: skip
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / name).touch()
    func = tmp_path / 'sub-01' / 'func'
    for stray in (f's6{name}', 'desc-optcom_bold.nii.gz', name.replace('_task', '_ses-1_task'),
                  name.replace('rest', 'rest_task-x'), '._' + name):  # fmt: skip
        (func / stray).touch()
    os.close(os.open(os.fsencode(func) + b'/sub-01_task-\xff_bold.nii.gz', os.O_CREAT))
    for empty in ('sub-04', 'sub-05/anat', 'sub-03/ses-2/anat'):
        (tmp_path / empty).mkdir(parents=True)
    (tmp_path / 'sub-06').symlink_to('not-here')
    (tmp_path / 'sub-01.html').touch()
    found = list_dataset(tmp_path)
    assert [run.bold for run in find_runs(found, 'x', SPACES, {})[0]] == [func / name]
    messages = {record.getMessage() for record in caplog.records}
    (empty,) = (text for text in messages if text.startswith('There are no functional files'))
    (strays,) = (text for text in messages if text.startswith('Not read'))
    assert 'files of sub-03_ses-2, sub-04, sub-05, sub-06 in' in empty
    assert 'and 2 more' in strays
    names = [path.name for folder in found.folders for path in folder.strays]
    assert len(names) == 7
    assert not any(each.startswith('._') for each in names)


def test_a_recording_whose_image_is_missing_is_named(exists):
    table = '{}_desc-confounds_timeseries.tsv'.format
    runs, without = find(f'{IMAGE}.nii.gz', table(STEM), table('sub-02_ses-1_task-rest'))
    assert list(runs) == [STEM]
    assert list(without) == ['sub-02_ses-1_task-rest']
    assert 'no preprocessed BOLD image, but sub-02_ses-1_task-rest' in str(without)
    assert list(find(f'{IMAGE}.nii.gz', 'sub-01_task-n_desc-brain_mask.nii.gz')[1]) == [
        'sub-01_task-n'
    ]
    names = (f'{IMAGE}.nii.gz', table('sub-01_task-nback'))
    assert find(*names, task=['rest'], space='MNI152NLin6Asym')[1] == {}


@pytest.mark.parametrize(
    ('names', 'read', 'note'),
    [
        ([f'{IMAGE}.nii.gz', f'{IMAGE}.nii'], f'{IMAGE}.nii.gz', f'and not {IMAGE}.nii.'),
        ([f'{MNI}_res-{r}_desc-preproc_bold.nii' for r in (1, 2)],
         f'{MNI}_res-2_desc-preproc_bold.nii', 'and not sub-01_task-rest_space-MNI152NLin6Asym_r'),
        ([f'{IMAGE}.nii', f'{MNI}_desc-preproc_part-mag_bold.nii'], None, 'choose with'),
        ([f'{STEM}_space-MNI152NLin6Asym_cohort-{n}_desc-preproc_bold.nii' for n in (1, 2)],
         None, r'cohort-1.* and .*cohort-2'),
    ],
)  # fmt: skip
def test_candidates_of_a_run_are_named(exists, names, read, note):
    """A rule decides (2 mm, compressed), or the run is refused."""
    import re

    runs, without = find(*names)
    if read is None:
        assert not runs
        assert re.search(note, without[STEM])
    else:
        (run,) = runs.values()
        assert run.bold.name == read
        assert note in run.notes[0]


def test_the_companion_that_shares_more_entities_is_taken(exists):
    """Of a mask with part-mag, as in the image, and one without; the report names both."""
    part = MNI.replace('_space', '_part-mag_space')
    masks = [f'{MNI}_desc-brain_mask.nii.gz', f'{part}_desc-brain_mask.nii']
    runs, _ = find(f'{part}_desc-preproc_bold.nii.gz', *masks)
    (run,) = runs.values()
    assert run.mask.name == masks[1]
    assert run.notes == (f'{masks[1]} was read, and not {masks[0]}.',)


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        ([f'{STEM}_space-fsLR_den-91k_desc-denoisedSmoothed_bold.dtseries.nii',
          f'{STEM}_space-fsLR_den-91k_desc-denoised_bold.dtseries.nii'],
         'found: fsLR desc-denoised, fsLR desc-denoisedSmoothed); only'),
        ([f'{MNI}_desc-denoised_bold.nii.gz'], 'found: MNI152NLin6Asym desc-denoised); only'),
        ([f'{MNI}_bold.nii.gz'], 'found: MNI152NLin6Asym without desc); only'),
        ([f'{STEM}_space-fsLR_den-170k_bold.dtseries.nii'], 'found: fsLR den-170k); run'),
        ([f'{STEM}_echo-{n}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz' for n in (1, 2)],
         'combines the echoes (found: MNI152NLin6Asym echo-1, MNI152NLin6Asym echo-2)'),
        ([f'{STEM}_part-phase_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz'],
         'found: MNI152NLin6Asym part-phase'),
        ([f'{IMAGE}.nii.bz2'], 'found: MNI152NLin6Asym .nii.bz2'),
        ([f'{STEM}_bold_space-MNI152NLin6Asym_preproc.nii.gz'], 'name of fMRIPrep 1.0 or 1.1'),
        ([f'{STEM}_desc-hmc_boldref.nii.gz'], '--level full'),
    ],
)  # fmt: skip
def test_why_a_recording_is_not_read(exists, names, said):
    """The sentence tells what is there, and never that the space that is there is missing."""
    runs, without = find(*names)
    assert not runs
    (sentence,) = without.values()
    assert said in sentence


@pytest.mark.parametrize('label', ['', '²', 'a b', '<i>'])
def test_labels_that_bids_forbids_fail_alone(exists, label):
    """Also where labels are compared as numbers."""
    odd = IMAGE.replace('_space', f'_run-{label}_space')
    for asked in ({}, {'run': ['²', 1, label]}):
        runs, without = find(f'{odd}.nii.gz', f'{IMAGE}.nii.gz', **asked)
        assert list(runs) == ([] if asked else [STEM])
        assert 'other characters than letters and digits' in str(without)


def test_sidecars_are_inherited(tmp_path):
    """From the root to the file; null sets nothing; a byte-order mark does no harm."""
    func = tmp_path / 'sub-01' / 'func'
    func.mkdir(parents=True)
    (func / f'{IMAGE}.nii.gz').touch()
    for path, content in {
        'bold.json': {'Manufacturer': 'root', 'StartTime': 0},
        'task-rest_bold.json': {'RepetitionTime': 2, 'StartTime': 1},
        'task-nback_bold.json': {'RepetitionTime': 9},
        'sub-01/sub-01_task-rest_bold.json': {'RepetitionTime': 0.8},
        'sub-01/sub-01_acq-x_bold.json': {'RepetitionTime': 9},
        f'sub-01/func/{IMAGE}.json': {'RepetitionTime': None, 'StartTime': 0.4},
        'sub-01/func/task-other_bold.json': {'RepetitionTime': 9},
        f'sub-01/func/{STEM}_desc-preproc_bold.json': {'StartTime': 9},
    }.items():
        (tmp_path / path).write_text('\ufeff' + json.dumps(content), encoding='utf-8')
    (run,), _ = find_runs(list_dataset(tmp_path), 'x', SPACES, {})
    assert [path.name for path in run.sidecars] == [
        'task-rest_bold.json', 'sub-01_task-rest_bold.json', f'{IMAGE}.json'
    ]  # fmt: skip
    assert metadata(run) == {'RepetitionTime': 0.8, 'StartTime': 0.4}
    assert run_of(run.bold).sidecars == run.sidecars
    (func / f'{IMAGE}.json').unlink()
    (func / 'task-rest_bold.json').write_text('{"RepetitionTime": 0.7}')
    (func / f'{STEM}_desc-preproc_bold.json').unlink()
    (within,), _ = find_runs(list_dataset(tmp_path), 'x', SPACES, {})
    assert metadata(within)['RepetitionTime'] == 0.7
    for name in ('my.run_2.nii.gz', 'other.nii.gz'):
        (tmp_path / name).touch()
    (tmp_path / 'my.json').write_text('{}')
    assert run_of(tmp_path / 'my.run_2.nii.gz').sidecars == (tmp_path / 'my.json',)
    assert run_of(tmp_path / 'other.nii.gz').sidecars == ()


def run_with(tmp_path, content, extension='.nii.gz'):
    path = tmp_path / 'x_bold.json'
    path.write_text(content)
    entities = {'sub': '01', 'task': 'rest', 'space': 'X'}
    return BoldRun(
        STEM, entities, 'x', tmp_path, tmp_path / f'x_bold{extension}', sidecars=(path,)
    )


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ('{"RepetitionTime": Infinity}', 'x_bold.json has RepetitionTime inf: write'),
        ('{"RepetitionTime": NaN}', 'has RepetitionTime nan: write'),
        ('{"RepetitionTime": 1e300}', r'has RepetitionTime 1e\+300: write'),
        ('{"RepetitionTime": 1' + '0' * 400 + '}', 'has RepetitionTime 1000.*: write'),
        ('{"RepetitionTime": [2]}', r'has RepetitionTime \[2\]: write'),
        ('{"RepetitionTime": 2000}', r'milliseconds: write it in seconds \(2\)'),
        ('[' * 100_000, 'not a readable JSON file .*nests'),
        ('[]', 'not a readable JSON file .it holds no JSON object but a list'),
        ('{}', r'x_bold.json has no RepetitionTime \(the header .* 0.8 s\): .* task-rest_bold'),
    ],
)  # fmt: skip
def test_repetition_times_that_cannot_be(tmp_path, content, said):
    with pytest.raises(BrainfmError, match=said):
        repetition_time(run_with(tmp_path, content), 0.8)


def test_the_header_of_grayordinates_gives_the_repetition_time(tmp_path):
    assert repetition_time(run_with(tmp_path, '{}', '.dtseries.nii'), 0.8) == 0.8
    with pytest.raises(BrainfmError, match='no RepetitionTime: write'):
        repetition_time(run_with(tmp_path, '{}', '.dtseries.nii'))


def test_a_sidecar_that_is_a_folder(tmp_path):
    run = run_with(tmp_path, '{}')
    run.sidecars[0].unlink()
    run.sidecars[0].mkdir()
    with pytest.raises(BrainfmError, match=r'x_bold.json is not a readable JSON file .*directory'):
        metadata(run)


def test_components_without_the_part_of_the_confounds(tmp_path):
    for name in ('desc-confounds_part-mag_timeseries.tsv', 'desc-ICA_mixing.tsv',
                 'desc-tedana_metrics.tsv', 'run-1_desc-ICA_mixing.tsv'):  # fmt: skip
        (tmp_path / f'{STEM}_{name}').touch()
    table = tmp_path / f'{STEM}_desc-confounds_part-mag_timeseries.tsv'
    names = [path.name for path in ica_tables(table, 'tedana')]
    assert names == [f'{STEM}_desc-ICA_mixing.tsv', f'{STEM}_desc-tedana_metrics.tsv']
    table = tmp_path / f'{STEM}_desc-confounds_timeseries.tsv'
    (tmp_path / f'{STEM}_desc-ICA_mixing.tsv').rename(
        tmp_path / f'{STEM}_part-mag_desc-ICA_mixing.tsv'
    )
    assert ica_tables(table, 'tedana')[0].name == f'{STEM}_part-mag_desc-ICA_mixing.tsv'


def test_datasets_are_found_or_what_is_there_is_listed(tmp_path):
    """Derivatives that do not say that they are; a folder with the version in its name."""
    describe = lambda folder: (folder / 'dataset_description.json').write_text('\ufeff{}', 'utf-8')
    with pytest.raises(BrainfmError, match=r'the one with dataset_description.json in it\.'):
        read_description(tmp_path)
    func = tmp_path / 'derivatives' / 'fmriprep-24.1' / 'sub-01' / 'func'
    func.mkdir(parents=True)
    describe(func.parents[1])
    with pytest.raises(BrainfmError, match=r'there is one in fmriprep-24.1'):
        read_description(tmp_path / 'derivatives')
    describe(tmp_path)
    (tmp_path / 'derivatives' / 'aroma').mkdir()  # comes first
    listed = r'with aroma, fmriprep-24.1 in its derivatives.*fmriprep=/.*/fmriprep-24.1\.$'
    with pytest.raises(BrainfmError, match=listed):
        find_datasets(tmp_path, {})
    (func / f'{STEM}_bold.nii.gz').touch()  # as in raw data
    with pytest.raises(BrainfmError, match='raw BIDS dataset'):
        find_datasets(func.parents[1], {})
    (func / f'{IMAGE}.nii.gz').touch()
    assert find_datasets(func.parents[1], {}) == {'preprocessed': func.parents[1]}


def test_filter_files(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr('bids_brainfm.bids.inputs.filters.LOGGER.propagate', True)
    path = tmp_path / 'filter.json'
    path.write_text('\ufeff{"t1w": {}}', encoding='utf-8')
    assert read_filters(path) == {}
    assert 'no entry "bold"' in caplog.text
    for wrong in ('{"bold": 3}', '[]', '{"bold": {'):
        path.write_text(wrong)
        with pytest.raises(BrainfmError, match=r'filter.json is not JSON of the form'):
            read_filters(path)
