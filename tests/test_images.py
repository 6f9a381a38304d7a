"""Gzip as zlib reads it, and headers that cannot be true."""

import gzip
import io
import resource
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bids_brainfm.errors import BrainfmError
from bids_brainfm.images import BROKEN, GzipReader, load_image, read_values

AFFINE = np.diag([2.0, 2, 2, 1])


def member(content, level=6, name=b'', extra=b'', comment=b'', checked=False):
    """A member of a gzip stream, with what RFC 1952 allows in its header."""
    flags = 2 * checked + 4 * bool(extra) + 8 * bool(name) + 16 * bool(comment)
    head = b'\x1f\x8b\x08' + bytes([flags]) + bytes(4) + b'\0\xff'
    head += len(extra).to_bytes(2, 'little') + extra if extra else b''
    head += name + b'\0' if name else b''
    head += comment + b'\0' if comment else b''
    head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, 'little') if checked else b''
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    body = deflate.compress(content) + deflate.flush()
    end = zlib.crc32(content).to_bytes(4, 'little') + len(content).to_bytes(4, 'little')
    return head + body + end


texts = st.binary(min_size=1, max_size=20).map(lambda text: text.replace(b'\0', b'x'))
contents = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda seed, n: np.random.default_rng(seed).bytes(n), st.integers(0, 9),
              st.integers(0, 300_000)),
    st.builds(lambda part, n: part * n, st.binary(max_size=5), st.integers(0, 50_000)),
)  # fmt: skip
members = st.builds(
    member, contents, st.sampled_from([0, 1, 6, 9]), texts | st.just(b''),
    st.binary(max_size=300), texts | st.just(b''), st.booleans(),
)  # fmt: skip
padding = st.integers(0, 600).map(bytes)
after = st.binary(max_size=50).filter(lambda rest: not rest.lstrip(b'\0').startswith(b'\x1f\x8b'))


def inflate(stream):
    return io.BufferedReader(GzipReader(io.BufferedReader(io.BytesIO(stream)))).read()


def inflate_by_zlib(stream):
    """All members, by zlib's own inflate."""
    found = b''
    while stream.startswith(b'\x1f\x8b'):
        part = zlib.decompressobj(31)
        found += part.decompress(stream)
        if not part.eof:
            raise EOFError
        stream = part.unused_data.lstrip(b'\0')
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(members, padding), min_size=1, max_size=4), after)
def test_whole_streams_are_read_as_zlib_reads_them(parts, rest):
    stream = b''.join(one + zeros for one, zeros in parts)
    assert inflate(stream + rest) == inflate_by_zlib(stream)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(members, st.floats(0, 0.999))
def test_cut_streams_are_refused(whole, where):
    with pytest.raises(BROKEN):
        inflate(whole[: int(where * len(whole))])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(members, st.floats(0, 0.999), st.integers(0, 7))
def test_a_turned_bit_is_refused_or_changes_nothing(whole, where, bit):
    """A bit of a name or a time of change is nothing that a reader looks at."""
    wrong = bytearray(whole)
    wrong[int(where * len(whole))] ^= 1 << bit
    try:
        found = inflate(bytes(wrong))
    except BROKEN:
        return
    assert found in (inflate_by_zlib(whole), b'')
    assert found or wrong[:2] != whole[:2] or not inflate_by_zlib(whole)


def test_members_that_begin_anywhere_in_a_chunk(monkeypatch):
    """A header that comes in two parts is read."""
    monkeypatch.setattr('bids_brainfm.images.CHUNK', 1000)
    parts = [np.random.default_rng(n).bytes(990 + n) for n in range(40)]
    stream = b''.join(member(part, 0, b'name', b'extra', b'why', checked=True) for part in parts)
    assert inflate(stream) == b''.join(parts)


def saved(path, shape=(6, 6, 6, 12), **fields):
    """A file of zeros or noise, with other values in fields of its header."""
    data = np.random.default_rng(0).normal(1000, 10, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else
                    path.read_bytes())  # fmt: skip
    header = np.frombuffer(raw[:348], nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.tobytes()
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == '.gz' else bytes(raw))
    return path


BOMB = [4, 3000, 3000, 1000, 3, 1, 1, 1]
AFFINES = {
    'zeros': np.zeros((3, 4)),
    'huge': np.full((3, 4), 1e30),
    'NaN': np.full((3, 4), np.nan),
    'flat': [[2, 0, 0, 0], [0, 2, 0, 0], [2, 2, 0, 0]],
    'skewed to a plane': [[2, 2, 0, 0], [0, 1e-5, 0, 0], [0, 0, 2, 0]],
    'far': [[2, 0, 0, 1e30], [0, 2, 0, 0], [0, 0, 2, 0]],
    'metres': np.eye(3, 4) * 0.002,
}


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('mask', [True, False])
def test_a_header_that_claims_an_enormous_shape_takes_no_memory(tmp_path, suffix, mask):
    """It is refused by the size of its file, or by the grid of the mask."""
    from bids_brainfm.signals.parcellate import parcellate

    bold = saved(tmp_path / f'bold{suffix}', dim=BOMB)
    atlas = saved(tmp_path / 'atlas.nii', (6, 6, 6))
    inside = saved(tmp_path / 'mask.nii', (6, 6, 6)) if mask else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BrainfmError, match='cannot hold'):
        parcellate(bold, atlas, 4, inside)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_volume_that_is_too_large_is_refused_though_its_file_could_hold_it(tmp_path):
    """Zeros take a thousandth of their size."""
    path = saved(tmp_path / 'zeros.nii.gz', dim=[3, 3000, 3000, 20, 1, 1, 1, 1])
    with path.open('ab') as file:
        file.truncate(10**6)
    with pytest.raises(BrainfmError, match=r'more than 100,000,000 voxels'):
        load_image(path)


@pytest.mark.parametrize('name', AFFINES)
def test_an_affine_without_a_place_in_space_is_refused(tmp_path, name):
    rows = dict(zip(('srow_x', 'srow_y', 'srow_z'), AFFINES[name], strict=True))
    path = saved(tmp_path / 'bold.nii', sform_code=1, **rows)
    with pytest.raises(BrainfmError, match=r'bold\.nii has an affine that gives its voxels no'):
        load_image(path)


@pytest.mark.parametrize(
    'fields',
    [{'scl_slope': 1e30}, {'scl_slope': 1e-30}, {'scl_slope': 1, 'scl_inter': 1e30},
     {'vox_offset': 1e30}, {'vox_offset': -4}, {'dim': [4, 0, 6, 6, 12, 1, 1, 1]},
     {'dim': [4, -6, 6, 6, 12, 1, 1, 1]}, {'datatype': 77}],
)  # fmt: skip
def test_other_headers_that_cannot_be_true_are_refused(tmp_path, fields):
    with pytest.raises(BrainfmError, match=r'bold\.nii'):
        load_image(saved(tmp_path / 'bold.nii', **fields))


@pytest.mark.parametrize('kind', [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(('size', 'offset'), [(2**31 - 16, 0), (0, 0), (16, 10**9), (-8, 0)])
def test_header_extensions_take_no_memory(tmp_path, monkeypatch, kind, size, offset):
    """nibabel would read all that an extension claims; the check is before."""
    image = kind(np.ones((2, 2, 2), 'f4'), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'of a scanner' * 3))
    path = tmp_path / 'a.nii.gz'
    image.to_filename(path)
    assert load_image(path).shape == (2, 2, 2)
    content = bytearray(gzip.decompress(path.read_bytes()))
    start = image.header.sizeof_hdr + 4
    content[start : start + 4] = size.to_bytes(4, 'little', signed=True)
    if offset:
        place, form = {348: (108, '<f4'), 540: (168, '<i8')}[image.header.sizeof_hdr]
        content[place : place + np.dtype(form).itemsize] = np.array(offset, form).tobytes()
    path.write_bytes(gzip.compress(content))
    monkeypatch.setattr(nib, 'load', lambda path: pytest.fail('it was read'))
    with pytest.raises(BrainfmError, match=r'its data begin at byte|a header extension has'):
        load_image(path)


def test_values_are_those_of_nibabel_and_damage_is_seen(tmp_path):
    path = saved(tmp_path / 'bold.nii.gz', scl_slope=0.5, scl_inter=3)
    whole = path.read_bytes()
    wanted = np.asanyarray(nib.load(path).dataobj)
    assert np.array_equal(read_values(load_image(path)), wanted)
    path.write_bytes(whole + b'not gzip' * 9)
    assert np.array_equal(read_values(load_image(path)), wanted)
    for wrong in (whole[:-5], whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]):
        path.write_bytes(wrong)
        with pytest.raises(BrainfmError, match='truncated or damaged'):
            read_values(load_image(path))
