"""The one exception a user reads."""


class BrainfmError(Exception):
    """Something the user can mend.

    The message is one sentence that names what was found, in which file or run, and what to do.
    """
