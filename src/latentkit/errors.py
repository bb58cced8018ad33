"""The one error that means "the input is wrong", and how it names the nearest valid thing."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used: the message says what was got, what is allowed and what to do.

    The command line prints the message alone and exits with `exit_code` (2: the command was typed wrong, 1: the
    thing it names is unusable).
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A phrase that names the closest allowed names, for the end of an error message."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    shown = ", ".join(names[:20])
    return f"allowed: {shown}" + (", ..." if len(names) > 20 else "")
