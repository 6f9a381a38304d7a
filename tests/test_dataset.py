"""One reader of our own outputs, and adapters of input pipelines."""

import json

import pytest

from bids_brainfm.bids import inputs
from bids_brainfm.bids.dataset import find_records, find_whole
from bids_brainfm.bids.freshness import write_sidecar
from bids_brainfm.errors import BrainfmError
from bids_brainfm.outputs.outcome import Outcome

NAMES = (
    'sub-01/func/sub-01_task-rest_space-X_atlas-A_stat-mean_timeseries.tsv',
    'sub-01/func/sub-01_task-rest_space-X_atlas-A_stat-forecast_desc-m_timeseries.tsv',
    'sub-02/ses-b/func/sub-02_ses-b_task-rest_run-1_space-X_atlas-B_stat-mean_timeseries.tsv',
    'sub-02/ses-b/func/sub-02_ses-b_task-rest_run-1_space-X_atlas-B_desc-m_embedding.tsv',
    'sub-02/figures/sub-02_task-rest_space-X_atlas-B_stat-mean_timeseries.tsv',
    'group/sub-03_task-rest_space-X_atlas-A_stat-mean_timeseries.tsv',
)


@pytest.fixture
def outputs(tmp_path):
    """A folder of ours with a few tables and their sidecars."""
    description = {'Name': 'x', 'GeneratedBy': [{'Name': 'bids_brainfm'}]}
    (tmp_path / 'dataset_description.json').write_text(json.dumps(description))
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('a\n1\n')
        write_sidecar(path, {'InputFiles': {}, 'Name': path.name, 'ResultsVersion': 7})
    return tmp_path


def test_records_are_those_of_runs(outputs):
    """Tables in func folders, of sessions too; figures and the group level are none."""
    records = find_records(outputs, 'timeseries', stat='mean')
    assert [record.name for record in records] == [
        'sub-01_task-rest',
        'sub-02_ses-b_task-rest_run-1',
    ]
    assert [record.entities['atlas'] for record in records] == ['A', 'B']
    assert records[0].sidecar['Name'] == records[0].path.name
    assert all(record.whole for record in records)


@pytest.mark.parametrize(
    ('wanted', 'count'),
    [
        ({'suffix': '*'}, 4),
        ({'suffix': 'timeseries', 'desc': None}, 2),
        ({'suffix': 'timeseries', 'desc': 'm'}, 1),
        ({'suffix': '*', 'atlas': ('A', 'C')}, 2),
        ({'suffix': '*', 'subjects': ['02']}, 2),
        ({'suffix': '*', 'subjects': ['03']}, 0),
        ({'suffix': 'embedding', 'extension': '.json'}, 1),
        ({'suffix': 'series'}, 0),
    ],
)
def test_records_are_chosen_by_entities(outputs, wanted, count):
    assert len(find_records(outputs, **wanted)) == count


def test_what_is_cut_off_is_left_out_by_name(outputs, caplog):
    (outputs / NAMES[0]).write_text('a')
    with caplog.at_level('WARNING', 'bids_brainfm'):
        import logging

        logging.getLogger('bids_brainfm').propagate = True
        records = find_whole(outputs, 'timeseries', {}, 7, stat='mean')
    assert [record.entities['sub'] for record in records] == ['02']
    assert NAMES[0].rpartition('/')[2] in caplog.text


def test_other_datasets_are_refused(outputs):
    (outputs / 'dataset_description.json').write_text('{"Name": "x"}')
    with pytest.raises(BrainfmError, match='not written by bids_brainfm'):
        find_whole(outputs, 'timeseries', {}, 7)


def test_precisions_are_not_mixed(outputs):
    """Of one model; a second model may have been run in another one."""
    stem = outputs / 'sub-01' / 'func' / 'sub-01_task-rest'
    for run, label, precision in (
        ('1', 'm', 'float32'), ('2', 'm', 'float32'), ('3', 'k', 'bfloat16'),
    ):  # fmt: skip
        path = stem.with_name(f'{stem.name}_run-{run}_stat-attention_desc-{label}_boldmap.tsv')
        path.write_text('a\n1\n')
        write_sidecar(path, {'Precision': precision, 'ResultsVersion': 7})
    assert len(find_whole(outputs, 'boldmap', {}, 7)) == 3
    path = stem.with_name(f'{stem.name}_run-2_stat-attention_desc-m_boldmap.tsv')
    write_sidecar(path, {'Precision': 'tf32', 'ResultsVersion': 7})
    with pytest.raises(
        BrainfmError, match=r'run-1.* in float32 and .*run-2.* in tf32: a difference'
    ):
        find_whole(outputs, 'boldmap', {}, 7)
    assert len(find_whole(outputs, 'boldmap', {'run': ('1', '3')}, 7)) == 2


@pytest.mark.parametrize('name', inputs.ADAPTERS)
def test_adapters_have_what_the_protocol_says(name):
    module = inputs.adapter(name)
    assert module.FOLDER
    assert module.SOURCE
    for function in ('accepts', 'open_dataset', 'find_runs'):
        assert callable(getattr(module, function))


def test_the_first_adapter_that_accepts_a_dataset_reads_it(tmp_path, monkeypatch):
    """A pipeline is added by a module and its name."""
    import sys
    import types

    from bids_brainfm.bids.run import BoldRun

    run = BoldRun(
        'sub-01', {'sub': '01', 'space': 'X'}, 'd', tmp_path, tmp_path / 'b.nii',
        denoised=True,
    )  # fmt: skip
    flat = types.ModuleType('flat')
    flat.FOLDER, flat.SOURCE = 'flat', 'flat files'
    flat.accepts = lambda description: description.get('Name') == 'flat'
    flat.open_dataset = lambda root, participants: root
    flat.find_runs = lambda opened, dataset, spaces, filters: ([run], {})
    monkeypatch.setitem(sys.modules, f'{inputs.__name__}.flat', flat)
    monkeypatch.setattr(inputs, 'ADAPTERS', ('flat', *inputs.ADAPTERS))
    description = tmp_path / 'dataset_description.json'
    description.write_text('{"Name": "flat", "DatasetType": "derivative"}')
    (find_runs,) = inputs.open_datasets({'d': tmp_path}, ())
    ((found,), without) = find_runs(('X',), {})
    assert (found.name, found.pipeline, found.denoised, without) == (run.name, 'flat', True, {})
    description.write_text('{"Name": "other", "DatasetType": "derivative"}')
    (tmp_path / 'sub-01').mkdir()
    (find_runs,) = inputs.open_datasets({'d': tmp_path}, ())
    assert find_runs(('X',), {}) == ([], {})


def test_denoised_runs_are_not_denoised_again(simulated, tmp_path, monkeypatch, app, capfd):
    """The methods text says who denoised them, and raw runs are not mixed in."""
    import dataclasses
    import sys
    import types

    from bids_brainfm.bids.inputs import fmriprep

    def find_runs(*asked):
        runs, without = fmriprep.find_runs(*asked)
        return [dataclasses.replace(run, denoised=True) for run in runs], without

    clean = types.ModuleType('clean')
    vars(clean).update(
        FOLDER='clean', SOURCE='clean files', accepts=lambda description: True,
        open_dataset=fmriprep.open_dataset, find_runs=find_runs,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, f'{inputs.__name__}.clean', clean)
    asked = (
        simulated,
        tmp_path / 'out',
        '--participant-label',
        '01',
        '--stop-after',
        'timeseries',
    )
    with monkeypatch.context() as patch:
        patch.setattr(inputs, 'ADAPTERS', ('clean',))
        assert app(*asked, '--scrub', '5') == 2
        assert (
            '--scrub: the runs were denoised by their pipeline (clean)' in capfd.readouterr().err
        )
        assert app(*asked, '--denoise', '36P') == 2
        assert 'were denoised by their pipeline (clean)' in capfd.readouterr().err
        assert app(*asked) == 0
        assert app(*asked) == 0  # and it is current
    (series,) = (tmp_path / 'out').glob('sub-01/func/*_stat-mean_timeseries.json')
    found = json.loads(series.read_text())
    for unknown in ('DegreesOfFreedom', 'NumberOfRegressors'):
        assert unknown not in found['Denoising']
    assert found['Quality']['degrees_of_freedom'] is found['Quality']['num_regressors'] is None
    assert 'Degrees of freedom' not in (tmp_path / 'out' / 'sub-01.html').read_text()
    text = (tmp_path / 'out' / 'logs' / 'CITATION.md').read_text()
    assert 'taken from clean files' in text
    assert 'had been denoised by the pipeline' in text
    assert app(*asked, '--denoise', 'none') == 2
    assert 'denoised_by_pipeline' in capfd.readouterr().err


def test_a_label_given_twice_is_one_participant(outputs):
    once = find_records(outputs, 'timeseries', subjects=['01'])
    assert find_records(outputs, 'timeseries', subjects=['01', '01']) == once != []


@pytest.mark.parametrize(
    ('step', 'left_out'),
    [('atlas-B', {'series', 'embedding'}), ('atlas-B_desc-m', {'embedding'}),
     ('atlas-A', set()), ('atlas-B_desc-other', set())],
)  # fmt: skip
def test_outputs_of_a_run_that_failed_since_are_left_out(outputs, step, left_out, caplog):
    """Of the series and all that is made from it, or of one model; of one atlas."""
    run = 'sub-02_ses-b_task-rest_run-1'
    Outcome(run, step, f'{run}: too few volumes.').record(outputs)
    series = find_whole(outputs, 'timeseries', {}, 7, stat='mean', atlas='B')
    assert len(series) == ('series' not in left_out)
    assert len(find_whole(outputs, 'embedding', {}, 7)) == ('embedding' not in left_out)
    assert len(find_whole(outputs, 'timeseries', {}, 7, stat='mean', atlas='A')) == 1
    said = 'is left out, since the last attempt to make it failed (too few volumes): run the'
    assert caplog.text.count(said) == len(left_out)
    Outcome(run, step).record(outputs)  # it succeeds
    assert len(find_whole(outputs, 'embedding', {}, 7)) == 1
