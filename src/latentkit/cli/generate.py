"""`latentkit generate`: draw pictures with a model."""

from pathlib import Path
from typing import Annotated

import typer

from latentkit.errors import InputError


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several draw several.")] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped model, a model file or a run folder.")
    ] = "emoji",
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt, with seeds counting up.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("out"),
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture (default: drawn at random).")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    sampler: Annotated[str | None, typer.Option(help="How to step: dpm++2m, euler, heun, ...")] = None,
    spacing: Annotated[str | None, typer.Option(help="Which noise levels to visit: uniform, karras, ...")] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels (default: as the model was trained).")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Class to draw, for a model with classes.")] = None,
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    also: Annotated[
        list[str] | None, typer.Option(help="PROMPT:WEIGHT, drawn along with each prompt (whose weight is 1).")
    ] = None,
    guidance_kind: Annotated[str | None, typer.Option(help="cfg, cfg++ (scales 0 to 1) or apg (high scales).")] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="Share of the contrast gained by guidance that is given back, 0 to 1.")
    ] = None,
    guidance_low: Annotated[float | None, typer.Option(help="Lowest noise level that is guided.")] = None,
    guidance_high: Annotated[float | None, typer.Option(help="Highest noise level that is guided.")] = None,
    guidance_model: Annotated[str | None, typer.Option(help="A weaker model to lead away from (autoguidance).")] = None,
    pag: Annotated[float | None, typer.Option(help="Strength of perturbed-attention guidance; 0 is none.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Dynamic thresholding at this share of the values (models of pixels).")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Share of ancestral noise, of samplers that take it.")] = None,
    churn: Annotated[float | None, typer.Option(help="Temporary noise, of samplers that take it.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Picture to start from (image-to-image, inpainting, upscaling).")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Inpainting: what is white in this picture is repainted in --init.")
    ] = None,
    extend: Annotated[
        str | None, typer.Option(help="Outpainting: LEFT,TOP,RIGHT,BOTTOM pixels to add to --init.")
    ] = None,
    paste: Annotated[
        bool, typer.Option("--paste/--no-paste", help="Inpainting keeps the very pixels outside of the mask.")
    ] = True,
    strength: Annotated[float | None, typer.Option(help="Share of the path done again from --init, 0 to 1.")] = None,
    semantic_map: Annotated[
        Path | None, typer.Option("--map", help="PNG of class numbers, one a pixel, for models that draw by them.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(help='JSON of [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}], for layout models.')
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="How near everything is (white: near), for models that take it.")
    ] = None,
    noise_level: Annotated[
        int | None,
        typer.Option(
            help="Noise on --init (upscaling, 0 to 350) or --variation (unCLIP): more leaves more to the model."
        ),
    ] = None,
    variation: Annotated[
        Path | None, typer.Option(help="Picture to draw variations of, for models that are told pictures.")
    ] = None,
    original_size: Annotated[
        str | None, typer.Option(help="SD XL: WIDTHxHEIGHT that the picture is said to have had before it was cut.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="SD XL: LEFT,TOP pixels that are said to have been cut off (default: 0,0).")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="SD XL: WIDTHxHEIGHT that it is said to be drawn for.")
    ] = None,
    aesthetic: Annotated[
        float | None, typer.Option(help="SD XL refiner: how much people like the picture, 0 to 10 (default: 6).")
    ] = None,
    negative_aesthetic: Annotated[
        float | None, typer.Option(help="SD XL refiner: the same of what is led away from (default: 2.5).")
    ] = None,
    refiner: Annotated[str | None, typer.Option(help="A model that does the last steps (SD XL's refiner).")] = None,
    refiner_switch: Annotated[
        float | None, typer.Option(help="Share of the noise levels before the refiner takes over (default: 0.8).")
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="1: CLIP's text towers whole; 2 leaves out the last block (A1111's number).")
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="An autoencoder (a file, a folder, a model) in the place of the model's; a tiny one is fast."
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:NAME, a textual inversion that prompts say; repeatable.")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE or FILE:WEIGHT, a LoRA to put on; repeatable.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE:HINT.png or FILE:HINT.png:WEIGHT, a ControlNet, and behind it if wanted :start=0.1 :end=0.6 "
            "(shares of the steps), :guess (without words), :kind=canny (a union's kind of hint), :pooled (shuffle); "
            "repeatable."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="What computes the networks: torch, or openvino (pip install latentkit[openvino])."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="One at a time: a batch equals its singles bit by bit.")
    ] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Parts of the model are in memory only while they are needed.")
    ] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Write one sheet of all pictures too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per picture.")] = False,
) -> None:
    """Draw pictures. Prints the path of each; never writes over a file."""
    from latentkit.applications.attachment import Attachment, Guide, WeightsFile
    from latentkit.applications.backend import read
    from latentkit.applications.generate import generate as run
    from latentkit.applications.request import ask
    from latentkit.applications.tasks.places import read_boxes
    from latentkit.checkpoints.files import load
    from latentkit.cli.models import located
    from latentkit.cli.output import check_folder, show, slug, write_new
    from latentkit.data.maps import decode_map
    from latentkit.data.pictures import visible

    width, height = _size(size)
    fields = {
        "label": label,
        "negative": negative,
        "also": [_weighted(text) for text in also] if also else None,
        "seed": seed,
        "width": width,
        "height": height,
        "sampler": sampler,
        "spacing": spacing,
        "steps": steps,
        "guidance_scale": guidance,
        "guidance_kind": guidance_kind,
        "guidance_rescale": guidance_rescale,
        "guidance_low": guidance_low,
        "guidance_high": guidance_high,
        "guidance_model": None if guidance_model is None else Guide.read(guidance_model, low_memory=low_memory),
        "pag_scale": pag,
        "threshold": threshold,
        "eta": eta,
        "churn": churn,
        "init": Attachment.read(init) if init else None,
        "strength": strength,
        "mask": Attachment.read(mask) if mask else None,
        "extend": _numbers(extend, 4, "extend", "LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,64,0"),
        "paste": None if paste else False,
        "semantic_map": Attachment.read(semantic_map, decode_map) if semantic_map else None,
        "layout": read_boxes(boxes) if boxes else None,
        "depth": Attachment.read(depth) if depth else None,
        "noise_level": noise_level,
        "variation": Attachment.read(variation) if variation else None,
        "original_size": _extent(original_size),
        "crop": _numbers(crop, 2, "crop", "LEFT,TOP in pixels, such as 0,128"),
        "target_size": _extent(target_size),
        "aesthetic_score": aesthetic,
        "negative_aesthetic_score": negative_aesthetic,
        "refiner": None if refiner is None else Guide.read(refiner, low_memory=low_memory),
        "refiner_switch": refiner_switch,
        "clip_skip": clip_skip,
        "autoencoder": WeightsFile.read(located(vae)) if vae else None,
        "embedding": [_embedding(text) for text in embedding] if embedding else None,
        "lora": [_lora(text) for text in lora] if lora else None,
        "control": [_control(text) for text in control] if control else None,
        "backend": backend,
    }
    requests = [ask(prompt=prompt, **fields) for prompt in prompts] if prompts else [ask(**fields)]
    loaded = read(model, whole=bool(lora)) if backend == "openvino" else load(model, low_memory=low_memory)
    events = run(loaded, requests, count=count, exact=exact, low_memory=low_memory)
    check_folder(out)
    drawn = {}
    for result in show(events):
        words = result.request.prompt or result.request.label or str(result.request.task)
        data = result.file()
        path = write_new(out, f"{slug(words) or 'picture'}-{result.request.seed}", *data)
        typer.echo(_line(path, data[1], result.request.model_dump(mode="json", exclude_none=True)) if json else path)
        if grid:
            drawn[result.number] = visible(result.picture, result.alpha)
    if grid:
        from latentkit.data.pictures import grid as arrange
        from latentkit.data.pictures import to_png

        sheet = to_png(arrange([picture for _, picture in sorted(drawn.items())]))
        path = write_new(out, "grid", "png", sheet)
        typer.echo(_line(path, sheet, {"task": "grid"}) if json else path)


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of "64x48" or "64"."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise InputError(f"size {text!r} is not WIDTHxHEIGHT in pixels, such as 64x48", exit_code=2) from None


def _extent(text: str | None) -> list[int | None] | None:
    """Width and height of "64x48", if any."""
    return None if text is None else list(_size(text))


def _numbers(text: str | None, count: int, what: str, wanted: str) -> list[int] | None:
    """The `count` numbers of "0,0,64,0"."""
    try:
        numbers = None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if numbers is not None and len(numbers) != count:
        raise InputError(f"{what} {text!r} is not {wanted}", exit_code=2)
    return numbers


def _embedding(text: str) -> list[object]:
    """File and name of "style.safetensors:<style>"; a file's own name is None."""
    from latentkit.applications.attachment import WeightsFile

    path, _, name = text.rpartition(":")
    if not path or Path(text).exists():
        path, name = text, ""
    return [WeightsFile.read(path), name or None]


def _lora(text: str) -> list[object]:
    """File and weight of "style.safetensors:0.8"."""
    from latentkit.applications.attachment import WeightsFile

    path, weight = _weighted(text)
    before, _, last = text.rpartition(":")
    if path == text and before and not Path(text).exists() and Path(before).exists():
        raise InputError(f"lora {text!r} is not FILE or FILE:WEIGHT: {last!r} is no number", exit_code=2)
    return [WeightsFile.read(str(path)), weight]


TERMS = {"start": "0.1", "end": "0.6", "guess": None, "pooled": None, "kind": "canny"}
"""What may follow a ControlNet, with an example of its value."""


def _control(text: str) -> list[object]:
    """File, hint, weight and terms of "canny.safetensors:edges.png:0.8:end=0.6"."""
    from pydantic import ValidationError

    from latentkit.applications.attachment import Attachment, WeightsFile
    from latentkit.applications.request import Terms
    from latentkit.checkpoints.files import invalid
    from latentkit.errors import nearest

    parts, terms, weights = text.split(":"), dict[str, object](), list[object]()
    while len(parts) > 1:
        name, sign, value = parts[-1].partition("=")
        if name in terms:
            raise InputError(f"control {text!r} says {name} twice; once is enough", exit_code=2)
        if name in TERMS:
            terms[name] = _term(text, name, value if sign else None)
        elif sign and name.isidentifier() and len(parts) > 2:
            raise InputError(f"control {text!r}: term {name!r} is unknown; {nearest(name, TERMS)}", exit_code=2)
        elif len(parts) > 2 and _weighted(f"x:{parts[-1]}")[0] == "x":
            if weights:
                raise InputError(f"control {text!r} says two weights; one is enough", exit_code=2)
            weights = _weighted(f"x:{parts[-1]}")[1:]
        else:
            break
        parts.pop()
    path, hint = ":".join(parts[:-1]), parts[-1]
    if not path or not hint:
        raise InputError(f"control {text!r} is not FILE:HINT.png or FILE:HINT.png:WEIGHT", exit_code=2)
    if len(parts) > 2 and not Path(path).exists():
        raise InputError(f"control {text!r}: {hint!r} is neither a weight nor one of {', '.join(TERMS)}", exit_code=2)
    try:
        Terms.model_validate(terms)
    except ValidationError as error:
        raise invalid(error, f"control {text!r}", exit_code=2) from None
    return [WeightsFile.read(path), Attachment.read(hint), *(weights or [1.0]), *([terms] if terms else [])]


def _term(text: str, name: str, value: str | None) -> object:
    """The value of a term; None: it has none."""
    if TERMS[name] is None:
        if value is not None:
            raise InputError(
                f"control {text!r}: {name} takes no value; leave it out where it is not wanted", exit_code=2
            )
        return True
    if not value:
        raise InputError(f"control {text!r}: {name} needs a value, such as {name}={TERMS[name]}", exit_code=2)
    try:
        return value if name == "kind" else float(value)
    except ValueError:
        raise InputError(f"control {text!r} has {name} {value!r}, which is no number", exit_code=2) from None


def _weighted(text: str) -> list[object]:
    """Words and weight of "dog:0.5"; without a number behind the last colon the weight is 1."""
    words, _, weight = text.rpartition(":")
    try:
        return [words, float(weight)] if words else [text, 1.0]
    except ValueError:
        return [text, 1.0]


def _line(path: Path, data: bytes, request: dict[str, object]) -> str:
    import hashlib
    import json

    described = {"path": str(path), "sha256": hashlib.sha256(data).hexdigest(), **request}
    return json.dumps(described, ensure_ascii=False)
