"""Cards against the dataclasses that they fill: what is accepted, converted and refused."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from bids_brainfm.errors import BrainfmError
from bids_brainfm.validation import Condition, Proportion, build, card_names, one_of, read_card


@dataclass(frozen=True)
class Part:
    name: str
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size and self.size[0] > self.size[1]:
            raise BrainfmError('the first size must not be above the second.')


@dataclass(frozen=True)
class Card:
    path: str
    ratio: Proportion
    kind: Literal['a', 'b'] = 'a'
    method: Annotated[str, one_of(('x', 'y'))] = 'x'
    even: Annotated[int, Condition(lambda n: n % 2 == 0, 'even')] | None = None
    parts: tuple[Part, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    flag: bool = False


def make(**content):
    return build(Card, {'ratio': 1} | content, 'The card c.yml', path='p')


def test_lists_become_tuples_and_mappings_dataclasses():
    parts = [{'name': 'one', 'size': [1, 2]}, {'name': 'two'}]
    card = make(parts=parts, limits={'fd': 0.5}, rest={'any': [None]}, even=None, flag=True)
    assert card == Card('p', 1, parts=(Part('one', (1, 2)), Part('two')), limits={'fd': 0.5},
                        rest={'any': [None]}, flag=True)  # fmt: skip


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        ({'ratio': 'x'}, "ratio 'x' is not a number."),
        (
            {'ratio': '1e-3'},
            "'1e-3' is not a number (YAML reads 1e-3 as text: write 1.0e-3)",
        ),
        ({'ratio': True}, 'ratio True is not a number'),
        ({'ratio': float('nan')}, 'ratio nan is not a number'),
        ({'ratio': 2}, 'ratio 2 is not above 0 and at most 1'),
        ({'ratio': None}, 'ratio None is not a number'),
        ({'kind': 'c'}, "kind 'c' is not one of a, b"),
        ({'kind': ['a']}, "kind ['a'] is not text"),
        ({'method': 'z'}, "method 'z' is not one of x, y"),
        ({'even': 3}, 'even 3 is not even'),
        ({'even': 2.0}, 'even 2.0 is not a whole number'),
        ({'parts': 'one'}, "parts 'one' is not a list"),
        ({'parts': ['one']}, "parts 'one' is not a mapping"),
        ({'parts': [{'name': 'one', 'size': [1]}]}, 'one: size [1] is not a list of 2 values'),
        (
            {'parts': [{'name': 'one', 'extent': 1}]},
            'one has the unknown key extent; the keys are',
        ),
        ({'parts': [{'size': [1, 2]}]}, 'lacks name; the keys are name, size'),
        ({'parts': [{'name': 'one', 'size': [2, 1]}]}, 'one: the first size must not'),
        ({'limits': {'fd': float('inf')}}, 'limits inf is not a number'),
        ({'limits': {1: 0.5}}, 'limits 1 is not text'),
        ({'rest': []}, 'rest [] is not a mapping'),
        ({'flag': 1}, 'flag 1 is not true or false'),
        ({'path': 'q'}, 'has the unknown key path; the keys are ratio, kind'),
        ({3: 4}, 'has the unknown key 3'),
    ],
)
def test_what_does_not_fit_is_named(content, sentence):
    with pytest.raises(BrainfmError) as caught:
        build(Card, {'ratio': 1} | content, 'The card c.yml', path='p')
    assert sentence in str(caught.value)
    assert str(caught.value).startswith('The card c.yml')
    assert str(caught.value).endswith('.')


def test_missing_and_unknown_keys_are_one_sentence():
    with pytest.raises(BrainfmError, match='lacks ratio and has the unknown key ration; the keys'):
        build(Card, {'ration': 1}, 'The card c.yml', path='p')


def test_cards_by_name_and_by_path(tmp_path):
    for name in card_names('denoising'):
        path, content = read_card(name, 'denoising', 'preset')
        assert (path.stem, content['name']) == (name, name)
    with pytest.raises(BrainfmError, match=r'no preset simpel: choose 36P, .*your own'):
        read_card('simpel', 'denoising', 'preset')
    with pytest.raises(BrainfmError, match=r'no preset \.\./models/brainlm-demo'):
        read_card('../models/brainlm-demo', 'denoising', 'preset')
    own = tmp_path / 'own.yml'
    with pytest.raises(BrainfmError, match=r'preset .*own\.yml does not exist'):
        read_card(own, 'denoising', 'preset')
    own.write_bytes(b'a: \xff')
    with pytest.raises(BrainfmError, match='is not a YAML mapping'):
        read_card(own, 'denoising', 'preset')
    own.write_text('a: 1')
    assert read_card(str(own), 'denoising', 'preset') == (own, {'a': 1})
    plain = own.rename(tmp_path / 'plain')
    assert read_card(plain, 'denoising', 'preset') == (plain, {'a': 1})
