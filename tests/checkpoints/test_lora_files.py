"""LoRA files in every layout: read beside diffusers and peft, written for them, refused where they do not fit."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentkit.checkpoints.adapters.lora_files import Lora, read_lora, write_lora
from latentkit.checkpoints.adapters.lora_names import layers
from latentkit.checkpoints.names.diffusers_configs import unet_json
from latentkit.checkpoints.names.diffusers_names import unet_pairs
from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.names.tower_names import hugging_face_text
from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.clip import ClipTextConfig
from latentkit.nets.lora import Adapted, Change
from latentkit.nets.unet import UNetConfig

TOWER = ClipTextConfig(width=16, layers=2, heads=2)
UNET = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, depth=(1, 0), heads=4, linear_projection=False)
Q = "denoiser.unet.down.0.blocks.0.transformer.blocks.0.self_attention.q.weight"
CONV = "denoiser.unet.down.0.blocks.0.residual.conv_in.weight"
OTHER = "denoiser.unet.middle.block_in.residual.conv_in.weight"
TEXT = "conditioners.text.towers.0.blocks.1.attention.q.weight"


def made(towers: int = 1) -> LatentDiffusion:
    torch.manual_seed(1)
    wide = replace(TOWER, projection=12) if towers == 2 else TOWER
    clip = ClipConfig((TOWER, wide)[:towers])
    model = LatentDiffusion(
        fit_network(Architecture(UNET, size=(8, 8), picture_channels=4, clip=clip, prediction="v")), {}
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return made()


def drawn(model: LatentDiffusion) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    answer: Tensor = model.denoiser.unet(x, torch.full((1,), 300.0), context)
    return answer


def changes(model: LatentDiffusion, *names: str, rank: int = 3, alpha: float | None = 2.0) -> dict[str, Change]:
    generator, state, made = torch.Generator().manual_seed(4), model.state_dict(), {}
    for name in names:
        (out, *rest) = state[name].shape
        down = torch.randn(rank, *rest, generator=generator)
        made[name] = Change(down, torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator), alpha)
    return made


def same(ours: Mapping[str, Change], read: Lora, model: LatentDiffusion) -> None:
    state = model.state_dict()
    assert read.changes.keys() == ours.keys()
    for name, change in ours.items():
        torch.testing.assert_close(read.changes[name].applied(state[name], 1.0), change.applied(state[name], 1.0))


def test_what_is_written_is_read_again(model: LatentDiffusion, tmp_path: Path) -> None:
    ours = changes(model, Q, CONV, TEXT)
    ours[Q] = replace(ours[Q], magnitude=torch.rand(len(ours[Q].up), 1) + 1)
    for layout in ("kohya", "diffusers"):
        path = tmp_path / f"{layout}.safetensors"
        write_lora(path, model, ours, layout)
        same(ours, read_lora(path, model), model)
        with pytest.raises(InputError, match="exists and is not overwritten"):
            write_lora(path, model, ours)
    keys = load_file(tmp_path / "kohya.safetensors").keys()
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha" in keys
    keys = load_file(tmp_path / "diffusers.safetensors").keys()
    assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in keys


def test_loha_and_locon_are_kept_by_kohya_and_refused_by_diffusers(model: LatentDiffusion, tmp_path: Path) -> None:
    ours = changes(model, Q, CONV)
    ours[Q] = replace(ours[Q], second=changes(model, Q, rank=2, alpha=None)[Q])
    core = torch.randn(3, 3, 3, 3)
    second = Change(torch.randn(2, 64, 1, 1), torch.randn(64, 2), None, torch.randn(2, 2, 3, 3))
    ours[OTHER] = Change(torch.randn(3, 64, 1, 1), torch.randn(64, 3), 1.0, core, second)
    ours[CONV] = Change(torch.randn(3, 32, 1, 1), torch.randn(32, 3, 1, 1), 1.0, middle=core)
    write_lora(tmp_path / "loha.safetensors", model, ours)
    same(ours, read_lora(tmp_path / "loha.safetensors", model), model)
    with pytest.raises(InputError, match="holds no LoHa"):
        write_lora(tmp_path / "no.safetensors", model, ours, "diffusers")
    assert not (tmp_path / "no.safetensors").exists()


def test_every_layout_s_names_lead_to_the_same_weight(model: LatentDiffusion, tmp_path: Path) -> None:
    (change,) = changes(model, Q, alpha=None).values()
    assert change.down is not None
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    sgm = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    a, b = ".lora_A.weight", ".lora_B.weight"
    for number, (down, up) in enumerate(
        (
            (f"unet.{block}.to_q.lora.down.weight", f"unet.{block}.to_q.lora.up.weight"),
            (f"unet.{block}.processor.to_q_lora.down.weight", f"unet.{block}.processor.to_q_lora.up.weight"),
            (f"unet.{block}.to_q{a}", f"unet.{block}.to_q{b}"),
            (f"base_model.model.{block}.to_q{a}", f"base_model.model.{block}.to_q{b}"),
            (
                f"lora_unet_{sgm.replace('.', '_')}.lora_down.weight",
                f"lora_unet_{sgm.replace('.', '_')}.lora_up.weight",
            ),
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file({down: change.down, up: change.up}, path)
        same({Q: change}, read_lora(path, model), model)
    torch.save({f"unet.{block}.to_q{a}": change.down, f"unet.{block}.to_q{b}": change.up}, tmp_path / "pickled.pt")
    same({Q: change}, read_lora(tmp_path / "pickled.pt", model), model)
    text = "text_encoder.text_model.encoder.layers.1.self_attn"
    (change,) = changes(model, TEXT, alpha=None).values()
    assert change.down is not None
    for number, (down, up) in enumerate(
        (
            (f"{text}.q_proj.lora_linear_layer.down.weight", f"{text}.q_proj.lora_linear_layer.up.weight"),
            (f"{text}.to_q_lora.down.weight".replace("_lora.", ".lora."), f"{text}.to_q.lora.up.weight"),
        )
    ):
        path = tmp_path / f"text-{number}.safetensors"
        save_file({down: change.down, up: change.up}, path)
        same({TEXT: change}, read_lora(path, model), model)


def test_alpha_comes_from_the_metadata_that_diffusers_writes(model: LatentDiffusion, tmp_path: Path) -> None:
    (change,) = changes(model, Q, alpha=None).values()
    assert change.down is not None
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{place}.lora_A.weight": change.down, f"{place}.lora_B.weight": change.up}
    for values, alpha in (
        ({"unet.lora_alpha": 6}, 6.0),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 2}}, 2.0),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn2.to_q": 2}}, 6.0),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True, "unet.r": 4}, 12.0),
        ({"text_encoder.lora_alpha": 6}, None),
    ):
        save_file(tensors, tmp_path / "told.safetensors", {"lora_adapter_metadata": json.dumps(values)})
        assert read_lora(tmp_path / "told.safetensors", model).changes[Q].alpha == alpha
    save_file(tensors, tmp_path / "told.safetensors", {"lora_adapter_metadata": "[1"})
    with pytest.raises(InputError, match="lora_adapter_metadata is damaged"):
        read_lora(tmp_path / "told.safetensors", model)


def test_two_towers_have_files_of_their_own_names(tmp_path: Path) -> None:
    model = made(2)
    second = TEXT.replace("towers.0", "towers.1")
    ours = changes(model, TEXT, second)
    write_lora(tmp_path / "xl.safetensors", model, ours)
    assert {key[:9] for key in load_file(tmp_path / "xl.safetensors")} == {"lora_te1_", "lora_te2_"}
    same(ours, read_lora(tmp_path / "xl.safetensors", model), model)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: {"some.thing": torch.ones(2)}, "some.thing is not known to this model"),
        (lambda t: {k.replace("blocks_0_att", "blocks_7_att"): v for k, v in t.items()}, "blocks_7.*not known"),
        (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, "up is missing"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "alpha and down and up is not finite"),
        (
            lambda t: {k: v[:, :1] if "lora_down" in k else v for k, v in t.items()},
            r"changes a weight of shape \(32, 1\); it is \(32, 32\)",
        ),
        (lambda t: {k: v[:1] if "lora_down" in k else v for k, v in t.items()}, "do not fit each other"),
        (lambda t: t | {"unet." + PLACE + ".lora_A.weight": torch.ones(3, 32)}, "twice"),
        (lambda t: {}, "holds no tensors"),
        (lambda t: {k: v * 0 if "alpha" in k else v for k, v in t.items()}, "alpha is no number above 0"),
        (lambda t: {k: v.expand(2) if "alpha" in k else v for k, v in t.items()}, "alpha is no number above 0"),
        (lambda t: {k: v[:, :0] if "lora_up" in k else v for k, v in t.items()}, "up is empty"),
        (lambda t: {k: v.int() if "lora_up" in k else v for k, v in t.items()}, "up is not of floating type"),
        (lambda t: {k: v.flatten() if "lora_" in k and "alpha" not in k else v for k, v in t.items()}, "do not fit"),
        (lambda t: {k: v for k, v in t.items() if "lora_down" not in k}, "down is missing"),
        (lambda t: t | {HEAD + ".dora_scale": torch.ones(7)}, "7 magnitudes"),
        (lambda t: t | {HEAD + ".hada_w2_a": torch.ones(32, 2)}, "second down is missing"),
        (lambda t: t | {HEAD + ".lokr_w1_b": torch.ones(2, 2)}, "left up is missing"),
        (lambda t: t | {HEAD + ".oft_blocks": torch.ones(2)}, r"holds OFT \(lora_unet.*oft_blocks\), which is not run"),
        (lambda t: t | {HEAD + ".oft_diag": torch.ones(2)}, "holds OFT"),
        (lambda t: t | {HEAD + ".on_input": torch.ones(1)}, "holds IA3"),
        (lambda t: t | {HEAD + ".a1.weight": torch.ones(1)}, "holds GLoRA"),
        (lambda t: t | {HEAD + ".diff_b": torch.ones(1)}, "holds changes of biases"),
        (lambda t: t | {"bundle_emb.cat.string_to_param.*": torch.ones(1)}, "holds embeddings beside the LoRA"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(spoil: Any, said: str, model: LatentDiffusion, tmp_path: Path) -> None:
    write_lora(tmp_path / "good.safetensors", model, changes(model, Q))
    spoiled = spoil(load_file(tmp_path / "good.safetensors"))
    save_file({key: value.contiguous() for key, value in spoiled.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=said):
        read_lora(tmp_path / "bad.safetensors", model)


HEAD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PLACE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_what_is_no_lora_at_all_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_bytes(b"not tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": print}, tmp_path / "code.pt")
    for name, said in (
        ("text.safetensors", "neither safetensors nor"),
        ("list.pt", "holds no tensors by name"),
        ("code.pt", "print"),
        ("missing.safetensors", "cannot be read|No such file"),
    ):
        with pytest.raises(InputError, match=said):
            read_lora(tmp_path / name, model)


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_and_we_compute_the_same_with_each_other_s_files(
    dora: bool, model: LatentDiffusion, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    unet = model.denoiser.unet
    theirs = diffusers.UNet2DConditionModel.from_config(unet_json(unet.config, 8))
    theirs.load_state_dict(given(unet_pairs(unet), unet.state_dict()))
    plain = drawn(model)

    def answer() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
        with torch.no_grad():
            answered: Tensor = theirs(x, 300, context).sample
            return answered

    torch.testing.assert_close(answer(), plain, rtol=1e-4, atol=1e-5)
    modules = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, init_lora_weights=False, use_dora=dora)
    theirs.add_adapter(config)
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    state = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
    )
    with_alpha = {f"unet.{key}": value for key, value in state.items()}
    files = [tmp_path / "pytorch_lora_weights.safetensors"]
    if not dora:
        kohya = convert_state_dict_to_kohya(with_alpha)  # type: ignore[no-untyped-call]
        kohya |= {key: torch.tensor(5.0) for key in kohya if key.endswith(".alpha")}
        save_file({key.replace("unet_", "lora_unet_", 1) if key.startswith("unet_") else key: value.contiguous()
                   for key, value in kohya.items()}, tmp_path / "kohya.safetensors")  # fmt: skip
        files.append(tmp_path / "kohya.safetensors")
    for file in files:
        lora = read_lora(file, model)
        adapted = Adapted(model, [(lora.changes, 1.0)])
        changed = drawn(model)
        adapted.remove()
        torch.testing.assert_close(changed, answer(), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(changed, plain, atol=1e-2)
    theirs.delete_adapters("default")
    for layout in ("diffusers", "kohya"):
        write_lora(tmp_path / f"ours-{layout}.safetensors", model, lora.changes, layout)
        loaded, alphas, *_ = diffusers.StableDiffusionPipeline.lora_state_dict(
            str(tmp_path), weight_name=f"ours-{layout}.safetensors", unet_config=theirs.config
        )
        diffusers.StableDiffusionPipeline.load_lora_into_unet(loaded, alphas, theirs, adapter_name=layout)
        torch.testing.assert_close(answer(), changed, rtol=1e-3, atol=1e-4)
        theirs.delete_adapters(layout)


def test_the_names_of_layers_are_those_of_the_pairs(model: LatentDiffusion) -> None:
    names = layers(model)
    assert names["unet", PLACE] == Q
    assert names["text_encoder", "text_model.encoder.layers.1.self_attn.q_proj"] == TEXT
    weights = {
        ours
        for pair in hugging_face_text(TOWER)
        for ours in pair.ours
        if ours.endswith(("weight", "position_embedding"))
    }
    assert {
        ours.removeprefix("conditioners.text.towers.0.") for (part, _), ours in names.items() if part != "unet"
    } == weights


def test_a_full_disk_leaves_no_half_file(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, mode: str) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(InputError, match="could not be written: No space left"):
        write_lora(tmp_path / "lora.safetensors", model, changes(model, Q))
    assert not (tmp_path / "lora.safetensors").exists()
