"""A file given where another kind was wanted is named as what it is; folders of LoRAs; words that are wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import family
import pytest
import torch
from safetensors.torch import save_file

from latentkit.applications.attachment import Attachment, WeightsFile
from latentkit.applications.request import ask
from latentkit.checkpoints.adapters.control_files import write_control
from latentkit.checkpoints.adapters.lora_files import read_lora, write_lora
from latentkit.checkpoints.adapters.survey import holding, kind_of
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.files import save_autoencoder, save_model
from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.lone import write_first_stage
from latentkit.data.pictures import to_png
from latentkit.diffusion.noise import keyed_normal
from latentkit.errors import InputError
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change

Run = Callable[..., int]
ASKED = ("generate", "cat", "-m", "sd.safetensors", "--steps", "2", "--seed", "1")
QUERY = "denoiser.unet.down.1.blocks.0.transformer.blocks.0.cross_attention.q.weight"


def changes() -> dict[str, Change]:
    down, up = keyed_normal((4, 64), 1, "down"), keyed_normal((64, 4), 1, "up")
    return {QUERY: Change(down * 0.1, up * 0.1, 2.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file or folder of each kind."""
    root, model = tmp_path_factory.mktemp("files"), family.model("SD 1")
    save_model(root / "sd.safetensors", model, {}, torch.float32)
    write_single(root / "single.safetensors", model, "t")
    write_folder(root / "pipe", model)
    write_lora(root / "style.safetensors", model, changes())
    (root / "styles").mkdir()
    write_lora(root / "styles" / "pytorch_lora_weights.safetensors", model, changes(), "diffusers")
    write_lora(root / "styles" / "other.safetensors", model, changes())
    (root / "style-alone").mkdir()
    write_lora(root / "style-alone" / "mine.safetensors", model, changes())
    (root / "two").mkdir()
    for name in "ab":
        write_lora(root / "two" / f"{name}.safetensors", model, changes())
    write_control(root / "canny.safetensors", ControlNet(model.architecture.network), "ldm")
    write_control(root / "canny", ControlNet(model.architecture.network), "diffusers")
    save_file({"emb_params": torch.randn(2, 32)}, root / "emb.safetensors")
    write_first_stage(root / "vae.safetensors", model.first_stage, "ldm")
    save_autoencoder(root / "own-vae.safetensors", model.first_stage, {})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, root / "odd.safetensors")
    (root / "hint.png").write_bytes(to_png(torch.zeros(3, 32, 32)))
    (root / "empty").mkdir()
    return root


HOLDS = {
    "sd.safetensors": "a whole model", "single.safetensors": "a whole model", "pipe": "a whole model",
    "style.safetensors": "a LoRA", "styles": "a LoRA", "canny.safetensors": "a ControlNet", "canny": "a ControlNet",
    "emb.safetensors": "a textual inversion", "vae.safetensors": "an autoencoder alone",
    "pipe/vae": "an autoencoder alone", "own-vae.safetensors": "an autoencoder alone", "pipe/unet": "a U-Net alone",
    "pipe/text_encoder": "a CLIPTextModel",
}  # fmt: skip
UNKNOWN = ("odd.safetensors", "hint.png", "empty", "none", "two")
WANTED = {
    "--lora {}": "a LoRA",
    "--control {}:hint.png": "a ControlNet",
    "--embedding {}": "a textual inversion",
    "--vae {}": "an autoencoder",
    "--refiner {}": "a whole model",
    "--guidance-model {}": "a whole model",
    "-m {}": "a whole model",
}


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Run:
    """Runs the command in the folder; gives the exit code."""
    monkeypatch.chdir(folder)
    out = ("--out", str(tmp_path / "out"))
    return lambda *words: run(*words, *(out if words[0] == "generate" else ()))


def test_what_files_hold(folder: Path) -> None:
    assert {name: holding(folder / name) for name in HOLDS} == HOLDS
    assert {name: holding(folder / name) for name in UNKNOWN} == dict.fromkeys(UNKNOWN)


@pytest.mark.parametrize("option", WANTED)
def test_other_kinds_are_named(option: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = WANTED[option]
    for name, holds in HOLDS.items():
        if holds == wanted or (wanted == "an autoencoder" and holds in ("an autoencoder alone", "a whole model")):
            continue
        assert run(*ASKED, *option.format(name).split()) == 2, name
        assert f"{name} is {holds}; wanted is {wanted}" in capsys.readouterr().err.replace(
            "pytorch_lora_weights", ""
        ), name


def test_what_is_known_to_be_right_keeps_its_own_complaint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--lora", "odd.safetensors"), "a, b are not known to this model"),
        (("--control", "empty:hint.png"), "empty: is no ControlNet: diffusers' folder of one has a config.json"),
        (("--lora", "two"), "two: is a folder with 2 .safetensors files; a LoRA's has one"),
        (("--lora", "empty"), "empty: is a folder with 0 .safetensors files"),
        (("-m", "XL.safetensors", "--lora", "style.safetensors"), "no model 'XL.safetensors'"),
        (("--refiner", ""), "holds no model"),
        (("--guidance-model", ""), "holds no model"),
    ):
        assert run(*ASKED, *words) in (1, 2)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lora style.safetensors:half",
            "lora 'style.safetensors:half' is not FILE or FILE:WEIGHT: 'half' is no number",
        ),
        ("--lora style.safetensors:1000", "request: weight of lora 1: must be at most 100 (got 1000.0)"),
        ("--control canny:hint.png:101", "request: weight of control 1: must be at most 100 (got 101.0)"),
        ("--control canny:hint.png:star=1", "term 'star' is unknown; did you mean 'start'?"),
        ("--control canny:hint.png:start=2", "control 'canny:hint.png:start=2': start: must be at most 1 (got 2.0)"),
        ("--control canny:hint.png:start=.6:end=.5", "start=.6:end=.5': start 0.6 must be below end 0.5"),
        ("--control canny:hint.png:start=", "start needs a value, such as start=0.1"),
        ("--control canny:hint.png:kind", "kind needs a value, such as kind=canny"),
        ("--control canny:hint.png:heavy", "'heavy' is neither a weight nor one of start, end, guess, pooled, kind"),
        ("--control canny:hint.png:1:2", "says two weights"),
    ],
)
def test_wrong_words(words: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, *words.split()) == 2
    assert message in capsys.readouterr().err


def test_terms_in_python_are_named_without_pydantics_union(folder: Path) -> None:
    file, hint = WeightsFile.read(folder / "canny"), Attachment.read(folder / "hint.png")
    wrong: tuple[tuple[Any, str], ...] = (
        ([file, hint, 0.5, {"start": 2.0}], r"request: terms start of control 1: must be at most 1 \(got 2.0\)$"),
        ([file, hint, 0.5, {"begin": 0.5}], "request: 'terms begin of control 1' is unknown$"),
        ([file, hint, "x"], r"request: weight of control 1: must be a number \(got 'x'\)$"),
        ([file, hint], "request: weight of control 1: is missing$"),
        (5, "control"),
    )
    for entry, message in wrong:
        with pytest.raises(InputError, match=message):
            ask(prompt="x", control=[entry])
    with pytest.raises(InputError, match="request: autoencoder: a file of weights is given as"):
        ask(prompt="x", autoencoder="vae.safetensors")


def test_a_folder_of_a_lora_draws_as_its_file(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for name in ("styles/pytorch_lora_weights.safetensors", "styles", "style-alone", "style-alone/mine.safetensors"):
        assert run(*ASKED, "--lora", f"{name}:0.5") == 0
        pictures.append(Path(capsys.readouterr().out.strip()))
    from latentkit.data.pictures import decode

    arrays = [decode(path.read_bytes(), "x").array for path in pictures]
    assert all((array == arrays[0]).all() for array in arrays)
    assert (
        run("replay", str(pictures[1]), "-m", "sd.safetensors", "--lora", "styles", "--out", str(pictures[0].parent))
        == 0
    )


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_pefts_folder_is_scaled_as_it_says(rank_stabilised: bool, tmp_path: Path, folder: Path) -> None:
    """The alpha stands beside the file alone; merged by peft itself."""
    diffusers: Any = pytest.importorskip("diffusers")
    peft: Any = pytest.importorskip("peft")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "pipe" / "unet")
    more = {"init_lora_weights": False, "use_rslora": rank_stabilised, "alpha_pattern": {"to_v": 3}}
    told = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], **more)
    adapted = peft.get_peft_model(unet, told)
    adapted.save_pretrained(tmp_path / "style")
    assert kind_of(tmp_path / "style") == "LoRA"
    model = family.model("SD 1")
    found = read_lora(tmp_path / "style", model).changes
    merged = adapted.merge_and_unload().state_dict()
    block, ours = "attentions.0.transformer_blocks.0.attn2", "denoiser.unet.down.1.blocks.0.transformer.blocks.0.cross"
    for theirs, name in (("to_q", f"{ours}_attention.q.weight"), ("to_v", f"{ours}_attention.v.weight")):
        applied = found[name].applied(model.state_dict()[name], 1.0)
        torch.testing.assert_close(applied, merged[f"down_blocks.1.{block}.{theirs}.weight"], rtol=1e-5, atol=1e-6)


def test_inspect_names_parts_of_pipelines_and_options_that_it_lacks(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "pipe/text_encoder") == 2
    assert "is a CLIPTextModel; wanted is a whole model" in capsys.readouterr().err
    assert run("inspect", "style.safetensors") == 1
    said = capsys.readouterr().out
    assert "convert takes its model with --base" in said
    assert "give its model with --base" not in said
