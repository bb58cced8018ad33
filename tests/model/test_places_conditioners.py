"""What is to be where: semantic maps beside the latent, and labelled boxes as tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.checkpoints.ldm_file import single_pairs
from latentkit.checkpoints.names.rename import given
from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.layout import Box, LayoutConditioner
from latentkit.model.conditioners.map import MapConditioner, MapConfig
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.model.presets import preset
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.towers import BertTextConfig
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import DiffusionLoss, DiffusionObjective

SMALL = BertTextConfig(vocabulary=16, length=11, width=16, layers=1, heads=2, head_width=8)
NAMED = BertTextConfig(vocabulary=40, length=8, width=16, layers=1, heads=2, head_width=8)
UNET = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2)
STAGE = AutoencoderConfig(channels=16, multipliers=(1, 2, 2), blocks=1, latent_channels=3)


def with_map(cell: int = 4, **fields: Any) -> Architecture:
    return fit_network(Architecture(UNET, STAGE, size=(32, 32), map=MapConfig(7, 2, cell), **fields))


def as_released(maps: Tensor, weight: Tensor) -> Tensor:
    """One-hot maps halved bilinearly twice, then a convolution of one pixel without bias (SpatialRescaler)."""
    x = F.one_hot(maps, weight.shape[1]).movedim(-1, 1).to(weight)
    for _ in range(2):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    return F.conv2d(x, weight[:, :, None, None])


@pytest.mark.parametrize("size", [(16, 24), (512, 512)])
def test_a_map_is_rescaled_and_mixed_as_the_released_code_does(size: tuple[int, int]) -> None:
    conditioner = MapConditioner(MapConfig()).double()
    maps = torch.randint(182, (2, *size))
    found = conditioner(list(maps)).concat
    assert found is not None
    expected = as_released(maps, conditioner.mixing.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.std() > 1e-2


def test_a_map_holds_classes_of_the_model_and_is_never_absent() -> None:
    conditioner = MapConditioner(MapConfig(7, 2, 4))
    assert isinstance(conditioner, Conditioner)
    whole = torch.zeros(8, 8, dtype=torch.long)
    assert conditioner.from_batch({"map": whole[None]})[0].shape == (8, 8)
    for bad, message in ((whole + 7, "classes 7 to 7; this model has 0 to 6"), (whole - 1, "classes -1 to -1")):
        with pytest.raises(InputError, match=message):
            conditioner([whole, bad])
    with pytest.raises(InputError, match="nothing without a semantic map"):
        conditioner(conditioner.absent(1))


def test_a_map_widens_the_network_and_has_the_cells_of_the_latents() -> None:
    made = with_map(concat_channels=1)
    assert made.beside == 3
    assert made.network.channels_in == 6
    assert made.network.channels_out == 3
    with pytest.raises(InputError, match="cells of 8 pixels, its latents of 4"):
        with_map(8)
    with pytest.raises(InputError, match="at least 1"):
        MapConfig(0)


def test_points_are_numbered_as_in_the_released_builders_own_example() -> None:
    """Of 16 tokens 4 x 4 points: the third of the second row is 6, the last one 15 (its `tokenize_coordinates`)."""
    conditioner = LayoutConditioner(SMALL)
    assert isinstance(conditioner, Conditioner)
    assert conditioner.room == 3
    assert conditioner.tokens([Box(9, 2 / 3, 1 / 3, 1.0, 1.0)]) == [9, 6, 15, 15, 15, 15, 15, 15, 15, 0, 15]
    assert conditioner.tokens([]) == [15] * 9 + [0, 15]


def test_the_released_models_layout_is_thirty_boxes_and_a_crop() -> None:
    config = preset("layout2img-openimages256").layout
    assert config is not None
    with torch.device("meta"):
        conditioner = LayoutConditioner(config)
    assert conditioner.room == 30
    ids = conditioner.tokens([Box(271, 0.0, 0.0, 1.0, 1.0), Box(3, 0.25, 0.5, 0.75, 1.0)])
    # 90 x 90 points: 22.25 is the 22nd, 44.5 the 44th and 66.75 the 67th of the 89 steps between the first and last.
    assert ids[:6] == [271, 0, 8099, 3, 44 * 90 + 22, 89 * 90 + 67]
    assert ids[6:] == [8191] * 84 + [0, 8099]


def test_classes_by_name_and_what_no_layout_is() -> None:
    conditioner = LayoutConditioner(NAMED, ["cat", "dog"])
    assert conditioner.state() == {"classes": ["cat", "dog"]}
    where = (0.0, 0.0, 0.5, 0.5)
    assert conditioner.tokens([Box("dog", *where)]) == conditioner.tokens([Box(1, *where)])
    for boxes, message in (
        ([Box("cow", *where)], "class 'cow' of a box is unknown; allowed: cat, dog"),
        ([Box(2, *where)], "class 2 of a box is unknown; allowed are 0 to 1"),
        ([Box("cat", *where)] * 3, "has 3 boxes; this model reads 2"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            conditioner.tokens(boxes)
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="knows classes by number only"):
        LayoutConditioner(SMALL).tokens([Box("cat", *where)])
    with pytest.raises(InputError, match="allowed are 0 to 14"):
        LayoutConditioner(SMALL).tokens([Box(15, *where)])
    for wrong in (replace(NAMED, length=4), replace(NAMED, vocabulary=2)):
        with pytest.raises(InputError, match="a layout of"):
            LayoutConditioner(wrong, ["cat", "dog"])


def test_each_row_is_its_own_layouts() -> None:
    conditioner = LayoutConditioner(NAMED, ["cat", "dog"]).eval()
    layouts = [[Box("cat", 0.0, 0.0, 0.5, 0.5)], [Box("dog", 0.0, 0.0, 0.5, 0.5)], *conditioner.absent(1)]
    rows = conditioner(layouts).context
    assert rows is not None
    assert rows.shape == (3, 8, 16)
    for row, layout in zip(rows, layouts):
        alone = conditioner([layout]).context
        assert alone is not None
        torch.testing.assert_close(alone[0], row)
    assert (rows[0] - rows[1]).abs().max() > 1e-2
    assert (rows[0] - rows[2]).abs().max() > 1e-2


def test_both_lie_in_single_files_where_the_released_code_has_them() -> None:
    for name, expected in (
        ("semantic_synthesis256", {"cond_stage_model.channel_mapper.weight": (3, 182, 1, 1)}),
        (
            "layout2img-openimages256",
            {
                "cond_stage_model.transformer.token_emb.weight": (8192, 512),
                "cond_stage_model.transformer.pos_emb.emb.weight": (92, 512),
                "cond_stage_model.transformer.attn_layers.layers.30.1.to_q.weight": (512, 512),
                "cond_stage_model.transformer.attn_layers.layers.31.1.net.0.0.weight": (2048, 512),
                "cond_stage_model.transformer.norm.bias": (512,),
            },
        ),
    ):
        with torch.device("meta"):
            model = LatentDiffusion(preset(name), {})
        tensors = given(single_pairs(model), model.state_dict())
        found = {place: tuple(tensor.shape) for place, tensor in tensors.items() if place.startswith("cond_stage")}
        assert expected.items() <= found.items()
        assert len(found) == (1 if len(expected) == 1 else 2 + 16 * 13 + 2)


@pytest.mark.parametrize("kind", ["map", "layout"])
def test_both_learn_with_the_network(kind: str) -> None:
    made = with_map() if kind == "map" else fit_network(Architecture(UNET, STAGE, size=(32, 32), layout=NAMED))
    model = LatentDiffusion(made, {"layout": {"classes": ["cat", "dog"]}} if kind == "layout" else {})
    for name, parameter in model.named_parameters():
        if "conv_out" in name or "out.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    objective = DiffusionObjective(model, DiffusionLoss(condition_dropout=0 if kind == "map" else 0.5), 1)
    batch: dict[str, Any] = {
        "draw": torch.arange(2),
        "moments": torch.randn(2, 6, 8, 8),
        "map": torch.randint(7, (2, 32, 32)),
        "layout": [[Box("cat", 0.0, 0.0, 0.5, 0.5)], [Box("dog", 0.5, 0.0, 1.0, 0.5)]],
    }
    loss, _ = objective.loss("diffusion", batch, {})
    slopes = torch.autograd.grad(loss, list(model.conditioners.parameters()))
    assert all(slope.abs().max() > 0 for slope in slopes)
