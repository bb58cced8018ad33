"""The autoencoder in strips: the whole's values, whatever the strips, and no more of it on the device than strips."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentkit.nets import strips
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.strips import Strips

CONFIGS = {
    "kl": AutoencoderConfig(channels=32, multipliers=(1, 2, 2), blocks=1, latent_channels=4),
    "stem": AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=3, stem=2, attention=False),
    "codes": AutoencoderConfig(
        channels=32, multipliers=(1, 2), blocks=1, latent_channels=3, codes=16, attention_levels=1
    ),
    "levels": AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=2, levels=(5, 5)),
    "one level": AutoencoderConfig(channels=32, multipliers=(1,), blocks=1, latent_channels=4, picture_channels=5),
}


def made(config: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    torch.manual_seed(5)
    network = Autoencoder(config)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "conv_out" in name:
            nn.init.normal_(parameter, std=0.05)
    return network.to(dtype).eval().requires_grad_(False)


def pictures(config: AutoencoderConfig, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.rand((2, config.picture_channels, 40, 24), generator=generator).to(dtype) * 2 - 1


@pytest.mark.parametrize("elements", [1, 5000, 1 << 22])
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_are_exact(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "ELEMENTS", elements)
    config = CONFIGS[name]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        network, x = made(config, dtype), pictures(config, dtype)
        whole, parts = network.encode(x), Strips(network).encode(x)
        torch.testing.assert_close(parts.mean, whole.mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(parts.log_variance, whole.log_variance, rtol=tolerance, atol=tolerance)
        z = whole.mean
        torch.testing.assert_close(Strips(network).decode(z), network.decode(z), rtol=tolerance, atol=10 * tolerance)


class Products(TorchDispatchMode):
    """Keeps the number of elements of the largest product of matrices."""

    largest = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        if call is torch.ops.aten.bmm.default:
            self.largest = max(self.largest, found.numel())
        return found


def test_scores_of_attention_are_no_more_than_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channels are few, strips have many cells, and every pair of them a score."""
    monkeypatch.setattr(strips, "ELEMENTS", 5000)
    config = CONFIGS["one level"]
    with Products() as parts:
        Strips(made(config, torch.float32)).encode(pictures(config, torch.float32)[:1])
    assert 1000 < parts.largest <= 5000


def test_bfloat16_errs_no_more_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "ELEMENTS", 5000)
    config = CONFIGS["kl"]
    true = made(config, torch.float64)
    network = made(config, torch.float64).bfloat16()
    z = true.encode(pictures(config, torch.float64)).mean
    exact = true.decode(z)
    ours, plain = (float((y.double() - exact).square().mean()) for y in (
        Strips(network).decode(z.bfloat16()), network.decode(z.bfloat16())))  # fmt: skip
    assert ours < 1.5 * plain


def test_what_lies_between_goes_to_files_that_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []
    from_file = torch.from_file

    def spy(path: str, **options: Any) -> Tensor:
        assert Path(path).parent == tmp_path
        mapped.append(1)
        return from_file(path, **options)

    monkeypatch.setattr(torch, "from_file", spy)
    network, x = made(CONFIGS["kl"], torch.float32), pictures(CONFIGS["kl"], torch.float32)
    torch.testing.assert_close(Strips(network, tmp_path).decode(x[:, :1].repeat(1, 4, 1, 1)), Strips(network).decode(
        x[:, :1].repeat(1, 4, 1, 1)))  # fmt: skip
    assert mapped
    assert not list(tmp_path.iterdir())


def test_only_strips_pass_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "ELEMENTS", 20_000)
    network = made(CONFIGS["kl"], torch.float32)
    sizes: list[int] = []

    def spied(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(x: Tensor, *given: Any, **options: Any) -> Tensor:
            result = call(x, *given, **options)
            sizes.append(max(x.numel(), result.numel()))
            return result

        return spy

    for name in ("conv2d", "linear", "silu"):
        monkeypatch.setattr(F, name, spied(getattr(F, name)))
    tall = torch.zeros(1, 4, 64, 8)
    Strips(network).decode(tall)
    most = max(sizes)
    Strips(network).decode(torch.zeros(1, 4, 256, 8))
    assert max(sizes) == most < 64 * 8 * 16 * 32


def test_what_was_read_for_the_last_time_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "ELEMENTS", 1 << 15)
    made_new: list[int] = []
    new = strips.Memory._new

    def spy(memory: strips.Memory, count: int) -> Tensor:
        made_new.append(count)
        return new(memory, count)

    monkeypatch.setattr(strips.Memory, "_new", spy)
    network = made(CONFIGS["kl"], torch.float32)
    Strips(network).decode(torch.zeros(1, 4, 64, 24))
    assert (
        64 <= len(made_new) <= 68
    )  # four rows each of the last upsampling, which becomes two fields of half its width
    made_new.clear()
    Strips(network).encode(torch.zeros(1, 3, 256, 96))
    assert 52 <= len(made_new) <= 56  # ten rows each of two fields
