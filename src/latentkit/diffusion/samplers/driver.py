"""The contract of sampling, and the one loop that runs every sampler.

A sampler is an update rule `rule(walk, x, **options) -> x`: it takes the latent `x` from `walk.sigma` to `walk.after`.
The loop owns all the rest: the intervals, the noise, the count of evaluations, the latents to write into, and the
interval that begins at `SIGMA_CAP`, which is one first-order step and enters no history. A rule writes into no tensor
but those of `Walk.spare`; a denoiser writes into none that it has returned.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from latentkit.diffusion.schedule import SIGMA_CAP
from latentkit.diffusion.spacing import ALIASES, SPACINGS
from latentkit.errors import InputError, close

FEW = 15
"""With fewer steps than this the order of some multistep rules falls towards a last sigma of 0, as the peers' does."""


class Denoised(NamedTuple):
    """A denoiser's answer `b c h w`, float like x.

    `x0` is the estimate of the clean latent. `anchor` is the estimate that fresh noise is taken relative to, when it
    differs from x0 (CFG++: the unconditional one), and None otherwise: every sampler steps as if x were
    x + (x0 - anchor), so that (x - anchor) / sigma is the noise. `log_variance` is None, or learned: the share 0..1 at
    which the logarithm of a step's variance lies between the posterior's (0) and the forward step's (1), which is
    (v + 1) / 2 for the output v of improved DDPM (Nichol & Dhariwal 2021, eq. 15) and holds for any spacing.
    """

    x0: Tensor
    anchor: Tensor | None = None
    log_variance: Tensor | None = None


Denoise = Callable[[Tensor, float], Denoised]
"""denoise(x, sigma): x is `b c h w` with x = x0 + sigma * eps, valid during the call; sigma a float64 host value."""


class Step(NamedTuple):
    """One finished interval: the latent at `sigma` and the last estimate of x0; valid until the next step.

    `evaluations` counts the calls of the denoiser since the start.
    """

    x: Tensor
    x0: Tensor
    sigma: float
    evaluations: int = 0


class Point(NamedTuple):
    """A point of a path that is known: the latent at `sigma` and the denoiser's estimate there."""

    x: Tensor
    x0: Tensor
    sigma: float


@runtime_checkable
class Noise(Protocol):
    """Where a stochastic sampler gets its noise from, standard normal of the latent's shape (`noise.PictureNoise`)."""

    def step(self, step: int, purpose: str = "step") -> Tensor:
        """The noise of one step, independent of that of every other step and purpose."""
        ...

    def between(self, sigma: float, after: float) -> Tensor:
        """The increment of one Brownian path W on the way from `sigma` down to `after`, over its own deviation.

        The clock of W is the signal-to-noise ratio 1 / sigma^2: W(1 / after^2) - W(1 / sigma^2) is divided by the
        root of 1 / after^2 - 1 / sigma^2. A pure function of seed and interval; undivided, adjacent ones add up.
        """
        ...


Rule = Callable[..., Tensor]
Allowed = tuple[float, float] | tuple[str, ...]


class SamplerEntry(NamedTuple):
    """A sampler's line in the table.

    `order` is that of convergence for smooth data between two finite sigmas, the start known (of a stochastic sampler,
    that of its variance), and 0 where more steps alone do not bring it nearer; `evaluations` are those of
    one interval between two positive sigmas. `names` are the peers' (A1111, ComfyUI, diffusers). `options` are the
    keyword options that it takes, each with its lowest and highest value or its allowed words.
    """

    run: Rule
    order: int
    evaluations: int
    stochastic: bool
    source: str
    good_for: str
    names: tuple[str, ...] = ()
    options: Mapping[str, Allowed] = {}


class Walk:
    """One run in progress: the interval that a rule crosses, and what it leaves for the next one.

    `i` numbers the interval from `sigma` to `after`; `past` holds what the rule remembers of earlier estimates, newest
    last, each with its sigma; `held` is a latent, and `carried` a number, that it wants to find again.
    """

    def __init__(self, denoise: Denoise, sigmas: np.ndarray, noise: Noise | None) -> None:
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.past: list[tuple[Tensor, float]] = []
        self.held: Tensor | None = None
        self.carried = 0.0
        self.evaluations = 0
        self.log_variance: Tensor | None = None
        self.denoise, self._noise = denoise, noise
        self._pool: list[Tensor] = []

    def enter(self, i: int, sigma: float, after: float, x: Tensor) -> None:
        """Begin interval `i` with the latent `x`."""
        self.i, self.sigma, self.after, self._x = i, sigma, after, x

    def hand_over(self, denoise: Denoise) -> None:
        """Another denoiser answers from here on, and nothing is remembered of the one before."""
        self.denoise, self.held, self.carried = denoise, None, 0.0
        self.past.clear()

    @property
    def left(self) -> int:
        """Intervals from this one to the end, where that is 0; more than any rule needs where it is not."""
        return len(self.sigmas) - 1 - self.i if self.sigmas[-1] == 0 else len(self.sigmas) + 9

    def estimate(self, x: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """(x, x0) at `sigma`, by default where the interval begins; x is moved by x0 - anchor if there is an anchor."""
        answer = self.denoise(x, self.sigma if sigma is None else sigma)
        self.evaluations += 1
        x0 = answer.x0.detach().to(x.dtype)
        if x0.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            x0 = x0.clone()
        self.x0, self.log_variance = x0, answer.log_variance
        return (x if answer.anchor is None else x + (x0 - answer.anchor), x0)

    def spare(self, *busy: Tensor) -> Tensor:
        """A latent to write into that is none of `busy`, of `past`, `held`, and the interval's start."""
        taken = (*busy, *(value for value, _ in self.past), self.held, self._x)
        for free in self._pool:
            if all(free is not other for other in taken):
                return free
        self._pool.append(torch.empty_like(self._x, memory_format=torch.contiguous_format, requires_grad=False))
        return self._pool[-1]

    def order(self, most: int) -> int:
        """The order of a multistep rule of at most `most`: what the past allows; with few steps it falls at the end."""
        return min(most, len(self.past) + 1, self.left if len(self.sigmas) <= FEW else most)

    def remember(self, value: Tensor, most: int) -> None:
        """Put `value`, which belongs to `sigma`, into `past`, and keep the newest `most`."""
        self.past.append((value, self.sigma))
        self.forget(most)

    def forget(self, most: int) -> None:
        """Keep the newest `most` of `past`."""
        del self.past[: max(0, len(self.past) - most)]

    def mix(self, x: Tensor, x0: Tensor, kept: float, up: float = 0.0, purpose: str = "step") -> Tensor:
        """kept x + (1 - kept) x0 + up noise, in a spare latent."""
        mixed = torch.lerp(x0, x, kept, out=self.spare(x, x0))
        return mixed.add_(self.fresh(purpose), alpha=up) if up else mixed

    def fresh(self, purpose: str = "step") -> Tensor:
        """The noise of this interval."""
        return self._ready(self._source().step(self.i, purpose))

    def between(self, sigma: float, after: float) -> Tensor:
        """The Brownian noise on the way from `sigma` to `after`."""
        return self._ready(self._source().between(sigma, after))

    def _source(self) -> Noise:
        assert self._noise is not None, "a sampler that draws noise was given none"
        return self._noise

    def _ready(self, noise: Tensor) -> Tensor:
        if self._x.is_cuda and not noise.is_cuda:
            noise = noise.pin_memory()
        return noise.to(self._x.device, self._x.dtype, non_blocking=True)


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """(down, up): the level that a step goes down to, and the deviation of the noise that takes it up to `after`.

    up^2 + down^2 = after^2; eta 1 is the posterior of DDPM, eta 0 no noise (Song et al. 2021, eq. 16).
    """
    ratio = after / sigma
    share = min(1.0, eta * math.sqrt(1 - ratio * ratio))
    return after * math.sqrt(max(0.0, 1 - eta * eta + eta * eta * ratio * ratio)), after * share


def follow(
    entry: SamplerEntry,
    denoise: Denoise,
    x: Tensor,
    sigmas: np.ndarray,
    noise: Noise | None,
    history: Sequence[Point] = (),
    later: tuple[int, Denoise] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Run a sampler of the table; see `sample`, which gets it by its name."""
    walk = Walk(denoise, sigmas, noise)
    for back, point in enumerate(history, start=-len(history)):
        walk.denoise = lambda x, sigma, known=point.x0: Denoised(known)  # type: ignore[misc]
        walk.enter(back, point.sigma, history[back + 1].sigma if back < -1 else walk.sigmas[0], point.x)
        entry.run(walk, point.x, **options)
    walk.denoise, walk.evaluations = denoise, 0
    for i, (sigma, after) in enumerate(itertools.pairwise(walk.sigmas)):
        walk.enter(i, sigma, after, x)
        if later is not None and i == later[0]:
            walk.hand_over(later[1])
        if sigma >= SIGMA_CAP:
            down, up = ancestral(sigma, after, options.get("eta", float(entry.stochastic)))
            x = walk.mix(*walk.estimate(x), down / sigma, up)
        else:
            x = entry.run(walk, x, **options)
        yield Step(x, walk.x0, after, walk.evaluations)


def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: np.ndarray,
    noise: Noise | None,
    history: Sequence[Point] = (),
    later: tuple[int, Denoise] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Run sampler `name` from `x` at `sigmas[0]` down `sigmas` (falling, float64), one `Step` per interval.

    `history` makes known points of the path, at falling sigmas above `sigmas[0]`, the past of a multistep sampler:
    its rule is led over them first, with their x0 as the denoiser's answer, and what it makes of x is thrown away.
    `noise` may be None for a sampler that draws none. `later` is (i, denoise): another denoiser answers from interval
    i on, and the past of a multistep sampler begins anew there.
    Errors: InputError for an unknown name, an option that the sampler does not take, or a value outside its range.
    """
    entry = sampler(name)
    _check(entry, options, name)
    return follow(entry, denoise, x, sigmas, noise, history, later, **options)


def invert(denoise: Denoise, x: Tensor, sigmas: np.ndarray) -> Iterator[Step]:
    """The noise that `x` came from: Euler up rising `sigmas`, `x` being at the first one, which is positive.

    Source: DDIM inversion (Song et al. 2021, section 4.3).
    """
    if not (sigmas[0] > 0 and np.all(np.diff(sigmas) > 0)):
        raise InputError("inversion goes up rising sigmas that begin above 0; turn the spacing round, without its 0")
    return follow(table()["euler"], denoise, x, sigmas, None)


def _check(entry: SamplerEntry, options: Mapping[str, Any], name: str) -> None:
    """Only options that the sampler takes, with values that it allows."""
    for option, value in options.items():
        allowed = entry.options.get(option)
        if allowed is None:
            takes = ", ".join(entry.options) or "no options"
            raise InputError(f"sampler {name!r} takes no {option!r}; it takes: {takes}", exit_code=2)
        if isinstance(allowed[0], str):
            fits, range_ = value in allowed, " or ".join(map(repr, allowed))
        else:
            low, high = allowed
            whole = isinstance(low, int) and isinstance(high, int)
            fits = isinstance(value, int if whole else int | float) and low <= value <= high
            range_ = f"{'whole numbers ' if whole else ''}{low} to {high}"
        if not fits:
            raise InputError(f"{option} {value!r} is not allowed for {name!r}; it takes {range_}", exit_code=2)


def table() -> dict[str, SamplerEntry]:
    """Every sampler by its name."""
    from latentkit.diffusion.samplers import adams, dpm, euler, heun, langevin, singlestep, unipc

    families = (euler, heun, adams, dpm, singlestep, unipc, langevin)
    return {name: entry for family in families for name, entry in family.SAMPLERS.items()}


def sampler(name: str) -> SamplerEntry:
    """The sampler called `name`, here or by a peer; InputError with the nearest names otherwise."""
    return table()[split_name(name)[0]]


def split_name(name: str) -> tuple[str, str | None]:
    """Our name of the sampler that `name` means, and the spacing that a peer's name says besides it, if any.

    "DPM++ 2M Karras" is ("dpm++2m", "karras"). Letters' case does not matter. Errors: InputError, the nearest names.
    """
    known = {peer.casefold(): key for key, entry in table().items() for peer in (*entry.names, key)}
    wanted = name.casefold().strip()
    if wanted in known:
        return known[wanted], None
    words = wanted.split()
    for cut in range(len(words) - 1, 0, -1):
        first, spacing = " ".join(words[:cut]), "_".join(words[cut:])
        if first in known and spacing in {*SPACINGS, *ALIASES}:
            return known[first], spacing
    hint = f"{close(wanted, known)} allowed: {', '.join(sorted(table()))}".lstrip()
    raise InputError(f"sampler {name!r} is unknown; {hint}", exit_code=2)
