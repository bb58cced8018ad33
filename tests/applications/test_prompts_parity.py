"""Long prompts and emphasis in whole drawings: diffusers is fed with the windows one after another."""

from typing import Any

import pytest
import torch
from peer_pipelines import NEGATIVE, SCALE, SEED, SIZE, STEPS, agree, ours, pipeline, scheduler, theirs
from torch import Tensor

import latentkit

pytestmark = pytest.mark.parity
WORDS = [("cat", "dog", "red", "sun", "sea")[n * n % 5] for n in range(100)]
"""Each is one token; a window holds 75."""
LONG, FIRST, SECOND = (" ".join(words) for words in (WORDS, WORDS[:75], WORDS[75:]))
Told = tuple[Tensor, Tensor | None]


@pytest.fixture(scope="module", params=["SD 1", "SD 2", "XL"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, latentkit.Model]:
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = pipeline(request.param, folder)
    pipe.save_pretrained(folder / "saved")
    assert len(pipe.tokenizer(LONG).input_ids) == len(WORDS) + 2
    return pipe, latentkit.load(folder / "saved", "cpu")


def told(pipe: Any, *windows: str) -> Told:
    """The windows' contexts one after another, and the vector of the first."""
    found = [
        pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        for text in windows
    ]
    return torch.cat([each[0] for each in found], 1), found[0][2] if len(found[0]) > 2 else None


def heavier(context: Tensor, place: int, weight: float) -> Tensor:
    """One token's states times the weight, and all scaled so that the mean of each tower's is what it was."""
    parts = []
    for before in torch.split(context, 32, -1):
        after = before.clone()
        after[:, place] *= weight
        parts.append(after * (before.mean() / after.mean()).clamp(0.5, 2))
    return torch.cat(parts, -1)


@torch.no_grad()
def compared(pair: tuple[Any, latentkit.Model], kind: str, prompt: str, negative: str, *asked: Told) -> None:
    """Ours of the words is the peer's of the two contexts; the latter counts."""
    pipe, model = pair
    fields: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance_scale": SCALE, **scheduler(pipe, kind)}
    (context, vector), (other, away) = asked
    given: dict[str, Any] = {"prompt_embeds": context, "negative_prompt_embeds": other}
    if vector is not None:
        given |= {"pooled_prompt_embeds": vector, "negative_pooled_prompt_embeds": away}
    how = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "height": SIZE, "width": SIZE}
    mine = ours(model, latentkit.TextToImage(prompt=prompt, negative=negative, **fields))
    agree(mine, theirs(pipe, **given, **how))
    for words in ({"prompt": FIRST}, {"negative": "green"}):
        changed, _ = ours(model, latentkit.TextToImage(**{"prompt": prompt, "negative": negative, **fields, **words}))
        assert (mine[0] - changed).abs().max() / mine[0].std() > 1e-3, words


@pytest.mark.parametrize("kind", ["DDIM", "DPM++(2M)"])
def test_a_long_prompt_beside_a_short_negative_one(kind: str, pair: tuple[Any, latentkit.Model]) -> None:
    """The peer takes contexts of one length alone: a window that is there twice is to attention as if it were once."""
    compared(pair, kind, LONG, NEGATIVE, told(pair[0], FIRST, SECOND), told(pair[0], NEGATIVE, NEGATIVE))


def test_both_long(pair: tuple[Any, latentkit.Model]) -> None:
    away = told(pair[0], SECOND + " " + " ".join(WORDS[:50]), " ".join(WORDS[50:]))
    negative = " ".join([SECOND, *WORDS[:50], *WORDS[50:]])
    compared(pair, "DDIM", f"{FIRST} BREAK {SECOND}", negative, told(pair[0], FIRST, SECOND), away)


def test_emphasis_in_a_long_prompt(pair: tuple[Any, latentkit.Model]) -> None:
    """In the second window, and in the negative prompt."""
    (first, vector), (second, _) = told(pair[0], FIRST), told(pair[0], "a dog")
    away, other = told(pair[0], "blue sky", "blue sky")
    away = torch.cat([heavier(away[:, :77], 1, 0.6)] * 2, 1)
    context = torch.cat([first, heavier(second, 2, 1.4)], 1)
    compared(pair, "DDIM", f"{FIRST} BREAK a (dog:1.4)", "(blue:0.6) sky", (context, vector), (away, other))
