"""The one exception a user reads."""


class BrainfmError(Exception):
    """A fault that the user can correct.

    The message is one sentence that names what was found, in which file or run, and what to do.
    """
