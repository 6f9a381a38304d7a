"""The one exception a user reads, and how its sentences list many names."""

from collections.abc import Collection


class BrainfmError(Exception):
    """A fault that the user can correct.

    The message is one sentence that names what was found, in which file or run, and what to do.
    """


def abridge(names: Collection[str], most: int = 5) -> str:
    """Join names, of many only the first.

    >>> abridge(['a', 'b', 'c'], 2)
    'a, b and 1 more'
    """
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(list(names)[:most]) + more
