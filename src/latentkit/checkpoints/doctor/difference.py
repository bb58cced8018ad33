"""What differs between two models, parts or adapters: weights, shapes and what else they say, by name."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def fields_apart(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs or mappings differ, of nested ones as `outer.inner`, with what each has."""
    first, second = (_flat(asdict(part) if is_dataclass(part) else part) for part in (one, other))  # type: ignore[arg-type]
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return {name: (first.get(name), second.get(name)) for name in names}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            found |= _flat(dict(zip(map(str, range(len(value))), value)), f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
