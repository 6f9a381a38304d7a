"""Whatever is wrong with an input is said in one sentence, and the other runs are written."""

import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest


def copy_participant(dataset: Path, label: str) -> Path:
    """Another participant, equal to the first; returns the folder of functional files."""
    func = dataset / f'sub-{label}' / 'func'
    func.mkdir(parents=True)
    for path in (dataset / 'sub-01' / 'func').iterdir():
        shutil.copy(path, func / path.name.replace('sub-01', f'sub-{label}'))
    return func


def the(func: Path, pattern: str) -> Path:
    """The one file of this kind."""
    (path,) = func.glob(pattern)
    return path


def truncate(func):
    path = the(func, '*_bold.nii.gz')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_volume(func):
    path = the(func, '*_bold.nii.gz')
    image = nib.load(path)
    nib.save(image.slicer[..., 0], path)


def constant(func):
    path = the(func, '*_bold.nii.gz')
    image = nib.load(path)
    data = np.zeros(image.shape, np.int16) + 100
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def edit_sidecar(**values):
    def edit(func):
        path = the(func, '*_bold.json')
        content = json.loads(path.read_text())
        content |= values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def remove(pattern):
    return lambda func: the(func, pattern).unlink()


def empty_csf(func):
    path = the(func, '*confounds_timeseries.tsv')
    table = pd.read_csv(path, sep='\t')
    table[[name for name in table if name.startswith('csf')]] = np.nan
    table.to_csv(path, sep='\t', index=False, na_rep='n/a')


def shift_mask(func):
    path = the(func, '*_mask.nii.gz')
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 20
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), path)


def sidecar_folder(func):
    path = the(func, '*_bold.json')
    path.unlink()
    path.mkdir()


def rename_desc(func):
    for path in func.glob('*desc-preproc*'):
        path.rename(path.with_name(path.name.replace('preproc', 'denoised')))


def fewer_confounds(func):
    path = the(func, '*confounds_timeseries.tsv')
    pd.read_csv(path, sep='\t').iloc[:-3].to_csv(path, sep='\t', index=False, na_rep='n/a')


def rename_space(func):
    for path in func.glob('*space-*'):
        path.rename(path.with_name(path.name.replace('MNI152NLin2009cAsym', 'T1w')))


def short(func):
    path = the(func, '*_bold.nii.gz')
    nib.save(nib.load(path).slicer[..., :60], path)
    path = the(func, '*confounds_timeseries.tsv')
    pd.read_csv(path, sep='\t').iloc[:60].to_csv(path, sep='\t', index=False, na_rep='n/a')


def not_gzip(func):
    path = the(func, '*_bold.nii.gz')
    path.write_bytes(b'this is not a NIfTI file' * 40)


FAULTS = {
    'truncated': (truncate, ['volumes', 'desc-preproc_bold.nii.gz']),
    'threed': (one_volume, ['desc-preproc_bold.nii.gz', '4-D']),
    'constant': (constant, ['constant']),
    'notr': (edit_sidecar(RepetitionTime=None), ['no RepetitionTime', '.json', '0.735 s']),
    'infinitetr': (edit_sidecar(RepetitionTime=float('inf')), ['RepetitionTime inf', '.json']),
    'sidecarfolder': (sidecar_folder, ['_bold.json', 'directory']),
    'emptycsf': (empty_csf, ['Every value of csf', '--denoise']),
    'shiftedmask': (shift_mask, ['another affine', '20 mm']),
    'noimage': (remove('*_bold.nii.gz'), ['no preprocessed BOLD image', 'confounds']),
    'denoised': (rename_desc, ['desc-denoised', 'output of fMRIPrep']),
    'zerotr': (edit_sidecar(RepetitionTime=0), ['RepetitionTime 0', '.json']),
    'mstr': (edit_sidecar(RepetitionTime=735), ['milliseconds', '0.735']),
    'nosidecar': (remove('*_bold.json'), ['sidecar']),
    'nomask': (remove('*_mask.nii.gz'), ['brain mask', 'found: none']),
    'noconfounds': (remove('*confounds_timeseries.tsv'), ['confounds', '--denoise none']),
    'fewconfounds': (fewer_confounds, ['207', '210']),
    'nospace': (rename_space, ['T1w', '--output-spaces']),
    'short': (short, ['--short-runs']),
    'garbage': (not_gzip, ['desc-preproc_bold.nii.gz']),
}


@pytest.fixture(scope='module')
def outcome(simulated, tmp_path_factory):
    """One run of the command over a dataset in which each participant has another fault."""
    from bids_brainfm.cli.run import main

    place = tmp_path_factory.mktemp('faults')
    dataset = Path(shutil.copytree(simulated, place / 'data'))
    for label, (damage, _) in FAULTS.items():
        damage(copy_participant(dataset, label))
    command = [dataset, place / 'out', 'participant', '--model', 'brainlm-demo']
    code = main([*map(str, command), '-w', str(place / 'work')])
    log = next((place / 'out' / 'logs').glob('*/bids_brainfm.log')).read_text()
    return code, place / 'out', log


def test_good_runs_are_written_and_the_code_is_1(outcome):
    code, out, _ = outcome
    assert code == 1
    for label in ('01', '02'):
        assert next(out.glob(f'sub-{label}/func/*desc-brainlmdemo_embedding.json')).is_file()
        assert (out / f'sub-{label}.html').is_file()


@pytest.mark.parametrize('label', FAULTS)
def test_fault_is_one_sentence_with_file_and_remedy(outcome, label):
    _, out, log = outcome
    lines = [x for x in log.splitlines() if 'Failed: ' in x and f'sub-{label}' in x]
    assert len(lines) == 1, log
    sentence = lines[0].partition('Failed: ')[2]
    assert sentence.startswith(f'sub-{label}_task-rest')
    assert 'unexpected' not in sentence
    assert sentence.rstrip().endswith('.')
    for word in FAULTS[label][1]:
        assert word in sentence
    page = (out / f'sub-{label}.html').read_text()
    assert FAULTS[label][1][0] in page


def test_no_half_written_file_keeps_a_final_name(outcome):
    _, out, _ = outcome
    assert not [p for p in out.rglob('.*') if p.name != '.bidsignore']
    for label in FAULTS:
        assert not list(out.glob(f'sub-{label}/func/*brainlmdemo*'))
    for path in out.glob('sub-*/func/*.tsv'):
        assert path.with_suffix('.json').is_file()


@pytest.mark.slow
def test_mended_run_is_done(outcome, simulated, tmp_path):
    """After the mending a second run writes what was missing and forgets the failure."""
    from bids_brainfm.cli.run import main

    dataset = Path(shutil.copytree(simulated, tmp_path / 'data'))
    tr = edit_sidecar(RepetitionTime=None)
    tr(dataset / 'sub-02' / 'func')
    command = [dataset, tmp_path / 'out', 'participant', '--model', 'brainlm-demo']
    command = [*map(str, command), '-w', str(tmp_path / 'work')]
    assert main(command) == 1
    edit_sidecar(RepetitionTime=0.735)(dataset / 'sub-02' / 'func')
    assert main(command) == 0
    assert not list((tmp_path / 'out').rglob('failed-*'))
    assert next((tmp_path / 'out').glob('sub-02/func/*brainlmdemo_embedding.tsv')).is_file()


def test_nan_voxels_are_left_out_and_said(dataset, tmp_path, app):
    """Voxels that are NaN, in one volume or all, do not spoil their parcel."""
    path = the(dataset / 'sub-01' / 'func', '*_bold.nii.gz')
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    inside = np.argwhere(data.std(-1) > 0)
    data[tuple(inside[100])] = np.nan
    data[(*inside[2000], 5)] = np.inf
    header = image.header.copy()
    header.set_data_dtype(np.float32)
    nib.save(nib.Nifti1Image(data, image.affine, header), path)
    assert app(dataset, tmp_path / 'out', '--participant-label', '01') == 0
    sidecar = json.loads(next(tmp_path.glob('out/sub-01/func/*_timeseries.json')).read_text())
    assert any('NaN' in warning for warning in sidecar['Warnings'])
    table = pd.read_csv(next(tmp_path.glob('out/sub-01/func/*_timeseries.tsv')), sep='\t')
    assert not table.isna().any(axis=None)


@pytest.mark.slow
def test_data_without_a_mean_and_two_masks_are_said(dataset, tmp_path, app):
    """In the sidecar and the report: the run is read all the same."""
    func = dataset / 'sub-01' / 'func'
    path, mask = the(func, '*_bold.nii.gz'), the(func, '*_mask.nii.gz')
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    data -= data.mean(axis=-1, keepdims=True)
    nib.save(nib.Nifti1Image(data, image.affine), path)
    nib.save(nib.load(mask), mask.with_suffix(''))
    out = tmp_path / 'out'
    options = ('--participant-label', '01', '--stop-after', 'timeseries')
    assert app(dataset, out, *options) == 0
    sidecar = json.loads(the(out / 'sub-01' / 'func', '*_stat-mean_timeseries.json').read_text())
    candidates, demeaned = sidecar['Warnings'][:2]
    assert candidates == f'{mask.name} was read, and not {mask.with_suffix("").name}.'
    assert 'denoised before' in demeaned
    assert 'means of about zero' in (out / 'sub-01.html').read_text()


def refused(app, capfd, *arguments) -> str:
    """The sentence of a command that cannot run at all."""
    assert app(*arguments) == 2
    text = capfd.readouterr().err.strip()
    assert text.startswith('bids_brainfm: error: ')
    assert len(text.splitlines()) == 1
    assert text.endswith('.')
    return text


def test_refusals_before_anything_runs(dataset, tmp_path, app, capfd):
    """What makes a run impossible is found first."""
    out = tmp_path / 'out'
    say = lambda *arguments: refused(app, capfd, *arguments)
    assert '01, 02' in say(dataset, out, '--participant-label', '99')
    assert '--task-id nback' in say(dataset, out, '--task-id', 'nback')
    assert 'inside the input' in say(dataset, dataset / 'out')
    assert 'inside the input' in say(dataset, out, '-w', dataset / 'work')
    named = ['-d', f'prep={dataset}', '-w', tmp_path / 'w']
    raw = tmp_path / 'raw'
    raw.mkdir()
    assert 'inside the input' in say(raw, dataset / 'out', *named)
    assert 'Demo424' in say(dataset, out, '--space', 'MNIPediatricAsym')
    assert 'brainlm-demo' in say(dataset, out, '--model', 'brainlm-9000')
    assert '--scale-stats' in say(dataset, out, '--scale', 'cohort')
    missing = say(dataset, out, '--model', 'brainlm-111m')
    assert 'bids_brainfm_models fetch brainlm-111m' in missing
    assert 'bids_brainfm_models fetch A424' in missing
    assert not list(out.glob('sub-*'))
    (dataset / 'dataset_description.json').unlink()
    assert 'dataset_description.json' in say(dataset, out)


def test_output_that_cannot_be_written(simulated, tmp_path, app, capfd):
    """A file stands where the output folder should be (root may write everywhere else)."""
    (tmp_path / 'file').write_text('')
    assert 'file' in refused(app, capfd, simulated, tmp_path / 'file' / 'out')


def test_output_of_another_program(simulated, tmp_path, app, capfd):
    """The output of another program is not written into."""
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'dataset_description.json').write_text(
        json.dumps({'Name': 'x', 'GeneratedBy': [{'Name': 'fMRIPrep'}]})
    )
    assert 'fMRIPrep' in refused(app, capfd, simulated, out)


@pytest.mark.parametrize(
    ('damage', 'word'),
    [
        (lambda state: state | {'more': state['vit.layernorm.bias'] + 1}, 'more'),
        (lambda state: {k: v for k, v in state.items() if k != 'vit.layernorm.bias'}, 'lacks'),
    ],
)
def test_checkpoint_that_does_not_fit(simulated, tmp_path, app, capfd, damage, word):
    """A tensor too few or too many is fatal before anything is read."""
    from safetensors.torch import save_file

    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.weights import build, initialise

    config = load_card('brainlm-demo').config
    folder = tmp_path / 'checkpoint'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    state = initialise(build(config), 0).state_dict()
    save_file(damage({k: v.contiguous() for k, v in state.items()}), folder / 'model.safetensors')
    model = f'brainlm-demo={folder}'
    assert word in refused(app, capfd, simulated, tmp_path / 'out', '--model', model)


def test_gzip_of_the_wrong_thing(tmp_path):
    """A gzip file that holds no NIfTI is refused by name."""
    from bids_brainfm.errors import BrainfmError
    from bids_brainfm.signals.parcellate import parcellate

    path = tmp_path / 'x_bold.nii.gz'
    path.write_bytes(gzip.compress(b'nothing' * 1000))
    with pytest.raises(BrainfmError, match=r'x_bold\.nii\.gz'):
        parcellate(path, path, 424)


def test_cleaning_the_work_folder_deletes_no_input(dataset, tmp_path, app, capfd):
    """A dataset inside the work folder is refused, not deleted; links are only unlinked."""
    place = tmp_path / 'scratch'
    place.mkdir()
    inside = Path(shutil.move(dataset, place / 'data'))
    options = ['-d', f'prep={inside}', '-w', place, '--clean-workdir']
    raw = tmp_path / 'raw'
    raw.mkdir()
    assert 'would delete' in refused(app, capfd, raw, tmp_path / 'out', *options)
    assert (inside / 'dataset_description.json').is_file()

    outside = Path(shutil.move(inside, tmp_path / 'elsewhere'))
    (place / 'link').symlink_to(outside)
    options = ['--participant-label', '01', '-w', place, '--clean-workdir']
    assert app(outside, tmp_path / 'out', *options) == 0
    assert not (place / 'link').exists()
    assert (outside / 'dataset_description.json').is_file()


@pytest.mark.slow
def test_a_mended_fault_of_other_settings_is_not_held_against_a_run(dataset, tmp_path, app):
    """Failures of another space or model do not count in a run that does not ask for them."""
    out = tmp_path / 'out'
    for path in (dataset / 'sub-02' / 'func').glob('*space-*'):
        path.rename(path.with_name(path.name.replace('2009cAsym', '6Asym')))
    assert app(dataset, out) == 0
    assert app(dataset, out, '--space', 'MNI152NLin2009cAsym') == 1
    assert app(dataset, out) == 0  # though nothing is left to do
    assert not list(out.rglob('failed-*'))


def test_failure_of_a_model_names_it_and_its_report(dataset, tmp_path, app):
    """The series are written, the model's refusal names the model, the report says in part."""
    short(dataset / 'sub-02' / 'func')
    out = tmp_path / 'out'
    assert app(dataset, out) == 1
    (record,) = out.rglob('failed-*')
    assert record.name == 'failed-sub-02_task-rest_atlas-Demo424_desc-brainlmdemo.txt'
    assert record.read_text().startswith('sub-02_task-rest: brainlm-demo cannot take it: the run')
    page = (out / 'sub-02.html').read_text()
    assert 'failed in part' in page
    assert 'brainlm-demo cannot take it' in page


@pytest.mark.slow
def test_stop_on_first_crash_blames_the_right_run(dataset, tmp_path, app):
    """Though runs before it wait in the same batch."""
    short(copy_participant(dataset, '03'))
    out = tmp_path / 'out'
    assert app(dataset, out, '--stop-on-first-crash', '--nprocs', '1') == 1
    assert {p.name for p in out.rglob('failed-*')} == {
        'failed-sub-03_task-rest_atlas-Demo424_desc-brainlmdemo.txt'
    }


def test_half_covered_parcel_is_na_and_filled(dataset, tmp_path, app):
    """Below --min-coverage the series are n/a in the table, and the sidecars name the parcel."""
    from bids_brainfm.atlases.atlas import load_atlas
    from bids_brainfm.resources import home
    from bids_brainfm.signals.sampling import make_sampler

    path = the(dataset / 'sub-01' / 'func', '*_bold.nii.gz')
    image = nib.load(path)
    atlas = load_atlas('Demo424', home())
    labels = nib.load(atlas.image_for('MNI152NLin2009cAsym', 4).path)
    sampler = make_sampler(labels, 424, image.shape[:3], image.affine)
    voxels = sampler.voxels[sampler.starts[9] : sampler.starts[10]]
    data = np.asanyarray(image.dataobj).copy(order='F')
    data.reshape(-1, data.shape[-1], order='F')[voxels[: int(0.7 * len(voxels))]] = 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)
    out = tmp_path / 'out'
    assert app(dataset, out, '--participant-label', '01') == 0
    table = pd.read_csv(the(out / 'sub-01' / 'func', '*_timeseries.tsv'), sep='\t')
    assert list(table.columns[table.isna().all()]) == [atlas.names[9]]
    sidecar = json.loads(the(out / 'sub-01' / 'func', '*_timeseries.json').read_text())
    assert sidecar['ParcelsBelowMinimumCoverage'] == [atlas.names[9]]
    sidecar = json.loads(the(out / 'sub-01' / 'func', '*brainlmdemo_embedding.json').read_text())
    assert list(sidecar['FilledParcels']) == [atlas.names[9]]


@pytest.mark.parametrize(
    'line',
    [
        'derivatives = ["a=b"]', 'derivatives = {a = 1}', 'task_id = 5',
        'min_coverage = 3.0', 'batch_size = 0',
        'stride = "abc"', 'short_runs = "foo"', 'tokens = "yes"', 'scale = "magic"',
    ],
)  # fmt: skip
def test_configuration_file_is_held_to_the_command_line(simulated, tmp_path, app, capfd, line):
    (tmp_path / 'my.toml').write_text(line + '\n')
    sentence = refused(app, capfd, simulated, tmp_path / 'out', '--config-file', 'my.toml')
    assert line.partition(' ')[0] in sentence


def test_statistics_of_another_atlas_are_refused_at_once(simulated, tmp_path, app, capfd):
    stats = tmp_path / 'stats.json'
    columns = {'Median': 0.0, 'IQR': 1.0, 'Lower': -1.0, 'Upper': 1.0}
    columns = {name: [value] * 424 for name, value in columns.items()}
    stats.write_text(json.dumps({'Atlas': 'A424'} | columns))
    options = ['--scale', 'cohort', '--scale-stats', stats]
    assert 'A424' in refused(app, capfd, simulated, tmp_path / 'out', *options)
    stats.write_text(json.dumps({'Atlas': 'Demo424'} | columns))
    assert app(simulated, tmp_path / 'out', *options, '--participant-label', '01') == 0


@pytest.mark.parametrize(
    ('old', 'new'),
    [('tr: 0.735', 'tr: "x"'), ('label: brainlmdemo', 'label: 111'),
     ('scaling: run-robust', 'scaling: foo'), ('label: brainlmdemo', 'label: connectome'),
     ('num_brain_voxels: 424', 'num_brain_voxels: 100'), ('patch_size: 16', 'patch_size: 0'),
     ('hidden_size: 64', 'hidden_size: big'), ('model_type: vit_mae', 'model_type: bert'),
     ('window: 200', 'windw: 200')],
)  # fmt: skip
def test_faulty_model_cards(simulated, tmp_path, app, capfd, old, new):
    package = Path(__file__).parents[1] / 'bids_brainfm' / 'data' / 'models'
    text = (package / 'brainlm-demo.yml').read_text()
    assert old in text
    (tmp_path / 'card.yml').write_text(text.replace(old, new))
    refused(app, capfd, simulated, tmp_path / 'out', '--model', 'card.yml')
