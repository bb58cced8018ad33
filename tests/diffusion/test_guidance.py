"""Guidance: the identities that hold whatever the network, closed forms on Gaussians, and peers' formulas."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ideal import gaussian, mixture
from torch import Tensor

from latentkit.diffusion.guidance import (
    Rule,
    apart,
    classifier,
    classifier_free,
    differentiable,
    guide,
    linear,
    perturbed,
    plus,
    projected,
    rescaled,
    thresholded,
    together,
)
from latentkit.diffusion.samplers.driver import Denoise, Denoised, sample

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
SIGMAS = np.array([9.0, 4.0, 1.5, 0.5, 0.0])
SCALES = (0.0, 0.3, 1.0, 3.0, 7.5, -2.0)


def positive(x: Tensor, sigma: float) -> Denoised:
    return Denoised(torch.tanh(x) / (1 + sigma))


def negative(x: Tensor, sigma: float) -> Denoised:
    return Denoised(torch.sin(x) / (2 + sigma))


def disturbed(x: Tensor, sigma: float) -> Denoised:
    return Denoised(torch.cos(x) / (3 + sigma))


def joined(*parts: Denoise) -> Denoise:
    """All parts in one call, each on its own rows, which are equal."""

    def joint(x: Tensor, sigma: float) -> Denoised:
        rows = x.chunk(len(parts))
        assert all(torch.equal(row, rows[0]) for row in rows)
        return Denoised(torch.cat([part(row, sigma).x0 for part, row in zip(parts, rows)]))

    return joint


def unreached(x: Tensor, sigma: float) -> Denoised:
    raise AssertionError("called though guidance is off")


both = joined(negative, positive)


def with_(rule: Rule) -> Denoise:
    return guide(apart(negative, positive), unreached, rule)


def nothing(sigmas: np.ndarray = SIGMAS, scale: float = 3.0) -> Rule:
    return projected(scale, sigmas, parallel=1.0, momentum=0.0, norm=math.inf)


RULES: dict[str, Callable[[float], Rule]] = {
    "linear": linear,
    "plus": plus,
    "projected": lambda scale: projected(scale, SIGMAS),
    "rescaled": lambda scale: rescaled(linear(scale), 0.7),
    "rescaled projected": lambda scale: rescaled(projected(scale, SIGMAS), 0.7),
}


def test_scale_one_is_the_positive_alone() -> None:
    assert classifier_free(unreached, positive, 1.0) is positive
    for name, rule in RULES.items():
        assert torch.equal(with_(rule(1.0))(X, 2.0).x0, positive(X, 2.0).x0), name
    assert not torch.equal(with_(linear(1.001))(X, 2.0).x0, positive(X, 2.0).x0)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_conditions_change_nothing(scale: float) -> None:
    plain = positive(X, 2.0).x0
    for name, rule in RULES.items():
        guided = guide(together(joined(positive, positive)), unreached, rule(scale))
        assert torch.equal(guided(X, 2.0).x0, plain), name
    three = guide(together(joined(*[positive] * 4), (1.0, 0.4, -2.0)), unreached, linear(scale))
    assert torch.equal(three(X, 2.0).x0, plain)
    assert torch.equal(
        guide(apart(positive, positive), unreached, perturbed(linear(scale), positive, 5.0))(X, 2.0).x0, plain
    )
    if scale != 1:
        assert not torch.equal(with_(linear(scale))(X, 2.0).x0, plain)


def test_the_formula_and_its_anchor() -> None:
    low, high = negative(X, 2.0).x0, positive(X, 2.0).x0
    guided = classifier_free(both, positive, 4.0)(X, 2.0)
    torch.testing.assert_close(guided.x0, low + 4.0 * (high - low))
    assert guided.anchor is None
    assert torch.equal(classifier_free(both, positive, 0.0)(X, 2.0).x0, low)
    relative = with_(plus(0.6))(X, 2.0)
    assert torch.equal(relative.x0, with_(linear(0.6))(X, 2.0).x0)
    assert relative.anchor is not None
    assert torch.equal(relative.anchor, low)


@pytest.mark.parametrize("sigma", [0.1, 6.0])
def test_outside_the_interval_there_is_none(sigma: float) -> None:
    assert torch.equal(classifier_free(unreached, positive, 4.0, (0.2, 5.0))(X, sigma).x0, positive(X, sigma).x0)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_inside_the_interval_and_at_its_ends_there_is(sigma: float) -> None:
    inside = classifier_free(both, unreached, 4.0, (0.2, 5.0))(X, sigma).x0
    assert torch.equal(inside, classifier_free(both, unreached, 4.0)(X, sigma).x0)


def test_several_weighted_conditions() -> None:
    low, high, other = negative(X, 2.0).x0, positive(X, 2.0).x0, disturbed(X, 2.0).x0
    pair = together(joined(negative, positive, disturbed), (1.0, -0.5))
    torch.testing.assert_close(pair(X, 2.0)[1].x0, high - 0.5 * (other - low))
    guided = guide(pair, unreached, linear(3.0))(X, 2.0).x0
    torch.testing.assert_close(guided, low + 3 * ((high - low) - 0.5 * (other - low)))
    without = guide(together(joined(negative, positive, disturbed), (1.0, 0.0)), unreached, linear(3.0))(X, 2.0).x0
    torch.testing.assert_close(without, classifier_free(both, positive, 3.0)(X, 2.0).x0)


def test_what_else_a_branch_says_is_that_of_the_positive() -> None:
    def telling(x: Tensor, sigma: float) -> Denoised:
        return both(x, sigma)._replace(log_variance=torch.arange(len(x))[:, None])

    assert guide(together(telling), unreached, linear(3.0))(X, 2.0).log_variance.tolist() == [[3], [4], [5]]  # type: ignore[union-attr]


def test_guidance_composes() -> None:
    """Guiding with an already guided positive is guidance of the product's strength from the same negative."""
    twice = guide(apart(negative, with_(linear(2.0))), unreached, linear(3.0))
    torch.testing.assert_close(twice(X, 1.0).x0, with_(linear(6.0))(X, 1.0).x0)


def test_the_order_of_wrappers_is_that_of_the_source() -> None:
    """Perturbing before rescaling is undone with the rest; after it, it is not."""
    inside = rescaled(perturbed(linear(5.0), disturbed, 2.0), 1.0)
    outside = perturbed(rescaled(linear(5.0), 1.0), disturbed, 2.0)

    def deviation(rule: Rule) -> Tensor:
        return (with_(rule)(X, 2.0).x0 - X / 5).std((1, 2, 3))

    own = (positive(X, 2.0).x0 - X / 5).std((1, 2, 3))
    torch.testing.assert_close(deviation(inside), own)
    assert ((deviation(outside) - own).abs() > 1e-2).all()


def test_rescaling_is_that_of_v_and_none_at_zero() -> None:
    """Against the formulas on v = (eps - sigma x0) / sqrt(1 + sigma^2) of the two branches."""
    sigma, scale, share = 2.0, 6.0, 0.7
    root = math.sqrt(1 + sigma**2)

    def v(x0: Tensor) -> Tensor:
        return ((X - x0) / sigma - sigma * x0) / root

    low, high = v(negative(X, sigma).x0), v(positive(X, sigma).x0)
    guided = low + scale * (high - low)
    factor = high.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    wanted = share * (guided * factor) + (1 - share) * guided
    torch.testing.assert_close(
        with_(rescaled(linear(scale), share))(X, sigma).x0, X / root**2 - sigma / root * wanted, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(with_(rescaled(linear(scale), 0.0))(X, sigma).x0, with_(linear(scale))(X, sigma).x0)


def test_projection_of_nothing_is_plain_guidance() -> None:
    for scale in SCALES:
        same, plain = with_(nothing(scale=scale)), with_(linear(scale))
        assert all(torch.equal(same(X, sigma).x0, plain(X, sigma).x0) for sigma in SIGMAS[:-1])
    changed = [projected(3.0, SIGMAS, **{"parallel": 1.0, "momentum": 0.0, "norm": math.inf} | change) for change in (
        {"parallel": 0.9}, {"norm": 1e-3}, {"momentum": 0.1})]  # fmt: skip
    for rule in changed:
        guided = with_(rule)
        assert not all(torch.equal(guided(X, s).x0, with_(linear(3.0))(X, s).x0) for s in (9.0, 4.0))


def test_projection_keeps_what_is_across_and_bounds_its_size() -> None:
    across = with_(projected(4.0, SIGMAS, momentum=0.0, norm=math.inf))(X, 2.0).x0 - positive(X, 2.0).x0
    own = positive(X, 2.0).x0
    torch.testing.assert_close((across * own).sum((1, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    whole = with_(projected(4.0, SIGMAS, parallel=1.0, momentum=0.0, norm=0.01))(X, 2.0).x0 - own
    torch.testing.assert_close(whole.square().mean((1, 2, 3)).sqrt(), torch.full((3,), 3 * 0.01), rtol=1e-4, atol=0)


@pytest.mark.parity
def test_projection_is_that_of_diffusers() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    buffer, norm = MomentumBuffer(-0.5), 0.05
    guided = with_(projected(4.0, SIGMAS, parallel=0.2, momentum=-0.5, norm=norm))
    for sigma in SIGMAS[:-1]:
        low, high = negative(X, sigma).x0, positive(X, sigma).x0
        peer = normalized_guidance(high, low, 3.0, buffer, 0.2, norm * math.sqrt(X[0].numel()), True)
        torch.testing.assert_close(guided(X, float(sigma)).x0, peer)


def test_momentum_advances_once_a_step_not_once_an_evaluation() -> None:
    def along(sigmas: list[float]) -> Tensor:
        guided = with_(projected(3.0, SIGMAS, momentum=-0.5))
        return [guided(X, sigma).x0 for sigma in sigmas][-1]

    once = along([9.0, 4.0, 1.5])
    assert torch.equal(along([9.0, 4.0, 4.0, 1.5, 1.5]), once)  # Heun's
    assert not torch.equal(along([4.0, 1.5]), once)
    assert not torch.equal(along([9.0, 1.5]), once)
    again = along([9.0, 4.0, 5.0, 4.5, 4.0, 1.5])  # churned back up, midpoints, tried again
    assert torch.equal(again, once)


@pytest.mark.parametrize("name", RULES)
def test_state_does_not_leak_between_runs_and_a_batch_equals_its_singles(name: str) -> None:
    def run(x: Tensor) -> Tensor:
        guided = with_(RULES[name](0.8 if name == "plus" else 4.0))
        return [step.x for step in sample("heun", guided, 9 * x, SIGMAS, None)][-1]

    x = X.double()
    assert torch.equal(run(x), run(x))
    torch.testing.assert_close(run(x), torch.cat([run(row[None]) for row in x]), rtol=1e-12, atol=1e-12)


@pytest.mark.parity
def test_perturbed_attention_adds_as_diffusers_does() -> None:
    from diffusers.guiders import PerturbedAttentionGuidance
    from diffusers.guiders.skip_layer_guidance import LayerSkipConfig

    config = LayerSkipConfig(indices=[0], fqn="mid", skip_attention=False, skip_attention_scores=True, skip_ff=False)
    peer = PerturbedAttentionGuidance(
        4.0, perturbed_guidance_scale=2.0, perturbed_guidance_config=config, perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0, perturbed_guidance_layers=None,
    )  # fmt: skip
    peer.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    low, high, bad = (part(X, 2.0).x0 for part in (negative, positive, disturbed))
    peers = peer.forward(pred_cond=high, pred_uncond=low, pred_cond_skip=bad).pred
    torch.testing.assert_close(with_(perturbed(linear(4.0), disturbed, 2.0))(X, 2.0).x0, peers)
    assert torch.equal(with_(perturbed(linear(4.0), disturbed, 0.0))(X, 2.0).x0, with_(linear(4.0))(X, 2.0).x0)


def test_guidance_of_gaussian_classes_is_their_known_tilt() -> None:
    """Score s_neg + w (s_pos - s_neg) of N(m, v) and N(0, v) is that of N(w m, v): the estimate of another Gaussian."""
    x, std, scale = X.double(), 0.8, 3.5
    for sigma in (0.1, 1.0, 8.0):
        guided = guide(apart(gaussian(0.0, std), gaussian(0.4, std)), unreached, linear(scale))(x, sigma).x0
        torch.testing.assert_close(guided, gaussian(scale * 0.4, std)(x, sigma).x0)


def test_autoguidance_of_a_blurred_self_sharpens() -> None:
    """A worse model of N(0, s^2) that believes N(0, r^2), r > s: the guided slope is the known extrapolation."""
    x, sigma, scale = X.double(), 0.7, 2.0
    slope = [std**2 / (std**2 + sigma**2) for std in (1.5, 0.5)]
    guided = guide(apart(gaussian(0.0, 1.5), gaussian(0.0, 0.5)), unreached, linear(scale))(x, sigma).x0
    torch.testing.assert_close(guided, (slope[0] + scale * (slope[1] - slope[0])) * x)


CENTRES = torch.tensor([[1.0, 0.5], [-0.5, 1.5]], dtype=torch.float64)[:, :, None, None]


def class_log_probability(x: Tensor, sigma: float) -> Tensor:
    """log p(first of two classes N(centre, 0.6^2) | x) at noise sigma."""
    away = (x[:, None] - CENTRES[None]).square().flatten(2).sum(2)
    return torch.log_softmax(-away / (2 * (0.36 + sigma**2)), 1)[:, 0]


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0])
def test_an_exact_classifier_makes_the_mixture_its_class(sigma: float) -> None:
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64) * (1 + sigma)
    whole, own = mixture(CENTRES, 0.6), mixture(CENTRES[:1], 0.6)
    with torch.inference_mode():
        guided = classifier(whole, class_log_probability, 1.0)(x, sigma).x0
    torch.testing.assert_close(guided, own(x, sigma).x0)
    assert torch.equal(classifier(whole, class_log_probability, 0.0)(x, sigma).x0, whole(x, sigma).x0)
    assert (classifier(whole, class_log_probability, 1.1)(x, sigma).x0 - own(x, sigma).x0).abs().max() > 1e-6


@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0])
def test_a_differentiable_guide_pulls_as_its_likelihood_does(sigma: float) -> None:
    """N(0, s^2) data and -log N(y; x0, t^2): the gradient through x0 = a x is a (a x - y) / t^2."""
    x, y, std, spread = X.double(), 0.3, 0.8, 0.5
    a = std**2 / (std**2 + sigma**2)

    def loss(x0: Tensor) -> Tensor:
        return (x0 - y).square().flatten(1).sum(1) / (2 * spread**2)

    guided = differentiable(gaussian(0.0, std), loss, 1.5)(x, sigma)
    torch.testing.assert_close(guided.x0, a * x - 1.5 * sigma**2 * a * (a * x - y) / spread**2)
    assert not guided.x0.requires_grad
    assert torch.equal(differentiable(gaussian(0.0, std), loss, 0.0)(x, sigma).x0, a * x)


def test_a_whole_run_guided_by_an_exact_classifier_ends_in_its_class() -> None:
    start = 20 * torch.randn(64, 2, 1, 1, dtype=torch.float64)
    guided = classifier(mixture(CENTRES, 0.1), lambda x, s: _sharp(x, s), 1.0)
    *_, last = sample("heun", guided, start, np.append(np.geomspace(20, 0.05, 40), 0.0), None)
    assert (last.x - CENTRES[0]).square().mean().sqrt() < 0.15


def _sharp(x: Tensor, sigma: float) -> Tensor:
    away = (x[:, None] - CENTRES[None]).square().flatten(2).sum(2)
    return torch.log_softmax(-away / (2 * (0.01 + sigma**2)), 1)[:, 0]


def test_dynamic_thresholding_is_that_of_imagen() -> None:
    def bright(x: Tensor, sigma: float) -> Denoised:
        return Denoised(torch.stack([3 * x[0], 0.1 * x[1], x[2]]))

    def same(x: Tensor) -> Tensor:
        return x

    cut = thresholded(bright, 0.9, same, same)(X, 1.0).x0
    x0 = bright(X, 1.0).x0
    limit = torch.quantile(x0.abs().flatten(1), 0.9, dim=1).clamp(min=1)[:, None, None, None]
    torch.testing.assert_close(cut, torch.minimum(torch.maximum(x0, -limit), limit) / limit)
    assert cut.abs().max() <= 1
    assert limit[0] > 1
    assert torch.equal(cut[1], x0[1])  # inside the range nothing changes
    assert torch.equal(thresholded(bright, 1.0, same, same)(X[:1].expand(3, -1, -1, -1), 1.0).x0[1], 0.1 * X[0])


def test_thresholding_works_on_pixels_whatever_the_working_scale() -> None:
    def half(x: Tensor, sigma: float) -> Denoised:
        return Denoised(x)

    working = thresholded(half, 0.95, lambda z: 2 * z + 0.1, lambda pixels: (pixels - 0.1) / 2)(X, 1.0).x0
    plain = thresholded(half, 0.95, lambda z: z, lambda z: z)(2 * X + 0.1, 1.0).x0
    torch.testing.assert_close(2 * working + 0.1, plain)
