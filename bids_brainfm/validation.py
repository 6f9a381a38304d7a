"""Values that users give, and cards: YAML files, checked against the dataclass that they fill.

A field declares what it takes by its annotation and by a :class:`Condition` in ``Annotated``.
What does not fit is refused in one sentence: the file, the field, its value, what is accepted.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from bids_brainfm.errors import BrainfmError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DATA = Path(__file__).parent / 'data'
MAX_TR = 30  # seconds; a longer repetition time is in milliseconds
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


Positive = Annotated[float, Condition(lambda value: value > 0, 'above 0')]
PositiveInt = Annotated[int, Condition(lambda value: value > 0, 'above 0')]
Proportion = Annotated[float, Condition(lambda value: 0 < value <= 1, 'above 0 and at most 1')]
LABEL = 'made of letters and digits only (it goes into file names)'
Label = Annotated[str, Condition(str.isalnum, LABEL)]


def is_number(value: Any, kind: type = numbers.Real) -> bool:
    """Whether this is a number (of a kind); text, True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def card_names(folder: str) -> list[str]:
    """Names of the cards in a folder of the package's data."""
    return sorted(path.stem for path in (DATA / folder).glob('*.yml'))


def read_card(name: str | Path, folder: str, what: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of a card of the package, by its name, or of the user's, by its path."""
    import yaml

    path, names = Path(name), card_names(folder)
    if str(name) in names:
        path = DATA / folder / f'{name}.yml'
    elif path.suffix not in ('.yml', '.yaml') and not path.is_file():
        raise BrainfmError(
            f'There is no {what} {name}: choose {", ".join(names)}, or give the path of one '
            'of your own (.yml).'
        )
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError(f'it is {WORDS.get(type(content), "empty")}')
    except FileNotFoundError:
        raise BrainfmError(f'The {what} {path} does not exist: check the path.') from None
    except (OSError, ValueError, yaml.YAMLError) as error:
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
    unknown = [str(key) for key in content if key not in fields]
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


class _Misfit(Exception):
    """A value that is not what its field takes."""

    def __init__(self, value: object, accepted: str):
        is_number = accepted.endswith('number') and str(value)[:1].isdigit()
        hint = ' (YAML reads 1e-3 as text: write 1.0e-3)' if is_number else ''
        super().__init__(f'{value!r} is not {accepted}{hint}')


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
    is_true = isinstance(value, bool) and basic is not bool
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    fits = isinstance(value, accepted) and not is_true and not is_infinite
    if not fits or (is_fixed and len(value) != len(parts)):
        raise _Misfit(value, f'a list of {len(parts)} values' if is_fixed else WORDS[basic])
    if origin is dict:
        return {_convert(k, parts[0], what): _convert(v, parts[1], what) for k, v in value.items()}
    if origin in (list, tuple):
        each = parts if is_fixed else parts[:1] * len(value)
        return origin(_convert(one, part, what) for one, part in zip(value, each, strict=True))
    if is_card:
        return build(hint, value, f'{what}, {value["name"]}' if 'name' in value else what)
    return value
