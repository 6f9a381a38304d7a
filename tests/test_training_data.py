"""What a network is trained with: cohorts and their splits, series on disk, and recipes."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.errors import BrainfmError
from bids_brainfm.models.cards import load_card
from bids_brainfm.models.weights import build
from bids_brainfm.training.cohort import (
    CohortRun,
    Targets,
    find_cohort,
    read_targets,
)
from bids_brainfm.training.recipe import load_recipe
from bids_brainfm.training.session import training_precision
from bids_brainfm.training.settings import TrainingSettings
from bids_brainfm.training.split import count_parts, read_groups, split
from bids_brainfm.training.store import (
    INDEX,
    Store,
    StoredRun,
    WindowStream,
    collect,
    sample_seed,
    windows_in,
    write_store,
)
from bids_brainfm.validation import card_names

SPACE = 'space-MNI152NLin6Asym'


def write_run(folder, recording, atlas='A424', tr=0.735, space=SPACE, session=''):
    """A run as far as a cohort is concerned: its name, and its repetition time."""
    person = recording.split('_')[0]
    func = folder / person / session / 'func'
    func.mkdir(parents=True, exist_ok=True)
    path = func / f'{recording}_{space}_atlas-{atlas}_stat-mean_timeseries.tsv'
    path.write_text('a\n1\n')
    write_sidecar(path, {'RepetitionTime': tr, 'ResultsVersion': 2})
    return path


def write_people(folder, rows, column='age'):
    """``participants.tsv`` and a description; rows are (label, text)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'dataset_description.json').write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    lines = [f'participant_id\t{column}', *(f'sub-{label}\t{text}' for label, text in rows)]
    (folder / 'participants.tsv').write_text('\n'.join(lines) + '\n')
    return [CohortRun(folder / f'sub-{label}_x', folder, label, 2.0) for label, _ in rows]


# --- runs ------------------------------------------------------------------------------------


def test_runs_of_several_datasets(tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    first = write_run(one, 'sub-01_ses-a_task-rest', session='ses-a')
    second = write_run(one, 'sub-01_ses-b_task-rest_run-2', session='ses-b')
    third = write_run(two, 'sub-x9_task-rest', tr=0.7351)
    write_run(two, 'sub-x9_task-rest', atlas='Schaefer2018')  # another model's, beside it
    (two / 'sub-x9' / 'func' / 'sub-x9_task-rest_atlas-A424_stat-coverage_bold.tsv').write_text('')
    runs = find_cohort([two, one], 'A424')
    assert [run.path for run in runs] == [third, first, second]
    assert [run.participant for run in runs] == ['x9', '01', '01']
    assert [run.dataset for run in runs] == [two, one, one]
    assert [run.tr for run in runs] == [0.7351, 0.735, 0.735]
    assert runs[1].name == f'sub-01_ses-a_task-rest_{SPACE}_atlas-A424'


def test_atlases_are_not_mixed(tmp_path):
    write_run(tmp_path, 'sub-01_task-rest')
    write_run(tmp_path, 'sub-02_task-rest', atlas='Schaefer2018')
    said = 'sub-02_task-rest has parcel series of Schaefer2018, but the model takes A424'
    with pytest.raises(BrainfmError, match=said):
        find_cohort([tmp_path], 'A424')
    with pytest.raises(BrainfmError, match='sub-01_task-rest has parcel series of A424, but'):
        find_cohort([tmp_path], 'Schaefer2018')


def test_repetition_times_are_mixed_only_when_asked_to(tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    write_run(one, 'sub-01_task-rest', tr=0.72)
    write_run(one, 'sub-02_task-rest', tr=2.0)
    write_run(two, 'sub-03_task-rest', tr=0.735)
    write_run(tmp_path / 'near', 'sub-04_task-rest', tr=0.72)
    said = r'from 0.72 s \(sub-01.*\) to 2 s \(sub-02.*--mix-trs'
    with pytest.raises(BrainfmError, match=said):
        find_cohort([one, two], 'A424')
    assert len(find_cohort([one, two], 'A424', mix_trs=True)) == 3
    assert len(find_cohort([two], 'A424')) == 1
    with pytest.raises(BrainfmError, match=r'from 0\.72 s .* to 0\.735 s'):
        find_cohort([tmp_path / 'near', two], 'A424')


@pytest.mark.parametrize(
    'places',
    [
        (SPACE, 'space-MNI152NLin2009cAsym'),
        (f'{SPACE}_res-1', f'{SPACE}_res-2'),
        (SPACE, 'space-fsLR_den-91k'),
    ],
)
def test_a_recording_counts_once(places, tmp_path):
    for place in places:
        write_run(tmp_path, 'sub-01_task-rest', space=place)
    with pytest.raises(BrainfmError, match=r'sub-01_task-rest has .* A424 in 2 spaces'):
        find_cohort([tmp_path], 'A424')


def test_runs_of_one_participant_are_told_apart(tmp_path):
    for run in (1, 2):
        for task in ('rest', 'movie'):
            write_run(tmp_path, f'sub-01_task-{task}_run-{run}')
    assert len(find_cohort([tmp_path], 'A424')) == 4


def test_what_is_no_output_of_ours(tmp_path):
    fmriprep = tmp_path / 'fmriprep' / 'sub-01' / 'func'
    fmriprep.mkdir(parents=True)
    (fmriprep / 'sub-01_task-rest_desc-confounds_timeseries.tsv').write_text('a\n1\n')
    write_run(tmp_path / 'ours', 'sub-01_task-rest')
    for datasets in (['fmriprep'], ['absent'], ['ours', 'fmriprep']):
        with pytest.raises(BrainfmError, match=f'{datasets[-1]} holds no parcel series'):
            find_cohort([tmp_path / name for name in datasets], 'A424')


@pytest.mark.parametrize('content', [None, '{', '[]'])
def test_a_run_without_its_sidecar(content, tmp_path):
    sidecar = write_run(tmp_path, 'sub-01_task-rest').with_suffix('.json')
    sidecar.unlink() if content is None else sidecar.write_text(content)
    with pytest.raises(BrainfmError, match=r'timeseries.tsv has no valid sidecar'):
        find_cohort([tmp_path], 'A424')


def test_a_run_that_lost_rows(tmp_path):
    path = write_run(tmp_path, 'sub-01_task-rest')
    path.write_text('a\n')
    with pytest.raises(BrainfmError, match=r'timeseries.tsv has .* bytes.*run "bids_brainfm"'):
        find_cohort([tmp_path], 'A424')


# --- targets ---------------------------------------------------------------------------------


def test_numbers_are_regressed(tmp_path):
    runs = write_people(tmp_path, [('01', '30.5'), ('02', '41'), ('03', '-7e1'), ('04', '41')])
    found = read_targets([*runs, runs[0]], 'age')
    assert found == Targets('age', 'regression', {'01': 30.5, '02': 41, '03': -70, '04': 41})


def test_only_participants_with_runs_have_targets(tmp_path):
    runs = write_people(tmp_path, [('01', '1'), ('02', '2'), ('03', 'n/a'), ('04', '4')])
    del runs[2]
    assert list(read_targets(runs, 'age').values) == ['01', '02', '04']


@pytest.mark.parametrize(
    ('texts', 'classes', 'values'),
    [
        (['M', 'F', 'M', 'X'], ('F', 'M', 'X'), [1, 0, 1, 2]),
        (['10', '9', '10', '9'], ('9', '10'), [1, 0, 1, 0]),
        (['1', 'x', '1', '10'], ('1', '10', 'x'), [0, 2, 0, 1]),
    ],
)
def test_text_and_two_values_are_classified(texts, classes, values, tmp_path):
    labels = ['01', '02', '03', '04']
    rows = list(zip(labels, texts, strict=True))
    found = read_targets(write_people(tmp_path, rows), 'age')
    assert found.problem == 'classification'
    assert found.classes == classes
    assert found.values == dict(zip(labels, values, strict=True))


def test_what_is_asked_for_decides(tmp_path):
    runs = write_people(tmp_path, [('01', '2'), ('02', '10'), ('03', '9')])
    found = read_targets(runs, 'age', 'classification')
    assert found.classes == ('2', '9', '10')
    assert found.values == {'01': 0, '02': 2, '03': 1}
    runs = write_people(tmp_path, [('01', '0'), ('02', '1'), ('03', '1')])
    found = read_targets(runs, 'age', 'regression')
    assert found == Targets('age', 'regression', {'01': 0, '02': 1, '03': 1})


def test_text_is_not_regressed(tmp_path):
    runs = write_people(tmp_path, [('01', '2'), ('02', 'old'), ('03', '9')])
    with pytest.raises(BrainfmError, match=r"'old' is no number.*--problem classification"):
        read_targets(runs, 'age', 'regression')


@pytest.mark.parametrize('empty', ['n/a', '', 'NaN', 'NA', ' '])
def test_missing_values(empty, tmp_path):
    runs = write_people(tmp_path, [('01', '1'), ('02', empty), ('03', '3'), ('04', '4')])
    with pytest.raises(BrainfmError, match=r'1 of 4 participants have no value \(sub-02\)'):
        read_targets(runs, 'age')
    found = read_targets(runs, 'age', drop_missing=True)
    assert found == Targets('age', 'regression', {'01': 1, '03': 3, '04': 4})


def test_participants_that_the_table_lacks_are_missing(tmp_path):
    runs = write_people(tmp_path, [(f'{i:02d}', str(i)) for i in range(12)])
    write_people(tmp_path, [('00', '0'), ('01', '1'), ('02', '2')])
    said = r'9 of 12 .*\(sub-03, sub-04, sub-05, sub-06, sub-07, \.\.\.\)'
    with pytest.raises(BrainfmError, match=said):
        read_targets(runs, 'age')
    assert len(read_targets(runs, 'age', drop_missing=True).values) == 3


def test_nothing_to_learn(tmp_path):
    runs = write_people(tmp_path, [('01', '5'), ('02', '5'), ('03', 'n/a')])
    with pytest.raises(BrainfmError, match=r'same value \(5\)'):
        read_targets(runs, 'age', drop_missing=True)
    with pytest.raises(BrainfmError, match=r'same value \(none\)'):
        read_targets(runs[2:], 'age', drop_missing=True)
    with pytest.raises(BrainfmError, match=r'no participants.tsv has a column iq .*age'):
        read_targets(runs, 'iq')


def test_targets_of_several_datasets(tmp_path):
    one = write_people(tmp_path / 'one', [('01', '1'), ('02', '2')])
    two = write_people(tmp_path / 'two', [('02', '2'), ('03', '3')])
    found = read_targets([*one, *two], 'age')
    assert found.values == {'01': 1, '02': 2, '03': 3}
    two = write_people(tmp_path / 'two', [('02', '7'), ('03', '3')])
    with pytest.raises(BrainfmError, match=r"sub-02 has '2' in one dataset and '7' in .*two"):
        read_targets([*one, *two], 'age')
    two = write_people(tmp_path / 'two', [('03', '3')], column='iq')
    with pytest.raises(BrainfmError, match=r'no participants.tsv has a column age'):
        read_targets([*one, *two], 'age')


# --- splits ----------------------------------------------------------------------------------

SHARES = {'train': 0.7, 'validation': 0.1, 'test': 0.2}


def people_of(n):
    return [f'{i:03d}' for i in range(n)]


def test_split_is_by_participant():
    people = people_of(40)
    parts = split(people * 3, SHARES, seed=1)
    assert sorted(parts) == people
    assert Counter(parts.values()) == {'train': 28, 'validation': 4, 'test': 8}
    assert count_parts(parts) == '28 train, 4 validation, 8 test'


@pytest.mark.parametrize('n', [20, 23, 31, 57, 101])
def test_split_has_the_shares(n):
    counts = Counter(split(people_of(n), SHARES, seed=n).values())
    assert sum(counts.values()) == n
    for name, share in SHARES.items():
        assert abs(counts[name] - share * n) <= 1


def test_split_follows_from_the_seed():
    people = people_of(40)
    parts = split(people, SHARES, seed=1)
    assert split(people[::-1], SHARES, seed=1) == parts  # in whatever order they are found
    other = split(people, SHARES, seed=2)
    assert sum(parts[p] != other[p] for p in people) > 5
    assert [parts[p] for p in people] != sorted(parts.values(), key=list(SHARES).index)


def test_split_keeps_classes_in_proportion():
    people = people_of(100)
    classes = {p: float(i % 10 == 0) for i, p in enumerate(people)}  # one in ten
    for seed in range(10):
        parts = split(people, SHARES, seed, classes)
        assert Counter(parts.values()) == {'train': 70, 'validation': 10, 'test': 20}
        rare = Counter(parts[p] for p in people if classes[p])
        assert rare == {'train': 7, 'validation': 1, 'test': 2}


def test_split_of_too_few():
    with pytest.raises(
        BrainfmError, match=r'14 .* too few .*validation needs at least 2 and .* 1'
    ):
        split(people_of(14), SHARES, seed=0)
    assert Counter(split(people_of(15), SHARES, seed=0).values())['validation'] == 2
    people = people_of(30)
    classes = {p: float(i < 4) for i, p in enumerate(people)}
    with pytest.raises(BrainfmError, match=r'validation needs at least 1 of each class and .* 0'):
        split(people, SHARES, 0, classes)


def test_groups_are_in_one_part():
    """Families of one to five, sexes mixed: proportions and classes are nearly met."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, size=80)
    people = people_of(sizes.sum())
    families = dict(zip(people, np.repeat(np.arange(80), sizes).tolist(), strict=True))
    sexes = dict(zip(people, rng.integers(2, size=len(people)).astype(float), strict=True))
    for seed in range(5):
        parts = split(people, SHARES, seed, sexes, families)
        of = {f: {parts[p] for p in people if families[p] == f} for f in range(80)}
        assert all(len(found) == 1 for found in of.values())
        counts = Counter(parts.values())
        for name, proportion in SHARES.items():
            assert counts[name] == pytest.approx(proportion * len(people), abs=4)
            women = np.mean([sexes[p] for p in people if parts[p] == name])
            assert women == pytest.approx(np.mean(list(sexes.values())), abs=0.12)
    assert split(people, SHARES, 1, sexes, families) == split(people, SHARES, 1, sexes, families)
    assert split(people, SHARES, 1, sexes, families) != split(people, SHARES, 2, sexes, families)


def test_split_of_too_few_groups():
    people = people_of(60)
    sites = {person: i % 2 for i, person in enumerate(people)}
    with pytest.raises(
        BrainfmError, match=r'60 participants in 2 groups are too few .*would have 0'
    ):
        split(people, SHARES, 0, groups=sites)


def test_groups_are_read_from_columns(tmp_path):
    """The same value in any column joins people, over columns and datasets."""
    rows = [('01', 'a\tx'), ('02', 'a\ty'), ('03', 'b\ty'), ('04', 'c\tz'), ('05', 'd\tn/a')]
    runs = write_people(tmp_path, rows, column='family\tsite')
    found = read_groups(runs[:4], ['family'])
    assert found['01'] == found['02']
    assert len(set(found.values())) == 3
    found = read_groups(runs[:4], ['family', 'site'])
    assert found['01'] == found['02'] == found['03'] != found['04']
    with pytest.raises(BrainfmError, match=r'--group-column site: 1 of 5 .*\(sub-05\)'):
        read_groups(runs, ['site'])
    with pytest.raises(BrainfmError, match=r'no participants.tsv has a column mother'):
        read_groups(runs, ['mother'])


# --- store -----------------------------------------------------------------------------------

PARCELS = 3
LENGTHS = (11, 5, 41, 7, 23, 13)


def series_of(lengths=LENGTHS):
    """Series whose values say which run, sample and parcel they are."""
    for i, n in enumerate(lengths):
        values = 1000 * i + np.arange(n)[:, None] + np.arange(PARCELS) / 10
        yield f'run{i}', f'p{i // 2}', 'train', (values.astype(np.float32), flags_of(i, n))


def flags_of(number, n):
    """Every third sample of a run is flagged, from another one on in each run."""
    return np.arange(n) % 3 == number % 3


def store_of(folder, lengths=LENGTHS, **options):
    write_store(folder, PARCELS, series_of(lengths), **options)
    return Store(folder)


@pytest.mark.parametrize(('shard_bytes', 'shards'), [(2**30, 1), (16 * 4 * PARCELS, 4), (1, 6)])
def test_store_round_trip(shard_bytes, shards, tmp_path):
    store = store_of(tmp_path / 'a' / 'store', shard_bytes=shard_bytes)
    assert len(list(store.folder.glob('shard-*.f32'))) == shards
    assert {run.shard for run in store.runs} == set(range(shards))
    assert sum(
        path.stat().st_size for path in store.folder.glob('shard-*.f32')
    ) == 4 * PARCELS * sum(LENGTHS)
    assert store.parcels == PARCELS
    assert store.left_out == {}
    for run, (name, person, part, (data, flags)) in zip(store.runs, series_of(), strict=True):
        assert (run.name, run.participant, run.part) == (name, person, part)
        assert (run.samples, run.flagged) == (len(data), flags.sum())
        window, flagged = store.window(run, 0, len(data))
        assert (window.dtype, flagged.dtype) == (np.float32, bool)
        np.testing.assert_array_equal(window, data.T)
        np.testing.assert_array_equal(flagged, flags)
        for (window, flagged), rows in (
            (store.window(run, 2, 3), slice(2, 5)),
            (store.window(run, 1, 2, 3), [1, 4]),
        ):
            np.testing.assert_array_equal(window, data[rows].T)
            np.testing.assert_array_equal(flagged, flags[rows])


def test_store_is_mapped(tmp_path):
    store = store_of(tmp_path)
    store.window(store.runs[0], 0, 5)
    ((mapped, flags),) = store._mapped.values()
    assert isinstance(mapped.base, np.memmap) or isinstance(mapped, np.memmap)
    assert isinstance(flags, np.memmap)
    with pytest.raises(ValueError, match='read-only'):
        mapped[0, 0] = 1


def test_a_store_of_another_format_is_refused(tmp_path):
    """A store without flags is not read as one in which nothing is flagged."""
    store_of(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index['format'], index['FileChecksums']
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BrainfmError, match=r'another version of bids_brainfm .* train in another'):
        Store(tmp_path)


def test_store_of_parts(tmp_path):
    series = [(*row[:2], part, row[3]) for row, part in zip(series_of(), 'abaacb', strict=True)]
    write_store(tmp_path, PARCELS, series, shard_bytes=100)
    store = Store(tmp_path)
    names = {part: [run.name for run in store.part(part)] for part in 'abc'}
    assert names == {'a': ['run0', 'run2', 'run3'], 'b': ['run1', 'run5'], 'c': ['run4']}
    np.testing.assert_array_equal(
        store.window(store.part('c')[0], 0, 23)[0], list(series_of())[4][3][0].T
    )


def test_store_says_what_is_left_out(tmp_path):
    rows = list(series_of())
    rows[2] = (*rows[2][:3], 'it is too short')
    write_store(tmp_path, PARCELS, rows)
    store = Store(tmp_path)
    assert store.left_out == {'run2': 'it is too short'}
    assert [run.name for run in store.runs] == ['run0', 'run1', 'run3', 'run4', 'run5']
    np.testing.assert_array_equal(store.window(store.runs[2], 0, 7)[0], rows[3][3][0].T)


def test_a_part_without_runs_is_refused(tmp_path):
    rows = [*list(series_of())[:2], ('run9', 'p9', 'validation', 'it is too short')]
    with pytest.raises(BrainfmError, match=r'validation part .*\(run9: it is too short\)'):
        write_store(tmp_path, PARCELS, rows)
    assert not (tmp_path / INDEX).exists()


def test_an_interrupted_store_is_no_store(tmp_path):
    """Also where a whole one stood before; and it is written over."""

    def broken():
        yield from list(series_of())[:3]
        raise RuntimeError

    store_of(tmp_path, shard_bytes=1)
    with pytest.raises(RuntimeError):
        write_store(tmp_path, PARCELS, broken())
    assert not (tmp_path / INDEX).exists()
    store = store_of(tmp_path, LENGTHS[:2])
    assert [len(store.window(run, 0, run.samples)[1]) for run in store.runs] == list(LENGTHS[:2])


def test_collect_keeps_reasons(tmp_path):
    def prepare(run):
        if run.participant == '02':
            raise BrainfmError('it is too short')
        return np.zeros((4, 1), np.float32), np.zeros(4, bool)

    runs = write_people(tmp_path, [('01', ''), ('02', '')])
    rows = list(collect(runs, prepare, {'01': 'train', '02': 'test'}))
    assert [row[:3] for row in rows] == [('sub-01', '01', 'train'), ('sub-02', '02', 'test')]
    assert rows[0][3][0].shape == (4, 1)
    assert rows[1][3] == 'it is too short'


def test_windows_in_a_run():
    run = StoredRun('r', 'p', 'train', 0, 0, 23)
    assert list(windows_in(run, 5)) == [0, 5, 10, 15]
    assert list(windows_in(run, 23)) == [0]
    assert list(windows_in(run, 24)) == []


# --- stream ----------------------------------------------------------------------------------


def origin(window):
    """Run, and samples in it, of a window of :func:`series_of`."""
    number, first = divmod(int(window[0, 0]), 1000)
    return number, first, np.diff(window[0].astype(int))


def test_stream_depends_on_seed_and_position_alone(tmp_path):
    store = store_of(tmp_path, shard_bytes=100)
    one, again = (WindowStream(store, store.runs, 5, seed=3) for _ in range(2))
    ahead = {position: one[position] for position in range(60)}
    for position in (59, 0, 30, 31, 7, 58):  # from anywhere, in any order
        window, flagged, number = again[position]
        np.testing.assert_array_equal(window, ahead[position][0])
        np.testing.assert_array_equal(flagged, ahead[position][1])
        assert number == ahead[position][2]
    other = WindowStream(store, store.runs[2:3], 5, seed=4)  # of one run there is one order
    same = WindowStream(store, store.runs[2:3], 5, seed=3)
    assert sum(np.array_equal(other[p][0], same[p][0]) for p in range(60)) < 15
    other = WindowStream(store, store.runs, 5, seed=4)
    assert sum(np.array_equal(other[p][0], ahead[p][0]) for p in range(60)) < 15


def test_every_run_has_one_window_in_an_epoch(tmp_path):
    store = store_of(tmp_path)
    stream = WindowStream(store, store.runs, 5, seed=0)
    orders = [tuple(stream[6 * epoch + i][2] for i in range(6)) for epoch in range(30)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) > 20


@pytest.mark.parametrize('strides', [(1,), (1, 2, 3), (4,), (1, 10)])
def test_windows_lie_in_their_run(strides, tmp_path):
    store = store_of(tmp_path, shard_bytes=100)
    stream = WindowStream(store, store.runs, 5, seed=0, strides=strides)
    taken = {number: set() for number in range(6)}
    for position in range(1500):
        window, flagged, number = stream[position]
        assert window.shape == (PARCELS, 5)
        run, first, steps = origin(window)
        rows = first + int(steps[0]) * np.arange(5)
        np.testing.assert_array_equal(flagged, flags_of(run, LENGTHS[run])[rows])
        assert run == number
        assert (steps == steps[0]).all()
        taken[number].add((int(steps[0]), first))
        np.testing.assert_allclose(window[1:] - window[0], [[0.1] * 5, [0.2] * 5], atol=1e-3)
    for number, samples in enumerate(LENGTHS):
        fits = [s for s in strides if 4 * s + 1 <= samples] or [1]
        places = {(s, first) for s in fits for first in range(samples - 4 * s)}
        assert taken[number] <= places
        assert len(taken[number]) > 0.9 * len(places)
        assert {s for s, _ in taken[number]} == set(fits)


def test_windows_of_some_runs(tmp_path):
    """A run is numbered by its place among those of the stream, not of the store."""
    store = store_of(tmp_path)
    stream = WindowStream(store, store.runs[3:], 5, seed=0)
    for position in range(12):
        window, _, number = stream[position]
        assert origin(window)[0] == number + 3


def test_rows_are_put_in_order(tmp_path):
    store = store_of(tmp_path)
    plain = WindowStream(store, store.runs, 5, seed=0)
    ordered = WindowStream(store, store.runs, 5, seed=0, order=np.array([2, 0, 1]))
    for position in range(8):
        np.testing.assert_array_equal(ordered[position][0], plain[position][0][[2, 0, 1]])


def test_seeds_of_samples():
    """They are the same on every machine, and fit torch's generators."""
    assert sample_seed(0, 1, 2) == 1535930435702422785
    found = {sample_seed(a, b, c) for a in range(10) for b in range(1, 5) for c in range(50)}
    assert len(found) == 2000
    assert all(0 <= seed < 2**63 for seed in found)


# --- recipes ---------------------------------------------------------------------------------

PEOPLE = 32128  # 502 micro batches of 64 in an epoch


def test_recipes_load():
    assert card_names('training') == [
        'brainlm-legacy', 'brainlm-vit', 'finetune', 'fixed', 'head', 'official',
    ]  # fmt: skip
    for name in card_names('training'):
        recipe = load_recipe(name)
        for step in (0, 1, 50, 98, 99):
            rates = recipe.rates(step, 100)
            assert rates.lr >= 0
            assert (rates.momentum is None) == (recipe.momentum is None)
    assert load_recipe('official').masks == 'official'


@pytest.mark.parametrize(
    ('model', 'masks'),
    [('brainlm-demo', None), ('brainlm-13m', None), ('brain-jepa-vitb', 'fixed')],
)
def test_recipe_of_a_family(model, masks):
    network = build(load_card(model).config)
    assert load_recipe(network.capabilities.recipe).masks == masks


@pytest.mark.parametrize('name', ['fixed', 'official'])
def test_brain_jepa_rates(name):
    """The specification's figures, section 5."""
    recipe = load_recipe(name)
    steps = recipe.steps(PEOPLE)
    assert steps == 18825
    assert recipe.batch_size == 512
    lr = np.array([recipe.rates(step, steps).lr for step in range(steps)])
    assert lr[0] == pytest.approx(5e-5, rel=0.01)
    assert lr.argmax() == 2509  # the 2,510th step
    assert lr.max() == pytest.approx(1e-3)
    np.testing.assert_allclose(np.diff(lr[:2510]), 9.5e-4 / 2510)
    assert lr[-1] == pytest.approx(1e-6)
    half = 2510 + (steps - 2510) // 2
    assert lr[half] == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-3)
    quarter = 2510 + (steps - 2510) // 4
    assert lr[quarter] == pytest.approx(1e-6 + 9.99e-4 * (0.5 + 0.5 * math.sqrt(0.5)), rel=1e-3)
    decay = [recipe.rates(step, steps).weight_decay for step in range(steps)]
    assert decay[0] == pytest.approx(0.04, rel=1e-3)
    assert decay[-1] == pytest.approx(0.4)
    assert decay[steps // 2] == pytest.approx(0.22, rel=1e-3)
    assert (np.diff(decay) > 0).all()
    assert recipe.lr_batch is None
    assert load_recipe(name, batch_size=64).rates(2509, steps).lr == pytest.approx(1e-3)


@pytest.mark.parametrize(('name', 'slower'), [('fixed', 1), ('official', 8)])
def test_momentum_of_the_target_encoder(name, slower):
    """Conformance point 10: 0.996 + 0.004 N / N_total, or an eighth of the way."""
    recipe = load_recipe(name)
    for step in (0, 1, 1000, 18824):
        expected = 0.996 + 0.004 / slower * step / 18825
        assert recipe.rates(step, 18825).momentum == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(('name', 'batch'), [('brainlm-legacy', 128), ('brainlm-vit', 512)])
def test_brainlm_rates(name, batch):
    """Section 3.6: 1e-3 x batch / 256, 5 % warm-up, weight decay 0.05."""
    recipe = load_recipe(name)
    assert recipe.batch_size == batch
    assert recipe.epochs == 100
    for size in (batch, 256, 64):
        changed = load_recipe(name, batch_size=size)
        lr = np.array([changed.rates(step, 1000).lr for step in range(1000)])
        assert lr.argmax() == 49
        assert lr.max() == pytest.approx(1e-3 * size / 256)
        assert lr[24] == pytest.approx(lr.max() / 2)
        assert lr[-1] == pytest.approx(0, abs=1e-9)
        assert (np.diff(lr[49:]) < 0).all()
    assert {recipe.rates(step, 1000).weight_decay for step in (0, 500, 999)} == {0.05}
    assert recipe.rates(0, 1000).momentum is None


def test_steps():
    recipe = load_recipe('fixed', epochs=2, batch_size=10)
    assert [recipe.steps(runs) for runs in (100, 104, 105, 1)] == [20, 20, 21, 1]
    assert load_recipe('fixed', epochs=0.5, batch_size=10).steps(100) == 5


def test_training_of_a_single_step():
    for name in card_names('training'):
        rates = load_recipe(name).rates(0, 1)
        assert math.isfinite(rates.lr)
        assert math.isfinite(rates.weight_decay)


OWN = 'epochs: 3\nbatch_size: 4\nlr: [0, 1.0e-3, 0]\nwarmup: 0.1\nweight_decay: [0.1, 0.2]\n'


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text(OWN)
    recipe = load_recipe(path, epochs=5, batch_size=None)
    assert (recipe.epochs, recipe.batch_size) == (5, 4)
    assert recipe.lr == (0, 1e-3, 0)
    assert recipe.layer_decay == 1
    assert recipe.patience is None
    assert recipe.rates(0, 100).weight_decay == pytest.approx(0.1, rel=1e-2)
    assert load_recipe(str(path), micro_batch_size=2).micro_batch_size == 2


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('epochs: 0', 'epochs 0 is not above 0'),
        ('epochs: -1', 'epochs -1 is not above 0'),
        ('batch_size: 0', 'batch_size 0 is not above 0'),
        ('micro_batch_size: -2', 'micro_batch_size -2 is not above 0'),
        ('warmup: 1', 'warmup 1 is not from 0 to below 1'),
        ('warmup: -0.1', 'warmup -0.1 is not from 0'),
        ('layer_decay: 0', 'layer_decay 0 is not above 0 and at most 1'),
        ('layer_decay: 1.1', 'layer_decay 1.1 is not above 0 and at most 1'),
        ('momentum: [0.9, 1.1]', 'momentum 1.1 is not from 0 to 1'),
        ('patience: 0', 'patience 0 is not above 0'),
        ('lr: 0.001', 'lr 0.001 is not a list of 3 values'),
        ('lr: [0, 1.0e-3]', r'lr \[0, 0.001\] is not a list of 3 values'),
        ('lr: [0, -1.0e-3, 0]', 'lr -0.001 is not 0 or above'),
        ('lr: [0, high, 0]', "lr 'high' is not a number"),
        ('weight_decay: [0.1]', 'weight_decay .* is not a list of 2 values'),
        ('momentum: [0.9, 0.95, 1]', 'momentum .* is not a list of 2 values'),
        ('momentums: [0.9, 1]', 'unknown key momentums'),
    ],
)
def test_recipes_that_make_no_sense(line, said, tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text(OWN + line + '\n')
    with pytest.raises(BrainfmError, match=said):
        load_recipe(path)


@pytest.mark.parametrize('content', ['- 1\n- 2\n', 'a: [', 'only words', ''])
def test_recipes_that_are_none(content, tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text(content)
    with pytest.raises(BrainfmError, match=r'mine.yml is not a YAML mapping'):
        load_recipe(path)


def test_recipes_that_lack_something(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text(OWN.replace('warmup: 0.1\n', ''))
    with pytest.raises(BrainfmError, match='lacks warmup; the keys are epochs'):
        load_recipe(path)
    with pytest.raises(BrainfmError, match='There is no recipe fast: choose brainlm-leg'):
        load_recipe('fast')
    with pytest.raises(BrainfmError, match='epochs -3'):
        load_recipe('fixed', epochs=-3)


@pytest.mark.parametrize(
    'line',
    ['epochs: 1e2', 'epochs: .inf', 'batch_size: "4"', 'batch_size: 1.5', 'lr: [0, .nan, 0]',
     'micro_batch_size: 0', 'lr_batch: -256', 'masks: fixed', 'warmup: null'],
)  # fmt: skip
def test_recipes_of_wrong_values_are_refused_in_a_sentence(line, tmp_path):
    """What YAML reads otherwise than it was meant is no traceback, and no silent training."""
    path = tmp_path / 'mine.yml'
    content = 'epochs: 1\nbatch_size: 4\nlr: [0, 1.0e-3, 0]\nwarmup: 0\nweight_decay: [0, 0]\n'
    key = line.split(':')[0]
    kept = [x for x in content.split('\n') if not x.startswith(f'{key}:')]
    path.write_text('\n'.join([*kept, line]))
    with pytest.raises(BrainfmError, match=line.split(':')[0]):
        load_recipe(path)


def test_equal_numbers_are_one_value(tmp_path):
    """1 and 1.0 are the same class, and what one dataset lacks another may tell."""
    one, two = (tmp_path / name for name in ('one', 'two'))
    for folder, values in ((one, '1 2 n/a'), (two, '1.0 2.0 2')):
        folder.mkdir()
        (folder / 'dataset_description.json').write_text('{}')
        rows = [f'sub-0{i + 1}\t{value}' for i, value in enumerate(values.split())]
        (folder / 'participants.tsv').write_text('\n'.join(['participant_id\tsex', *rows]))
    runs = [
        CohortRun(folder / f'{label}_x', folder, label, 2.0)
        for folder in (one, two)
        for label in ('01', '02', '03')
    ]
    targets = read_targets(runs, 'sex')
    assert targets.problem == 'classification'
    assert targets.classes == ('1', '2')
    assert targets.values == {'01': 0, '02': 1, '03': 1}


@pytest.mark.parametrize(
    ('mode', 'on_gpu'), [('full', 'bfloat16'), ('head', 'tf32'), ('probe', 'tf32')]
)
def test_frozen_networks_are_not_computed_in_bfloat16(mode, on_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    settings = TrainingSettings('brainlm-demo', Path('out'), (), Path('home'), mode=mode)
    assert training_precision(settings, torch.device('cuda')) == on_gpu
    assert training_precision(settings, torch.device('cpu')) == 'float32'
