"""Damaged headers, tables, sidecars and cards: a sentence or a right number, never a traceback."""

import json
import resource
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_brainfm.errors import BrainfmError

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / 'bids_brainfm' / 'data'
T, SHAPE = 30, (6, 6, 6)
MEGABYTES = 600  # of memory that a series of cases may add to the process
TOKENS = (
    b'1e300', b'-1e300', b'1e-300', b'NaN', b'nan', b'inf', b'-Infinity', b'.inf', b'-.inf',
    b'n/a', b'', b'0', b'-1', b'1e9', b'999999999999999999999', b'9' * 400, b'true', b'null',
    b'"', b"'", b'\t', b'\n', b'\r\n', b'\0', b'\xff', b'\xef\xbb\xbf', b'[', b'{', b']', b'}',
    b':', b',', b'*a', b'&a ', b'[' * 3000, b'{"a":' * 3000, b'!!int ', b'!!timestamp x',
    b'!!python/name:os.system ', b'<<: ', b'1_000', b'0x1F', b'1:30', b'2001-01-01', b'~', b'- ',
    b'? ', b'\\ud800', b'\xc3\xa9',
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 127, 255, 32767, -32768, 3000, 1e-40, 1e-30, 1e30, 3e38, np.inf, np.nan)


def damaged(rng, content):
    """Text with one to three faults: bytes lost, doubled or exchanged, or tokens put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(content) + 1))
        stop = start + int(rng.choice([0, 1, 5, 40]))
        kind, token = rng.integers(6), TOKENS[rng.integers(len(TOKENS))]
        if kind == 0:
            content[start:stop] = token
        elif kind == 1:  # one value: from a delimiter to the next
            begin = max(
                content.rfind(mark, 0, start) for mark in (b'\t', b': ', b'\n', b',', b' ')
            )
            ends = [content.find(mark, start) for mark in (b'\t', b'\n', b',')]
            end = min((place for place in ends if place >= 0), default=len(content))
            content[begin + 1 : end] = token
        elif kind == 2:
            del content[start:stop]
        elif kind == 3:
            content[start:start] = content[start:stop] * int(rng.choice([1, 50]))
        elif kind == 4:
            del content[start:]
        elif content:
            content[start % len(content)] = rng.integers(256)
    return bytes(content)


def survive(cases, work):
    """Run `work` on all cases; gives how many were read, and how many refused in a sentence."""
    before, refusals = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    cases = list(cases)
    for i, case in enumerate(cases):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('error', RuntimeWarning)
                work(case)
        except BrainfmError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f'case {i}: {case!r:.300}') from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, grown
    assert [text for text in refusals if len(text) > 2500 or '\n' in text] == []
    return len(cases) - len(refusals), len(refusals)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with its mask and atlas, uncompressed."""
    folder, rng = tmp_path_factory.mktemp('run'), np.random.default_rng(0)
    data = rng.uniform(400, 1200, SHAPE)[..., None] + 10 * rng.standard_normal((*SHAPE, T))
    labels = 1 + np.arange(216).reshape(SHAPE) // 54
    for name, values in (('bold', data), ('mask', np.ones(SHAPE)), ('atlas', labels)):
        image = nib.Nifti1Image(values.astype(np.int16), np.diag([2.0, 2, 2, 1]))
        nib.save(image, folder / f'{name}.nii')
    axis = nib.cifti2.BrainModelAxis.from_surface(np.arange(216), 300, 'cortex_left')
    table = nib.cifti2.LabelAxis(['a'], {0: ('none', (0, 0, 0, 0)), 1: ('a', (1, 0, 0, 1))})
    time = nib.cifti2.SeriesAxis(0, 1, T)
    for name, values, first in (
        ('bold.dtseries', data.reshape(-1, T).T, time),
        ('atlas.dlabel', labels.reshape(1, -1), table),
    ):  # fmt: skip
        nib.save(
            nib.Cifti2Image(values.astype('f4'), header=(first, axis)), folder / f'{name}.nii'
        )
    return folder


def changed_fields(rng, path, header, number):
    """Copies of an image with other values in one to three fields of its header."""
    content = path.read_bytes()
    names = [name for name in header.names if name != 'magic']
    for _ in range(number):
        raw = np.frombuffer(content[: header.itemsize], header).copy()
        for name in rng.choice(names, rng.integers(1, 4)):
            field = raw[name].reshape(-1)
            value = NUMBERS[rng.integers(len(NUMBERS))]
            with np.errstate(all='ignore'), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                if field.dtype.kind in 'iuf':
                    field[rng.integers(field.size)] = np.float64(value).astype(field.dtype)
                else:
                    field[:] = rng.bytes(field.dtype.itemsize)
            raw[name] = field.reshape(raw[name].shape)
        yield raw.tobytes() + content[header.itemsize :]


@pytest.mark.parametrize('which', ['bold', 'mask', 'atlas'])
def test_headers_of_nifti_files(run, tmp_path, which):
    """What is read is finite, and right where the header says the same of the data."""
    from bids_brainfm.signals.parcellate import parcellate

    paths = {name: run / f'{name}.nii' for name in ('bold', 'mask', 'atlas')}
    truth = parcellate(paths['bold'], paths['atlas'], 4, paths['mask'])
    paths[which] = tmp_path / f'{which}.nii'
    same = ('dim', 'datatype', 'bitpix', 'vox_offset', 'scl_slope', 'scl_inter', 'sform_code',
            'qform_code', 'srow_x', 'srow_y', 'srow_z', 'sizeof_hdr')  # fmt: skip
    header = nib.Nifti1Header.template_dtype
    whole = np.frombuffer((run / f'{which}.nii').read_bytes()[:348], header)

    def work(content):
        paths[which].write_bytes(content)
        found = parcellate(paths['bold'], paths['atlas'], 4, paths['mask'])
        assert np.isfinite(found.data[:, found.coverage > 0]).all()
        assert np.isfinite(found.brain_mean)
        raw = np.frombuffer(content[:348], header)
        if all(raw[name].tobytes() == whole[name].tobytes() for name in same):
            np.testing.assert_array_equal(found.data, truth.data)

    rng = np.random.default_rng(1)
    read, refused = survive(changed_fields(rng, run / f'{which}.nii', header, 200), work)
    assert read > 20
    assert refused > 20


@pytest.mark.parametrize('which', ['bold.dtseries', 'atlas.dlabel'])
def test_headers_of_cifti_files(run, tmp_path, which):
    """Both the header of NIfTI-2 and the description in XML."""
    from bids_brainfm.signals.parcellate import parcellate

    paths = {name: run / f'{name}.nii' for name in ('bold.dtseries', 'atlas.dlabel')}
    whole = paths[which].read_bytes()
    paths[which] = tmp_path / f'{which}.nii'
    offset = int(np.frombuffer(whole[:540], nib.Nifti2Header.template_dtype)['vox_offset'][0])

    def work(content):
        paths[which].write_bytes(content)
        found = parcellate(*paths.values(), 4)
        assert np.isfinite(found.data[:, found.coverage > 0]).all()

    rng = np.random.default_rng(2)
    fields = nib.Nifti2Header.template_dtype
    survive(changed_fields(rng, run / f'{which}.nii', fields, 100), work)
    described = [whole[:552] + damaged(rng, whole[552:offset]) for _ in range(100)]
    survive([text[:offset].ljust(offset, b' ') + whole[offset:] for text in described], work)


@pytest.mark.parametrize('strategy', ['simple', '36P', 'acompcor', 'none'])
def test_tables_of_confounds(simulated, tmp_path, strategy):
    """Series that are denoised with what is read are finite."""
    from bids_brainfm.signals.confounds import Tables, count_dummy, read_confounds
    from bids_brainfm.signals.denoise import denoise
    from bids_brainfm.signals.quality import motion
    from bids_brainfm.signals.strategy import load_strategy

    table = next(simulated.glob('sub-01/func/*_desc-confounds_timeseries.tsv'))
    frame = pd.read_csv(table, sep='\t')[:60]
    whole = frame.to_csv(sep='\t', index=False, na_rep='n/a').encode()
    sidecar = tmp_path / 'confounds.json'
    shutil.copy(table.with_suffix('.json'), sidecar)
    plan, path = load_strategy(strategy), tmp_path / 'confounds.tsv'
    data = np.random.default_rng(0).normal(1000, 10, (60, 5)).astype('f4')
    tables = Tables(path, sidecar)

    def work(content):
        path.write_bytes(content)
        count_dummy(path, 60)
        found = read_confounds(tables, plan, 60, 0.8)
        clean, _ = denoise(data, found, plan, 0.8)
        assert np.isfinite(clean).all()
        assert np.abs(clean).max() < 1e5
        motion(path)

    rng = np.random.default_rng(3)
    work(whole)
    survive([damaged(rng, whole) for _ in range(100)], work)


def documents(simulated):
    """Every kind of JSON and YAML file that is read: its content, and what reads it."""
    from bids_brainfm.atlases import cards as atlases
    from bids_brainfm.bids.description import generators, read_description
    from bids_brainfm.bids.inputs.filters import read_filters
    from bids_brainfm.bids.run import BoldRun, repetition_time, start_time
    from bids_brainfm.models.cards import load_card
    from bids_brainfm.models.weights import build, read_config
    from bids_brainfm.signals.confounds import Tables, read_confounds
    from bids_brainfm.signals.scale import load_scale_stats
    from bids_brainfm.signals.strategy import load_strategy, override
    from bids_brainfm.training.recipe import load_recipe

    func = simulated / 'sub-01' / 'func'
    table = next(func.glob('*_desc-confounds_timeseries.tsv'))
    volumes, compcor = len(pd.read_csv(table, sep='\t')), load_strategy('acompcor')
    stats = {'FormatVersion': 1, 'Atlas': 'A', 'Statistic': 'series', 'Median': [1.0, 2.0],
             'IQR': [1.0, 2.0], 'Lower': [-1.0, -1.0], 'Upper': [1.0, 1.0]}  # fmt: skip
    config = load_card('brainlm-demo').config
    jepa = load_card('brain-jepa-demo').config

    def times(path):
        run = BoldRun('r', {'sub': '01'}, 'd', path.parent, path, sidecars=(path,))
        assert 0 < repetition_time(run) <= 30
        assert np.isfinite(start_time(run) or 0)

    def network(path):
        build(read_config(path.parent))

    def card(path):
        found = load_card(path)
        assert 1e-9 <= found.divide_by <= 1e9
        assert found.label.isascii()
        build(found.config)

    text = lambda content: json.dumps(content, indent=1).encode()
    own = lambda *parts: DATA.joinpath(*parts).read_bytes()
    return {
        'sidecar.json': (next(func.glob('*_bold.json')).read_bytes(), times),
        'dataset_description.json': (
            (simulated / 'dataset_description.json').read_bytes(),
            lambda path: generators(read_description(path.parent)),
        ),
        'confounds.json': (
            table.with_suffix('.json').read_bytes(),
            lambda path: read_confounds(Tables(table, path), compcor, volumes, 0.8),
        ),
        'stats.json': (text(stats), lambda path: load_scale_stats(path, 'A', 2)),
        'filter.json': (text({'bold': {'task': 'rest', 'run': [1, 2]}}), read_filters),
        'config.json': (text(config), network),
        'jepa/config.json': (text(jepa), network),
        'model.yml': (own('models', 'brainlm-111m.yml'), card),
        'jepa.yml': (own('models', 'brain-jepa-vitb.yml'), card),
        'atlas.yml': (own('atlases', 'A424.yml'), atlases.load_card),
        'denoising.yml': (
            own('denoising', 'acompcor.yml'), lambda path: override(load_strategy(path), scrub=2)
        ),
        'recipe.yml': (own('training', 'brainlm-vit.yml'), load_recipe),
    }  # fmt: skip


NAMES = ('sidecar.json', 'dataset_description.json', 'confounds.json', 'stats.json', 'filter.json',
         'config.json', 'jepa/config.json', 'model.yml', 'jepa.yml', 'atlas.yml', 'denoising.yml',
         'recipe.yml')  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_sidecars_and_cards(simulated, tmp_path, name):
    """Values that are read are within bounds, and none takes memory or time."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    whole, read = documents(simulated)[name]

    def work(content):
        path.write_bytes(content)
        read(path)

    work(whole)
    rng = np.random.default_rng(sum(name.encode()))
    survive([damaged(rng, whole) for _ in range(75)], work)
