"""The one error that means "the input is wrong", and how it names the nearest valid thing."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """Input that cannot be used: the message says what was got, what is allowed and what to do.

    The command line prints the message alone and exits with `exit_code` (2: the command was typed wrong, 1: the
    thing it names is unusable).
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def together(*attempts: Callable[[], object]) -> None:
    """Make every attempt; of the InputErrors that they raise, one that says what each says."""
    said: list[str] = []
    for attempt in attempts:
        try:
            attempt()
        except InputError as error:
            said.append(str(error))
    if said:
        raise InputError("; ".join(dict.fromkeys(said)))


def close(name: str, allowed: Iterable[str]) -> str:
    """The question whether one of the closest allowed names was meant; empty where none is close."""
    found = difflib.get_close_matches(name, sorted(allowed), n=3, cutoff=0.5)
    return "did you mean " + " or ".join(repr(n) for n in found) + "?" if found else ""


def nearest(name: str, allowed: Iterable[str], *, every: bool = False) -> str:
    """A phrase that names the closest allowed names, for the end of an error message; with `every` all of them too."""
    names = sorted(allowed)
    question = close(name, names)
    if question and not every:
        return question
    shown = names if every else names[:20]
    listed = f"allowed: {', '.join(shown)}" + (", ..." if len(names) > len(shown) else "")
    return f"{question} {listed}".lstrip()


_WORDING = {
    "missing": "is missing",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dataclass_type", "dict_type"), "must be a section of keys"
    ),
    "string_type": "must be text",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}",
}


def wording(problem: Mapping[str, Any]) -> str:
    """What a validation problem (one of pydantic's `errors()`) says, in words for a person, with what was got."""
    kind = problem["type"]
    said = problem["msg"].removeprefix("Value error, ")
    if kind in _WORDING:
        limits = {
            k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in problem.get("ctx", {}).items()
        }
        said = _WORDING[kind].format(**limits)
    return said if kind in ("missing", "value_error") else f"{said} (got {repr(problem['input'])[:60]})"
