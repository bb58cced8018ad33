"""The objectives of both stages and their losses: closed forms, and randomness that belongs to the draw alone."""

import math

import pytest
import torch

from latentkit.diffusion.prediction import PREDICTIONS, WEIGHTS
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.evaluation.reconstruction import bounding_box, psnr, reconstruction
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioners.text import train_tokenizer
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import DiffusionLoss, DiffusionObjective, SigmaSampling
from latentkit.training.first_stage.autoencoder import AutoencoderObjective, ReconstructionLoss
from latentkit.training.first_stage.losses import pyramid_l1, structure

AUTOENCODER = AutoencoderConfig(channels=16, multipliers=(1, 1), blocks=1, stem=2, attention=False)
NETWORK = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2)


def pictures(count: int, size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def diffusion(settings: DiffusionLoss, prediction: str = "flow") -> DiffusionObjective:
    torch.manual_seed(0)
    captions = ["a red ball", "a blue cube", "green hat"]
    architecture = Architecture(
        network=NETWORK,
        first_stage=AUTOENCODER,
        text=TextEncoderConfig(vocabulary=400, length=8, width=16, layers=1, heads=2),
        label=LabelConfig(width=16),
        prediction=prediction,
        schedule=NoiseSchedule("flow" if prediction == "flow" else "cosine"),
    )
    state = {"text": {"tokenizer": train_tokenizer(captions, 400)}, "label": {"classes": ["ball", "cube"]}}
    model = LatentDiffusion(fit_network(architecture), state)
    for parameter in model.denoiser.parameters():  # the last layers start at zero: give every path a say
        torch.nn.init.normal_(parameter, std=0.1)
    return DiffusionObjective(model, settings, seed=5)


def batch(draws: list[int], *, count: int = 6) -> dict:
    moments = torch.randn(count, 8, 4, 4, generator=torch.Generator().manual_seed(1)).clamp(-3, 1)
    rows = [draw % count for draw in draws]
    words = ["a red ball", "a blue cube", "", "green hat", "a red ball", "x"]
    return {
        "draw": torch.tensor(draws),
        "index": torch.tensor(rows),
        "moments": moments[rows],
        "caption": [words[row] for row in rows],
        "label": torch.tensor([(0, 1, -1)[row % 3] for row in rows]),
    }


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_a_batch_of_the_diffusion_objective_is_the_mean_of_its_singles(prediction: str) -> None:
    objective = diffusion(DiffusionLoss(condition_dropout=0.5), prediction)
    draws = [7, 11, 40, 13]
    together = objective.loss("diffusion", batch(draws), {})[0]
    singles = [objective.loss("diffusion", batch([draw]), {})[0] for draw in draws]
    torch.testing.assert_close(together, torch.stack(singles).mean(), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(singles[0], singles[2])


def test_another_draw_of_the_same_picture_has_other_noise() -> None:
    objective = diffusion(DiffusionLoss())
    first, again = (objective.loss("diffusion", batch([draw]), {})[0] for draw in (1, 7))  # both picture 1
    assert not torch.isclose(first, again)


def test_a_perfect_network_has_no_loss() -> None:
    objective = diffusion(DiffusionLoss(condition_dropout=0))
    x0 = objective.latents(batch([0, 1, 2]))
    eps = torch.randn_like(x0)
    sigma = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    rows = sigma.float()[:, None, None, None]

    class Perfect(torch.nn.Module):
        conv_in = torch.nn.Conv2d(1, 1, 1)

        def forward(self, *_: object, **__: object) -> torch.Tensor:
            return objective.model.denoiser.prediction.target(x0, eps, rows)

    objective.model.denoiser.unet = Perfect()
    told = {"text": ["a"] * 3, "label": [None] * 3}
    assert objective.errors(x0, sigma, eps, told).max() < 1e-10


def test_condition_dropout_drops_its_share_and_belongs_to_the_draw() -> None:
    objective = diffusion(DiffusionLoss(condition_dropout=0.3))
    draws = list(range(0, 3000, 6))  # all picture 0, "a red ball"
    told = objective.conditions(batch(draws))
    share = sum(caption == "" for caption in told["text"]) / len(draws)
    assert share == pytest.approx(0.3, abs=0.06)
    assert told["text"][3] == objective.conditions(batch([draws[3]]))["text"][0]
    both = [(a == "", b is None) for a, b in zip(told["text"], told["label"])]
    assert len(set(both)) == 4, "text and label are dropped apart from each other"
    assert all(
        c == "a red ball" for c in diffusion(DiffusionLoss(condition_dropout=0)).conditions(batch(draws))["text"]
    )


def test_logit_normal_sigmas_have_their_distribution() -> None:
    sampling = SigmaSampling(mean=0.4, std=1.3)
    draws = torch.arange(4096)
    logs = sampling.sigmas(draws, NoiseSchedule(), 9).log()
    assert float(logs.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(logs.std()) == pytest.approx(1.3, abs=0.01)
    assert sampling.sigmas(draws[100:101], NoiseSchedule(), 9) == logs[100].exp()
    assert not torch.equal(sampling.sigmas(draws, NoiseSchedule(), 10).log(), logs)


def test_every_batch_covers_the_noise_levels_evenly() -> None:
    logs = SigmaSampling().sigmas(torch.arange(640, 672), NoiseSchedule(), 2).log()
    shares = torch.special.ndtr(logs).sort().values
    assert float((shares[1:] - shares[:-1]).max()) < 3 / 32


@pytest.mark.parametrize("kind", ["flow", "linear", "scaled_linear", "cosine"])
def test_uniform_sigmas_are_uniform_in_timestep(kind: str) -> None:
    schedule = NoiseSchedule(kind)
    sigmas = SigmaSampling(distribution="uniform").sigmas(torch.arange(2000), schedule, 0)
    timesteps = torch.from_numpy(schedule.to_timestep(sigmas.numpy())).sort().values
    expected = torch.linspace(0, schedule.steps if kind == "flow" else schedule.steps - 1, 2000, dtype=torch.float64)
    assert float((timesteps - expected).abs().max()) < 3


@pytest.mark.parametrize("name", sorted(PREDICTIONS))
def test_min_snr_weighs_the_error_of_x0(name: str) -> None:
    prediction = PREDICTIONS[name]
    sigma = torch.tensor([0.05, 0.3, 1.0, 10.0], dtype=torch.float64)
    error_of_f = torch.tensor([0.2, 0.5, 0.1, 0.3], dtype=torch.float64)
    error_of_x0 = prediction.c_out(sigma) * error_of_f
    expected = torch.clamp(1 / sigma**2, max=5) * error_of_x0**2
    torch.testing.assert_close(WEIGHTS["min_snr"](prediction, sigma) * error_of_f**2, expected)


def test_the_autoencoder_loss_is_the_weighted_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    weights = ReconstructionLoss(l1=1.0, pyramid=0.5, structure=0.2, kl=0.01)
    objective = AutoencoderObjective(Autoencoder(AUTOENCODER), weights, 1)
    given = {"pixels": pictures(3), "draw": torch.tensor([4, 5, 6])}
    loss, logs = objective.loss("autoencoder", given, {})
    expected = logs["l1"] + 0.5 * logs["pyramid"] + 0.2 * logs["structure"] + 0.01 * logs["kl"]
    torch.testing.assert_close(loss, expected)
    again = objective.loss("autoencoder", given, {})[0]
    other = objective.loss("autoencoder", given | {"draw": torch.tensor([4, 5, 7])}, {})[0]
    assert torch.equal(loss, again)
    assert not torch.equal(loss, other), "posterior noise belongs to the draw"


def test_gradients_of_the_picture_losses() -> None:
    a, b = pictures(1, 8).double().requires_grad_(), pictures(2, 8)[1:].double()
    for loss in (pyramid_l1, structure):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, b), (a,))


def test_pyramid_of_a_constant_difference_is_that_difference() -> None:
    a = pictures(2)
    assert float(pyramid_l1(a, a)) == 0
    assert float(pyramid_l1(a, a + 0.25)) == pytest.approx(0.25, abs=1e-6)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)[None, None]
    assert float(pyramid_l1(checks, torch.zeros_like(checks))) == pytest.approx(1.0)  # all in the finest band


def test_structure_is_one_minus_similarity() -> None:
    a = pictures(2, 32)
    assert float(structure(a, a)) == pytest.approx(0, abs=1e-6)
    dark = torch.full((1, 1, 32, 32), -1.0)
    gray = dark + 1.0  # intensities 0 and 0.5, no variance: the luminance term alone
    assert float(structure(dark, gray)) == pytest.approx(1 - 0.01**2 / (0.25 + 0.01**2), abs=1e-5)
    assert float(structure(a, -a)) > 1, "contrast turned round is less than nothing in common"


def test_psnr_and_box() -> None:
    white = torch.ones(3, 16, 16)
    other = white.clone()
    other[:, 4:8, 2:10] = 0.0
    share = 4 * 8 / 256
    assert psnr(white, other) == pytest.approx(-10 * math.log10(share * 0.25), abs=1e-4)
    assert psnr(white, white) == 100
    assert bounding_box(other) == (slice(4, 8), slice(2, 10))
    assert bounding_box(white) == (slice(None), slice(None))
    figures = reconstruction([(other, white)])
    assert figures["psnr"] == pytest.approx(psnr(other, white))
    assert figures["psnr_box"] == pytest.approx(-10 * math.log10(0.25), abs=1e-4)
