"""Single files are known by their shapes, at full size on tensors without data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkit.checkpoints import detect, lone
from latentkit.checkpoints.detect import autoencoder_shape, said_prediction, single_file, unet_shape
from latentkit.checkpoints.files import Shapes
from latentkit.checkpoints.ldm_file import match, single_pairs
from latentkit.checkpoints.names.ldm_names import FIRST_STAGE, UNET
from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.storage.archive import Archive
from latentkit.errors import InputError
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.model.presets import PRESETS, preset

SAME = {"sd2.1": "sd2.1-base", "ffhq256": "celeba256", "lsun_beds256": "celeba256"} | {
    "semantic_synthesis512": "semantic_synthesis256"
}
"""Of the same shapes: which of them it is only shows in what it draws."""


def whole(name: str) -> dict[str, Tensor]:
    """Every tensor of the released file that takes part in a picture."""
    architecture = preset(name)
    rows = 1000
    state = {"label": {"classes": [str(n) for n in range(rows)]}}
    with torch.device("meta"), Shapes():
        model = LatentDiffusion(architecture, state)
    return given(single_pairs(model), model.state_dict())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_known_by_its_shapes(name: str) -> None:
    tensors = whole(name)
    tensors |= {"betas": torch.ones(1000), "first_stage_model.loss.logvar": torch.ones(())}
    found = match(Archive(tensors), name)
    assert not found.complaints
    assert found.found.name == SAME.get(name, name)
    assert found.model.architecture.network == preset(name).network
    assert found.model.architecture.first_stage == preset(name).first_stage
    assert sum(map(len, found.ignored.values())) == 2
    scale = PRESETS[name].latent_scale
    assert found.state["first_stage.latent_std"][0] == pytest.approx(1 / scale)


def test_what_a_file_says_of_itself_is_heard() -> None:
    tensors = whole("sd2.1")
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, None),
        ({"metadata": {"modelspec.prediction_type": "v"}}, "v"),
        ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "eps"),
        ({"values": {"global_step": 875000}}, "eps"),
        ({"values": {"global_step": 875001}}, None),
    ]
    for fields, said in cases:
        archive = Archive(tensors, **fields)
        assert said_prediction(archive) == said
        assert single_file(archive, "file").architecture.prediction == (said or "eps")
        assert single_file(archive, "file").certain == (said is not None)
        assert single_file(archive, "file").architecture.size == ((768, 768) if said == "v" else (512, 512))
    assert said_prediction(Archive(tensors | {"v_pred": torch.zeros(0)})) == "v"
    measured = single_file(Archive(whole("lsun_churches256") | {"scale_factor": torch.tensor(0.25)}), "file")
    assert measured.latent_scale == 0.25


def test_a_network_of_unknown_shape_must_say_its_heads() -> None:
    tensors = whole("sd1.5")
    for name in [name for name in tensors if ".label_emb" not in name and name.endswith("attn2.to_k.weight")]:
        tensors[name] = torch.empty(tensors[name].shape[0], 777, device="meta")
    with pytest.raises(InputError, match="does not say how many heads"):
        single_file(Archive(tensors), "file")
    with pytest.raises(InputError, match=r"input_blocks\.0\.0\.weight is missing"):
        single_file(Archive({"a": torch.ones(1)}), "file")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("sd1.5", f"{UNET}input_blocks.3.0.op.weight"),
        ("semantic_synthesis256", f"{UNET}middle_block.1.qkv.weight"),
        ("lsun_churches256", f"{UNET}input_blocks.1.1.qkv.weight"),
        ("sd1.5", f"{FIRST_STAGE}encoder.mid.attn_1.q.weight"),
        ("cin256", f"{FIRST_STAGE}encoder.down.3.attn.0.q.weight"),
    ],
)
def test_a_layer_is_there_with_any_of_its_tensors(name: str, lost: str) -> None:
    tensors = whole(name)
    shapes = unet_shape(tensors, "file"), autoencoder_shape(tensors, "file")
    del tensors[lost]
    assert (unet_shape(tensors, "file"), autoencoder_shape(tensors, "file")) == shapes


def test_a_codebook_that_is_lost_is_missed() -> None:
    tensors = whole("cin256")
    del tensors[f"{FIRST_STAGE}quantize.embedding.weight"]
    with pytest.raises(InputError, match=r"quantize\.embedding\.weight is missing"):
        autoencoder_shape(tensors, "file")
    assert match(Archive(tensors), "file").complaints.missing == [f"{FIRST_STAGE}quantize.embedding.weight"]


def test_a_damaged_file_is_that_of_the_nearest_model(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
    tensors = whole("sd1.5")
    tensors[first] = tensors[first].transpose(0, 1)
    assert "input_blocks.0.0.weight (4x320x3x3, wanted 320x4x3x3)" in match(Archive(tensors), "f").complaints.shape[0]
    alone = {name.removeprefix(UNET): tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    assert lone._unet(alone, Path("file"), "") == preset("sd1.5").network
    tensors[last] = tensors[last].transpose(0, 1)
    monkeypatch.setattr(detect, "_shapes", None)  # nothing is built for what resembles no released model
    with pytest.raises(InputError, match="a U-Net of 4 channels"):
        single_file(Archive(tensors), "file")
