"""LatentDiffusion: parts that fit together, conditions by name, shapes, a state that rebuilds it."""

from dataclasses import replace

import pytest
import torch

from latentkit.errors import InputError
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.image import ImageConfig
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioners.numbers import NumbersConfig
from latentkit.model.conditioners.text import train_tokenizer
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.clip import ClipImageConfig, ClipTextConfig
from latentkit.nets.layers import sinusoids
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig

NETWORK = UNetConfig(channels=32, multipliers=(1, 2), depth=(0, 1), blocks=1, heads=2)
FIRST_STAGE = AutoencoderConfig(latent_channels=6, channels=16, multipliers=(1, 2), blocks=1, stem=2)
TEXT = TextEncoderConfig(vocabulary=300, length=6, width=16, layers=1, heads=2)
CLIP = ClipConfig((ClipTextConfig(width=16, layers=1, heads=2, projection=5),))
STATE = {"text": {"tokenizer": train_tokenizer(["red heart", "pizza"], 280)}, "label": {"classes": ["cat", "dog"]}}
BOTH = fit_network(Architecture(NETWORK, FIRST_STAGE, text=TEXT, label=LabelConfig(width=16)))


@pytest.fixture
def model() -> LatentDiffusion:
    return LatentDiffusion(BOTH, STATE).eval()


def test_the_network_is_fitted_to_the_parts_that_feed_it() -> None:
    assert (BOTH.network.channels_in, BOTH.network.channels_out) == (6, 6)
    assert (BOTH.network.context_width, BOTH.network.vector_width) == (16, 32)
    pixels = fit_network(Architecture(NETWORK, picture_channels=4)).network
    assert (pixels.channels_in, pixels.context_width, pixels.vector_width) == (4, None, None)
    assert fit_network(BOTH) == BOTH


def test_conditioners_of_different_width_are_refused() -> None:
    with pytest.raises(InputError, match=r"widths \[16, 8\]; give them the same width"):
        fit_network(replace(BOTH, label=LabelConfig(width=8)))


@torch.no_grad()
def test_conditions_by_name_what_is_not_given_is_absent(model: LatentDiffusion) -> None:
    told = model.condition({"text": ["pizza", ""], "label": ["cat", None]}, 2)
    assert told.context is not None
    assert told.vector is not None
    assert told.context.shape == (2, 7, 16)
    assert told.vector.shape == (2, 32)
    silent = model.condition({}, 2)
    assert silent.vector is not None
    torch.testing.assert_close(silent.vector[0], told.vector[1])
    label_only = model.condition({"label": ["cat", "cat"]}, 2)
    assert label_only.vector is not None
    torch.testing.assert_close(label_only.vector[0], torch.cat([silent.vector[0, :16], told.vector[0, 16:]]))


@torch.no_grad()
def test_the_whole_draws_from_a_condition(model: LatentDiffusion) -> None:
    shape = model.latent_shape(32, 16)
    denoise = model.denoiser.bind(model.condition({"label": ["dog"]}, 1))
    assert model.first_stage.decode(denoise(torch.randn(1, *shape), 1.0).x0).shape == (1, 3, 32, 16)


@torch.no_grad()
def test_without_conditioners_there_is_no_condition() -> None:
    model = LatentDiffusion(fit_network(Architecture(NETWORK)), {})
    assert model.condition({}, 3).context is None
    assert model.state() == {}
    assert model.latent_shape(8, 10) == (3, 8, 10)


def test_its_state_and_weights_rebuild_it(model: LatentDiffusion) -> None:
    other = LatentDiffusion(model.architecture, model.state())
    other.load_state_dict(model.state_dict())
    other.eval()
    values = {"text": ["red heart"], "label": ["dog"]}
    one, two = model.condition(values, 1), other.condition(values, 1)
    assert one.context is not None
    assert two.context is not None
    assert torch.equal(one.context, two.context)
    assert model.state() == STATE == other.state()


def test_latent_shapes(model: LatentDiffusion) -> None:
    assert model.latent_shape(64, 64) == (6, 16, 16)
    assert model.latent_shape(8, 24) == (6, 2, 6)


@pytest.mark.parametrize(("height", "width"), [(64, 60), (65, 64), (0, 64), (4, 64), (-8, 8)])
def test_a_size_that_does_not_fit_is_refused(model: LatentDiffusion, height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"size {width}x{height} does not fit.*multiples of 8") as error:
        model.latent_shape(height, width)
    assert error.value.exit_code == 2


def test_a_model_has_one_text_encoder() -> None:
    with pytest.raises(InputError, match="this one text and clip; keep one"):
        Architecture(NETWORK, text=TEXT, clip=CLIP)


@torch.no_grad()
def test_all_conditioners_of_a_model_together_numbers_and_pictures_behind_the_text() -> None:
    parts = Architecture(
        NETWORK,
        clip=CLIP,
        label=LabelConfig(width=16, vector=False),
        numbers=NumbersConfig((1.0, 2.0), 4),
        image=ImageConfig(ClipImageConfig(size=8, patch=4, width=8, layers=1, heads=2, projection=3)),
    )
    architecture = fit_network(parts)
    assert (architecture.network.context_width, architecture.network.vector_width) == (16, 5 + 8 + 6)
    model = LatentDiffusion(architecture, {"label": {"classes": ["cat"]}}).eval()
    assert list(model.conditioners) == ["text", "label", "numbers", "image"]
    told = model.condition({"text": ["a cat"], "numbers": [(3.0, 4.0)]}, 1)
    assert told.context is not None
    assert told.vector is not None
    assert told.context.shape == (1, 78, 16)
    assert torch.equal(told.vector[0, 5:9], sinusoids(torch.tensor([3.0]), 4)[0])
    assert not told.vector[0, 13:].any()
    assert model.denoiser.bind(told)(torch.randn(1, 3, 8, 8), 1.0).x0.shape == (1, 3, 8, 8)
    again = LatentDiffusion(architecture, model.state())
    again.load_state_dict(model.state_dict())
    elsewhere = again.to("meta").condition({"text": ["a cat"]}, 1)
    assert elsewhere.vector is not None
    assert elsewhere.vector.is_meta


def test_a_network_with_a_table_of_classes_is_told_one_number() -> None:
    network = replace(NETWORK, classes=10)
    fitted = fit_network(Architecture(network, numbers=NumbersConfig((3.0,), None))).network
    assert fitted.vector_width is None


def test_values_for_a_conditioner_that_is_not_there_are_refused() -> None:
    model = LatentDiffusion(
        fit_network(Architecture(NETWORK, label=LabelConfig(width=16))), {"label": {"classes": ["cat"]}}
    )
    with pytest.raises(InputError, match=r"no conditioner 'text'; it takes: label"):
        model.condition({"text": ["red"], "label": ["cat"]}, 1)
    model.condition({"text": [""], "label": ["cat"]}, 1)  # what stands for nothing is nothing
