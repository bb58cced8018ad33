"""`latentkit inspect`, `convert` and `diff`: model files of any layout."""

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    path: Annotated[Path, typer.Argument(help="A shipped model, a file, a run or a diffusers folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Say what a model file is, what it holds, and what is wrong with it."""
    from latentkit.checkpoints.layouts import report
    from latentkit.cli.adapters import inspected

    if inspected(_place(path), json):
        return
    found = report(_place(path))
    if json:
        import json as writer

        typer.echo(writer.dumps(found, ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(_lines(found)))
    if found["wrong"]:
        raise typer.Exit(1)


def _place(path: Path) -> Path:
    """A diffusers folder as it is, else what the name means wherever a model is named."""
    from latentkit.checkpoints.files import find

    return path if (path / "model_index.json").exists() else find(path)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['path']}: {found['kind']}, layout {found['layout']}, {found['parameters'] / 1e6:,.2f} M parameters",
        f"  predicts {found['prediction']} (the file says: {found['says'] or 'nothing'}); "
        f"trained at {found['size'][1]}x{found['size'][0]} px",
    ]
    for title, part in found["parts"].items():
        types = ", ".join(f"{count} {kind}" for kind, count in part["types"].items())
        lines.append(f"  {title:<13} {part['parameters'] / 1e6:10,.2f} M in {part['tensors']} tensors ({types})")
    lines += [f"  | {line}" for line in found["network"]]
    if found["averaged"]:
        lines.append("  has averaged weights too")
    for kind, names in found["ignored"].items():
        lines.append(f"  left aside: {kind} ({len(names)}: {names[0]}{', ...' if len(names) > 1 else ''})")
    lines += [f"  suspicious: {name} {why}" for name, why in found["suspicious"].items()]
    return lines + [f"  wrong: {line}" for line in found["wrong"]]


def convert(
    source: Annotated[Path, typer.Argument(help="A shipped model, a file, a run or a diffusers folder.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write; it must not exist.")],
    to: Annotated[str, typer.Option("--to", help="Layout: ldm, diffusers or latentkit; LoRAs: kohya, diffusers, ldm.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; as stored otherwise.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The model that an adapter is for, where that is none of Stable Diffusion's.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WEIGHT, a LoRA to put into the model's weights; repeatable.")
    ] = None,
    averaged: Annotated[
        bool | None, typer.Option("--averaged/--plain", help="Take averaged weights, or those they were averaged of.")
    ] = None,
) -> None:
    """Write a model in another layout, read it back, and prove that every weight is the same."""
    from typing import cast, get_args

    from latentkit.checkpoints.layouts import TYPES, Layout, differences, open_model, write_model
    from latentkit.checkpoints.ldm_file import OUR_FIRST_STAGE
    from latentkit.checkpoints.probe import settle
    from latentkit.cli.adapters import bake, converted
    from latentkit.errors import InputError, nearest

    if converted(source, target, to, base, {"dtype": dtype, "averaged": averaged, "lora": lora}):
        return
    if to not in get_args(Layout):
        raise InputError(f"layout {to!r} is unknown; {nearest(to, get_args(Layout))}", exit_code=2)
    if dtype is not None and dtype not in TYPES:
        raise InputError(f"type {dtype!r} is unknown; {nearest(dtype, TYPES)}", exit_code=2)
    if target.exists():
        raise InputError(f"{target} exists and is not overwritten; name another", exit_code=2)
    source = _place(source)
    opened = open_model(source, averaged=averaged)
    if not opened.certain:
        settle(opened.model, str(source))
    wanted = TYPES[dtype] if dtype else None
    if lora:
        bake(opened.model, lora, wanted)
    write_model(target, opened, cast(Layout, to), wanted)
    again = open_model(target)
    expected = {
        name: tensor.to(wanted) if wanted and not name.startswith("first_stage.latent") else tensor
        for name, tensor in opened.model.state_dict().items()
    }
    apart = differences(expected, again.model.state_dict())
    folded = {name for name in apart if name.startswith((f"{OUR_FIRST_STAGE}to_", f"{OUR_FIRST_STAGE}from_"))}
    statistics = {name for name in apart if name.startswith("first_stage.latent")}
    if (folded or statistics) and apart.keys() == folded | statistics and to != "latentkit":
        typer.echo(f"  latent statistics were folded into {len(folded)} tensors of the autoencoder")
    elif apart:
        first = next(iter(apart))
        raise InputError(f"{target} is not what was to be written: {first}: {apart[first]}, and {len(apart) - 1} more")
    count = len(expected) - len(apart)
    typer.echo(f"{target}: read back, {count} of {len(expected)} tensors bit for bit the same as in {source}")


def diff(
    first: Annotated[Path, typer.Argument(help="A model of any layout.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Say in which weights two models differ; exit code 1 if they do."""
    from latentkit.checkpoints.layouts import differences, open_model

    one, other = (open_model(_place(path)).model for path in (first, second))
    apart = differences(one.state_dict(), other.state_dict())
    for name, why in apart.items():
        typer.echo(f"{name}: {why}")
    if one.architecture != other.architecture:
        typer.echo("their architectures differ")
    typer.echo(f"{len(apart)} of {len(one.state_dict().keys() | other.state_dict().keys())} tensors differ")
    if apart:
        raise typer.Exit(1)
