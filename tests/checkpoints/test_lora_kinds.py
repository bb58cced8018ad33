"""LoKr, whole differences and half precision; whole pipelines of diffusers with the same file at several weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family import model as random_model
from safetensors.torch import load_file, save_file
from test_lora_files import CONV, HEAD, TEXT, UNET, Q, changes, made, same
from torch import Tensor, nn

from latentkit.checkpoints.adapters.lora_files import read_lora, write_lora
from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.names.diffusers_names import unet_pairs
from latentkit.checkpoints.names.rename import given
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.lora import Adapted, Change

CONV_HEAD = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return made()


@pytest.mark.parametrize(
    ("fields", "rank"),
    [({}, 4), ({"decompose_both": True}, 2), ({"decompose_factor": 4}, 64)],
    ids=["second low rank", "both low rank", "whole"],
)
def test_lokr_is_pefts(fields: dict[str, Any], rank: int, model: LatentDiffusion, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(3)
    layers = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False), "b": nn.Conv2d(32, 32, 3, padding=1)})
    config = peft.LoKrConfig(r=rank, alpha=3, target_modules=["a", "b"], init_weights=False, **fields)
    config.use_effective_conv2d = rank != 64
    tensors, expected = {}, {}
    for name, head, weight in (("a", HEAD, Q), ("b", CONV_HEAD, CONV)):
        theirs = peft.get_peft_model(nn.ModuleDict({name: layers[name]}), config).base_model.model[name]
        for kind in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"):
            if "default" in getattr(theirs, kind):
                tensors[f"{head}.{kind}"] = getattr(theirs, kind)["default"].detach().clone()
        low = any(f"{head}.lokr_{kind}" in tensors for kind in ("w1_a", "w2_a"))
        tensors[f"{head}.alpha"] = torch.tensor(3.0)
        scale = 1 if low else rank / 3  # peft divides a whole one by its rank too, LyCORIS by nothing
        expected[weight] = theirs.get_delta_weight("default").detach() * scale
    save_file(tensors, tmp_path / "lokr.safetensors")
    read = read_lora(tmp_path / "lokr.safetensors", model)
    for name, delta in expected.items():
        weight = model.state_dict()[name]
        torch.testing.assert_close(read.changes[name].applied(weight, 1.0), weight + delta)
    write_lora(tmp_path / "again.safetensors", model, read.changes)
    again = load_file(tmp_path / "again.safetensors")
    for key, tensor in tensors.items():
        both_whole = key.endswith("alpha") and f"{key[:-5]}lokr_w1" in tensors and f"{key[:-5]}lokr_w2" in tensors
        assert both_whole or torch.equal(again[key], tensor)
    same(read.changes, read_lora(tmp_path / "again.safetensors", model), model)


def test_whole_differences(model: LatentDiffusion, tmp_path: Path) -> None:
    state = model.state_dict()
    tensors = {f"{HEAD}.diff": torch.randn_like(state[Q]), f"{CONV_HEAD}.diff": torch.randn_like(state[CONV])}
    save_file(tensors, tmp_path / "full.safetensors")
    read = read_lora(tmp_path / "full.safetensors", model)
    torch.testing.assert_close(read.changes[Q].applied(state[Q], 0.5), state[Q] + 0.5 * tensors[f"{HEAD}.diff"])
    write_lora(tmp_path / "again.safetensors", model, read.changes)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_files_of_a_tower_alone_without_alpha(dtype: torch.dtype, model: LatentDiffusion, tmp_path: Path) -> None:
    (change,) = changes(model, TEXT, alpha=None).values()
    change = replace(change, down=change.shapes().down if change.down is None else change.down.to(dtype))
    change = replace(change, up=change.up.to(dtype))
    write_lora(tmp_path / "text.safetensors", model, {TEXT: change})
    tensors = {key: one for key, one in load_file(tmp_path / "text.safetensors").items() if "alpha" not in key}
    assert {one.dtype for one in tensors.values()} == {dtype}
    save_file(tensors, tmp_path / "without.safetensors")
    same({TEXT: change}, read_lora(tmp_path / "without.safetensors", model), model)


def test_what_is_written_for_diffusers_keeps_its_type_where_that_is_exact(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    for alpha, dtype in ((1.0, torch.float16), (1.7, torch.float32)):
        (change,) = changes(model, Q, rank=4, alpha=alpha).values()
        assert change.down is not None
        change = replace(change, down=change.down.half(), up=change.up.half())
        path = tmp_path / f"{alpha}.safetensors"
        write_lora(path, model, {Q: change}, "diffusers")
        up = next(one for key, one in load_file(path).items() if "lora_B" in key)
        assert up.dtype == dtype
        torch.testing.assert_close(up.float(), change.up.float() * alpha / 4, rtol=1e-6, atol=0)


def drawn_by(unet: Any, family: str) -> Tensor:
    """diffusers' U-Net's answer to fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    width = {"SD 1": 32, "XL": 80}[family]
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, width, generator=generator)
    added = {"text_embeds": torch.ones(1, 40), "time_ids": torch.ones(1, 6)} if family == "XL" else None
    with torch.no_grad():
        answer: Tensor = unet(x, 300, context, added_cond_kwargs=added).sample
        return answer


def towers_say(pipe: Any) -> list[Tensor]:
    ids = torch.tensor([[49406, 320, 1125, 539, 49407]])
    found = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    with torch.no_grad():
        return [tower(ids).last_hidden_state for tower in found if tower is not None]


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "ldm"])
@pytest.mark.parametrize("family", ["SD 1", "XL"])
def test_diffusers_pipelines_wear_our_files_as_we_do(family: str, layout: Any, tmp_path: Path) -> None:
    """At several weights, on U-Net and every text tower: ours is the base with the file baked in, theirs wears it."""
    pytest.importorskip("peft")
    import diffusers

    if family != "XL" and layout == "ldm":
        pytest.skip("diffusers reads these names for XL alone")
    model = random_model(family)
    state = model.state_dict()
    block = "denoiser.unet.down.1.blocks.0.transformer.blocks.0"
    names = [
        f"{block}.self_attention.q.weight",
        f"{block}.cross_attention.out.weight",
        f"{block}.feed_forward.out.weight",
    ]
    if layout != "ldm":
        names += ["denoiser.unet.down.0.blocks.0.residual.conv_in.weight"]
    towers = range(2 if family == "XL" else 1)
    for index in towers:  # diffusers takes a tower's names for kohya's only where there is one of the output
        names += [f"conditioners.text.towers.{index}.blocks.0.attention.{leaf}.weight" for leaf in ("v", "out")]
    ours = {}
    for index, name in enumerate(names):
        change = changes(model, name, rank=2 + index % 2, alpha=1.5)[name]
        assert change.down is not None
        ours[name] = replace(change, down=change.down * 0.5 / change.down[0].numel() ** 0.5)
    write_lora(tmp_path / "lora.safetensors", model, ours, layout)
    same(ours, read_lora(tmp_path / "lora.safetensors", model), model)
    write_folder(tmp_path / "base", model)
    kind: Any = diffusers.StableDiffusionXLPipeline if family == "XL" else diffusers.StableDiffusionPipeline
    optional: dict[str, Any] = {} if family == "XL" else {"safety_checker": None}
    pipe = kind.from_pretrained(tmp_path / "base", **optional)
    plain = drawn_by(pipe.unet, family)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="ours")
    baked = type(pipe.unet).from_config(pipe.unet.config)
    unet = model.denoiser.unet
    for weight in (1.0, -0.7, 0.4):
        with Adapted(model, [(ours, weight)]):
            baked.load_state_dict(given(unet_pairs(unet), unet.state_dict()))
            if weight == 0.4:
                write_folder(tmp_path / "baked", model)
        pipe.set_adapters("ours", weight)
        worn = drawn_by(pipe.unet, family)
        assert (worn - plain).abs().max() > 1e-2
        torch.testing.assert_close(drawn_by(baked, family), worn, rtol=1e-3, atol=1e-4)
    whole = kind.from_pretrained(tmp_path / "baked", **optional)
    for one, other in zip(towers_say(whole), towers_say(pipe), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_a_change_without_values_has_its_shape(model: LatentDiffusion) -> None:
    whole = Change(None, torch.ones(2, 3), left=Change(torch.ones(1, 4), torch.ones(5, 1)))
    assert whole.shapes().product().shape == whole.product().shape == (10, 12)
    assert whole.shapes().up.is_meta
    assert UNET.channels == 32
