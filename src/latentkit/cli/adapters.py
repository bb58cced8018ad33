"""What `latentkit inspect` and `convert` do with LoRAs, ControlNets and textual inversions."""

from pathlib import Path
from typing import Any

import typer

from latentkit.errors import InputError


def inspected(path: Path, json: bool) -> bool:
    """Whether the file is an adapter, of which all is said then; exit code 1 where something is wrong with it."""
    from latentkit.checkpoints.adapters.survey import kind_of, report

    kind = kind_of(path)
    if kind is None:
        return False
    found = report(path, kind)
    if json:
        import json as writer

        typer.echo(writer.dumps(found, ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(_lines(found)))
    if found["wrong"]:
        raise typer.Exit(1)
    return True


def _lines(found: dict[str, Any]) -> list[str]:
    fits = f" for {found['base']}" if found["base"] else ""
    lines = [f"{found['path']}: {found['kind']}{fits}"]
    apart = ("path", "kind", "base", "suspicious", "wrong")
    shown = {name: value for name, value in found.items() if name not in apart and value}
    for name, value in shown.items():
        words = str(value)
        if isinstance(value, dict):
            words = ", ".join(f"{key}: {one}" for key, one in value.items())
        elif isinstance(value, list):
            words = ", ".join(map(str, value))
        lines.append(f"  {name.replace('_', ' '):<13} {words}")
    lines += [f"  suspicious: {name} {why}" for name, why in found["suspicious"].items()]
    return lines + [f"  wrong: {line}" for line in found["wrong"]]


def converted(source: Path, target: Path, to: str, base: Path | None, others: dict[str, Any]) -> bool:
    """Whether the source is an adapter, which then is written in the layout, read back and compared."""
    from latentkit.checkpoints.adapters.survey import convert, kind_of
    from latentkit.checkpoints.layouts import open_model

    kind = kind_of(source) if source.exists() else None
    if kind is None:
        if base is not None:
            raise InputError(f"--base says what model an adapter is for, and {source} is no adapter", exit_code=2)
        return False
    if given := [name for name, value in others.items() if value is not None]:
        raise InputError(f"{source} is a {kind}, whose conversion takes no {' and no '.join(given)}", exit_code=2)
    typer.echo(convert(source, target, kind, to, open_model(base).model if base else None))
    return True


def bake(model: Any, texts: list[str], dtype: Any) -> None:
    """Put the LoRAs ("FILE" or "FILE:WEIGHT") into the model's own weights, computed in float32 and rounded once.

    With `dtype` the weights are of that type before, so that what they are rounded to is what is written.
    """
    from latentkit.checkpoints.adapters.lora_files import read_lora
    from latentkit.checkpoints.adapters.survey import instead
    from latentkit.nets.lora import Adapted

    adapters = []
    for text in texts:
        path, _, weight = text.rpartition(":")
        try:
            path, strength = (path, float(weight)) if path else (text, 1.0)
        except ValueError:
            path, strength = text, 1.0
        try:
            adapters.append((read_lora(path, model).changes, strength))
        except InputError as error:
            raise instead(error, Path(path), "a LoRA") from None
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    Adapted(model, adapters)
    count = len({name for changes, _ in adapters for name in changes})
    typer.echo(f"  {len(adapters)} LoRA{'s' * (len(adapters) > 1)} put into {count} of the model's own weights")
