"""Numbers, pictures, the 2021 text, classes without a vector: rows, what is absent, peers, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.bert import BertConditioner
from latentkit.model.conditioners.image import (
    UNCLIP_H_IMAGE,
    UNCLIP_L_IMAGE,
    VARIATION_IMAGE,
    ImageConditioner,
    ImageConfig,
    ImagePrompt,
    prepared,
)
from latentkit.model.conditioners.label import CIN256_LABEL, CIN256_V2_LABEL, LabelConditioner
from latentkit.model.conditioners.numbers import (
    REFINER_NUMBERS,
    SDXL_NUMBERS,
    UPSCALER_NUMBERS,
    NumbersConditioner,
)
from latentkit.model.conditioners.tokenizer import PIECES, word_pieces
from latentkit.model.conditioning import Conditioning
from latentkit.nets.clip import ClipImageConfig
from latentkit.nets.towers import BertTextConfig

TOWER = ClipImageConfig(size=12, patch=4, width=16, layers=2, heads=2, projection=10)
BERT = BertTextConfig(vocabulary=40, length=8, width=16, layers=1, heads=2, head_width=4)
PIECES_AND = word_pieces({piece: i for i, piece in enumerate([*PIECES, "red", "heart", "##s"])}).to_str()


def vector(told: Conditioning) -> Tensor:
    assert told.vector is not None
    return told.vector


def context(told: Conditioning) -> Tensor:
    assert told.context is not None
    return told.context


@pytest.fixture
def image() -> ImageConditioner:
    torch.manual_seed(1)
    conditioner = ImageConditioner(ImageConfig(TOWER)).eval().requires_grad_(False)
    conditioner.mean.copy_(torch.randn(10))
    conditioner.std.copy_(torch.rand(10) + 0.5)
    return conditioner


def test_all_are_conditioners(image: ImageConditioner) -> None:
    for conditioner in (image, NumbersConditioner(SDXL_NUMBERS), BertConditioner(BERT)):
        assert isinstance(conditioner, Conditioner)


@pytest.mark.parametrize(
    ("width", "config"),
    [(6 * 256, SDXL_NUMBERS), (5 * 256, REFINER_NUMBERS), (1, UPSCALER_NUMBERS), (2048, UNCLIP_H_IMAGE),
     (1536, UNCLIP_L_IMAGE), (0, VARIATION_IMAGE), (0, CIN256_LABEL), (0, CIN256_V2_LABEL), (0, BERT)],
)  # fmt: skip
def test_vector_widths_of_released_models(width: int, config: Any) -> None:
    assert config.vector_width == width


@pytest.mark.parity
def test_numbers_are_the_waves_that_diffusers_makes() -> None:
    embeddings: Any = pytest.importorskip("diffusers.models.embeddings")
    numbers = torch.tensor([[1024.0, 768.0, 0.0, 17.0, 512.0, 1024.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    expected = embeddings.Timesteps(256, True, 0)(numbers.flatten()).reshape(2, -1)
    told = vector(NumbersConditioner(SDXL_NUMBERS)(numbers.tolist()))
    torch.testing.assert_close(told, expected, atol=1e-4, rtol=0)


def test_numbers_that_are_not_given_are_the_defaults() -> None:
    sizes = NumbersConditioner(REFINER_NUMBERS)
    assert sizes.absent(2) == [(1024, 1024, 0, 0, 6)] * 2 == sizes.from_batch({"draw": [0, 1]})
    assert vector(sizes(sizes.absent(2))).shape == (2, 1280)
    assert vector(NumbersConditioner(UPSCALER_NUMBERS)([(20.0,), (0.0,)])).tolist() == [[20.0], [0.0]]
    assert sizes.state() == {}


def test_too_few_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="5 numbers are given; this model takes 6"):
        NumbersConditioner(SDXL_NUMBERS)([(1.0, 2.0, 3.0, 4.0, 5.0)])


@pytest.mark.parity
@pytest.mark.parametrize("level", [0, 20, 999])
def test_noised_embeddings_are_those_of_diffusers(image: ImageConditioner, level: int) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    normalizer = diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer.StableUnCLIPImageNormalizer(10)
    normalizer.load_state_dict({"mean": image.mean, "std": image.std})
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = {"image_normalizer": normalizer, "image_noising_scheduler": schedule}
    noise, picture = torch.randn(10), torch.rand(3, 12, 12) * 2 - 1
    embedded = image.tower(prepared(picture, 12)[None])
    make = diffusers.StableUnCLIPImg2ImgPipeline.noise_image_embeddings
    with torch.no_grad():
        expected = make(type("Pipeline", (), parts)(), embedded, level, noise=noise[None])
    told = vector(image([ImagePrompt(picture, level, noise)]))
    torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4)


def test_absent_pictures_are_zeros_and_levels_are_told(image: ImageConditioner) -> None:
    picture = torch.rand(3, 20, 30) * 2 - 1
    told = vector(image([*image.absent(1), ImagePrompt(picture), ImagePrompt(picture, 500)]))
    assert not told[0].any()
    assert told[1, 10:].tolist() == [1.0] * 5 + [0.0] * 5
    assert (told[2] - told[1]).abs().max() > 0.1
    assert image.state() == {}


def test_variations_are_told_one_token() -> None:
    ours = ImageConditioner(ImageConfig(TOWER, slot="context")).eval().requires_grad_(False)
    picture = torch.rand(3, 12, 12)
    told = ours([ImagePrompt(picture), None])
    assert told.vector is None
    torch.testing.assert_close(context(told)[0, 0], ours.tower(prepared(picture, 12)[None])[0])
    assert not context(told)[1].any()
    assert ours.config.context_width == 10


@pytest.mark.parametrize("level", [-1, 1000])
def test_levels_that_do_not_exist_are_refused(image: ImageConditioner, level: int) -> None:
    with pytest.raises(InputError, match=f"noise level {level} is asked for; allowed are 0 to 999"):
        image([ImagePrompt(torch.zeros(3, 12, 12), level)])


def test_training_with_pictures_as_conditions_is_refused(image: ImageConditioner) -> None:
    with pytest.raises(InputError, match="cannot be trained"):
        image.from_batch({})


@pytest.mark.parity
@pytest.mark.parametrize("size", [(40, 31), (16, 16), (9, 25)])
def test_pictures_are_prepared_as_transformers_prepares_them(size: tuple[int, int]) -> None:
    from PIL import Image

    processing: Any = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    pixels = torch.randint(64, 192, (*size, 3), dtype=torch.uint8)  # theirs clips between its two passes
    process = processing.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = process(Image.fromarray(pixels.numpy()), return_tensors="pt")["pixel_values"][0]
    ours = prepared(pixels.permute(2, 0, 1) / 127.5 - 1, 16)
    assert ours.shape == expected.shape == (3, 16, 16)
    assert (ours - expected).abs().max() < 1.5 / 255 / 0.26  # and rounds to steps of 1/255


def test_captions_are_word_pieces_in_a_frame_of_the_encoders_length() -> None:
    ours = BertConditioner(BERT, PIECES_AND).eval().requires_grad_(False)
    told = context(ours(["red hearts", "", *ours.absent(1), "red " * 20, [2, 5, 6, 7, 3, 0, 0, 0]]))
    assert told.shape == (5, 8, 16)
    assert torch.equal(told[0], told[4])
    assert torch.equal(told[1], told[2])
    assert torch.equal(told[3], ours.encoder(torch.tensor([[2, 5, 5, 5, 5, 5, 5, 3]]))[0])
    assert ours.from_batch({"caption": ["a"]}) == ["a"]
    assert ours.state() == {"tokenizer": PIECES_AND}


@pytest.mark.parametrize("ids", [[1] * 7, [1] * 9, [40] * 8, [-1] * 8])
def test_ids_that_the_encoder_has_not_are_refused(ids: list[int]) -> None:
    with pytest.raises(InputError, match="this model takes 8, each from 0 to 39"):
        BertConditioner(BERT)([ids])


def test_captions_without_a_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match=r"lay BERT's \(vocab\.txt\)"):
        BertConditioner(BERT)(["red heart"])
    with pytest.raises(InputError, match="the tokenizer has 8 tokens, the encoder 5"):
        BertConditioner(replace(BERT, vocabulary=5), PIECES_AND)


def test_classes_of_the_2021_models_are_one_token_and_no_vector() -> None:
    with_null, without = (LabelConditioner(config, ["cat", "dog"]) for config in (CIN256_V2_LABEL, CIN256_LABEL))
    assert (len(with_null.embedding.weight), len(without.embedding.weight)) == (3, 2)
    told = with_null(["dog", None])
    assert told.vector is None
    assert torch.equal(context(told)[:, 0], with_null.embedding.weight[1:])
    assert torch.equal(context(without(["dog"]))[0], without.embedding.weight[1:])
    with pytest.raises(InputError, match="no picture without a class"):
        without([None])


def test_sizes_are_those_drawn() -> None:
    assert SDXL_NUMBERS.drawn(768, 512) == SDXL_NUMBERS.drawn(768, 512, away=True) == (768, 512, 0, 0, 768, 512)
    assert REFINER_NUMBERS.drawn(768, 512) == (768, 512, 0, 0, 6)
    assert REFINER_NUMBERS.drawn(768, 512, away=True) == (768, 512, 0, 0, 2.5)
    assert UPSCALER_NUMBERS.drawn(768, 512) == (20,)
