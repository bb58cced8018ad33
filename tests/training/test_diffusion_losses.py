"""Every noise schedule trained under every prediction: levels, weights, the hybrid loss of a learned variance."""

import itertools
import math

import numpy as np
import pytest
import torch

from latentkit.diffusion.prediction import PREDICTIONS, WEIGHTS
from latentkit.diffusion.schedule import KINDS, SIGMA_CAP, NoiseSchedule
from latentkit.errors import InputError
from latentkit.model.denoiser import NOISE_ALONE
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.towers import BertTextConfig
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import BOUND_SHARE, DiffusionLoss, DiffusionObjective, SigmaSampling
from latentkit.training.optimizers import Optimiser, Stepper

SCHEDULES = {
    **{kind: NoiseSchedule(kind) for kind in KINDS},  # type: ignore[arg-type]
    "zero_terminal": NoiseSchedule("cosine", zero_terminal=True),
    "shifted": NoiseSchedule("flow", shift=3.0),
}
NETWORK = UNetConfig(channels=32, multipliers=(1,), blocks=1, depth=(0,), middle_depth=0, heads=1)
WAYS = itertools.cycle(itertools.product(("logit_normal", "uniform"), WEIGHTS))
"""One distribution and weight for each pair, in turn."""
PAIRS = [
    (kind, prediction, *next(WAYS))
    for kind, prediction in itertools.product(SCHEDULES, PREDICTIONS)
    if not (prediction in NOISE_ALONE and SCHEDULES[kind].sigma_max >= SIGMA_CAP)
]


def objective(
    schedule: NoiseSchedule, prediction: str, settings: DiffusionLoss, learned_variance: bool = False
) -> DiffusionObjective:
    torch.manual_seed(0)
    architecture = Architecture(
        NETWORK, size=(4, 4), schedule=schedule, prediction=prediction, learned_variance=learned_variance,
    )  # type: ignore[arg-type]  # fmt: skip
    return DiffusionObjective(LatentDiffusion(fit_network(architecture), {}), settings, seed=1)


def batch(count: int = 8) -> dict:
    pixels = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return {"draw": torch.arange(count), "pixels": pixels, "caption": [""] * count}


def losses(subject: DiffusionObjective, steps: int) -> list[float]:
    """The loss of one batch, fitted again and again."""
    optimiser = torch.optim.AdamW(subject.module.parameters(), lr=8e-3)
    given, values = batch(), []
    for _ in range(steps):
        loss, _ = subject.loss("diffusion", given, {})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
    return values


@pytest.mark.parametrize(("kind", "prediction", "distribution", "weight"), PAIRS)
@pytest.mark.usefixtures("unchecked")
def test_every_schedule_trains_under_every_prediction(
    kind: str, prediction: str, distribution: str, weight: str
) -> None:
    settings = DiffusionLoss(sigma=SigmaSampling(distribution=distribution), weight=weight)  # type: ignore[arg-type]
    values = losses(objective(SCHEDULES[kind], prediction, settings), 7)
    assert np.isfinite(values).all()
    assert min(values[-3:]) < 0.9 * values[0]


def test_what_cannot_be_learned_is_refused() -> None:
    left_out = {(kind, name) for kind in SCHEDULES for name in PREDICTIONS} - {pair[:2] for pair in PAIRS}
    assert {kind for kind, _ in left_out} == {"sqrt", "flow", "zero_terminal", "shifted"}
    for kind, name in left_out:
        with pytest.raises(InputError, match="take prediction 'v', 'x0', 'flow' or 'edm', or a schedule that ends"):
            objective(SCHEDULES[kind], name, DiffusionLoss())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_uniform_sigmas_are_uniform_among_the_levels(kind: str) -> None:
    schedule = SCHEDULES[kind]
    sigmas = SigmaSampling(distribution="uniform").sigmas(torch.arange(2000), schedule, 0)
    positions = np.sort(schedule.position(sigmas.numpy()))
    assert np.abs(positions - np.linspace(0, schedule.top, 2000)).max() < 3
    assert schedule.sigma_min <= float(sigmas.min())


def test_the_log_normal_of_edm_and_a_flows_shift() -> None:
    edm = SigmaSampling(mean=-1.2, std=1.2).sigmas(torch.arange(4096), SCHEDULES["edm"], 3).log()
    assert float(edm.mean()) == pytest.approx(-1.2, abs=0.01)
    assert float(edm.std()) == pytest.approx(1.2, abs=0.01)
    plain, moved = (SigmaSampling().sigmas(torch.arange(100), SCHEDULES[kind], 3) for kind in ("flow", "shifted"))
    torch.testing.assert_close(moved, 3 * plain)


def test_a_learned_variance_trains_by_the_hybrid_loss_and_leaves_the_mean_alone() -> None:
    settings = DiffusionLoss(sigma=SigmaSampling(distribution="uniform"))
    subject = objective(NoiseSchedule("cosine", steps=100), "eps", settings, learned_variance=True)
    out = subject.model.denoiser.unet.conv_out
    torch.nn.init.normal_(out.weight, std=0.1)
    given = batch()
    x0, eps = given["pixels"], torch.randn_like(given["pixels"])
    sigma = torch.from_numpy(subject.model.denoiser.schedule.at(np.linspace(1, 99, 8)))
    errors = subject.errors(x0, sigma, eps, {})
    plain = objective(NoiseSchedule("cosine", steps=100), "eps", settings)
    state = dict(subject.module.state_dict())
    for name in ("weight", "bias"):
        state[f"denoiser.unet.conv_out.{name}"] = state[f"denoiser.unet.conv_out.{name}"][:3]
    plain.module.load_state_dict(state)
    simple = plain.errors(x0, sigma, eps, {})
    rows, low = sigma[:, None, None, None], subject.model.denoiser.schedule.at(np.linspace(0, 98, 8))
    after = torch.from_numpy(low)[:, None, None, None]
    answer = subject.model.denoiser.network((x0 + rows * eps).float(), sigma, subject.model.condition({}, 8)).double()
    variance = after**2 * (1 - after**2 / rows**2)
    widest = (rows**2 - after**2) * (1 + after**2) / (1 + rows**2)
    share = (answer[:, 3:] + 1) / 2
    learned = torch.exp(share * widest.log() + (1 - share) * variance.log())
    apart = (1 - after**2 / rows**2) * rows * (answer[:, :3] - eps)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(apart, variance.sqrt()), normal(0 * apart, learned.sqrt()))
    bound = 100 * divergence.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close((errors - simple).double(), BOUND_SHARE * bound, rtol=1e-3, atol=1e-5)
    (mixed,) = torch.autograd.grad(errors.sum(), out.weight, retain_graph=True)
    (alone,) = torch.autograd.grad(simple.sum(), plain.model.denoiser.unet.conv_out.weight)
    torch.testing.assert_close(mixed[:3], alone)  # no gradient of the bound reaches the mean
    assert mixed[3:].abs().max() > 0


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_a_learned_variance_trains(kind: str) -> None:
    settings = DiffusionLoss(sigma=SigmaSampling(distribution="uniform"))
    subject = objective(NoiseSchedule(kind, steps=50), "v", settings, learned_variance=True)  # type: ignore[arg-type]
    assert subject.model.architecture.network.channels_out == 6
    values = losses(subject, 12)
    assert min(values[-3:]) < 0.9 * values[0]
    below = torch.full((1,), subject.model.denoiser.schedule.sigma_min * 0.99, dtype=torch.float64)
    zero = torch.zeros(1, 3, 4, 4)
    assert float(subject._bound(zero, zero + 1, below)) == 0  # the decoder's step


def test_embeddings_and_the_ends_of_the_network_are_not_muons() -> None:
    """Tables of tokens and positions are looked up, no matrices that map; whichever conditioner has them."""
    architecture = Architecture(
        UNetConfig(channels=32, multipliers=(1,), blocks=1, depth=(1,), heads=1, context_width=32), size=(4, 4),
        schedule=SCHEDULES["shifted"], prediction="v", layout=BertTextConfig(30, 8, 32, 1, 2),
    )  # fmt: skip
    subject = DiffusionObjective(LatentDiffusion(architecture, {"layout": {"classes": ["cat"]}}), DiffusionLoss(), 1)
    named = subject.turns()["diffusion"]
    stepper = Stepper(named, Optimiser(name="muon"), subject.elementwise)
    muons = {name for names, _, _ in stepper.muon.stacks for name in names}
    matrices = {name for name, parameter in named if parameter.ndim > 1}
    tables = {f"conditioners.layout.encoder.{kind}" for kind in ("position_embedding", "token_embedding.weight")}
    assert tables <= matrices - muons
    assert {"denoiser.unet.conv_in.weight", "denoiser.unet.conv_out.weight"} <= matrices - muons
    assert "conditioners.layout.encoder.blocks.0.attention.q.weight" in muons
