"""How a codebook learns: running means and usage by hand, revival, one run however divided; watching for collapse."""

import pytest
import torch
from torch import Tensor

from latentkit.nets.bottleneck import Codebook, Levels
from latentkit.training.collapse import Collapse, doubtful, watch
from latentkit.training.first_stage.codebook import CodebookLoss, chosen, counted, followed, settle
from latentkit.training.first_stage.equivariance import change_of, changed


def book(*vectors: float) -> Codebook:
    made = Codebook(len(vectors), 1)
    made.vectors.data = torch.tensor(vectors)[:, None]
    return made


def latents(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def sums_of(codebook: Codebook, z: Tensor, draw: int = 0) -> dict[str, Tensor]:
    return chosen(codebook, z, codebook.nearest(z), torch.arange(draw, draw + len(z)), 1)


def test_running_means_by_hand() -> None:
    """van den Oord et al. 2017, eq. 6 to 8: from counts of 1 and the codes themselves."""
    codes, shared = book(0.0, 10.0), {}
    settings = CodebookLoss(running_mean=0.9, revive=False)
    settle(codes, settings, sums_of(codes, latents(1.0, 2.0, 9.0)), shared, 1, 0)
    count, total = 0.9 * 1 + 0.1 * 2, 0.9 * 0 + 0.1 * 3
    second = (0.9 * 10 + 0.1 * 9) / (0.9 + 0.1)
    assert codes.vectors.flatten().tolist() == pytest.approx([total / count, second])
    settle(codes, settings, sums_of(codes, latents(9.0)), shared, 1, 1)
    assert codes.vectors.flatten().tolist() == pytest.approx([total / count, (0.9 * second + 0.1 * 9) / (0.9 + 0.1)]), (
        "a code that nobody chose stays"
    )


def test_usage_and_perplexity() -> None:
    codes, shared = book(0.0, 1.0, 2.0, 3.0), {}
    still = CodebookLoss(revive=False)
    logs = settle(codes, still, sums_of(codes, latents(0.0, 1.0, 2.0, 3.0)), shared, 1, 0)
    assert logs["codebook_perplexity"] == pytest.approx(4)
    assert logs["codebook_chosen"] == 1
    torch.testing.assert_close(shared["codebook_usage"], torch.full((4,), 0.01))
    shared.clear()
    logs = settle(codes, still, sums_of(codes, latents(0.1, 0.2, 1.1, 0.9)), shared, 1, 0)
    assert logs["codebook_perplexity"] == pytest.approx(2)
    assert logs["codebook_chosen"] == 0.5


def test_the_use_of_levels() -> None:
    """Two channels of 3 and 4 values: numbers as they count up, and their even use."""
    values = torch.tensor([[-1.0, 0.0, 1.0, 1.0], [-1.0, -1.0, -0.5, 0.5]])[None, :, None]
    levels = Levels((3, 4))
    assert levels.nearest(values).tolist() == [[[0, 4, 9, 11]]]
    counts = counted(levels, values)["codebook_chosen"]
    assert counts.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1]
    shared: dict[str, Tensor] = {}
    logs = followed(counts, shared)
    assert logs["codebook_perplexity"] == pytest.approx(4)
    assert logs["codebook_chosen"] == pytest.approx(1 / 3)
    assert followed(counts.roll(6), shared)["codebook_perplexity"] == pytest.approx(8, abs=0.01)
    assert counted(Levels((64, 64, 65)), torch.zeros(1, 3, 1, 1)) == {}, "too many"


@pytest.mark.parametrize("running_mean", [None, 0.9])
def test_dead_codes_move_to_latents_of_the_batch_and_live_ones_stay(running_mean: float | None) -> None:
    codes, shared = book(0.5, 50.0, 60.0, 1.0), {}
    settings = CodebookLoss(running_mean=running_mean)
    z = latents(0.5, 1.0, 0.375, 0.875)
    logs = settle(codes, settings, sums_of(codes, z), shared, 1, 0)
    moved = codes.vectors.flatten().tolist()
    assert logs["codebook_revived"] == 2
    assert {moved[1], moved[2]} <= {0.5, 1.0, 0.375, 0.875}
    if running_mean is None:
        assert (moved[0], moved[3]) == (0.5, 1)
    assert shared["codebook_usage"][1] == 1, "and have time to be found"
    assert settle(codes, settings, sums_of(codes, z, 1), shared, 1, 1)["codebook_revived"] == 0
    for step in range(2, 600):  # one that nobody chooses any more
        logs = settle(codes, CodebookLoss(revive=step > 540), sums_of(codes, latents(-9.0)), shared, 1, step)
        if logs["codebook_revived"]:
            break
    assert step == 541


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    codes = Codebook(7, 3)
    codes.vectors.data.normal_()
    z = torch.randn(6, 3, 4, 2)
    whole = chosen(codes, z, codes.nearest(z), torch.arange(6), 1)
    parts = [
        chosen(codes, part, codes.nearest(part), draws, 1) for part, draws in zip(z.split(2), torch.arange(6).split(2))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
    filled = whole["codebook_filled"] == 1
    assert int(filled.sum()) == 6 * 8
    cells = z.movedim(1, -1).reshape(-1, 3)
    assert all(bool((cells == row).all(1).any()) for row in whole["codebook_cells"][filled])


def test_a_fall_is_doubted_then_given_up() -> None:
    shared: dict[str, Tensor] = {}
    for psnr in [20.0] * 50:
        watch(torch.tensor(psnr), shared, counts=True)
    assert not doubtful(shared)
    seen: list[bool] = []
    with pytest.raises(Collapse, match=r"fell from (20|19).* to 1[34]\.\d dB"):
        _fall(shared, seen)
    assert seen.index(True) < 6
    assert len(seen) < 25
    assert all(seen[seen.index(True) :])


def _fall(shared: dict[str, Tensor], seen: list[bool]) -> None:
    for _ in range(100):
        watch(torch.tensor(10.0), shared, counts=True)
        seen.append(doubtful(shared))


def test_a_slow_fall_is_let_be_and_nothing_is_given_up_before_the_critic_counts() -> None:
    shared: dict[str, Tensor] = {}
    for step in range(5000):
        watch(torch.tensor(30.0 - 0.0025 * step), shared, counts=True)
    assert not doubtful(shared)
    for _ in range(100):
        watch(torch.tensor(3.0), shared, counts=False)


def test_latents_and_pictures_change_alike() -> None:
    """Cells of one colour on a slope: what scales and turns the picture does the same with its cells."""
    cells = (torch.arange(8.0)[:, None] + 3 * torch.arange(4.0) - 8).expand(1, 2, -1, -1)
    pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for turns in range(4):
        small = changed(cells, 0.5, turns, 1)
        large = changed(pixels, 0.5, turns, 4)
        assert small.shape[2:] == ((4, 2) if turns % 2 == 0 else (2, 4))
        assert [side * 4 for side in small.shape[2:]] == [*large.shape[2:]]
        means = torch.nn.functional.avg_pool2d(large, 4)
        assert float((means - small).abs().mean() / small.abs().mean()) < 0.25, "but for the edges"
        assert torch.equal(changed(cells, 1.0, turns, 1), cells.rot90(turns, (2, 3)))


def test_half_of_the_steps_change_by_a_function_of_the_step() -> None:
    found = [change_of(step, 3) for step in range(2000)]
    applied = [change for change in found if change is not None]
    assert len(applied) == pytest.approx(1000, abs=80)
    scales, turns = zip(*applied)
    assert min(scales) >= 0.25
    assert max(scales) <= 1
    assert set(turns) == {0, 1, 2, 3}
    assert found == [change_of(step, 3) for step in range(2000)]
