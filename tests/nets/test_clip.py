"""CLIP's towers against transformers' at tiny random shapes, what counts in a window, and refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from peer import distance, randomise

from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.names.tower_names import hugging_face_image, hugging_face_text
from latentkit.errors import InputError
from latentkit.nets.clip import ClipImage, ClipImageConfig, ClipText, ClipTextConfig

TINY = ClipTextConfig(vocabulary=60, length=9, width=24, layers=3, heads=4, hidden=40)
OPEN = replace(TINY, activation="gelu", projection=20, pad=0)
PICTURES = ClipImageConfig(size=12, patch=4, width=24, layers=2, heads=3, activation="gelu", projection=16)
END = 59
IDS = torch.tensor([[58, 7, 8, END, END, END, END, END, END], [58, 3, END, 0, 0, 0, 0, 0, 0]])
TYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def peer(config: ClipTextConfig, end: int) -> Any:
    """The same tower in transformers, which takes the first `end` (2: the largest id) for the end of the text."""
    transformers: Any = pytest.importorskip("transformers")
    settings = transformers.CLIPTextConfig(
        vocab_size=config.vocabulary,
        max_position_embeddings=config.length,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        hidden_act=config.activation,
        projection_dim=config.projection,
        bos_token_id=58,
        eos_token_id=end,
    )
    kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
    return kind(settings).eval()


def tower(config: ClipTextConfig, dtype: torch.dtype = torch.float32) -> ClipText:
    ours = ClipText(config).to(dtype).eval()
    randomise(ours, 1)
    return ours


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@pytest.mark.parametrize("end", [2, END])
@torch.no_grad()
def test_text_towers_equal_their_peers(dtype: torch.dtype, tolerance: float, end: int) -> None:
    plain, projecting = tower(TINY, dtype), tower(OPEN, dtype)
    for ours, prefix in ((plain, ""), (projecting, "text_model.")):
        theirs = peer(ours.config, end).to(dtype)
        theirs.load_state_dict(given(hugging_face_text(ours.config, prefix), ours.state_dict()), strict=True)
        expected = theirs(IDS, output_hidden_states=True)
        assert expected.last_hidden_state.std() > 0.1
        context, vector = ours(IDS, END)
        assert distance(context, expected.last_hidden_state) < tolerance
        if vector is not None:
            assert distance(vector, expected.text_embeds) < tolerance
        ours.config = replace(ours.config, skip=1, final_norm=False)
        for more in (0, 1):
            context, again = ours(IDS, END, more)
            assert distance(context, expected.hidden_states[-2 - more]) < tolerance
            assert (again is None and vector is None) or torch.equal(again, vector)


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
@torch.no_grad()
def test_image_tower_equals_its_peer(dtype: torch.dtype, tolerance: float) -> None:
    transformers: Any = pytest.importorskip("transformers")
    settings = transformers.CLIPVisionConfig(
        image_size=12, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        hidden_act="gelu", projection_dim=16,
    )  # fmt: skip
    ours = ClipImage(PICTURES).to(dtype).eval()
    randomise(ours, 2)
    theirs = transformers.CLIPVisionModelWithProjection(settings).to(dtype).eval()
    theirs.load_state_dict(given(hugging_face_image(PICTURES), ours.state_dict()), strict=True)
    pixels = torch.randn(2, 3, 12, 12, dtype=dtype)
    assert distance(ours(pixels), theirs(pixels).image_embeds) < tolerance


@torch.no_grad()
def test_the_context_of_fewer_blocks_with_the_last_norm_is_that_of_a_shorter_tower() -> None:
    whole, short = tower(replace(TINY, skip=1)), tower(replace(TINY, layers=2))
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("blocks.2.")}
    short.load_state_dict(state)
    assert torch.equal(whole(IDS, END)[0], short(IDS, END)[0])


@torch.no_grad()
def test_a_token_knows_nothing_of_those_behind_it() -> None:
    ours, changed = tower(OPEN), IDS.clone()
    changed[:, 4:] = 5
    (context, vector), (other, again) = ours(IDS, END), ours(changed, END)
    torch.testing.assert_close(other[:, :4], context[:, :4])
    assert (other[:, 4:] - context[:, 4:]).abs().max() > 1e-3
    torch.testing.assert_close(again, vector)


@torch.no_grad()
def test_learnt_vectors_stand_behind_the_vocabulary_and_do_not_end_the_text() -> None:
    ours, longer = tower(OPEN), tower(replace(OPEN, vocabulary=62))
    learnt = torch.randn(2, 24)
    state = ours.state_dict()
    state["token_embedding.weight"] = torch.cat([state["token_embedding.weight"], learnt])
    longer.load_state_dict(state)
    ids = torch.tensor([[58, 61, 60, 4, END, 0, 0, 0, 0]])
    for one, two in zip(ours(ids, END, learnt=learnt), longer(ids, END)):
        assert torch.equal(one, two)
    largest = longer(ids, 61)[1]
    assert (longer(ids, END)[1] - largest).abs().max() > 1e-3


@pytest.mark.parametrize("skip", [3, -1])
def test_a_skip_that_leaves_no_block_is_refused(skip: int) -> None:
    with pytest.raises(InputError, match=f"clip skip {skip} is asked for; this text tower allows 0 to 2"):
        tower(TINY)(IDS, END, skip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 24, which is no multiple of its 5 heads"),
        ({"heads": 0}, "no multiple of its 0 heads"),
        ({"skip": 3}, "skips 3 of its 3 blocks"),
        ({"skip": -1}, "skips -1 of its 3"),
        ({"length": 2}, "windows of 2 tokens"),
    ],
)
def test_shapes_of_text_towers_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)


def test_shapes_of_image_towers_that_cannot_be() -> None:
    with pytest.raises(InputError, match="12 px is not a whole number of 5 px patches"):
        replace(PICTURES, patch=5)
    with pytest.raises(InputError, match="width 24, which is no multiple of its 5 heads"):
        replace(PICTURES, heads=5)
