"""Outputs of an earlier version of the program, whose numbers differ, are never used again."""

import json
import shutil

import pytest

from bids_brainfm.outputs.registry import BY_NAME, PRODUCTS


@pytest.fixture(scope='module')
def written(simulated, tmp_path_factory):
    """Outputs of one participant."""
    from bids_brainfm.cli.run import main

    folder = tmp_path_factory.mktemp('versions')
    out, work = folder / 'out', folder / 'work'
    arguments = [simulated, out, 'participant', '--participant-label', '01', '-w', work]
    arguments += ['--model', 'brainlm-demo', '--outputs', 'networks', '--nprocs', '1']
    assert main(list(map(str, arguments))) == 0
    return out


def sidecars(out):
    """Sidecars that name the inputs of an output, with their content."""
    found = {path: json.loads(path.read_text()) for path in out.glob('sub-*/**/*.json')}
    return {path: content for path, content in found.items() if 'InputFiles' in content}


@pytest.fixture
def earlier(written, tmp_path):
    """A copy in the form of version 0.1: no version of the results and no checksums anywhere."""
    out = tmp_path / 'out'
    shutil.copytree(written, out)
    for path, content in sidecars(out).items():
        del content['ResultsVersion'], content['FileChecksums']
        path.write_text(json.dumps(content))
    for path in (out / 'logs' / 'settings').iterdir():
        content = json.loads(path.read_text())
        del content['results_version']
        path.write_text(json.dumps(content))
    return out


def test_every_output_says_its_version(written):
    versions = {
        (path.name.rpartition('_')[2].removesuffix('.json'), content['ResultsVersion'])
        for path, content in sidecars(written).items()
    }
    assert ('timeseries', BY_NAME['series'].results_version) in versions
    assert ('relmat', BY_NAME['connectome'].results_version) in versions
    assert ('embedding', BY_NAME['embedding'].results_version) in versions
    assert len(versions) >= 6


def test_versions_rise_with_those_of_what_a_product_is_made_from():
    for product in PRODUCTS:
        for name in product.reads or ('series',) * (product.needs != 'bold'):
            assert product.results_version > BY_NAME[name].results_version, product.name


@pytest.mark.slow
def test_earlier_outputs_are_refused_and_made_again_on_request(
    simulated, written, earlier, app, capfd
):
    asked = '--participant-label', '01', '--outputs', 'networks'
    before = {path: path.read_bytes() for path in earlier.glob('sub-01/func/*')}
    assert app(simulated, earlier, *asked) == 2
    error = capfd.readouterr().err
    assert 'results version 1, now 2' in error
    assert 'add --recompute to make them again, or use another output folder' in error
    assert before == {path: path.read_bytes() for path in earlier.glob('sub-01/func/*')}

    assert app(simulated, earlier, '--recompute', *asked) == 0
    made = sidecars(earlier)
    assert len(made) == len(sidecars(written))
    assert all('ResultsVersion' in content for content in made.values())
    assert app(simulated, earlier, *asked) == 0  # nothing is left to do, nothing is refused
    assert '0 parcel series to make' in capfd.readouterr().err


def test_outputs_are_made_again_where_only_their_source_has_a_new_version(
    simulated, earlier, app, capfd
):
    """As after an update between the stages of a cohort: series are new, embeddings are not."""
    asked = '--participant-label', '01'
    (embedding,) = earlier.glob('sub-01/func/*brainlmdemo_embedding.json')
    old = embedding.read_bytes()
    assert app(simulated, earlier, '--recompute', '--stop-after', 'timeseries', *asked) == 0
    assert embedding.read_bytes() == old
    assert app(simulated, earlier, '--recompute', *asked) == 0
    assert json.loads(embedding.read_text())['ResultsVersion'] == (
        BY_NAME['embedding'].results_version
    )


def test_the_group_level_leaves_out_earlier_outputs_by_name(earlier, tmp_path, capfd, monkeypatch):
    from bids_brainfm.cli.run import main

    monkeypatch.chdir(tmp_path)
    assert main([str(earlier), str(earlier), 'group', '--scale-stats']) == 2
    error = capfd.readouterr().err
    assert 'stat-mean_timeseries.tsv is left out' in error
    assert '--recompute' in error


def test_reports_do_not_show_earlier_outputs(simulated, earlier, app):
    assert app(simulated, earlier, '--reports-only', '--participant-label', '01') == 0
    page = (earlier / 'sub-01.html').read_text()
    assert 'the outputs were written by another version of bids_brainfm' in page
    assert 'Mean brain signal' not in page
