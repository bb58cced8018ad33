"""`latentkit inspect`, `convert` and `diff`: model files of any layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    path: Annotated[Path, typer.Argument(help="A shipped model, a file, a run or a diffusers folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Say what a model file is, what it holds, and what is wrong with it."""
    from latentkit.checkpoints.adapters.survey import instead
    from latentkit.checkpoints.exchange import WITH_ONE
    from latentkit.checkpoints.layouts import report
    from latentkit.cli.adapters import inspected
    from latentkit.errors import InputError

    if inspected(located(path), json):
        return
    try:
        found = report(located(path))
    except InputError as error:
        raise instead(error, path, "a whole model", *WITH_ONE) from None
    if json:
        import json as writer

        typer.echo(writer.dumps(found, ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(_lines(found)))
    if found["wrong"]:
        raise typer.Exit(1)


def located(path: Path) -> Path:
    """A diffusers folder, or a LoRA's, as it is, else what the name means wherever a model is named."""
    from latentkit.checkpoints.adapters.survey import kind_of
    from latentkit.checkpoints.files import find

    foreign = any((path / name).exists() for name in ("model_index.json", "config.json"))
    return path if foreign or (path.is_dir() and kind_of(path)) else find(path)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['path']}: {found['kind']}, layout {found['layout']}, {found['parameters'] / 1e6:,.2f} M parameters",
    ]
    if found["prediction"]:
        says, (height, width) = found["says"] or "nothing", found["size"]
        lines.append(f"  predicts {found['prediction']} (the file says: {says}); trained at {width}x{height} px")
    for title, part in found["parts"].items():
        types = ", ".join(f"{count} {kind}" for kind, count in part["types"].items())
        lines.append(f"  {title:<13} {part['parameters'] / 1e6:10,.2f} M in {part['tensors']} tensors ({types})")
        lines += [f"  | {line}" for line in part["picture"]]
    if found["averaged"]:
        other = "convert --plain takes the others" if found["averaged"] == "taken" else "convert --averaged takes them"
        lines.append(f"  has averaged weights, which are {found['averaged']}; {other}")
    lines += _aside(found["left"])
    lines += [f"  suspicious: {name} {why}" for name, why in found["suspicious"].items()]
    return lines + [f"  wrong: {line}" for line in found["wrong"]]


def _aside(left: Mapping[str, list[str]], of: str = "") -> list[str]:
    """Names of what takes no part in a model, a line for each kind; `of` a file that gave a part of it."""
    return [f"  left aside{of}: {kind}: {', '.join(names)}" for kind, names in left.items() if names]


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
    vae: Annotated[
        Path | None, typer.Option(help="An autoencoder (or a model with one) to put in the place of the model's.")
    ] = None,
    unet: Annotated[Path | None, typer.Option(help="A U-Net to put in the place of the model's.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Which weights of a diffusers folder that has several: fp16, non_ema, ...")
    ] = None,
) -> None:
    """Write a model in another layout, read it back, and prove that every weight is the same.

    An autoencoder alone is written alone.
    """
    from typing import Literal, cast, get_args

    from latentkit.checkpoints.exchange import left_aside, with_part
    from latentkit.checkpoints.layouts import TYPES, Layout, open_model, write_model
    from latentkit.checkpoints.probe import settle
    from latentkit.checkpoints.storage.folders import undone
    from latentkit.cli.adapters import bake, converted
    from latentkit.errors import InputError, nearest

    if converted(source, target, to, base, {"dtype": dtype, "averaged": averaged, "lora": lora, "variant": variant}):
        return
    if to not in get_args(Layout):
        raise InputError(f"layout {to!r} is unknown; {nearest(to, get_args(Layout))}", exit_code=2)
    if dtype is not None and dtype not in TYPES:
        raise InputError(f"type {dtype!r} is unknown; {nearest(dtype, TYPES)}", exit_code=2)
    if target.exists():
        raise InputError(f"{target} exists and is not overwritten; name another", exit_code=2)
    source = located(source)
    wanted = TYPES[dtype] if dtype else None
    given = {"lora": lora, "averaged": averaged, "vae": vae, "unet": unet, "variant": variant}
    if _converted_alone(source, target, to, wanted, [name for name, value in given.items() if value is not None]):
        return
    opened = open_model(source, averaged=averaged, variant=variant)
    aside = _aside(opened.left)
    parts: dict[Literal["vae", "unet"], Path | None] = {"vae": vae, "unet": unet}
    for kind, part in parts.items():
        if part is not None:
            opened = opened._replace(model=with_part(opened.model, located(part), kind))
            aside += _aside(left_aside(located(part)), f" of {part}")
    if not opened.certain:
        settle(opened.model, str(source))
    if lora:
        bake(opened.model, lora, wanted)
    with undone(target):
        write_model(target, opened, cast(Layout, to), wanted)
        lines, proof = _proven(target, opened, to, wanted)
    typer.echo("".join(f"{line}\n" for line in lines + aside), nl=False)
    put_in = [str(path) for path in (vae, unet) if path is not None] + (lora or [])
    origin = " with ".join([str(source), *([" and ".join(put_in)] if put_in else [])])
    typer.echo(f"{target}: read back, {proof} tensors bit for bit the same as in {origin}")


def _proven(target: Path, opened: Any, to: str, dtype: Any) -> tuple[list[str], str]:
    """What is to be said of a model that was written, and how many of its tensors are the same; InputError if wrong."""
    from latentkit.checkpoints.layouts import differences, open_model
    from latentkit.checkpoints.ldm_file import OUR_FIRST_STAGE
    from latentkit.errors import InputError

    again, lines = open_model(target), []
    expected = {
        name: tensor.to(dtype) if dtype and not name.startswith("first_stage.latent") else tensor
        for name, tensor in opened.model.state_dict().items()
    }
    apart = differences(expected, again.model.state_dict())
    folded = {name for name in apart if name.startswith((f"{OUR_FIRST_STAGE}to_", f"{OUR_FIRST_STAGE}from_"))}
    statistics = {name for name in apart if name.startswith("first_stage.latent")}
    if (folded or statistics) and apart.keys() == folded | statistics and to != "latentkit":
        lines.append(f"  latent statistics were folded into {len(folded)} tensors of the autoencoder")
    elif apart:
        first = next(iter(apart))
        raise InputError(f"{target} is not what was to be written: {first}: {apart[first]}, and {len(apart) - 1} more")
    return lines + _lost(opened, again), f"{len(expected) - len(apart)} of {len(expected)}"


def _lost(opened: Any, again: Any) -> list[str]:
    """What of a model besides its weights is not in what was written, by name."""
    from latentkit.checkpoints.doctor.difference import fields_apart

    names = [*fields_apart(opened.model.architecture, again.model.architecture)]
    names += fields_apart(opened.model.state(), again.model.state())
    names += sorted(opened.provenance.keys() - again.provenance.keys() - {"name"})
    return [f"  not held by this layout: {', '.join(names)}"] if names else []


def _converted_alone(source: Path, target: Path, to: str, dtype: Any, given: list[str]) -> bool:
    """Whether the source is a part alone: of those an autoencoder is written and compared, and takes no options."""
    from latentkit.checkpoints.adapters.tiny_files import is_tiny
    from latentkit.checkpoints.files import load_autoencoder, save_autoencoder
    from latentkit.checkpoints.layouts import differences
    from latentkit.checkpoints.lone import lone_first_stage, lone_part, write_first_stage
    from latentkit.checkpoints.storage.folders import undone
    from latentkit.errors import InputError

    if is_tiny(source):
        raise InputError(f"{source} is a tiny autoencoder alone; {_put_in(source, target, to, 'vae')}", exit_code=2)
    lone = lone_part(source)
    if lone is None:
        return False
    stage = lone_first_stage(source)
    if stage is None or given:
        what = f"{source} is a {lone.part} alone" + (f", which takes no --{' and no --'.join(given)}" if given else "")
        raise InputError(f"{what}; {_put_in(source, target, to, 'vae' if stage else 'unet')}", exit_code=2)
    with undone(target):
        if to == "latentkit":
            save_autoencoder(target, stage, {"source": f"{lone.part} alone"}, dtype or stage.dtype)
            again = load_autoencoder(target, dtype=None)
        else:
            write_first_stage(target, stage, to, dtype)
            again = lone_first_stage(target) or stage
        assert stage.autoencoder is not None
        assert again.autoencoder is not None
        expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stage.autoencoder.state_dict().items()}
        if apart := differences(expected, again.autoencoder.state_dict()):
            more = f"{next(iter(apart))} and {len(apart) - 1} more differ"
            raise InputError(f"{target} is not what was to be written: {more}")
    typer.echo("".join(f"{line}\n" for line in _aside(lone.left)), nl=False)
    typer.echo(f"{target}: read back, {len(expected)} of {len(expected)} tensors bit for bit the same as in {source}")
    return True


def _put_in(part: Path, target: Path, to: str, option: str) -> str:
    return f"to put it into a model: latentkit convert MODEL {target} --to {to} --{option} {part}"


def diff(
    first: Annotated[Path, typer.Argument(help="A model of any layout, a part of one, a LoRA, ControlNet, inversion.")],
    second: Annotated[Path, typer.Argument(help="Another of that kind.")],
    base: Annotated[
        Path | None, typer.Option(help="The model that adapters are for, where that is none of Stable Diffusion's.")
    ] = None,
) -> None:
    """Say in which weights two models, parts of models or adapters differ; exit code 1 if they do."""
    from latentkit.checkpoints.doctor.difference import compared, fields_apart
    from latentkit.checkpoints.layouts import differences, open_model
    from latentkit.errors import InputError

    model = open_model(located(base)).model if base else None
    one, other = (compared(located(path), model) for path in (first, second))
    if one.kind != other.kind:
        raise InputError(f"{first} is a {one.kind} and {second} is a {other.kind}; give two of a kind", exit_code=2)
    apart, said = differences(one.weights, other.weights), fields_apart(one.said, other.said)
    if None in said.get("statistics", ()):  # a bare file does not say them
        del said["statistics"]
    for name, why in apart.items():
        typer.echo(f"{name}: {why}")
    for name, values in said.items():
        typer.echo(f"{name} differs: {' and '.join(str(value)[:80] for value in values)}")
    typer.echo(f"{len(apart)} of {len(one.weights.keys() | other.weights.keys())} tensors differ")
    if apart or said:
        raise typer.Exit(1)
