"""ControlNets of every kind beside diffusers: pooled, blue first, short, unions; files that hold no whole weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_controlnet_names import SD1, SDXL, model
from torch import Tensor

from latentkit.checkpoints.adapters.control_files import open_control, read_control, write_control
from latentkit.checkpoints.adapters.controlnet_names import controlnet_pairs
from latentkit.checkpoints.names.diffusers_configs import unet_json
from latentkit.checkpoints.names.rename import given
from latentkit.errors import InputError
from latentkit.nets.controlnet import KINDS, ROWS, Control, ControlNet, kind_number, residuals
from latentkit.nets.unet import UNetConfig

UNION = replace(SDXL, vector_width=6 * 256 + 24)


def peer(config: UNetConfig, kind: str = "ControlNetModel", **fields: Any) -> Any:
    """diffusers' network for the config, with no weight at zero."""
    diffusers: Any = pytest.importorskip("diffusers")
    known = unet_json(config, 8, wave_width=256)
    for name in ("sample_size", "out_channels", "up_block_types", "center_input_sample", "dropout", "_class_name"):
        known.pop(name)
    known.pop("time_embedding_dim")
    if kind != "ControlNetModel":
        known.pop("mid_block_type")
    known |= {"conditioning_embedding_out_channels": (16, 32, 96, 256)} | fields
    torch.manual_seed(5)
    theirs = getattr(diffusers, kind)(**{name: value for name, value in known.items() if name[0] != "_"})
    with torch.no_grad():
        for parameter in theirs.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5 + 0.5 * (parameter.ndim == 1))
    return theirs.eval()


def told(config: UNetConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of ours, and the peer's form of those that have another there."""
    torch.manual_seed(6)
    ours: dict[str, Any] = {
        "x": torch.randn(2, 4, 6, 4), "timestep": torch.tensor([951.0, 951.0]),
        "context": torch.randn(2, 5, config.context_width or 0), "vector": None, "mask": None,
    }  # fmt: skip
    if not config.vector_width:
        return ours, {}
    pooled, ids = torch.randn(2, config.vector_width - 6 * 256), torch.randint(0, 1024, (2, 6))
    half = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(128) / 128)
    angles = ids.flatten()[:, None].float() * half
    waves = torch.cat([angles.cos(), angles.sin()], 1).reshape(2, -1)
    ours["vector"] = torch.cat([pooled, waves], 1)
    return ours, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def close(ours: list[Tensor] | None, theirs: tuple[list[Tensor], Tensor]) -> None:
    assert ours is not None
    for one, other in zip(ours, [*theirs[0], theirs[1]], strict=True):
        assert other.std() > 1e-3
        assert (one - other.expand_as(one)).abs().max() < 2e-5 * other.abs().max()


@pytest.mark.parity
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (SD1, {}),
        (SD1, {"global_pool_conditions": True}),
        (SD1, {"controlnet_conditioning_channel_order": "bgr"}),
        (UNION, {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}),
        (UNION, {"transformer_layers_per_block": [1, 1, 1], "mid_block_type": "UNetMidBlock2D"}),
    ],
    ids=["plain", "pooled", "bgr", "small XL", "middling XL"],
)
@torch.no_grad()
def test_kinds_answer_as_in_diffusers_and_come_back_to_the_bit(
    config: UNetConfig, fields: dict[str, Any], guess: bool, tmp_path: Path
) -> None:
    theirs = peer(config, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_control(tmp_path / "theirs", model(config))
    inputs, added = told(config)
    hint = torch.rand(2, 3, 48, 32)
    expected = theirs(
        inputs["x"], 951, inputs["context"], hint, 0.7, guess_mode=guess, return_dict=False, **added
    )  # fmt: skip
    close(residuals([Control(ours, "a", 0.7, guess)], {"a": hint}, **inputs), expected)
    ours.pooled, told_so = False, Control(ours, "a", 0.7, guess, pooled=ours.pooled)
    close(residuals([told_so], {"a": hint}, **inputs), expected)
    ours.pooled = told_so.pooled
    for layout, name in (("ldm", "single.safetensors"), ("diffusers", "folder")):
        write_control(tmp_path / name, ours, layout)  # type: ignore[arg-type]
        again = open_control(tmp_path / name, model(config))
        assert not again.complaints
        assert again.layout == layout
        assert (again.network.pooled, again.network.bgr) == (ours.pooled, ours.bgr)
        assert all(torch.equal(one, ours.state_dict()[key]) for key, one in again.network.state_dict().items())
    loaded = type(theirs).from_pretrained(tmp_path / "folder")
    assert all(torch.equal(one, theirs.state_dict()[key]) for key, one in loaded.state_dict().items())
    again_there = loaded(inputs["x"], 951, inputs["context"], hint, 0.7, guess_mode=guess, return_dict=False, **added)
    close([*again_there[0], again_there[1]], expected)


@pytest.mark.parity
@pytest.mark.parametrize("kinds", [[3], [1, 5]], ids=["one", "two"])
@torch.no_grad()
def test_a_union_answers_as_in_diffusers(kinds: list[int], tmp_path: Path) -> None:
    theirs = peer(UNION, "ControlNetUnionModel", num_trans_channel=32, num_proj_channel=32, num_control_type=8)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_control(tmp_path / "theirs", model(UNION))
    inputs, added = told(UNION)
    inputs["x"] = inputs["x"][:1].expand(2, -1, -1, -1)  # its tokens attend over the batch
    hints = [torch.rand(1, 3, 48, 32).expand(2, -1, -1, -1) for _ in kinds]
    there = torch.zeros(2, 8)
    there[:, kinds] = 1
    scales = [0.7, 0.4][: len(kinds)]
    expected = theirs(
        inputs["x"], 951, inputs["context"], hints, there, kinds, scales, return_dict=False, **added
    )  # fmt: skip
    controls = [Control(ours, str(n), scale, kind=kind) for n, (scale, kind) in enumerate(zip(scales, kinds))]
    close(residuals(controls, {str(n): hint for n, hint in enumerate(hints)}, **inputs), expected)
    write_control(tmp_path / "folder", ours, "diffusers")
    loaded = type(theirs).from_pretrained(tmp_path / "folder")
    assert all(torch.equal(one, theirs.state_dict()[key]) for key, one in loaded.state_dict().items())
    with pytest.raises(InputError, match="holds no ControlNet of several kinds"):
        write_control(tmp_path / "single.safetensors", ours, "ldm")
    with pytest.raises(InputError, match="8 kinds; say which"):
        ours(inputs["x"], inputs["timestep"], hints[0], inputs["context"], inputs["vector"])


@torch.no_grad()
def test_pictures_of_a_union_do_not_see_each_other() -> None:
    network = ControlNet(UNION, kinds=6).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    inputs, _ = told(UNION)
    hint = torch.rand(2, 3, 48, 32)
    both = residuals([Control(network, "a", kind=2)], {"a": hint}, **inputs)
    alone = {name: None if value is None else value[1:] for name, value in inputs.items()}
    single = residuals([Control(network, "a", kind=2)], {"a": hint[1:]}, **alone)  # type: ignore[arg-type]
    assert both is not None
    assert single is not None
    for one, other in zip(both, single):
        torch.testing.assert_close(one[1:], other, rtol=1e-4, atol=1e-4)
    other_kind = residuals([Control(network, "a", kind=3)], {"a": hint}, **inputs)
    assert other_kind is not None
    assert not torch.allclose(both[0], other_kind[0], atol=1e-3)


@torch.no_grad()
def test_rows_that_are_not_answered_get_nothing() -> None:
    network = ControlNet(SD1).eval()
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    inputs, _ = told(SD1)
    hints = {"a": torch.rand(2, 3, 48, 32)}
    whole = residuals([Control(network, "a")], hints, **inputs)
    half = residuals([Control(network, "a")], hints | {"a" + ROWS: torch.tensor([False, True])}, **inputs)
    assert whole is not None
    assert half is not None
    for one, other in zip(whole, half):
        assert not other[0].any()
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4)


def test_differences_and_low_ranks_are_put_on_their_model(tmp_path: Path) -> None:
    target, path = model(SD1), tmp_path / "c.safetensors"
    for parameter in target.parameters():
        parameter.data = torch.randn_like(parameter)
    unet = target.denoiser.unet.state_dict()
    network = ControlNet(SD1)
    names = {pair.theirs: pair.ours[0] for pair in controlnet_pairs(network, "ldm")}
    whole = given(controlnet_pairs(network, "ldm"), {k: torch.randn_like(v) for k, v in network.state_dict().items()})
    save_file(whole | {"difference": torch.zeros(1)}, path)
    for name, tensor in read_control(path, target).state_dict().items():
        theirs = next(key for key, ours in names.items() if ours == name)
        expected = whole[theirs].reshape(tensor.shape) + unet.get(name, torch.zeros(()))
        torch.testing.assert_close(tensor, expected)
    own = {name: tensor for name, tensor in whole.items() if names[name] not in unet}
    layer = "input_blocks.1.0.in_layers.2"
    factors = {f"{layer}.up": torch.randn(32, 3, 1, 1), f"{layer}.down": torch.randn(3, 32, 3, 3)}
    marked = own | factors | {"lora_controlnet": torch.zeros(1), "time_embed.0.bias": whole["time_embed.0.bias"]}
    save_file(marked, path)
    state = read_control(path, target).state_dict()
    changed = names[f"{layer}.weight"]
    product = torch.einsum("or,rikl->oikl", factors[f"{layer}.up"][:, :, 0, 0], factors[f"{layer}.down"])
    torch.testing.assert_close(state[changed], unet[changed] + product)
    assert torch.equal(state["time_embedding.linear_in.bias"], whole["time_embed.0.bias"])
    assert torch.equal(state["conv_in.weight"], unet["conv_in.weight"])
    for spoil, said in (
        ({f"{layer}.down": torch.randn(2, 32, 3, 3)}, rf"{layer}.weight is missing; {layer}.up is not known"),
        ({"elsewhere.up": torch.zeros(2, 2)}, "elsewhere.up is not known"),
        ({"zero_convs.0.0.bias": torch.zeros(3)}, "zero_convs.0.0.bias.*of another shape"),
    ):
        save_file(marked | spoil, path)
        with pytest.raises(InputError, match=said):
            read_control(path, target)
    save_file(marked, path)
    with pytest.raises(InputError, match="holds a control-LoRA; name the model"):
        open_control(path, target.to("meta"))


def test_kinds_of_hints_have_names_and_numbers() -> None:
    assert (kind_number("canny"), kind_number("tile"), kind_number("7")) == (3, 6, 7)
    assert max(KINDS.values()) == 7
    with pytest.raises(InputError, match=r"'cany' is unknown.*canny"):
        kind_number("cany")


def test_a_folder_without_metadata_of_kinds_is_plain(tmp_path: Path) -> None:
    network = ControlNet(SD1)
    network.pooled = network.bgr = True
    write_control(tmp_path / "c.safetensors", network, "ldm")
    read = read_control(tmp_path / "c.safetensors", model(SD1))
    assert (read.pooled, read.bgr) == (True, True)
    save_file(load_file(tmp_path / "c.safetensors"), tmp_path / "plain.safetensors")
    read = read_control(tmp_path / "plain.safetensors", model(SD1))
    assert (read.pooled, read.bgr) == (False, False)
