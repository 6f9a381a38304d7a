"""JSON, YAML, TOML and TSV files that users and other programs wrote, read within bounds.

A byte-order mark is skipped. What is too large, nests too deeply or grows too much when it is read
is refused before it takes memory. The errors are OSError and ValueError, whose text is a reason;
the caller knows what the file is and what to do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isal import isal_zlib

if TYPE_CHECKING:
    import pandas as pd
    import yaml

MEGABYTE = 1 << 20
MAX_BYTES = {'JSON': 64 * MEGABYTE, 'YAML': MEGABYTE // 4, 'TOML': MEGABYTE // 4,
             'TSV': 256 * MEGABYTE}  # fmt: skip
MAX_LINE = 4 * MEGABYTE  # bytes of the first lines of a table: a column costs memory of its own
MAX_DEPTH = 50  # levels of lists and mappings
MAX_VALUES = 100_000  # of a YAML file, with aliases (*) written out
ENCODING = 'utf-8-sig'  # UTF-8 with or without a byte-order mark
CHECKSUMS = 'FileChecksums'  # entry of our own JSON files: CRC-32 by extension


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    text = _text(path, 'JSON')
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if not isinstance(content, dict):
        raise ValueError(f'it holds no JSON object but a {type(content).__name__}')
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
    if level:
        raise ValueError(_TOO_DEEP)
    return content


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file fits the checksum in it; without one it counts as is."""
    recorded = content.get(CHECKSUMS, {}).get('.json')
    return recorded is None or recorded == checksum_of(content)


def checksum_of(content: Mapping[str, Any]) -> str:
    """CRC-32 of the content of a JSON file, whatever its layout, without its own checksum."""
    others = {key: value for key, value in content.get(CHECKSUMS, {}).items() if key != '.json'}
    text = json.dumps(dict(content) | {CHECKSUMS: others}, sort_keys=True)
    return text_checksum(text)


def text_checksum(text: str) -> str:
    """CRC-32 of a text, eight hexadecimal digits."""
    return f'{isal_zlib.crc32(text.encode()):08x}'


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; aliases count as if they were written out."""
    import yaml

    text = _text(path, 'YAML')
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (LookupError, AttributeError, TypeError) as error:  # of a tag that does not fit
        raise ValueError(f'a value does not fit its tag: {error}') from None
    except yaml.YAMLError as error:
        raise ValueError(' '.join(str(error).split())) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    import tomllib

    text = _text(path, 'TOML')
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_tsv(path: Path, **options: Any) -> 'pd.DataFrame':
    """Read a TSV file whose first row is its header; `options` are those of pandas.read_csv."""
    import pandas as pd

    _check_size(path, 'TSV')
    with Path(path).open('rb') as file:
        if max(len(file.readline(MAX_LINE + 1)) for _ in range(2)) > MAX_LINE:
            raise ValueError(f'a line of it has more than {MAX_LINE:,} bytes')
    table = pd.read_csv(path, **{'sep': '\t', 'encoding': ENCODING} | options)
    if not isinstance(table.index, pd.RangeIndex):  # pandas would shift the columns
        raise ValueError('its rows have more values than its header has names')
    return table


_TOO_DEEP = f'it nests more than {MAX_DEPTH} levels'


def _children(value: Any) -> list[Any]:
    """Lists and mappings, not empty, that a value holds."""
    held = value.values() if isinstance(value, dict) else value
    return [child for child in held if isinstance(child, dict | list) and child]


def _text(path: Path, kind: str) -> str:
    _check_size(path, kind)
    return Path(path).read_text(encoding=ENCODING)


def _check_size(path: Path, kind: str) -> None:
    size = Path(path).stat().st_size
    if size > MAX_BYTES[kind]:
        raise ValueError(
            f'it has {size / MEGABYTE:.0f} MB, and {MAX_BYTES[kind] / MEGABYTE:g} MB is the most '
            f'that is read of a {kind} file'
        )


def _check_nodes(root: 'yaml.Node') -> None:
    """Refuse a document that is large or deep once its aliases are written out."""
    stack: list[tuple[Any, int]] = [(root, 0)]
    count = 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if count > MAX_VALUES:
            raise ValueError(
                f'it holds more than {MAX_VALUES:,} values with its aliases written out'
            )
        if isinstance(node.value, list):  # of pairs for a mapping, of nodes for a sequence
            for item in node.value:
                children = item if isinstance(item, tuple) else (item,)
                stack += [(child, depth + 1) for child in children]
