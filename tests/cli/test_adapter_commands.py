"""`latentkit inspect` and `convert` with adapters: what they are, written in each layout with proof, baked in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family import model as random_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentkit.checkpoints.adapters import survey
from latentkit.checkpoints.adapters.control_files import write_control
from latentkit.checkpoints.adapters.lora_files import read_lora, write_lora
from latentkit.checkpoints.adapters.survey import bases, kind_of
from latentkit.checkpoints.files import Shapes, save_model
from latentkit.checkpoints.layouts import open_model
from latentkit.cli import application
from latentkit.errors import InputError
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change

BLOCK = "denoiser.unet.down.1.blocks.0.transformer.blocks.0"
NAMES = (f"{BLOCK}.cross_attention.k.weight", "denoiser.unet.down.0.blocks.0.residual.conv_in.weight")


def run(*words: Any) -> str:
    done = CliRunner().invoke(application(), [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def changes(shapes: dict[str, torch.Tensor], *names: str, alpha: float = 2.0) -> dict[str, Change]:
    torch.manual_seed(1)
    made = {}
    for name in names:
        out, *rest = shapes[name].shape
        made[name] = Change(torch.randn(4, *rest), torch.randn(out, 4, *(1 for _ in rest[1:])) * 0.1, alpha)
    return made


@pytest.mark.parametrize("index", range(4))
def test_loras_are_told_by_their_shapes_and_written_in_every_layout(index: int, tmp_path: Path) -> None:
    title, model = list(bases())[index]
    path = tmp_path / "style.safetensors"
    names = [NAMES[0], NAMES[1], "conditioners.text.towers.0.blocks.0.attention.v.weight"]
    made = changes(model.state_dict(), *names)
    write_lora(path, model, made)
    found = json.loads(run("inspect", path, "--json"))
    assert (found["kind"], found["base"], found["ranks"], found["alphas"]) == ("LoRA", title, {"4": 3}, [2.0])
    assert found["techniques"] == {"LoRA": 2, "LoCon": 1}
    assert found["parts"].keys() == {"U-Net", "text tower"}
    for to in ("kohya", "diffusers", "ldm") if index == 2 else ():
        target = tmp_path / f"{to}.safetensors"
        said = run("convert", path, target, "--to", to)
        assert f"a LoRA for {title}; read back, 3 of 3 changes exactly the same" in said
        again = read_lora(target, model).changes
        assert torch.equal(again[NAMES[0]].product() * (2.0 if to == "diffusers" else 1), made[NAMES[0]].product())
    if index != 2:
        return
    assert f"LoRA for {title}" in run("inspect", path)
    run("convert", tmp_path / "ldm.safetensors", tmp_path / "back.safetensors", "--to", "kohya")
    first, second = load_file(path), load_file(tmp_path / "back.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_alpha_that_no_type_holds_exactly_is_said(tmp_path: Path) -> None:
    _, model = next(bases())
    write_lora(tmp_path / "a.safetensors", model, changes(model.state_dict(), *NAMES, alpha=1.7))
    said = run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers")
    assert "changes exactly the same, the rest within" in said


def test_controlnets_and_inversions(tmp_path: Path) -> None:
    tiny = random_model("SD 1")
    save_model(tmp_path / "tiny.safetensors", tiny, {}, torch.float32)
    network = ControlNet(tiny.architecture.network)
    network.pooled = True
    write_control(tmp_path / "c.safetensors", network, "ldm")
    for source, target, to in (("c.safetensors", "folder", "diffusers"), ("folder", "again.safetensors", "ldm")):
        said = run("convert", tmp_path / source, tmp_path / target, "--to", to, "--base", tmp_path / "tiny.safetensors")
        assert "tensors bit for bit the same" in said
    first, second = load_file(tmp_path / "c.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [kind_of(tmp_path / name) for name in ("c.safetensors", "folder", "tiny.safetensors")] == [
        "ControlNet",
        "ControlNet",
        None,
    ]
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "cat.safetensors")
    found = json.loads(run("inspect", tmp_path / "cat.safetensors", "--json"))
    assert (found["kind"], found["base"], found["name"]) == ("textual inversion", "Stable Diffusion 1", "cat")
    with pytest.raises(InputError, match="is not converted"):
        run("convert", tmp_path / "cat.safetensors", tmp_path / "x", "--to", "ldm")


def test_a_full_size_controlnet_is_told_by_its_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentkit.checkpoints.adapters import control_files

    _, model = list(bases())[2]
    small = replace(model.architecture.network, depth=(0, 0, 0))
    with torch.device("meta"), Shapes():
        network = ControlNet(small, short=True)
        from latentkit.checkpoints.adapters.controlnet_names import controlnet_pairs
        from latentkit.checkpoints.names.rename import given

        tensors = given(controlnet_pairs(network, "diffusers"), network.state_dict())
    monkeypatch.setattr(control_files, "_read", lambda path: (dict(tensors), {}))
    title, found = survey.find_control(tmp_path / "c.safetensors")
    assert (title, found.network.config.depth, found.network.short) == ("Stable Diffusion XL", (0, 0, 0), True)


def test_spoiled_adapters_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not finite by the file's own names, whatever else is wrong; and what is out of proportion."""
    tiny = random_model("SD 1")
    monkeypatch.setattr(survey, "bases", lambda: iter([("a tiny family", tiny)]))
    write_lora(tmp_path / "lora.safetensors", tiny, changes(tiny.state_dict(), *NAMES))
    network = ControlNet(tiny.architecture.network)
    write_control(tmp_path / "control.safetensors", network, "ldm")
    write_control(tmp_path / "folder", network, "diffusers")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "cat.safetensors")

    def inspect(file: str, change: dict[str, float]) -> tuple[int, list[str]]:
        """Exit code, and what is wrong or suspicious, with tensors whose names hold such words multiplied."""
        path = tmp_path / file
        held, before = load_file(path), path.read_bytes()
        for word, factor in change.items():
            held |= {name: factor * tensor for name, tensor in held.items() if word in name}
        save_file(held, path)
        source = path.parent if path.parent != tmp_path else path
        done = CliRunner().invoke(application(), ["inspect", str(source)], catch_exceptions=False)
        path.write_bytes(before)
        return done.exit_code, [line for line in done.stdout.splitlines() if line.startswith(("  wrong", "  susp"))]

    down = "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"
    nan, plain = float("nan"), {"lora.safetensors": [], "cat.safetensors": []}
    for file, change, said in (
        *((file, {}, lines) for file, lines in plain.items()),
        ("lora.safetensors", {down: nan, "alpha": 0}, [f"wrong: {down} is not finite"]),
        ("lora.safetensors", {"lora_up": 0}, ["suspicious: all 2 changes are zero: this LoRA has no effect"]),
        ("lora.safetensors", {down: 0}, [f"suspicious: {NAMES[1]} is zero: it has no effect"]),
        ("cat.safetensors", {"": 1e5}, ["suspicious: tower 1.vectors has values of the size 1e+05"]),
        ("cat.safetensors", {"": 0}, ["suspicious: tower 1.vectors is all zero"]),
        ("cat.safetensors", {"": nan}, ["wrong: emb_params is not finite"]),
        (
            "control.safetensors",
            {"zero_convs.3.0.": nan, "time_embed.0.bias": nan},
            [f"wrong: {', '.join(f'control_model.{n}' for n in ('time_embed.0.bias', 'zero_convs.3.0.bias'))}, "],
        ),
        (
            "folder/diffusion_pytorch_model.safetensors",
            {"embedding.linear_1.bias": nan},
            ["wrong: time_embedding.linear_1.bias is not finite"],
        ),
        ("control.safetensors", {}, ["suspicious: skips and middle_out are all zero, as before training: this"]),
    ):
        code, lines = inspect(file, change)
        assert code == any(line.startswith("wrong") for line in said), lines
        kept = [line for line in lines if not line.endswith(".weight is all zero")]
        assert [line[2 : 2 + len(wanted)] for line, wanted in zip(kept, said, strict=True)] == said


def test_a_lora_baked_into_a_model(tmp_path: Path) -> None:
    tiny = random_model("SD 1")
    save_model(tmp_path / "tiny.safetensors", tiny, {}, torch.float32)
    made = changes(tiny.state_dict(), *NAMES)
    write_lora(tmp_path / "style.safetensors", tiny, made)
    style = tmp_path / "style.safetensors"
    said = run(
        "convert", tmp_path / "tiny.safetensors", tmp_path / "out", "--to", "diffusers", "--lora", f"{style}:0.8"
    )
    assert "1 LoRA put into 2 of the model's own weights" in said
    baked, own = open_model(tmp_path / "out").model.state_dict(), tiny.state_dict()
    for name in own:
        if name in made:
            torch.testing.assert_close(baked[name], made[name].applied(own[name], 0.8))
        elif name.startswith("denoiser."):
            assert torch.equal(baked[name], own[name])
    half = ("--dtype", "float16", "--lora", style, "--lora", f"{style}:-0.2")
    run("convert", tmp_path / "tiny.safetensors", tmp_path / "half", "--to", "diffusers", *half)
    other = random_model("XL")
    write_lora(tmp_path / "xl.safetensors", other, changes(other.state_dict(), NAMES[0]))
    with pytest.raises(InputError, match="changes a weight of shape"):
        run(
            "convert",
            tmp_path / "tiny.safetensors",
            tmp_path / "no",
            "--to",
            "ldm",
            "--lora",
            tmp_path / "xl.safetensors",
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_x.oft_blocks": torch.ones(2)}, "holds OFT"),
        ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "not known to this model"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(2)}, "down is missing"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "not of floating type"),
        ({"input_hint_block.0.weight": torch.ones(1, 1, 1, 1)}, "fits no known family"),
        ({"clip_l": torch.ones(2, 2, 2)}, "is no textual inversion"),
        ({"string_to_param.*": torch.ones(2), "x": torch.ones(2)}, "is no textual inversion"),
    ],
)
def test_broken_adapters_are_said_to_be(tensors: dict[str, torch.Tensor], said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    done = CliRunner().invoke(application(), ["inspect", str(path)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "wrong: " in done.stdout
    assert said in done.stdout


def test_what_convert_does_not_do(tmp_path: Path) -> None:
    _, model = next(bases())
    path = tmp_path / "a.safetensors"
    write_lora(path, model, changes(model.state_dict(), NAMES[0]))
    for words, said in (
        ((path, tmp_path / "b", "--to", "kohia"), "layout 'kohia' is none of a LoRA.*kohya"),
        ((path, path, "--to", "ldm"), "exists and is not overwritten"),
        ((path, tmp_path / "b", "--to", "ldm", "--dtype", "float16"), "takes no dtype"),
        ((path, tmp_path / "b", "--to", "ldm", "--variant", "fp16"), "takes no variant"),
        (("emoji", tmp_path / "b", "--to", "latentkit", "--base", path), "is no adapter"),
    ):
        with pytest.raises(InputError, match=said):
            run("convert", *words)
