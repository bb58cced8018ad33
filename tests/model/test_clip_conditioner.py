"""Prompts through CLIP towers: what diffusers' pipelines encode, windows, emphasis, learnt vectors, refusals."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.names.tower_names import hugging_face_text
from latentkit.errors import InputError
from latentkit.model.conditioners import Conditioner
from latentkit.model.conditioners.clip import (
    REFINER_TEXT,
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXT,
    ClipConditioner,
    ClipConfig,
    mentions,
)
from latentkit.model.conditioners.prompt import Prompt
from latentkit.model.conditioners.tokenizer import clip_tokenizer
from latentkit.model.conditioning import Conditioning
from latentkit.nets.clip import ClipTextConfig

SMALL = {"width": 16, "layers": 3, "heads": 2}
PROMPTS = ["a photo of a cat", "", "two red hearts, naïve", "word " * 75, "an <|endoftext|> inside"]


def small(config: ClipConfig) -> ClipConfig:
    """A released model's text towers, made small."""
    towers = (
        replace(tower, **SMALL, projection=tower.projection and 12, activation=activation)
        for tower, activation in zip(config.towers, ("quick_gelu", "gelu"))
    )
    return replace(config, towers=tuple(towers))


def made(config: ClipConfig) -> ClipConditioner:
    torch.manual_seed(3)
    conditioner = ClipConditioner(small(config)).eval().requires_grad_(False)
    for parameter in conditioner.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return conditioner


@pytest.fixture(scope="module")
def sd1() -> ClipConditioner:
    return made(SD1_TEXT)


@pytest.fixture(scope="module")
def sdxl() -> ClipConditioner:
    return made(SDXL_TEXT)


def context(told: Conditioning) -> Tensor:
    assert told.context is not None
    return told.context


def vector(told: Conditioning) -> Tensor:
    assert told.vector is not None
    return told.vector


def peers(conditioner: ClipConditioner) -> tuple[list[Any], list[Any]]:
    """The same towers and tokenizers in transformers."""
    transformers: Any = pytest.importorskip("transformers")
    model = json.loads(clip_tokenizer().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    towers, tokenizers = [], []
    for tower in conditioner.towers:
        config = tower.config
        assert isinstance(config, ClipTextConfig)
        settings = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            hidden_act=config.activation, projection_dim=config.projection,
        )  # fmt: skip
        kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
        theirs = kind(settings).eval()
        prefix = "text_model." if config.projection else ""
        theirs.load_state_dict(given(hugging_face_text(config, prefix), tower.state_dict()))
        towers.append(theirs)
        pad = "<|endoftext|>" if config.pad is None else "!"
        tokenizers.append(
            transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, pad_token=pad, model_max_length=77)
        )
    return towers, tokenizers


@pytest.mark.parity
@pytest.mark.parametrize("config", [SD1_TEXT, SD2_TEXT])
def test_prompts_of_sd_1_and_2_are_what_diffusers_encodes(config: ClipConfig) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    ours = made(config)
    (tower,), (tokenizer,) = peers(ours)
    pipeline = diffusers.StableDiffusionPipeline.encode_prompt
    object.__setattr__(tower, "text_model", tower)  # diffusers looks for the last norm there, transformers 5 moved it
    fake: Any = type("Pipeline", (), {"tokenizer": tokenizer, "text_encoder": tower, "unet": None})()
    for skip, clip_skip in ((0, None), (1, 1)):
        expected, _ = pipeline(fake, PROMPTS, "cpu", 1, False, clip_skip=clip_skip)
        assert expected.std() > 0.1
        told = ours([Prompt(prompt, skip) for prompt in PROMPTS])
        torch.testing.assert_close(context(told), expected, atol=1e-5, rtol=1e-5)
        assert told.vector is None
        assert told.mask is None


@pytest.mark.parity
def test_prompts_of_sd_xl_are_what_diffusers_encodes(sdxl: ClipConditioner) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    (one, two), (first, second) = peers(sdxl)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=one, text_encoder_2=two, tokenizer=first, tokenizer_2=second, unet=None, scheduler=None
    )
    positive, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    told, silent = sdxl(PROMPTS), sdxl([*sdxl.absent(len(PROMPTS))])
    for ours, theirs in ((told, (positive, pooled)), (silent, (negative, negative_pooled))):
        torch.testing.assert_close(context(ours), theirs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vector(ours), theirs[1], atol=1e-5, rtol=1e-5)
    assert not context(silent).any()
    assert not vector(silent).any()
    skipped = pipeline.encode_prompt(PROMPTS, device="cpu", clip_skip=1)[0]
    torch.testing.assert_close(context(sdxl([Prompt(p, 1) for p in PROMPTS])), skipped, atol=1e-5, rtol=1e-5)
    empty = pipeline.encode_prompt(PROMPTS, device="cpu", negative_prompt="")[1]
    torch.testing.assert_close(context(sdxl([""])), empty[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "widths"),
    [(SD1_TEXT, (768, 0)), (SD2_TEXT, (1024, 0)), (SDXL_TEXT, (2048, 1280)), (REFINER_TEXT, (1280, 1280))],
)
def test_widths_of_released_models(config: ClipConfig, widths: tuple[int, int]) -> None:
    assert (config.context_width, config.vector_width) == widths


def test_it_is_a_conditioner_whose_absent_prompt_is_the_empty_one(sd1: ClipConditioner) -> None:
    assert isinstance(sd1, Conditioner)
    told = context(sd1([*sd1.absent(1), ""]))
    assert torch.equal(told[0], told[1])
    assert sd1.room == 75
    assert sd1.state() == {"tokenizer": None}


def test_long_prompts_are_windows_one_after_another(sdxl: ClipConditioner) -> None:
    words = [f"{word} {number}" for number in range(4) for word in ("cat", "dog", "red", "sun", "sea")] * 3
    prompt = " ".join(words)
    assert 2 * 75 > len(sdxl._ids(prompt)) > 75
    told = sdxl([prompt])
    first, second = " ".join(prompt.split()[:75]), " ".join(prompt.split()[75:])
    parts = sdxl([first, second])
    torch.testing.assert_close(context(told)[0], context(parts).flatten(0, 1))
    torch.testing.assert_close(vector(told)[0], vector(parts)[0])
    broken = sdxl([f"{first} BREAK {second} BREAK"])
    torch.testing.assert_close(context(broken), context(told))


def test_a_batch_equals_its_singles_whatever_their_lengths(sdxl: ClipConditioner) -> None:
    asked = ["(cat:1.4)", None, "a BREAK b BREAK c", Prompt("dog", 1)]
    together = sdxl(asked)
    assert together.mask is not None
    assert together.mask.sum(1).tolist() == [77, 77, 3 * 77, 77]
    for row, prompt in enumerate(asked):
        alone, kept = sdxl([prompt]), together.mask[row]
        torch.testing.assert_close(context(together)[row, kept], context(alone)[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(vector(together)[row], vector(alone)[0], atol=1e-6, rtol=1e-5)
        assert not context(together)[row, ~kept].any()


def test_emphasis_scales_the_tokens_and_keeps_the_mean(sd1: ClipConditioner) -> None:
    plain, heavy = context(sd1(["a red cat"]))[0], context(sd1(["a (red:1.5) cat"]))[0]
    weights = torch.ones(77)
    weights[2] = 1.5
    scaled = plain * weights[:, None]
    torch.testing.assert_close(heavy, scaled * (plain.mean() / scaled.mean()))
    torch.testing.assert_close(heavy.mean(), plain.mean())
    balanced = context(sd1(["((red:2):0.5) cat"]))
    assert torch.equal(balanced, context(sd1(["red cat"])))


def test_a_mean_of_nothing_scales_nothing() -> None:
    ours = made(SD1_TEXT)
    (tower,) = ours.towers
    tower.norm_out.weight.fill_(1.0)
    tower.norm_out.bias.zero_()
    plain, heavy = context(ours(["a red cat"]))[0], context(ours(["a (red:1.5) cat"]))[0]
    ratio = heavy[1] / plain[1]
    assert abs(plain.mean()) < 1e-6
    assert 0.5 <= ratio.mean() <= 2
    torch.testing.assert_close(heavy[2] / plain[2], 1.5 * ratio, atol=1e-4, rtol=1e-4)


def test_a_context_of_zeros_stays_one() -> None:
    ours = made(SD1_TEXT)
    for parameter in ours.towers[0].norm_out.parameters():
        parameter.zero_()
    assert not context(ours(["a (red:1.5) cat"])).any()


def test_the_refiner_takes_the_second_of_two_learnt_vectors() -> None:
    ours, second = made(REFINER_TEXT), torch.randn(1, 16)
    ours.learn("toy", [torch.zeros(1, 8), second])
    both = context(ours(["a toy"]))
    ours.learn("toy", [second])
    assert torch.equal(context(ours(["a toy"])), both)


def test_captions_of_training_have_no_emphasis(sd1: ClipConditioner) -> None:
    (told,) = sd1.from_batch({"caption": ["flag (old)"]})
    ids = [list(ids) for ids, _ in sd1._windows(told)]
    assert ids[0][1:6] == [*clip_tokenizer().encode("flag (old)").ids, 49407]
    assert all(weight == 1 for _, weights in sd1._windows(told) for weight in weights)


def test_learnt_vectors_stand_for_their_name() -> None:
    ours = made(SDXL_TEXT)
    plain = context(ours(["a cat here"]))
    (token,) = clip_tokenizer().encode("cat").ids
    same = [tower.token_embedding.weight[token][None] for tower in ours.towers]
    ours.learn("other", [torch.randn(2, 16), torch.randn(2, 16)])
    ours.learn("<my-Cat>", same)
    torch.testing.assert_close(context(ours(["a <MY-cat> here"])), plain)
    assert (context(ours(["a <my-cat>s here"])) - plain).abs().max() > 1e-3
    assert (context(ours(["an other here"])) - plain).abs().max() > 1e-3
    torch.testing.assert_close(context(ours(["a cat here"])), plain)
    both = [torch.cat([one, one]) for one in same]
    ours.learn("<my-Cat>", both)
    torch.testing.assert_close(context(ours(["a <my-cat> here"])), context(ours(["a cat cat here"])))


def test_the_longest_name_wins_and_letters_of_any_script_do() -> None:
    ours = made(SD1_TEXT)
    ours.learn("ink", [torch.randn(1, 16)])
    ours.learn("INK style", [torch.randn(2, 16)])
    ids = [token for unit in ours._units("ink, ınk Style") for token in unit]
    assert ids == [49408, 267, 49409, 49410]


def test_learnt_vectors_are_not_torn_by_a_window() -> None:
    ours = made(SD1_TEXT)
    ours.learn("style", [torch.randn(4, 16)])
    first, second = (ids for ids, _ in ours._windows("cat " * 73 + "style"))
    assert first[73:77] == [2368, 49407, -1, -1]
    assert second[1:5] == [49408, 49409, 49410, 49411]


@pytest.mark.parametrize(
    "vectors",
    [[(2, 16)], [(2, 16), (3, 16)], [(2, 16), (2, 15)], [(16,), (16,)], [(0, 16), (0, 16)], [(76, 16), (76, 16)]],
)
def test_vectors_that_do_not_fit_are_refused(sdxl: ClipConditioner, vectors: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"'x' has vectors of shape .*1 to 75 of width 16 and as many of width 16"):
        sdxl.learn("x", [torch.zeros(shape) for shape in vectors])


@pytest.mark.parametrize(("name", "value"), [(" ", 0.0), ("x", float("nan"))])
def test_vectors_without_name_or_number_are_refused(sd1: ClipConditioner, name: str, value: float) -> None:
    with pytest.raises(InputError, match="no name, or holds values that are not finite"):
        sd1.learn(name, [torch.full((1, 16), value)])


def test_towers_that_cannot_read_one_prompt_are_refused() -> None:
    with pytest.raises(InputError, match="one vocabulary and length"):
        ClipConfig((ClipTextConfig(), ClipTextConfig(length=12)))
    with pytest.raises(InputError, match="one vocabulary and length"):
        ClipConfig(())


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    from tokenizers import Tokenizer, models

    tiny = ClipConfig((ClipTextConfig(vocabulary=100, **SMALL),))
    with pytest.raises(InputError, match="the tokenizer has 49408 tokens, the text tower 100"):
        ClipConditioner(tiny)
    with pytest.raises(InputError, match="it is not one of CLIP's"):
        ClipConditioner(tiny, Tokenizer(models.BPE({"a": 0}, [])).to_str())


def test_a_tokenizer_of_its_own_wins() -> None:
    text = clip_tokenizer().to_str()
    ours = ClipConditioner(small(SD1_TEXT), text)
    assert ours.state() == {"tokenizer": text}
    assert len(ours._ids("a cat")) == 2


def test_a_full_window_ends_at_its_last_comma_if_that_is_near(sd1: ClipConditioner) -> None:
    """Of 75 words the 56th is the first that a comma behind may move; a comma as the 76th moves nothing."""

    def split(text: str) -> list[int]:
        """Words of each window."""
        return [sum(0 <= token < sd1._start for token in ids) for ids, _ in sd1._windows(text)]

    def words(*places: int) -> str:
        return " ".join("," if place in places else "cat" for place in range(80))

    assert split(words()) == [75, 5]
    assert split(words(70)) == [71, 9]
    assert split(words(60, 70)) == [71, 9]
    assert split(words(55)) == [56, 24]
    assert split(words(54)) == [75, 5]
    assert split(words(70, 75)) == [75, 5]
    assert split(words(74)) == [75, 5]
    (_, first), (_, second) = sd1._windows(f"({words(70)}:1.5)")
    assert first.count(1.5) == 71
    assert second.count(1.5) == 9


def test_names_are_known_inside_of_the_context_alone(sd1: ClipConditioner) -> None:
    before = context(sd1(["a <cat>"]))
    with sd1.knowing({"<cat>": [torch.ones(2, 16)]}):
        assert (context(sd1(["a <cat>"])) - before).abs().max() > 1e-3
    assert torch.equal(context(sd1(["a <cat>"])), before)
    with pytest.raises(InputError, match="has vectors of shape"), sd1.knowing({"<cat>": [torch.ones(2, 15)]}):
        pass
    assert torch.equal(context(sd1(["a <cat>"])), before)


def test_no_prompt_has_a_clip_skip_too(sdxl: ClipConditioner, sd1: ClipConditioner) -> None:
    assert not context(sdxl([Prompt(None, 1)])).any()
    assert torch.equal(context(sd1([Prompt(None, 1)])), context(sd1([Prompt("", 1)])))
    assert not torch.equal(context(sd1([Prompt(None, 1)])), context(sd1([Prompt(None)])))


@pytest.mark.parametrize(
    ("text", "said"), [("a <cat> here", True), ("A <CAT>.", True), ("a<cat>", False), ("<cat>s", False), ("", False)]
)
def test_a_name_is_said_as_a_word_of_its_own(text: str, said: bool) -> None:
    assert any(mentions(text, ["<cat>"])) == said
