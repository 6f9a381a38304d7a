"""``--outputs`` through the command: what is written, what it says, and on which side it lies."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.analyses.scores import score
from bids_brainfm.atlases.atlas import load_atlas
from bids_brainfm.bids.files import read_matrix
from bids_brainfm.resources import home
from bids_brainfm.signals.sampling import make_sampler

SPACE = 'MNI152NLin2009cAsym'
STEM = f'sub-01_task-rest_space-{SPACE}_atlas-Demo424'
DEMO, PARCELS = 'brainlmdemo', 'tiny13m'
PACKAGE = Path(__file__).parents[1] / 'bids_brainfm'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Card of a small network of the 13M family, which has a token for each parcel."""
    text = (PACKAGE / 'data' / 'models' / 'brainlm-13m.yml').read_text()
    for old, new in (
        ('name: brainlm-13m', 'name: tiny-13m'),
        ('label: brainlm13m', f'label: {PARCELS}'),
        ('atlas: A424', 'atlas: Demo424'),
        ('hidden_size: 512', 'hidden_size: 16'),
        ('num_hidden_layers: 4', 'num_hidden_layers: 1'),
        ('num_hidden_layers: 2', 'num_hidden_layers: 1'),
        ('num_attention_heads: 4', 'num_attention_heads: 1'),
        ('intermediate_size: 1024', 'intermediate_size: 16'),
        ('num_timepoints_per_voxel: 200', 'num_timepoints_per_voxel: 100'),
        ('window: 200', 'window: 100'),
    ):
        assert old in text
        text = text.replace(old, new)
    card = tmp_path_factory.mktemp('card') / 'tiny.yml'
    card.write_text(text[: text.index('\nweights:')] + '\nweights: []\n')
    return card


def command(data, out, *options, level='participant'):
    return subprocess.run(
        [sys.executable, '-m', 'bids_brainfm.cli.run', data, out, level, '-w', f'{out}_work',
         '--nprocs', '1', *map(str, options)],
        capture_output=True, text=True, check=False, cwd=Path(out).parent,
    )  # fmt: skip


@pytest.fixture(scope='module')
def done(simulated, tiny, tmp_path_factory):
    """All outputs of two families on one participant, as BOLD too; networks of another."""
    out = tmp_path_factory.mktemp('outputs') / 'out'
    for options in (
        ('--participant-label', '01', '--outputs', 'all', '--write-bold'),
        ('--participant-label', '02', '--outputs', 'networks'),
    ):
        run = command(simulated, out, '--model', 'brainlm-demo', tiny, *options)
        assert run.returncode == 0, run.stderr
    return out


def func(out, name, sub='01'):
    return out / f'sub-{sub}' / 'func' / f'{STEM.replace("sub-01", f"sub-{sub}")}_{name}'


def write_unchecked(table, own, **entries):
    """Write the sidecar of a table from that of another, without size and checksums."""
    content = json.loads(own.with_suffix('.json').read_text()) | entries
    for checked in ('FileSizes', 'FileChecksums'):
        del content[checked]
    table.with_suffix('.json').write_text(json.dumps(content))


def about(out, name, sub='01'):
    return json.loads(func(out, f'{name}.json', sub).read_text())


def test_what_is_written(done):
    for label in (DEMO, PARCELS):
        for name in (
            f'desc-{label}_timeseries.tsv',
            f'stat-r2_desc-{label}_boldmap.tsv',
            f'stat-r2_desc-{label}_boldmap.nii.gz',
            f'desc-{label}_forecast.tsv',
            f'stat-forecast_desc-{label}_timeseries.tsv',
            f'stat-attention_desc-{label}_boldmap.tsv',
            f'stat-attention_desc-{label}_boldmap.nii.gz',
            f'stat-perturbation_desc-{label}_boldmap.tsv',
            f'stat-perturbation_desc-{label}_boldmap.nii.gz',
        ):
            assert func(done, name).is_file(), name
            sidecar = func(done, name.partition('.')[0] + '.json')
            assert json.loads(sidecar.read_text())['InputFiles']
    for label in ('connectome', PARCELS):
        for name in ('dseg.nii.gz', 'dseg.tsv', 'knn.tsv'):
            assert func(done, f'desc-{label}_{name}').is_file()
            whole = f'sub-01_space-{SPACE}_atlas-Demo424_desc-{label}_{name}'
            assert (done / 'sub-01' / 'func' / whole).is_file()
    assert not list(done.glob(f'**/*desc-{DEMO}_dseg*'))  # its tokens are not of parcels
    assert not [path for path in done.rglob('.*') if path.name != '.bidsignore']


def test_the_dataset_validates_without_a_word(done):
    validator = Path(sys.executable).with_name('bids-validator-deno')
    found = subprocess.run(
        [validator, '--format', 'json', done], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout)['issues']['issues'] == []


@pytest.mark.parametrize(('label', 'ratio', 'passes'), [(DEMO, 0.75, 2), (PARCELS, 0.2, 5)])
def test_reconstruction_is_scored_as_it_is_written(done, label, ratio, passes):
    """The table's scores are those of the written series, but for the bounds of the scaling."""
    original, names = read_matrix(func(done, 'stat-mean_timeseries.tsv'))
    made, same_names = read_matrix(func(done, f'desc-{label}_timeseries.tsv'))
    assert names == same_names
    assert made.shape == original.shape
    assert np.isfinite(made).all()
    assert np.abs(made.mean(0) / original.mean(0) - 1).max() < 0.05  # in BOLD units
    table = pd.read_csv(func(done, f'stat-r2_desc-{label}_boldmap.tsv'), sep='\t')
    assert list(table['Node']) == names
    flagged = about(done, 'stat-mean_timeseries')['FlaggedVolumes']
    measured = original.copy()
    measured[flagged] = np.nan  # these were interpolated
    found = score(made, measured, axis=0)
    np.testing.assert_allclose(table['r'], found.r, atol=0.02)
    np.testing.assert_allclose(table['r2'], found.r2, atol=0.05 * (1 - found.r2.min()))
    sidecar = about(done, f'stat-r2_desc-{label}_boldmap')
    assert sidecar['MaskRatio'] == ratio
    assert sidecar['NumberOfPasses'] == passes
    ways = ['mean', 'interpolation', 'covariance']
    assert list(sidecar['Pooled']) == ['model', *ways]
    assert {f'{score}_{way}' for score in ('r2', 'r') for way in ways} < set(table)
    assert 'visible' in sidecar['Covariance']['Source']
    pooled = {name: scores['R2'] for name, scores in sidecar['Pooled'].items()}
    if label == DEMO:
        assert pooled['model'] > max(0.1, pooled['mean'], pooled['interpolation'])
    else:
        assert pooled['model'] < 0  # untrained, and not floored
    assert sidecar['GainCheck']['Gain'][3] == 1
    assert len(sidecar['GainCheck']['R2']) == 8
    assert sidecar['ProportionFlagged'] == pytest.approx(len(flagged) / 210)
    assert sidecar['Precision'] == 'float32'
    image = nib.load(func(done, f'stat-r2_desc-{label}_boldmap.nii.gz'))
    assert np.isclose(image.get_fdata(), table['r2'][5], rtol=1e-6).sum() > 100


def test_reconstruction_as_bold_is_the_series(done, simulated):
    """Parcellated as any BOLD file it gives the table; it lies on the grid of the input."""
    from bids_brainfm.signals.parcellate import parcellate

    source = next(simulated.glob('sub-01/func/*_desc-preproc_bold.nii.gz'))
    path = done / 'sub-01' / 'func' / f'sub-01_task-rest_space-{SPACE}_desc-{DEMO}_bold.nii.gz'
    made, given = nib.load(path), nib.load(source)
    assert made.shape == given.shape
    np.testing.assert_array_equal(made.affine, given.affine)
    assert made.header.get_zooms()[3] == pytest.approx(0.735)
    atlas = load_atlas('Demo424', home())
    found = parcellate(path, atlas.image_for(SPACE, 2.0).path, 424)
    series, _ = read_matrix(func(done, f'desc-{DEMO}_timeseries.tsv'))
    np.testing.assert_allclose(found.data, series, rtol=1e-5)
    sidecar = json.loads(path.with_name(path.name.replace('.nii.gz', '.json')).read_text())
    assert sidecar['SkullStripped'] is True
    assert sidecar['RepetitionTime'] == 0.735


def test_forecast_table(done):
    for label in (DEMO, PARCELS):
        table = pd.read_csv(func(done, f'desc-{label}_forecast.tsv'), sep='\t')
        assert table['step'].tolist() == list(range(1, 21))
        np.testing.assert_allclose(table['time'], 0.735 * table['step'], rtol=1e-6)
        for way in ('model', 'persistence', 'mean', 'ar'):
            for measure in ('mse', 'r2', 'r'):
                assert np.isfinite(table[f'{way}_{measure}']).all()
        assert table['ar_r2'][0] > table['mean_r2'][0]  # simulated series have a memory
        assert table['persistence_mse'][0] < table['persistence_mse'][19]
        sidecar = about(done, f'desc-{label}_forecast')
        assert sidecar['PointsHidden'] == 20
        series, _ = read_matrix(func(done, f'stat-forecast_desc-{label}_timeseries.tsv'))
        given = np.flatnonzero(np.isfinite(series).all(axis=1))
        assert len(given) == 20 * sidecar['NumberOfWindows']
        assert given[-20:].tolist() == list(range(190, 210))


def test_networks_of_the_simulation_are_found(done):
    """Simulated networks are told from connectivity, far above shuffled labels and the null."""
    scores = pd.read_csv(func(done, 'desc-connectome_knn.tsv'), sep='\t', index_col='features')
    assert scores['accuracy']['features'] > scores['accuracy']['spatial null'] + 0.05
    assert scores['accuracy']['features'] > 2 * scores['accuracy']['majority']
    assert abs(scores['accuracy']['shuffled'] - 1 / 9) < 0.06
    assert scores['p']['features'] == pytest.approx(1 / 101)
    untrained = pd.read_csv(func(done, f'desc-{PARCELS}_knn.tsv'), sep='\t', index_col='features')
    assert {'xyz', 'majority', 'shuffled', 'spatial null'} < set(untrained.index)

    parcels = pd.read_csv(func(done, 'stat-network_desc-connectome_boldmap.tsv'), sep='\t')
    lut = pd.read_csv(func(done, 'desc-connectome_dseg.tsv'), sep='\t')
    image = nib.load(func(done, 'desc-connectome_dseg.nii.gz'))
    assert list(parcels) == ['Node', 'cluster', 'network', 'confidence', 'reference']
    assert parcels['confidence'].between(-1, 1).all()
    assert lut['name'].tolist() == sorted(lut['name'])  # a number is a network, in all maps
    named = dict(zip(lut['index'], lut['name'], strict=True))
    assert (parcels['cluster'].map(named) == parcels['network']).all()
    assert (parcels['network'] == parcels['reference']).mean() > 0.4
    assert set(np.unique(image.dataobj)) == {0, *lut['index']}
    atlas = load_atlas('Demo424', home())
    labels = np.asanyarray(nib.load(atlas.image_for(SPACE, 2.0).path).dataobj)
    for parcel in (1, 200, 424):
        painted = np.unique(np.asanyarray(image.dataobj)[labels == parcel])
        assert painted.tolist() == [parcels['cluster'][parcel - 1]]


@pytest.mark.slow
def test_networks_of_an_old_input_do_not_stay(dataset, tmp_path, app):
    """Nor do those of the participant, nor their pictures: the report would show them."""
    out = tmp_path / 'out'
    options = ('--participant-label', '01')
    assert app(dataset, out, *options, '--outputs', 'networks') == 0
    assert len(list(out.glob('sub-01/func/*_dseg.nii.gz'))) == 2
    assert app(dataset, out, *options) == 0
    assert len(list(out.glob('sub-01/func/*_dseg.nii.gz'))) == 2
    next(dataset.glob('sub-01/func/*_bold.nii.gz')).touch()
    assert app(dataset, out, *options) == 0
    for pattern in ('*_dseg*', '*_knn*', '*stat-network*', '*desc-networks*', '*desc-knn*'):
        assert not list(out.glob(f'sub-01/**/{pattern}')), pattern
    assert 'adjusted Rand index' not in (out / 'sub-01.html').read_text()


def test_settings_file_of_a_run_is_taken_back(simulated, done, tmp_path, app):
    """As it was written, with all new settings; a typo in a list of outputs is refused."""
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    written = next(
        path for path in out.glob('logs/*/bids_brainfm.toml') if '"all"' in path.read_text()
    )
    before = {path: path.stat().st_mtime_ns for path in out.glob('sub-*/func/*')}
    models = ('--model', 'brainlm-demo')
    assert app(simulated, out, *models, '--config-file', written) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob('sub-*/func/*')} == before
    config = tmp_path / 'mine.toml'
    config.write_text(written.read_text().replace('"all"', '"reconstrution"'))
    assert app(simulated, out, *models, '--config-file', config) == 2
    for setting in ('contrast = ["sex"]', 'perturb_sd = nan', 'random_seed = -1'):
        config.write_text(f'{setting}\n')
        assert app(simulated, out, *models, '--config-file', config) == 2


def test_settings_hold_while_any_output_stands(simulated, done, tmp_path, app, capfd):
    """Without the embeddings too, reconstructions of another scaling are not mixed in."""
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    for path in out.glob(f'sub-*/func/*_desc-{DEMO}_embedding.*'):
        path.unlink()
    assert app(simulated, out, '--outputs', 'reconstruction', '--scale', 'parcel-z') == 2
    assert "scaling was 'run-robust' and is now 'parcel-z'" in capfd.readouterr().err


@pytest.mark.slow
def test_networks_of_a_participant_are_of_all_its_runs(dataset, tmp_path, app):
    """With two runs: the mean of their features, drawn in the report; one alone is the same."""
    from bids_brainfm.analyses.networks import cluster_parcels, fc_features
    from bids_brainfm.bids.files import read_relmat

    func = dataset / 'sub-01' / 'func'
    other = dataset / 'sub-02' / 'func'
    for path in list(other.iterdir()):
        path.rename(func / path.name.replace('sub-02_task-rest', 'sub-01_task-more'))
    shutil.rmtree(dataset / 'sub-02')
    out = tmp_path / 'out'
    for task in ('rest', 'more'):  # a command each, as in jobs of an array
        options = ('--outputs', 'networks', '--network-clusters', '5', '--task-id', task)
        assert app(dataset, out, *options) == 0
    relmats = sorted(out.glob('sub-01/func/*_relmat.tsv'))
    assert len(relmats) == 2
    features = np.mean([fc_features(read_relmat(path)) for path in relmats], axis=0)
    expected = cluster_parcels(features, 5, 0).labels
    name = f'sub-01_space-{SPACE}_atlas-Demo424_stat-network_desc-connectome_boldmap'
    whole = pd.read_csv(out / 'sub-01' / 'func' / f'{name}.tsv', sep='\t')
    pairs = set(zip(whole['cluster'], expected, strict=True))
    assert len(pairs) == len(set(expected)) == 5  # the same parcels, in the reference's order
    sidecar = json.loads((out / 'sub-01' / 'func' / f'{name}.json').read_text())
    assert sidecar['Runs'] == ['sub-01_task-more', 'sub-01_task-rest']
    picture = f'sub-01_space-{SPACE}_atlas-Demo424_model-connectome_desc-networks_bold.svg'
    assert picture in (out / 'sub-01.html').read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob('sub-01/**/*')}
    assert app(dataset, out, '--outputs', 'networks', '--network-clusters', '5') == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob('sub-01/**/*')} == before


def test_attention_maps(done):
    """Relative to uniform attention; parcels of a token show its value, and the report says so."""
    fine = pd.read_csv(func(done, f'stat-attention_desc-{PARCELS}_boldmap.tsv'), sep='\t')
    coarse = pd.read_csv(func(done, f'stat-attention_desc-{DEMO}_boldmap.tsv'), sep='\t')
    assert fine.filter(like='patch').shape == (424, 5)
    assert coarse.filter(like='patch').shape == (424, 13)
    for table in (fine, coarse):
        np.testing.assert_allclose(
            table.filter(like='patch').mean(axis=1), table['attention'], rtol=1e-5
        )
    assert fine['attention'].nunique() > 400
    assert fine['token'].tolist() == list(range(424))
    assert fine['attention'].mean() == pytest.approx(1, abs=1e-4)
    assert (coarse.groupby('token').nunique()['attention'] == 1).all()
    assert coarse['token'].value_counts().sort_index().tolist() == [12, *[16] * 25, 12]
    y = pd.Series(load_atlas('Demo424', home()).xyz[:, 1])
    assert y.groupby(coarse['token']).mean().is_monotonic_increasing
    sidecar = about(done, f'stat-attention_desc-{DEMO}_boldmap')
    assert 'spans 16 parcels' in sidecar['TokenSpan']
    by_token = coarse.drop_duplicates('token').filter(like='patch').to_numpy()
    assert sidecar['NumberOfTokens'] == 729
    assert sidecar['TokensInPadding'] == 729 - 27 * 13
    assert sidecar['AttentionToPadding'] == pytest.approx(1 - by_token.sum() / 729, abs=1e-5)
    fine_sidecar = about(done, f'stat-attention_desc-{PARCELS}_boldmap')
    assert not {'TokenSpan', 'AttentionToPadding'} & set(fine_sidecar)
    report = (done / 'sub-01.html').read_text()
    assert 'spans 16 parcels' in report
    assert 'falls on tokens that hold no data' in report


@pytest.mark.parametrize('label', [DEMO, PARCELS])
def test_perturbation_map(done, label):
    """By default pulses of 1 SD in left V1; what shares a token with it is n/a, not zero."""
    table = pd.read_csv(func(done, f'stat-perturbation_desc-{label}_boldmap.tsv'), sep='\t')
    sidecar = about(done, f'stat-perturbation_desc-{label}_boldmap')
    target = table['target'] == 1
    atlas = load_atlas('Demo424', home())
    (parcel,) = np.flatnonzero(target)
    assert atlas.xyz[parcel, 0] < 0
    assert atlas.xyz[parcel, 1] < -70
    assert sidecar['Target'] == atlas.names[parcel] == sidecar['TargetParcels'][0]
    lost = table['change'].isna() & ~target
    assert lost.sum() == sidecar['ParcelsSharingTokens'] == (15 if label == DEMO else 0)
    assert any('share tokens' in warning for warning in sidecar['Warnings']) == (label == DEMO)
    assert table['p'].dropna().between(1 / 20, 1).all()
    tested = table['p'].notna()
    assert sidecar['ParcelsTested'] == tested.sum() > 300
    assert sidecar['NumberOfShams'] == 19
    assert sidecar['ParcelsBelow05'] == (table['p'] <= 0.05).sum()
    assert sidecar['ParcelsExpectedByChance'] == pytest.approx(tested.sum() / 20)
    assert len(sidecar['ParcelsBelow05OfShams']) == 19
    expected = f'({tested.sum() / 20:.1f} expected by chance; at least as many for '
    assert expected in (done / 'sub-01.html').read_text()
    assert sidecar['MedianDistanceMismatch'] < 2
    assert (sidecar['Mode'], sidecar['SD'], sidecar['NumberOfStimuli']) == ('pulse', 1, 4)
    points = 16 if label == DEMO else 20
    assert sidecar['StimulusDuration'] == pytest.approx(points * 0.735)
    assert 0 < sidecar['DepartureFromData'] < 3
    assert (table['change'].dropna() != 0).any()
    for column in ('change_before', 'change_after'):
        assert table[column][~target].notna().all()
    image = nib.load(func(done, f'stat-perturbation_desc-{label}_boldmap.nii.gz'))
    values = image.get_fdata()
    ijk = np.argwhere(np.nan_to_num(values) == 1)
    x = nib.affines.apply_affine(image.affine, ijk)[:, 0]
    assert len(x) > 100
    assert (x < 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('mirrored', [False, True])
def test_left_stays_left_from_input_to_output(dataset, tmp_path, app, mirrored):
    """A left visual parcel that is brighter in the input is brighter in the output, alone."""
    from bids_brainfm.cli.demo import _grid_labels

    atlas = load_atlas('Demo424', home())
    parcel = int(np.linalg.norm(atlas.xyz - [-10, -85, 2], axis=1).argmin())
    (source,) = dataset.glob('sub-01/func/*_desc-preproc_bold.nii.gz')
    (mask,) = dataset.glob('sub-01/func/*_desc-brain_mask.nii.gz')
    image = nib.load(source)
    labels, _ = _grid_labels(atlas.image_for(SPACE, 4.0).path)
    made = []
    for brighter in (0, 500):
        data = image.get_fdata(dtype=np.float32).copy()
        data[labels == parcel + 1] += brighter
        for path, values in ((source, data), (mask, np.asanyarray(nib.load(mask).dataobj))):
            given = nib.load(path)
            copy = nib.Nifti1Image(values, image.affine, given.header)
            copy = copy.as_reoriented([[0, -1], [1, 1], [2, 1]]) if mirrored else copy
            folder = tmp_path / str(brighter) / 'sub-01' / 'func'
            folder.mkdir(parents=True, exist_ok=True)
            nib.save(copy, folder / path.name)
        for path in dataset.glob('sub-01/func/*'):
            if not path.name.endswith('.nii.gz'):
                shutil.copy(path, folder / path.name)
        shutil.copy(dataset / 'dataset_description.json', tmp_path / str(brighter))
        out = tmp_path / f'out{brighter}'
        assert app(folder.parents[1], out, '--outputs', 'reconstruction', '--write-bold') == 0
        made.append(nib.load(next(out.glob('sub-01/func/*_desc-brainlmdemo_bold.nii.gz'))))
    assert nib.aff2axcodes(made[0].affine)[0] == ('L' if mirrored else 'R')
    moved = (made[1].get_fdata() - made[0].get_fdata()).mean(axis=3)
    ijk = np.argwhere(np.abs(moved) > 100)
    xyz = nib.affines.apply_affine(made[0].affine, ijk)
    assert len(ijk) == (labels == parcel + 1).sum()
    assert (xyz[:, 0] < 0).all()
    np.testing.assert_allclose(xyz.mean(0), atlas.xyz[parcel], atol=4)
    np.testing.assert_allclose(moved[tuple(ijk.T)], 500, atol=5)


def test_the_report_has_a_section_for_each(done):
    page = (done / 'sub-01.html').read_text()
    for what in (
        'reconstruction', 'r2', 'gain', 'forecast', 'attention', 'networks', 'knn', 'perturbation'
    ):  # fmt: skip
        (figure, *_) = done.glob(f'sub-01/figures/*model-{PARCELS}_desc-{what}_bold.svg')
        assert figure.name in page, what
    for words in ('75% of the tokens hidden in each of 2 passes', 'predict_last_pixel',
                  'adjusted Rand index', 'expected by chance', 'held-out parcels'):  # fmt: skip
        assert words in page
    methods = (done / 'logs' / 'CITATION.md').read_text()
    for words in ('20% of the tokens of a window were hidden', 'forecast by tiny-13m',
                  'Moran spectral randomisation', 'sham targets', 'Wagner & Dray 2015',
                  'Attention maps of tiny-13m show'):  # fmt: skip
        assert words in methods


@pytest.mark.slow
def test_second_run_does_nothing_and_what_was_lost_comes_back(
    simulated, done, tiny, tmp_path, app, capfd
):
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    models = ('--model', 'brainlm-demo', tiny, '--participant-label', '01', '--outputs', 'all')
    state = lambda: {path: path.stat().st_mtime_ns for path in out.glob('sub-*/**/*.*')}
    before = state()
    assert app(simulated, out, *models) == 0  # without --write-bold: what stands stays
    assert state() == before
    lost = [
        func(out, f'stat-r2_desc-{DEMO}_boldmap.tsv'),
        func(out, 'desc-connectome_dseg.nii.gz'),
    ]
    contents = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    assert app(simulated, out, *models) == 0
    assert [path.read_bytes() for path in lost] == contents
    changed = {path.name for path, when in state().items() if before.get(path) != when}
    assert not any(PARCELS in name for name in changed)
    assert not any('forecast' in name for name in changed)


@pytest.mark.slow
def test_outputs_can_be_added_and_do_not_outlive_their_input(dataset, tmp_path, app):
    """Embeddings stay as they are when more is asked for; of an old input nothing stays."""
    out = tmp_path / 'out'
    assert app(dataset, out, '--participant-label', '01') == 0
    table = func(out, f'desc-{DEMO}_embedding.tsv')
    before = table.stat().st_mtime_ns
    assert app(dataset, out, '--participant-label', '01', '--outputs', 'forecast') == 0
    assert table.stat().st_mtime_ns == before
    assert func(out, f'desc-{DEMO}_forecast.tsv').is_file()
    next(dataset.glob('sub-01/func/*_bold.nii.gz')).touch()
    assert app(dataset, out, '--participant-label', '01') == 0
    assert table.stat().st_mtime_ns != before
    assert not list(out.glob('sub-01/**/*forecast*'))


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (('--outputs', 'all', '--mask-ratio', '0.5'), 'mask_ratio was 0.75 and is now 0.5'),
        (('--outputs', 'forecast', '--forecast-points', '10'), 'points was 20 and is now 10'),
        (('--outputs', 'networks', '--network-clusters', '4'), 'clusters was 9 and is now 4'),
        (('--outputs', 'perturbation', '--perturb', 'visual'), "target_name was 'L_"),
        (('--outputs', 'perturbation', '--perturb-mode', 'clamp'), "mode was 'pulse' and is now"),
    ],
)
def test_other_settings_are_not_mixed_in(simulated, done, tmp_path, app, capfd, options, said):
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    assert app(simulated, out, *options) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (('--token-shuffles', '3'), 'do not matter to brainlm-demo'),
        (('--covariance', 'no.h5'), '--covariance is used by --outputs reconstruction only'),
        (('--outputs', 'all', '--covariance'), '--covariance takes a FILE'),
        (('--outputs', 'all', '--covariance', 'no.h5'), 'no.h5 does not exist'),
        (('--mask-ratio', '0.5'), '--mask-ratio is used by --outputs reconstruction or perturb'),
        (('--outputs', 'networks', '--write-bold'), '--write-bold is used by --outputs recon'),
        (('--outputs', 'reconstruction', '--model', 'brain-jepa-demo'), 'has no decoder'),
        (('--outputs', 'forecast', '--forecast-points', '200'), '1 to 199 of them, not 200'),
        (('--outputs', 'perturbation', '--perturb', 'L_19'), 'did you mean L_19'),
        (('--outputs', 'networks', '--reference-networks', 'no.tsv'), 'does not exist'),
        (('--contrast', 'task', 'a', 'b'), 'The participant level has no --contrast'),
        (('--outputs', 'networks', '--network-clusters', '424'), 'has 424 parcels; ask for fewer'),
        (('--outputs', 'reconstruction', '--mask-ratio', '0.9999'), 'hides all or none of 729'),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    simulated, tmp_path, app, capfd, options, said
):
    assert app(simulated, tmp_path / 'out', *options) == 2
    assert said in capfd.readouterr().err
    assert not list((tmp_path / 'out').glob('sub-*'))


@pytest.mark.slow
def test_embeddings_over_token_orders(simulated, done, tiny, tmp_path, app, capfd):
    """Other embeddings, recorded as such; not mixed with those in the order of the atlas."""
    out = tmp_path / 'out'
    options = ('--model', tiny, '--random-weights', '--participant-label', '01')
    assert app(simulated, out, *options, '--token-shuffles', '2') == 0
    averaged, plain = (
        about(out, f'desc-{PARCELS}_embedding'),
        about(done, f'desc-{PARCELS}_embedding'),
    )
    assert averaged['TokenShuffles'] == 2
    assert plain['TokenShuffles'] == 0
    found, usual = (
        read_matrix(func(each, f'desc-{PARCELS}_embedding.tsv'))[0][:, 5:] for each in (out, done)
    )
    assert 0 < np.abs(found - usual).max() < 5
    assert 'a mean over 2 random orders' in (out / 'logs' / 'CITATION.md').read_text()
    assert 'mean over 2 orders of the tokens' in (out / 'sub-01.html').read_text()
    assert app(simulated, out, *options) == 2
    assert 'token_shuffles was 2' in capfd.readouterr().err


def test_a_13m_model_hides_whole_patches(simulated, tiny, tmp_path, app, capfd):
    arguments = ('--model', tiny, '--outputs', 'forecast', '--forecast-points', '30')
    assert app(simulated, tmp_path / 'out', *arguments) == 2
    assert 'whole patches of 20' in capfd.readouterr().err


@pytest.mark.slow
def test_reference_networks_of_ones_own(simulated, tmp_path, app, capfd):
    """A table by name, in any order; parcels it does not name are left aside."""
    names = load_atlas('Demo424', home()).names
    table = tmp_path / 'mine.tsv'
    sides = {name: {'L': 'left', 'R': 'right'}[name[0]] for name in names[10:]}
    rows = [f'{name}\t{side}' for name, side in reversed(sides.items())]
    table.write_text('\n'.join(['name\tnetwork', *rows]) + '\n')
    out = tmp_path / 'out'
    options = ('--participant-label', '01', '--outputs', 'networks')
    options += ('--reference-networks', table)
    assert app(simulated, out, *options) == 0
    assert 'names no network of 10 parcels' in capfd.readouterr().err
    (log,) = out.glob('logs/*/bids_brainfm.log')  # which is opened only after that is said
    assert log.read_text().count('names no network of 10 parcels') == 1
    perturb = ('--outputs', 'perturbation', '--perturb', 'right', '--reference-networks', table)
    assert app(simulated, out, *perturb) == 2  # half of the brain is in every token
    assert 'each token of brainlm-demo holds one of its 212 parcels' in capfd.readouterr().err
    parcels = pd.read_csv(
        func(out, 'stat-network_desc-connectome_boldmap.tsv'), sep='\t', keep_default_na=False
    )
    assert parcels['reference'].value_counts().to_dict() == {'right': 212, 'left': 202, 'n/a': 10}
    assert sorted(parcels['cluster'].unique()) == [1, 2]
    other = tmp_path / 'other'
    for content, sentence in (
        ('parcel\tnetwork\nL_001\tx\n', 'is not a table (TSV) with the columns name and network'),
        ('name\tnetwork\nV1\tx\n', 'names no parcel of Demo424'),
        ('name\tnetwork\nL_001\tx\nL_001\ty\n', 'names L_001 twice'),
    ):
        table.write_text(content)
        assert app(simulated, other, *options) == 2
        assert sentence in capfd.readouterr().err


@pytest.mark.slow
def test_short_runs_are_served_too(dataset, tmp_path, app):
    """60 volumes of 0.735 s, padded: every output is there, and only what is real is scored."""
    (bold,) = dataset.glob('sub-01/func/*_bold.nii.gz')
    image = nib.load(bold)
    nib.save(image.slicer[..., :60], bold)
    (table,) = dataset.glob('sub-01/func/*_timeseries.tsv')
    frame = pd.read_csv(table, sep='\t', dtype=str, keep_default_na=False)[:60]
    frame.to_csv(table, sep='\t', index=False)
    out = tmp_path / 'out'
    options = ('--participant-label', '01', '--short-runs', 'pad', '--outputs', 'all')
    assert app(dataset, out, *options) == 0
    series, _ = read_matrix(func(out, f'desc-{DEMO}_timeseries.tsv'))
    assert series.shape == (60, 424)
    assert np.isfinite(series).all()
    assert about(out, f'desc-{DEMO}_forecast')['NumberOfWindows'] == 1


@pytest.mark.slow
def test_parcels_without_signal_are_in_no_output(dataset, tmp_path, app):
    """What was filled to feed the network is n/a in every table and NaN in every image."""
    from bids_brainfm.cli.demo import _grid_labels

    (bold,) = dataset.glob('sub-01/func/*_bold.nii.gz')
    image = nib.load(bold)
    labels, _ = _grid_labels(load_atlas('Demo424', home()).image_for(SPACE, 4.0).path)
    data = image.get_fdata(dtype=np.float32)
    data[labels == 31] = 0
    nib.save(nib.Nifti1Image(data, image.affine, image.header), bold)
    out = tmp_path / 'out'
    assert app(dataset, out, '--participant-label', '01', '--outputs', 'all') == 0
    for name, column in (
        (f'stat-r2_desc-{DEMO}_boldmap', 'r2'),
        (f'stat-attention_desc-{DEMO}_boldmap', 'attention'),
        (f'stat-perturbation_desc-{DEMO}_boldmap', 'change'),
        ('stat-network_desc-connectome_boldmap', 'confidence'),
    ):
        table = pd.read_csv(func(out, f'{name}.tsv'), sep='\t')
        assert np.isnan(table[column][30]), name
        assert table[column].notna().sum() > 400
    series, _ = read_matrix(func(out, f'desc-{DEMO}_timeseries.tsv'))
    assert np.isnan(series[:, 30]).all()
    networks = pd.read_csv(func(out, 'stat-network_desc-connectome_boldmap.tsv'), sep='\t')
    assert networks['cluster'][30] == 0
    assert app(dataset, tmp_path / 'no', '--participant-label', '01', '--outputs', 'perturbation',
               '--perturb', 'L_031') == 1  # fmt: skip


# --- the group level -------------------------------------------------------------------------


@pytest.mark.slow
def test_groups_are_subtracted(done, tmp_path):
    """participants.tsv gives the groups; the map is the difference of the two tables."""
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    (out / 'participants.tsv').write_text('participant_id\tsex\nsub-01\tF\nsub-02\tM\n')
    run = command(out, out, '--contrast', 'sex', 'F', 'M', level='group')
    assert run.returncode == 0, run.stderr
    for options, said in (
        (('--participant-label', '77'), 'no participant 77'),
        (('--task-id', 'nback'), 'no attention maps of nback'),
        (('--participant-label', '01'), 'is of sex M; the maps are of F'),
    ):
        refused = command(out, out, '--contrast', 'sex', 'F', 'M', *options, level='group')
        assert refused.returncode == 2
        assert said in refused.stderr
    folder = out / 'group' / 'sex-F-minus-M'
    name = f'space-{SPACE}_atlas-Demo424_stat-attention_desc-{PARCELS}_boldmap'
    table = pd.read_csv(folder / f'{name}.tsv', sep='\t')
    own = f'stat-attention_desc-{PARCELS}_boldmap.tsv'
    one, two = (pd.read_csv(func(out, own, sub), sep='\t')['attention'] for sub in ('01', '02'))
    np.testing.assert_allclose(table['difference'], one - two, atol=1e-8)
    assert table['p'].isna().all()  # one participant a side allows no test
    assert json.loads((folder / f'{name}.json').read_text())['TokensTested'] == 0
    coarse = name.replace(PARCELS, DEMO)
    shown = pd.read_csv(folder / f'{coarse}.tsv', sep='\t')
    assert shown['token'].nunique() == shown['difference'].nunique() == 27
    image = nib.load(folder / f'{name}.nii.gz')
    atlas = load_atlas('Demo424', home())
    labels = np.asanyarray(nib.load(atlas.image_for(SPACE, 2.0).path).dataobj)
    np.testing.assert_allclose(image.get_fdata()[labels == 7], table['difference'][6], rtol=1e-5)
    assert (folder / f'{name}.svg').is_file()
    sidecar = json.loads((folder / f'{name}.json').read_text())
    assert sidecar['NumberOfParticipants'] == {'F': 1, 'M': 1}
    assert 'Welch' in sidecar['Test']
    assert any('sub-02' in source for source in sidecar['Sources'])
    (out / 'participants.tsv').unlink()
    validator = Path(sys.executable).with_name('bids-validator-deno')
    found = subprocess.run(
        [validator, '--format', 'json', out], capture_output=True, text=True, check=False
    )
    assert json.loads(found.stdout)['issues']['issues'] == []


def test_attention_maps_of_earlier_versions_are_not_compared(done, tmp_path):
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    own = func(out, f'stat-attention_desc-{PARCELS}_boldmap.tsv')
    old = own.with_name(own.name.replace('task-rest', 'task-nback'))
    shutil.copy(own, old)
    write_unchecked(old, own, ResultsVersion=1)
    run = command(out, out, '--contrast', 'task', 'rest', 'nback', level='group')
    assert run.returncode == 2
    assert f'{old.name} is left out, since another version of bids_brainfm' in run.stderr
    assert 'of task nback' in run.stderr


def test_conditions_are_subtracted_within_participants(done, tmp_path):
    """With a second task the test is paired, over those who have both."""
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    random = np.random.default_rng(0)
    for sub in ('01', '02'):
        own = func(out, f'stat-attention_desc-{PARCELS}_boldmap.tsv', sub)
        frame = pd.read_csv(own, sep='\t')
        for run in ('1', '2'):
            other = own.with_name(own.name.replace('task-rest', f'task-nback_run-{run}'))
            frame.assign(attention=frame['attention'] + 1 + random.normal(0, 0.1, 424)).to_csv(
                other, sep='\t', index=False
            )
            write_unchecked(other, own)
    run = command(out, out, '--contrast', 'task', 'nback', 'rest', level='group')
    assert run.returncode == 0, run.stderr
    (path,) = out.glob(f'group/task-nback-minus-rest/*{PARCELS}_boldmap.tsv')
    table = pd.read_csv(path, sep='\t')
    np.testing.assert_allclose(table['difference'], 1, atol=0.3)
    assert np.isfinite(table['p']).all()
    sidecar = json.loads(path.with_suffix('.json').read_text())
    assert 'paired' in sidecar['Test']
    assert sidecar['TokensTested'] == 424
    assert sidecar['TokensBelowQ05'] == (table['q'] < 0.05).sum()
    assert len(list(out.glob('group/*/*.tsv'))) == 1  # the other model has no such task


@pytest.mark.parametrize(
    ('contrast', 'said'),
    [
        (('sex', 'F', 'M'), 'no participants.tsv has a column sex'),
        (('task', 'rest', 'nback'), 'is of task nback; the maps are of rest'),
        (('trait', 'high', 'low'), 'is of trait high or low'),
        (('task', 'rest', 'rest'), 'subtracts rest from itself'),
    ],
)
def test_contrasts_that_cannot_be(done, tmp_path, contrast, said):
    out = Path(shutil.copytree(done, tmp_path / 'out'))
    run = command(out, out, '--contrast', *contrast, level='group')
    assert run.returncode == 2
    assert said in run.stderr


def test_the_group_level_takes_our_outputs_only(simulated, tmp_path):
    before = sorted(simulated.rglob('*'))
    run = command(simulated, simulated, '--contrast', 'sex', 'F', 'M', level='group')
    assert run.returncode == 2
    assert 'was not written by bids_brainfm' in run.stderr
    assert sorted(simulated.rglob('*')) == before
    run = command(simulated, tmp_path / 'out', '--contrast', 'sex', 'F', 'M', level='group')
    assert run.returncode == 2
    assert 'writes into the dataset that it reads' in run.stderr
    run = command(simulated, tmp_path / 'out', level='group')
    assert run.returncode == 2
    assert '--contrast WHAT A B' in run.stderr


@pytest.mark.slow
def test_time_of_the_first_volume_reaches_every_output(dataset, tmp_path, app):
    """Onsets count from StartTime of the input, plus the volumes that were dropped."""
    folder, dropped, tr = dataset / 'sub-01' / 'func', 3, 0.735
    sidecar = next(folder.glob('*_bold.json'))
    timing = {'StartTime': 0.3675, 'SliceTimingCorrected': True}
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | timing))
    table = next(folder.glob('*_desc-confounds_timeseries.tsv'))
    confounds = pd.read_csv(table, sep='\t')
    for i in range(dropped):
        confounds[f'non_steady_state_outlier{i:02d}'] = (confounds.index == i).astype(int)
    confounds.to_csv(table, sep='\t', index=False, na_rep='n/a')
    out, start = tmp_path / 'out', 0.3675 + dropped * tr
    options = ('--outputs', 'reconstruction', 'forecast', '--write-bold', '--stride', '5')
    assert app(dataset, out, '--participant-label', '01', *options) == 0

    series = about(out, 'stat-mean_timeseries')
    assert (series['InputStartTime'], series['SliceTimingCorrected']) == (0.3675, True)
    reconstructed = next(out.glob(f'sub-01/func/*_desc-{DEMO}_bold.json'))
    for found in (
        series,
        about(out, f'desc-{DEMO}_timeseries'),
        about(out, f'stat-forecast_desc-{DEMO}_timeseries'),
        json.loads(reconstructed.read_text()),
    ):
        assert found['StartTime'] == pytest.approx(start)
    for name, windows in ((f'desc-{DEMO}_embedding.tsv', 2), ('desc-connectome_embedding.tsv', 1)):
        onset = pd.read_csv(func(out, name), sep='\t')['onset']
        np.testing.assert_allclose(onset, start + 5 * tr * np.arange(windows), atol=1e-3)

    coverage = pd.read_csv(func(out, 'stat-coverage_bold.tsv'), sep='\t')
    assert list(coverage) == ['Node', 'coverage', 'mean', 'tsnr']
    assert about(out, 'stat-coverage_bold')['NumberOfVolumesLeftOut'] == dropped
    rows, _ = read_matrix(func(out, 'stat-mean_timeseries.tsv'))
    np.testing.assert_allclose(coverage['mean'], rows.mean(axis=0), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('voxels', ['mask', 'all'])
def test_a_parcel_outside_the_brain_mask_is_na_in_every_table(dataset, tmp_path, app, voxels):
    """Whatever the voxels of the means, its coverage is 0, and it has a level only from all."""
    atlas = load_atlas('Demo424', home())
    mask = next((dataset / 'sub-01' / 'func').glob('*_desc-brain_mask.nii.gz'))
    image = nib.load(mask)
    labels = nib.load(atlas.image_for(SPACE, 4).path)
    sampler = make_sampler(labels, 424, image.shape, image.affine)
    inside = np.asarray(image.dataobj).ravel(order='F').copy()
    inside[sampler.voxels[sampler.parcel == 9]] = 0
    inside = inside.reshape(image.shape, order='F')
    nib.save(nib.Nifti1Image(inside, image.affine, image.header), mask)
    out, name = tmp_path / 'out', atlas.names[9]
    options = ('--participant-label', '01', '--stop-after', 'timeseries')
    assert app(dataset, out, *options, '--parcel-voxels', voxels) == 0
    coverage = pd.read_csv(func(out, 'stat-coverage_bold.tsv'), sep='\t', index_col='Node')
    assert coverage['coverage'][name] == 0
    assert coverage['tsnr'].isna().sum() == coverage['mean'].isna().sum() == (voxels == 'mask')
    sidecar = about(out, 'stat-mean_timeseries')
    assert sidecar['ParcelsBelowMinimumCoverage'] == [name]
    assert sidecar['ParcelVoxels'] == about(out, 'stat-coverage_bold')['ParcelVoxels'] == voxels
    record = json.loads((out / 'logs' / 'settings' / 'atlas-Demo424.json').read_text())
    assert record['parcel_voxels'] == voxels
    assert 'InputStartTime' not in sidecar  # unknown
    assert sidecar['StartTime'] == 0


def test_parcels_that_were_filled_have_no_features(tmp_path):
    """Parcels without signal have no features; windows that are excluded do not add to them."""
    import h5py

    from bids_brainfm.bids.files import write_matrix
    from bids_brainfm.bids.run import BoldRun
    from bids_brainfm.outputs.networks import features_of
    from bids_brainfm.outputs.tasks import NetworksTask, Place

    entities = {'sub': '01', 'task': 'rest', 'space': 'X'}
    run = BoldRun('sub-01_task-rest', entities, 'x', tmp_path, tmp_path / 'bold.nii.gz')
    place = Place(tmp_path, 'Toy', 'jepa')
    task = NetworksTask(place, None, 'parcels', None, '')
    relmat = np.array([[1, 0.5, np.nan], [0.5, 1, np.nan], [np.nan] * 3])
    names = ['a', 'b', 'c']
    write_matrix(place.of_series.table(run, 'connectome'), relmat, ['Node', *names], names)
    with h5py.File(task.features_file(run), 'w') as file:
        file['parcels'] = np.stack([np.zeros((3, 2)), np.ones((3, 2)), np.full((3, 2), 9)])
        file['excluded'] = [False, False, True]
    features = features_of(run, task)
    np.testing.assert_array_equal(features, [[0.5, 0.5], [0.5, 0.5], [np.nan, np.nan]])


def test_a_run_of_whose_windows_all_are_excluded_has_no_networks_of_the_model(tmp_path):
    """It has those of its connectivity, unless too many volumes of the whole run are flagged."""
    from bids_brainfm.bids.freshness import input_fingerprints, write_sidecar
    from bids_brainfm.bids.run import BoldRun
    from bids_brainfm.outputs.networks import NetworksTask, sources
    from bids_brainfm.outputs.registry import BY_NAME
    from bids_brainfm.outputs.tasks import Place

    entities = {'sub': '01', 'task': 'rest', 'space': 'X'}
    run = BoldRun('sub-01_task-rest', entities, 'x', tmp_path, tmp_path / 'bold.nii.gz')
    run.bold.write_text('x')
    tasks = [
        NetworksTask(Place(tmp_path, 'Toy', label), None, kind, None, '')
        for label, kind in (('connectome', 'connectome'), ('jepa', 'parcels'))
    ]

    def members(*excluded):
        for task, state in zip(tasks, excluded, strict=True):
            file, product = task.features_file(run), BY_NAME[task.feature_product]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('x')
            content = {'InputFiles': input_fingerprints(run), 'Excluded': state}
            write_sidecar(file, content | {'ResultsVersion': product.results_version})
        return [len(used) for _, _, used in sources([run], tasks)]

    # of the run, and of all runs of the participant; from connectivity, and from the model
    assert members(False, False) == [1, 1, 1, 1]
    assert members(False, True) == [1, 0, 1, 0]
    assert members(True, True) == [0, 0, 0, 0]


@pytest.mark.slow
def test_a_window_that_is_excluded_is_not_perturbed(dataset, tmp_path, app, tiny):
    path = next(dataset.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    table = pd.read_csv(path, sep='\t', na_values='n/a')
    table.loc[10:49, 'framewise_displacement'] = 1.0
    table.to_csv(path, sep='\t', index=False, na_rep='n/a')
    out = tmp_path / 'out'
    options = ('--outputs', 'perturbation', '--model', tiny, '--participant-label', '01')
    assert app(dataset, out, *options, '--max-flagged', '0.3') == 0
    assert about(out, f'desc-{PARCELS}_embedding')['WindowsExcluded'] == [0]
    sidecar = about(out, f'stat-perturbation_desc-{PARCELS}_boldmap')
    assert sidecar['Excluded'] is False
    assert sidecar['WindowOnset'] == pytest.approx(100 * 0.735)  # of the second window
    assert 'that is not excluded' in (out / 'logs' / 'CITATION.md').read_text()
