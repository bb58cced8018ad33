"""The text encoder: padding counts for nothing, order counts, refusals."""

import pytest
import torch
from peer import randomise

from latentkit.errors import InputError
from latentkit.nets.towers import TextEncoder, TextEncoderConfig

CONFIG = TextEncoderConfig(vocabulary=50, length=8, width=16, layers=2, heads=2)
IDS = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0], [9, 1, 0, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 9, 1]])


@pytest.fixture
def encoder() -> TextEncoder:
    encoder = TextEncoder(CONFIG).eval()
    randomise(encoder, 1)
    return encoder


@torch.no_grad()
def test_shapes(encoder: TextEncoder) -> None:
    context, vector = encoder(IDS)
    assert context.shape == (3, 8, 16)
    assert vector.shape == (3, 16)


@torch.no_grad()
def test_what_padding_holds_changes_no_token_that_counts(encoder: TextEncoder) -> None:
    context, vector = encoder(IDS)
    encoder.token_embedding.weight[0] += 10.0
    encoder.position_embedding[4:] -= torch.randn(4, 16)
    other_context, other_vector = encoder(IDS)
    torch.testing.assert_close(other_vector[:2], vector[:2])
    torch.testing.assert_close(other_context[0, :4], context[0, :4])
    torch.testing.assert_close(other_context[1, :2], context[1, :2])
    assert (other_vector[2] - vector[2]).abs().max() > 1e-3


@torch.no_grad()
def test_the_vector_is_the_mean_of_the_tokens_that_count(encoder: TextEncoder) -> None:
    context, vector = encoder(IDS)
    torch.testing.assert_close(vector[0], context[0, :4].mean(0))
    torch.testing.assert_close(vector[2], context[2].mean(0))


@torch.no_grad()
def test_the_order_of_words_counts(encoder: TextEncoder) -> None:
    _, vector = encoder(torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0], [7, 6, 5, 1, 0, 0, 0, 0]]))
    assert (vector[0] - vector[1]).abs().max() > 1e-3


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="width 16 is no multiple of its 3 heads"):
        TextEncoderConfig(width=16, heads=3)
