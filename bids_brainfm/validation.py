"""Values that users give, and cards: YAML files, checked against the dataclass that they fill.

A field declares what it takes by its annotation and by a :class:`Condition` in ``Annotated``.
What does not fit is refused in one sentence: the file, the field, its value, what is accepted.
"""

import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from bids_brainfm.documents import read_yaml
from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DATA = Path(__file__).parent / 'data'
MIN_TR, MAX_TR = 0.01, 30  # seconds; a longer repetition time is in milliseconds
LARGEST = 1e15  # magnitude of any number in a card, a sidecar or a table
SMALLEST = 1e-9  # of what must be above 0
MOST = 1_000_000  # of anything that is counted
LABEL_PATTERN = re.compile('[A-Za-z0-9]+')  # of BIDS
WORDS = {bool: 'true or false', dict: 'a mapping', float: 'a number', int: 'a whole number',
         list: 'a list', str: 'text', tuple: 'a list'}  # fmt: skip
Kind = TypeVar('Kind', bound='DataclassInstance')


class Condition(NamedTuple):
    """What a value must fulfil in addition to its type, and a description of what is accepted."""

    holds: Callable[[Any], bool]
    accepted: str


def one_of(names: Collection[str]) -> Condition:
    """Accept one of several names."""
    return Condition(lambda value: value in names, f'one of {", ".join(names)}')


def between(low: float, high: float, accepted: str) -> Condition:
    """Accept numbers from `low` to `high`."""
    return Condition(lambda value: low <= value <= high, f'{accepted} and at most {high:g}')


Positive = Annotated[float, between(SMALLEST, 1 / SMALLEST, f'above 0 (at least {SMALLEST:g})')]
PositiveInt = Annotated[int, between(1, MOST, 'above 0')]
NotNegative = Annotated[float, between(0, 1 / SMALLEST, '0 or above')]
Count = Annotated[int, between(0, MOST, '0 or above')]
Proportion = Annotated[float, between(SMALLEST, 1, 'above 0')]
Seconds = Annotated[float, between(MIN_TR, MAX_TR, f'a repetition time in seconds, {MIN_TR:g}')]
LABEL = 'made of the letters A to Z and digits only (it goes into file names)'


def is_label(text: str) -> bool:
    """Whether BIDS allows this text as a label: letters of ASCII and digits."""
    return LABEL_PATTERN.fullmatch(text) is not None


Label = Annotated[str, Condition(is_label, LABEL)]


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """Whether this is a number (of a kind) of magnitude up to `LARGEST`; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    magnitude: Any = abs(value)  # type: ignore[arg-type]
    return bool(magnitude <= LARGEST)


def card_names(folder: str) -> list[str]:
    """Names of the cards in a folder of the package's data."""
    return sorted(path.stem for path in (DATA / folder).glob('*.yml'))


def read_card(name: str | Path, folder: str, what: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of a card of the package, by its name, or of the user's, by its path."""
    path, names = Path(name), card_names(folder)
    if str(name) in names:
        path = DATA / folder / f'{name}.yml'
    elif path.suffix not in ('.yml', '.yaml') and not path.is_file():
        raise BrainfmError(
            f'There is no {what} {name}: choose {", ".join(names)}, or give the path of one '
            'of your own (.yml).'
        )
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f'it is {WORDS.get(type(content), "empty")}')
    except FileNotFoundError:
        raise BrainfmError(f'The {what} {path} does not exist: check the path.') from None
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise BrainfmError(f'The {what} {path} is not a YAML mapping ({reason}).') from None
    return path, content


def build(kind: type[Kind], content: dict[str, Any], what: str, **given: Any) -> Kind:
    """Fill a dataclass from a mapping, after a check of its keys and values.

    Lists become tuples and mappings dataclasses where the annotations say so. `what` is read, such
    as ``The recipe mine.yml``, and begins the refusals. `given` may not be in the mapping.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in given}
    required = lambda field: field.default is field.default_factory is dataclasses.MISSING
    missing = [name for name in fields if name not in content and required(fields[name])]
    unknown = [_short(key) for key in content if key not in fields]
    faults = [f'lacks {", ".join(missing)}'] if missing else []
    faults += [f'has the unknown key {", ".join(unknown)}'] if unknown else []
    if faults:
        raise BrainfmError(f'{what} {" and ".join(faults)}; the keys are {", ".join(fields)}.')
    values = {}
    for name, value in content.items():
        try:
            values[name] = _convert(value, hints[name], what)
        except _Misfit as misfit:
            raise BrainfmError(f'{what}: {name} {misfit}.') from None
    try:
        return kind(**values, **given)
    except BrainfmError as error:
        raise BrainfmError(f'{what}: {error}') from None


def _short(value: object) -> str:
    """Return a value as one line of a sentence."""
    return ' '.join(str(value).split())[:60]


class _Misfit(Exception):
    """A value that is not what its field takes."""

    def __init__(self, value: object, accepted: str):
        is_number = accepted.endswith('number') and str(value)[:1].isdigit()
        hint = ' (YAML reads 1e-3 as text: write 1.0e-3)' if is_number else ''
        super().__init__(f'{value!r:.200} is not {accepted}{hint}')


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Return a value in the type of its field, or raise `_Misfit`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        converted = _convert(value, parts[0], what)
        if not parts[1].holds(converted):
            raise _Misfit(value, parts[1].accepted)
        return converted
    if origin in (types.UnionType, typing.Union):  # with None
        return None if value is None else _convert(value, parts[0], what)
    if origin is Literal:
        return _convert(value, Annotated[str, one_of(parts)], what)
    is_card, is_fixed = dataclasses.is_dataclass(hint), origin is tuple and ... not in parts
    basic = dict if is_card else origin or hint
    accepted: Any = {float: (int, float), tuple: (list, tuple)}.get(basic, basic)
    fits = isinstance(value, accepted)
    if basic in (int, float):
        if fits and LARGEST < abs(value) < math.inf:
            raise _Misfit(value, f'of a magnitude up to {LARGEST:g}')
        fits = fits and is_number(value)
    if not fits or (is_fixed and len(value) != len(parts)):
        raise _Misfit(value, f'a list of {len(parts)} values' if is_fixed else WORDS[basic])
    if origin is dict:
        return {_convert(k, parts[0], what): _convert(v, parts[1], what) for k, v in value.items()}
    if origin in (list, tuple):
        each = parts if is_fixed else parts[:1] * len(value)
        return origin(_convert(one, part, what) for one, part in zip(value, each, strict=True))
    if is_card:
        return build(hint, value, f'{what}, {_short(value["name"])}' if 'name' in value else what)
    return value
