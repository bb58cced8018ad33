"""Averages of the weights."""

import pytest
import torch
from torch import nn

from latentkit.training.ema import Averaging, Ema, power_exponent, reconstruct
from latentkit.training.run.store import FileCalls, replace_file, tensor_bytes


def walk(module, step):
    """A drifting, noisy weight, a function of the step."""
    with torch.no_grad():
        for parameter in module.parameters():
            generator = torch.Generator().manual_seed(step)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + step / 100)


PLAIN = Averaging(decay=0.9)


def averaged(steps, settings=PLAIN, each=None):
    module = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    ema = Ema(module.named_parameters(), settings)
    seen = []
    for step in range(1, steps + 1):
        walk(module, step)
        seen.append(module.weight.detach().clone())
        ema.update()
        if each:
            each(step, ema)
    return module, ema, torch.stack(seen).double()


def test_plain_average_in_closed_form():
    _, ema, seen = averaged(120)
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(1, 121)]
    shares = torch.tensor([(1 - decays[i]) * torch.tensor(decays[i + 1 :]).prod() for i in range(120)]).double()
    torch.testing.assert_close(
        ema.table()["weight"].double(), torch.einsum("n,n...->...", shares, seen), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("width", [0.05, 0.10, 0.25])
def test_power_average_has_its_profile_and_width(width):
    """The profile is t ** gamma, and its deviation over its end is the width (EDM2, equation 121)."""
    exponent = power_exponent(width)
    assert (exponent + 1) ** 0.5 / ((exponent + 2) * (exponent + 3) ** 0.5) == pytest.approx(width)
    _, ema, seen = averaged(60, Averaging(power=(width,)))
    ends = (torch.arange(61).double() / 60) ** (exponent + 1)
    expected = torch.einsum("n,n...->...", ends.diff(), seen)
    torch.testing.assert_close(ema.table(f"ema-power-{width:.3f}")["weight"].double(), expected, rtol=0, atol=1e-5)


def test_any_width_is_reconstructed_from_snapshots(tmp_path):
    width = 0.15
    paths = []

    def store(step, ema):
        if step % 50 == 0:
            paths.append(tmp_path / f"{step}.safetensors")
            replace_file(FileCalls(), paths[-1], tensor_bytes(*ema.snapshot()))

    _, ema, _ = averaged(600, Averaging(power=(0.05, 0.10)), store)
    _, true, _ = averaged(600, Averaging(power=(width,)))
    made = reconstruct(paths, width)
    expected = true.table(f"ema-power-{width:.3f}")
    error = (made["weight"] - expected["weight"]).norm()
    nearest = (ema.table("ema-power-0.100")["weight"] - expected["weight"]).norm()
    assert set(made) == set(expected)
    assert error < 0.03 * nearest
    _, early, _ = averaged(300, Averaging(power=(width,)))
    expected = early.table(f"ema-power-{width:.3f}")
    torch.testing.assert_close(reconstruct(paths, width, updates=300)["weight"], expected["weight"], rtol=0, atol=0.1)


def test_applied_puts_every_bit_back():
    module, ema, _ = averaged(10)
    module.weight.data[0, 0, 0, 0] = -0.0
    before = {name: p.detach().clone().view(torch.int32) for name, p in module.named_parameters()}

    def fail():
        with ema.applied(module):
            assert torch.equal(module.weight, ema.table()["weight"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with ema.applied(track="ema-power-0.050"):
        assert torch.equal(module.weight, ema.table("ema-power-0.050")["weight"])
    assert all(torch.equal(p.detach().view(torch.int32), before[name]) for name, p in module.named_parameters())


def test_applied_to_another_module():
    _, ema, _ = averaged(10)
    other = nn.Conv2d(2, 3, 3)
    with ema.applied(other):
        assert torch.equal(other.weight, ema.table()["weight"])


def test_restore_is_exact_and_keeps_the_memory_format():
    module, ema, _ = averaged(10)
    tables = {track: {n: t.clone().contiguous() for n, t in table.items()} for track, table in ema.tables().items()}
    fresh = Ema(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last).named_parameters(), Averaging(decay=0.9))
    fresh.restore(tables, 10)
    for track, table in ema.tables().items():
        assert all(torch.equal(mean, fresh.table(track)[name]) for name, mean in table.items())
    assert fresh.table()["weight"].stride() == module.weight.stride()
    with pytest.raises(KeyError):
        fresh.restore({"ema": tables["ema"]}, 10)
