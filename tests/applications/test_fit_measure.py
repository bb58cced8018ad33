"""Measuring: real steps, nothing left behind, and the largest portion that fits into memory."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from small_fit import folder_of, tiny

from latentkit.applications.fit import measure
from latentkit.applications.fit.choice import choose
from latentkit.applications.fit.measure import measure_autoencoder, measure_diffusion, portion, rehearse
from latentkit.applications.pictures import open_data
from latentkit.data.source import open_source
from latentkit.errors import InputError

__all__ = ["tiny"]


def planned(tiny: Path, kind: str = "captions"):
    folder = folder_of(tiny / "pics", 12, kind=kind)
    found = choose(
        open_source(folder), str(folder), Path("runs/x"), "x", size=None, condition="auto", seed=0, device="cpu"
    )
    return found, open_data(found.diffusion.data, 0, 4)[0]


class Falling:
    """One weight that is pulled to 3."""

    def __init__(self, scale: float = 1.0) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.module.weight)
        self.scale = scale

    def turns(self):
        return {"all": list(self.module.named_parameters())}

    def loss(self, turn, batch, shared):
        return ((self.module.weight - 3).square().sum() * self.scale), {}


def test_a_rehearsal_trains_until_told_and_leaves_nothing(tiny, monkeypatch):
    found, _ = planned(tiny)
    trash = tiny / "trash"
    trash.mkdir()
    monkeypatch.setattr(measure.tempfile, "tempdir", str(trash))
    objective, losses = Falling(), []

    def watch(step, loss):
        losses.append(loss)
        assert any(trash.iterdir())
        return step == 7

    rehearse(found.autoencoder, objective, lambda: itertools.repeat([{"draw": torch.arange(4)}]), watch)
    assert losses[0] == pytest.approx(9.0)
    assert len(losses) == 7
    assert losses == sorted(losses, reverse=True)
    assert objective.module.weight.item() > 0
    assert not any(trash.iterdir())


def test_a_rehearsal_tells_of_steps_that_are_skipped(tiny):
    found, _ = planned(tiny)
    losses = []
    rehearse(
        found.autoencoder,
        Falling(math.inf),
        lambda: itertools.repeat([{"draw": torch.arange(4)}]),
        lambda step, loss: losses.append(loss) or step == 3,
    )
    assert len(losses) == 3
    assert all(math.isnan(loss) for loss in losses)


@pytest.mark.parametrize("kind", ["captions", "classes", "plain"])
def test_both_stages_are_measured(tiny, kind):
    found, train = planned(tiny, kind)
    first = measure_autoencoder(found.autoencoder, train)
    second = measure_diffusion(found.diffusion, found.autoencoder, train)
    for measured in (first, second):
        assert 0 < measured.seconds < 10
        assert 10**7 < measured.memory < 10**11
        assert measured.micro_batch is None
        assert measured.look > 0
        assert measured.save > 0
    assert min(first.decode, first.encode, second.draw) > 0


def test_steps_are_timed_over_several_batches_once_they_are_warm(tiny, monkeypatch):
    found, _ = planned(tiny)
    now = itertools.count()
    monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(measure, "TIMED", 9.0)
    seen = []

    class Seen(Falling):
        def loss(self, turn, batch, shared):
            seen.append(batch["draw"][0].item())
            return super().loss(turn, batch, shared)

    seconds, *_ = measure._steps(
        found.autoencoder, Seen(), [{"step": 0, "draw": torch.arange(n, n + 4)} for n in (0, 4, 8)], 4, 4, None
    )
    assert seen[:4] == [0, 4, 8, 0]
    assert len(seen) > measure.WARM + measure.LEAST_TIMED - 1
    assert seconds >= 1


def test_pictures_that_are_read_in_every_step_cost_time_in_every_step(tiny, monkeypatch):
    found, train = planned(tiny)
    monkeypatch.setattr(measure, "_measure", lambda *_: measure.Measured(seconds=1.0, memory=1))
    monkeypatch.setattr(measure, "_taken", lambda loader: (taken(loader), times.pop(0)))

    def taken(loader):
        return list(itertools.islice(loader.batches(), 2))

    times = [8.0, 0.4]  # read once: then kept
    kept = measure_autoencoder(found.autoencoder, train)
    times = [8.0, 8.0]
    read = measure_autoencoder(found.autoencoder, train)
    assert kept.seconds == pytest.approx(1 + 0.4 / measure.DISTINCT)
    assert read.seconds == pytest.approx(1 + 8 / measure.DISTINCT)
    assert kept.decode == pytest.approx(8 / 8)
    beside = found.autoencoder.model_copy(update={"data": found.autoencoder.data.model_copy(update={"workers": 1})})
    times = [8.0, 8.0]
    assert measure_autoencoder(beside, train).seconds == pytest.approx(8 / measure.DISTINCT)


def test_little_memory_makes_small_portions(tiny, monkeypatch):
    found, train = planned(tiny)
    monkeypatch.setattr(measure, "portion", lambda batch, weights, allowed: 2)
    assert measure_autoencoder(found.autoencoder, train).micro_batch == 2


def test_a_device_that_is_too_small_is_an_input_error(tiny, monkeypatch):
    found, train = planned(tiny)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "_steps", full)
    with pytest.raises(InputError, match="--size"):
        measure_autoencoder(found.autoencoder, train)


def test_the_largest_portion_that_fits():
    weights = {2: 1200, 8: 1800}  # 1000 and 100 a picture
    assert portion(32, weights, 10_000) == 32
    assert portion(32, weights, 4200) == 32
    assert portion(32, weights, 4199) == 16
    assert portion(32, weights, 1100) == 1
    assert portion(12, weights, 1950) == 6  # a divisor of the batch
    assert portion(32, {4: 1000, 8: 900}, 1000) == 32  # noise in the measurement is no negative cost
    with pytest.raises(InputError, match="--size"):
        portion(32, weights, 1099)
