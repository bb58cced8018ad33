"""Our own perceptual network: it learns to repair pictures, and each picture's share belongs to its draw alone."""

import torch

from latentkit.nets.perceptual import FeatureConfig, OwnTrunk
from latentkit.training.first_stage.perceptual import FeatureObjective


def batch(draws: list[int], channels: int = 3) -> dict:
    pictures = torch.rand(8, channels, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1
    slope = torch.linspace(-0.3, 0.3, 12)[:, None] + torch.linspace(-0.2, 0.2, 10)
    return {"draw": torch.tensor(draws), "pixels": (pictures + slope)[[draw % 8 for draw in draws]]}


def objective(channels: int = 3) -> FeatureObjective:
    torch.manual_seed(0)
    return FeatureObjective(OwnTrunk(FeatureConfig(picture_channels=channels, widths=(8, 12, 16))), 4)


def test_a_batch_is_the_mean_of_its_singles_and_what_is_spoilt_belongs_to_the_draw() -> None:
    made = objective()
    together = made.loss("features", batch([3, 9, 20]), {})[0]
    singles = [made.loss("features", batch([draw]), {})[0] for draw in (3, 9, 20)]
    torch.testing.assert_close(together, torch.stack(singles).mean())
    other = made.loss("features", batch([11]), {})[0]  # the same picture as draw 3
    assert not torch.isclose(other, singles[0])


def test_it_learns() -> None:
    for channels in (1, 4):
        made = objective(channels)
        parameters = [parameter for _, parameter in made.turns()["features"]]
        assert len(parameters) == len(list(made.module.parameters()))
        optimiser = torch.optim.Adam(parameters, lr=3e-3)
        losses = []
        for step in range(60):
            loss, _ = made.loss("features", batch(list(range(8 * step, 8 * step + 8)), channels), {})
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_third_of_the_blocks_is_left_out() -> None:
    made = objective(1)
    clean = torch.full((1, 1, 64, 64), 5.0)
    gone = sum(float((made._spoilt(clean, [draw]) == 0).float().mean()) for draw in range(40)) / 40
    assert 0.3 < gone < 0.37
