"""The recipes of the images agree; tests/containers/run.sh builds and runs them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def definition(name):
    """Lines of a section of the Apptainer definition."""
    text = (ROOT / 'singularity' / 'bids_brainfm.def').read_text()
    return re.search(rf'^%{name}\n(.*?)(?=^%|\Z)', text, re.M | re.S)[1].splitlines()


def test_both_images_have_the_same_environment_and_arguments():
    dockerfile = (ROOT / 'Dockerfile').read_text().replace('\\\n', ' ')
    variables = re.search(r'^ENV (.*)$', dockerfile, re.M)[1]
    exported = [line.split()[1] for line in definition('environment') if line.strip()]
    assert sorted(variables.split()) == sorted(exported)
    defaults = {line.strip() for line in definition('arguments') if line.strip()}
    for argument in defaults:
        assert re.search(rf'^ARG {re.escape(argument.removesuffix("="))}$', dockerfile, re.M)
    assert {argument.split('=')[0] for argument in defaults} == {'BASE', 'TORCH_INDEX', 'VERSION'}


def test_images_have_the_torch_that_is_tested():
    pinned = re.search(r'^torch==\S+$', (ROOT / 'constraints.txt').read_text(), re.M)[0]
    assert pinned in (ROOT / 'docker' / 'install.sh').read_text().split()


def test_the_image_gets_the_transforms_that_atlases_need(tmp_path, monkeypatch):
    """The program within install.sh, without TemplateFlow itself."""
    source = tmp_path / 'from' / 'tpl-X' / 'transform.h5'
    source.parent.mkdir(parents=True)
    source.write_text('transform')
    asked = []
    monkeypatch.setattr(
        'bids_brainfm.atlases.obtain.template_transform',
        lambda name: asked.append(name) or source,
    )
    monkeypatch.setattr('sys.argv', ['-', str(tmp_path)])
    text = (ROOT / 'docker' / 'install.sh').read_text()
    exec(re.search(r"<<'END'\n(.*?)^END$", text, re.M | re.S)[1], {})
    assert asked
    assert (tmp_path / 'tpl-X' / 'transform.h5').read_text() == 'transform'
