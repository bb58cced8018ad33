"""The first stage's loss: gradients against finite differences, the released code's formulas, its mistakes avoided."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.critics import CriticConfig, PatchCritic
from latentkit.nets.perceptual import FeatureConfig, OwnTrunk, PerceptualDistance
from latentkit.training.first_stage.adversarial import (
    Adversarial,
    Adversary,
    adaptive_weight,
    hinge,
    slope_penalty,
    vanilla,
)
from latentkit.training.first_stage.autoencoder import AutoencoderObjective, ReconstructionLoss
from latentkit.training.first_stage.codebook import CodebookLoss
from latentkit.training.first_stage.losses import focal_frequency, high_bands_l1
from latentkit.training.first_stage.perceptual import Perceptual

CRITIC = CriticConfig(channels=4, layers=1)
NOTHING = {"l1": 0.0, "pyramid": 0.0, "structure": 0.0, "kl": 0.0}


def network(**fields: Any) -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(AutoencoderConfig(channels=4, multipliers=(1, 1), blocks=1, attention=False, **fields))
    for parameter in made.parameters():  # the branches start at zero: give every path a say
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


def objective(net: Autoencoder, *, perceptual: bool = False, seed: int = 1, **loss: Any) -> AutoencoderObjective:
    torch.manual_seed(3)
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(3, 4))), 3) if perceptual else None
    if perceptual:
        loss["perceptual"] = Perceptual(weight=0.7)
    return AutoencoderObjective(net, ReconstructionLoss(**loss), seed, perceptual=distance)


def batch(count: int = 2, channels: int = 3, height: int = 12, width: int = 12, step: int = 9) -> dict[str, Any]:
    pixels = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return {"pixels": pixels, "draw": torch.arange(count), "step": step}


@pytest.mark.parametrize("bottleneck", ["kl", "identity"])
def test_gradients_of_the_whole_loss_are_those_of_finite_differences(bottleneck: str) -> None:
    """All parts but the focal frequency's, whose weights take no gradient."""
    net = network(variance=bottleneck == "kl")
    whole = objective(
        net,
        perceptual=True,
        l1=1.0, l2=0.3, pyramid=0.5, structure=0.2, wavelet=0.4, output_variance=True, kl=0.01,
        equivariance=0.3, latent_noise=0.2,
        adversarial=Adversarial(start=0, ramp=1, network=CRITIC),
    )  # fmt: skip
    whole.module.double()
    assert whole.log_variance is not None
    whole.log_variance.data.fill_(0.4)
    assert whole.perceptual is not None
    whole.perceptual.double()
    given = batch(step=next(s for s in range(99) if _applies(s)))
    given["pixels"] = given["pixels"].double()
    state = {
        "adaptive_weight": torch.tensor(0.6, dtype=torch.float64),
        "latent_moments": torch.tensor([[0.1] * 4, [0.9] * 4], dtype=torch.float64),
    }

    def value() -> Tensor:
        return whole.loss("autoencoder", given, dict(state))[0]

    parameters = [parameter for _, parameter in whole.turns()["autoencoder"]]
    gradients = torch.autograd.grad(value(), parameters)
    generator = torch.Generator().manual_seed(1)
    for chosen in range(6):  # along random directions: of everything, then of a part alone
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        if chosen:
            direction = [d if i % 5 == chosen - 1 else torch.zeros_like(d) for i, d in enumerate(direction)]
        ends = []
        for share in (1e-6, -1e-6):
            _move(parameters, direction, share)
            ends.append(float(value().detach()))
            _move(parameters, direction, -share)
        expected = (ends[0] - ends[1]) / 2e-6
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@torch.no_grad()
def _move(parameters: list[torch.nn.Parameter], direction: list[Tensor], share: float) -> None:
    torch._foreach_add_(parameters, direction, alpha=share)


def _applies(step: int) -> bool:
    from latentkit.training.first_stage.equivariance import change_of

    return change_of(step, 1) is not None


def test_the_critic_s_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert float(hinge(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2))
    expected = sum(math.log1p(math.exp(-x)) for x in (2.0, 0.5)) / 2
    expected += sum(math.log1p(math.exp(x)) for x in (-3.0, 0.25)) / 2
    assert float(vanilla(real, fake)) == pytest.approx(expected / 2)


def test_the_adaptive_weight_by_hand_and_clamped() -> None:
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 100)) == pytest.approx(
        5 / (2 + 1e-4)
    )
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 1.5)) == 1.5
    assert float(adaptive_weight(torch.tensor([1.0]), torch.zeros(1), 1e9)) == pytest.approx(1e4)


def test_r1_by_hand() -> None:
    """Of a critic that is linear in its picture the slope is known."""
    critic = PatchCritic(1, CriticConfig(channels=1, layers=1)).double()

    class Linear(torch.nn.Module):
        weight = torch.arange(16, dtype=torch.float64).reshape(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum((1, 2, 3))[:, None, None, None]

    critic.forward = Linear().forward  # type: ignore[method-assign]
    verdicts, penalty = slope_penalty(critic, torch.randn(3, 1, 4, 4, dtype=torch.float64))
    assert verdicts.shape == (3, 1, 1, 1)
    assert float(penalty) == pytest.approx(0.5 * sum(i * i for i in range(16)))


def test_r1_reaches_the_critic_s_weights() -> None:
    critic = PatchCritic(3, CRITIC).double()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = critic.layers[0].weight

    def penalty(w: Tensor) -> Tensor:
        return torch.func.functional_call(_Penalised(critic), {"critic.layers.0.weight": w}, (pixels,))

    assert torch.autograd.gradcheck(penalty, (weight.detach().requires_grad_(),), atol=1e-4)


class _Penalised(torch.nn.Module):
    def __init__(self, critic: PatchCritic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, pixels: Tensor) -> Tensor:
        return slope_penalty(self.critic, pixels)[1]


def test_lecam_by_hand() -> None:
    """Tseng et al. 2021, eq. 3, with the running verdicts of the steps before."""
    critic = PatchCritic(3, CRITIC)
    pixels, decoded = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    real, fake = critic(pixels), critic(decoded)
    anchors = {"anchor_real": torch.tensor(0.5), "anchor_fake": torch.tensor(-0.25)}
    adversary = Adversary(critic, Adversarial(start=0, lecam=0.1, r1=0.0))
    loss, _ = adversary.loss(pixels, {"decoded": decoded, **anchors})
    near = ((real + 0.25) ** 2).mean() + ((fake - 0.5) ** 2).mean()
    torch.testing.assert_close(loss, hinge(real, fake) + 0.1 * near)
    sums = {"pictures": torch.tensor(4.0), "verdict_real": torch.tensor(8.0), "verdict_fake": torch.tensor(-4.0)}
    adversary.settle_critic(sums, anchors)
    assert float(anchors["anchor_real"]) == pytest.approx(0.99 * 0.5 + 0.01 * 2)
    assert float(anchors["anchor_fake"]) == pytest.approx(-0.99 * 0.25 - 0.01)


def test_when_the_critic_counts() -> None:
    settings = Adversarial(start=10, warmup=4, ramp=4)
    assert [settings.learning(step) for step in (5, 6, 10)] == [False, True, True]
    assert [settings.measuring(step) for step in (8, 9)] == [False, True]
    assert [settings.share(step) for step in (9, 10, 12, 13, 99)] == [0, 0.25, 0.75, 1, 1]
    made = objective(network(), adversarial=settings)
    assert [made.active("critic", step) for step in (5, 6)] == [False, True]
    assert made.active("autoencoder", 0)
    adversary = made.adversary
    assert adversary is not None
    assert float(adversary.weight(99, 0, {})) == 0, "nothing was measured yet"
    assert float(adversary.weight(99, 2, {"adaptive_weight": torch.tensor(0.8)})) == pytest.approx(0.8 * 0.5 / 4)


def test_the_released_kl_loss() -> None:
    """ldm `contperceptual.py`: sums over elements over the batch; here means, so all weights are per element."""
    net = network()
    made = objective(
        net, perceptual=True, **NOTHING | {"l1": 1.0, "kl": 1e-6 * 4 * 6 * 6 / (3 * 12 * 12)},
        output_variance=True, adversarial=Adversarial(start=0, ramp=1, weight=0.5, network=CRITIC),
    )  # fmt: skip
    assert made.log_variance is not None
    made.log_variance.data.fill_(0.3)
    given = batch()
    weight = torch.tensor(0.02)
    loss, _ = made.loss("autoencoder", given, {"adaptive_weight": weight})

    x = given["pixels"]
    posterior = net.encode(x)
    from latentkit.diffusion.noise import keyed_batch

    xr = net.decode(posterior.sample(keyed_batch(given["draw"], (4, 6, 6), 1, "posterior")))
    assert made.perceptual is not None
    rec = (x - xr).abs() + 0.7 * made.perceptual(xr, x)[:, None, None, None]
    nll = (rec / made.log_variance.exp() + made.log_variance).sum() / len(x)
    mean, variance = posterior.mean, posterior.log_variance.exp()
    kl = 0.5 * (mean**2 + variance - 1 - posterior.log_variance).sum() / len(x)
    assert made.adversary is not None
    g = -made.adversary.critic(xr).mean()
    elements = x[0].numel()
    theirs = nll + 1e-6 * kl + (weight * elements) * 0.5 * g
    torch.testing.assert_close(loss * elements, theirs, rtol=1e-5, atol=1e-4)


def test_the_released_adaptive_weight() -> None:
    """`calculate_adaptive_weight`, of two backward passes; the released code takes it of each process alone."""
    net = network()
    made = objective(net, **NOTHING | {"l1": 1.0}, adversarial=Adversarial(start=0, most=1e4, network=CRITIC))
    given = batch()
    shared: dict[str, Tensor] = {}
    made.loss("autoencoder", given, shared)
    sums = {name: shared[name] for name in made.summed if name in shared}
    made.settle("autoencoder", 0, sums, shared)
    assert made.adversary is not None
    x = given["pixels"]
    from latentkit.diffusion.noise import keyed_batch

    xr = net.decode(net.encode(x).sample(keyed_batch(given["draw"], (4, 6, 6), 1, "posterior")))
    last = net.decoder.conv_out.weight
    by_nll = torch.autograd.grad((x - xr).abs().mean(), last, retain_graph=True)[0]
    by_g = torch.autograd.grad(-made.adversary.critic(xr).mean(), last, retain_graph=True)[0]
    theirs = torch.clamp(torch.norm(by_nll) / (torch.norm(by_g) + 1e-4), 0.0, 1e4)
    torch.testing.assert_close(shared["adaptive_weight"], theirs, rtol=1e-4, atol=1e-6)


def test_the_output_variance_is_optimised() -> None:
    """In the released KL loss `logvar` is a parameter that no optimiser was given: it never learns."""
    made = objective(network(), output_variance=True)
    turn = dict(made.turns()["autoencoder"])
    assert turn["log_variance"] is made.log_variance
    loss, logs = made.loss("autoencoder", batch(), {})
    loss.backward()
    difference = logs["l1"] + 0.5 * logs["pyramid"] + 0.1 * logs["structure"]
    assert made.log_variance is not None
    assert made.log_variance.grad is not None
    assert float(made.log_variance.grad) == pytest.approx(1 - float(difference), rel=1e-5)


def test_the_released_commitment_has_beta_on_the_wrong_side() -> None:
    """taming `VectorQuantizer2(legacy=True)`: mean((z_q.detach() - z)^2) + beta mean((z_q - z.detach())^2)."""
    net = network(codes=11, latent_channels=3)
    assert net.codebook is not None
    net.codebook.vectors.data.normal_(generator=torch.Generator().manual_seed(1))
    z = net.encode(batch()["pixels"]).mean
    z_q = net.codebook.vectors[net.codebook.nearest(z)].movedim(-1, 1)
    legacy = ((z_q.detach() - z) ** 2).mean() + 0.25 * ((z_q - z.detach()) ** 2).mean()
    corrected = 0.25 * ((z_q.detach() - z) ** 2).mean() + ((z_q - z.detach()) ** 2).mean()
    for settings, theirs in ((CodebookLoss(codes=0.25, commitment=1.0), legacy), (CodebookLoss(), corrected)):
        made = objective(net, **NOTHING, codebook=settings)
        loss, _ = made.loss("autoencoder", batch(), {})
        torch.testing.assert_close(loss, theirs)
        ours, known = (
            torch.autograd.grad(value, [net.codebook.vectors, net.encoder.conv_in.weight], retain_graph=True)
            for value in (loss, theirs)
        )
        for a, b in zip(ours, known, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize("kind", [{}, {"codes": 7}, {"levels": (5, 4, 3, 3)}])
def test_any_channels_and_non_square_pictures_pass_every_part(channels: int, kind: dict[str, Any]) -> None:
    made = objective(
        network(picture_channels=channels, **kind),
        perceptual=True,
        l2=1, wavelet=1, frequency=1, equivariance=1, latent_noise=0.1,
        adversarial=Adversarial(start=0, network=CRITIC),
    )  # fmt: skip
    for step in range(4):
        shared: dict[str, Tensor] = {"latent_moments": torch.ones(2, 4)}
        given = batch(channels=channels, height=14, width=10, step=step)
        for turn, parameters in made.turns().items():
            loss, _ = made.loss(turn, given, shared)
            loss.backward()
            assert math.isfinite(float(loss.detach()))
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in parameters)


def test_wavelet_bands_by_hand() -> None:
    zero = torch.zeros(1, 1, 4, 4)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    # one level: diagonal band (1 + 1 + 1 + 1) / 2 = 2, the other two 0; the second level has nothing left
    assert float(high_bands_l1(checks, zero, levels=1)) == pytest.approx(2 / 3)
    assert float(high_bands_l1(checks, zero, levels=2)) == pytest.approx(1 / 3)
    assert float(high_bands_l1(zero + 0.7, zero)) == pytest.approx(0, abs=1e-7)
    stripes = torch.tensor([1.0, -1.0]).repeat(4, 2)[None, None]
    assert float(high_bands_l1(stripes, zero, levels=1)) == pytest.approx(2 / 3)
    assert float(high_bands_l1(zero[..., :3], zero[..., :3])) == 0


@pytest.mark.parametrize("width", [5, 6])
def test_focal_frequency_against_the_whole_spectrum(width: int) -> None:
    a, b = torch.randn(2, 3, 6, width, dtype=torch.float64), torch.randn(2, 3, 6, width, dtype=torch.float64)
    spectrum = torch.fft.fft2(a - b, norm="ortho")
    square = spectrum.abs() ** 2
    weight = square.sqrt() / square.sqrt().amax((2, 3), keepdim=True)
    torch.testing.assert_close(focal_frequency(a, b), (weight * square).mean())
    assert float(focal_frequency(a, a)) == 0


@pytest.mark.parametrize("kind", [{}, {"codes": 7}, {"levels": (3, 3, 3, 3)}])
def test_frozen_encoders_have_no_gradient_and_no_place_in_the_turn(kind: dict[str, Any]) -> None:
    net = network(**kind)
    made = AutoencoderObjective(net, ReconstructionLoss(), 1, frozen_encoder=True)
    names = [name for name, _ in made.turns()["autoencoder"]]
    assert {name.split(".")[0] for name in names} == {"from_latent", "decoder"}
    codes = None if net.codebook is None else net.codebook.vectors.detach().clone()
    shared: dict[str, Tensor] = {}
    loss, logs = made.loss("autoencoder", batch(), shared)
    loss.backward()
    made.settle("autoencoder", 9, {name: shared[name] for name in made.summed if name in shared}, shared)
    assert net.codebook is None or torch.equal(net.codebook.vectors, codes)
    assert all(parameter.grad is None for parameter in net.encoder.parameters())
    assert not {"kl", "codes", "commitment"} & set(logs)
    assert F.mse_loss(net.decoder.conv_out.weight.grad, torch.zeros_like(net.decoder.conv_out.weight)) > 0


def test_in_bf16_the_perceptual_part_and_the_adaptive_weight_stay_in_float32() -> None:
    made = objective(network(codes=7), perceptual=True, adversarial=Adversarial(start=0, network=CRITIC))
    assert made.perceptual is not None
    types: list[torch.dtype] = []
    made.perceptual.trunk.register_forward_hook(lambda module, inputs, found: types.append(found[-1].dtype))
    made.autoencoder.encoder.middle.register_forward_hook(lambda module, inputs, found: types.append(found.dtype))
    shared: dict[str, Tensor] = {}
    for turn in made.turns():
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = made.loss(turn, batch(height=16, width=16), shared)
        loss.backward()
        assert loss.dtype == torch.float32
    assert types == [torch.bfloat16, torch.float32, torch.float32]
    assert shared["slope_verdict"].dtype == shared["slope_difference"].dtype == torch.float32
