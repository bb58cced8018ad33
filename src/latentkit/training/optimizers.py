"""AdamW and Muon for one turn of a run, and the learning rate as a function of the step."""

import math
from collections.abc import Collection, Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

MOMENTUM = 0.95
ROUNDS = ((3.4445, -4.7750, 2.0315),) * 5  # Newton-Schulz coefficients (Jordan et al. 2024)
LARGEST_STACK = 1 << 24  # elements orthogonalised in one batch: bounds the extra memory of a step


class Optimiser(BaseModel):
    """How the weights of one turn are moved."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(
        default=1e-3, gt=0
    )  # at its highest; Muon's updates are scaled to AdamW's, so it is the same for both
    weight_decay: float = Field(default=0.0, ge=0)  # of matrices and convolutions only
    betas: tuple[float, float] = Field(default=(0.9, 0.99), strict=False)
    warmup: int = Field(default=100, ge=0)  # steps
    decay: float = Field(default=0.2, ge=0, le=1)  # share of the steps, at the end, over which the rate falls to 0
    clip: float | None = Field(default=1.0, gt=0)  # largest norm of the gradient; null for none

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`: warm-up, constant, linear fall."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return self.lr * min(1.0, rising, falling)


class Stepper:
    """The optimiser of one turn: Muon for hidden matrices where asked for, AdamW for everything else.

    `elementwise` names parameters, or beginnings of their names, that Muon leaves to AdamW; None stands for the
    first and the last matrix. Embeddings, biases and norms are always AdamW's.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        settings: Optimiser,
        elementwise: Collection[str] | None = None,
    ) -> None:
        self.settings = settings
        named = dict(parameters)
        hidden = _hidden(named, elementwise) if settings.name == "muon" else set()
        self.muon = Muon({name: p for name, p in named.items() if name in hidden}, settings.weight_decay)
        rest = {name: p for name, p in named.items() if name not in hidden}
        self.adamw = AdamW(rest, settings.weight_decay, settings.betas)

    def step(self, rate: float) -> None:
        """Move the weights by their gradients."""
        self.adamw.step(rate)
        self.muon.step(rate)

    def table(self) -> dict[str, Tensor]:
        """The whole state as named tensors; not copies."""
        return self.muon.table() | self.adamw.table()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `table` gave; raises KeyError where a name is missing."""
        for name, value in self.table().items():
            value.copy_(tensors[name])


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), of matrices other than embeddings only.

    It calls the kernel of torch.optim.AdamW(fused=True); making that class loads torch's compiler, which takes seconds.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float, betas: tuple[float, float]) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.betas = betas
        # Made now and in the parameters' memory format, so that a resumed run's memory is laid out the same.
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]
        self.means = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        self.squares = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters]
        decayed = [p.ndim >= 2 and "embedding" not in name for name, p in parameters.items()]
        self.groups = [
            (rows, decay)
            for rows, decay in (
                ([i for i, yes in enumerate(decayed) if yes], weight_decay),
                ([i for i, yes in enumerate(decayed) if not yes], 0.0),
            )
            if rows
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the weights by their gradients."""
        for rows, decay in self.groups:
            steps = [self.steps[i] for i in rows]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [self.parameters[i] for i in rows],
                [_gradient(self.parameters[i]) for i in rows],
                [self.means[i] for i in rows],
                [self.squares[i] for i in rows],
                [],
                steps,
                lr=rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def table(self) -> dict[str, Tensor]:
        """The moments and the count of each parameter; not copies."""
        tensors: dict[str, Tensor] = {}
        for name, step, mean, square in zip(self.names, self.steps, self.means, self.squares, strict=True):
            tensors |= {f"{name}/step": step, f"{name}/exp_avg": mean, f"{name}/exp_avg_sq": square}
        return tensors


class Muon:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), scaled to AdamW's update size (Liu et al. 2025).

    Convolutions are matrices of [out, in * kh * kw]. Matrices of one shape are kept and orthogonalised as one batch.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.stacks: list[tuple[list[str], list[nn.Parameter], Tensor]] = []
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in parameters.items():
            shapes.setdefault((*_matrix(parameter, parameter).shape, parameter.device.index or 0), []).append(name)
        for (rows, columns, _), names in shapes.items():
            size = max(1, LARGEST_STACK // (rows * columns))
            for start in range(0, len(names), size):
                chosen = names[start : start + size]
                members = [parameters[name] for name in chosen]
                momentum = torch.zeros(len(members), rows, columns, device=members[0].device)
                self.stacks.append((chosen, members, momentum))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the weights by their gradients."""
        for _, members, momentum in self.stacks:
            gradients = torch.stack([_matrix(_gradient(p), p).float() for p in members])
            momentum.lerp_(gradients, 1 - MOMENTUM)
            directions = orthogonalise(gradients.lerp_(momentum, MOMENTUM))
            size = 0.2 * math.sqrt(max(momentum.shape[1:]))
            for parameter, direction in zip(members, directions, strict=True):
                matrix = _matrix(parameter, parameter)
                if self.weight_decay:
                    matrix.mul_(1 - rate * self.weight_decay)
                matrix.add_(direction, alpha=-rate * size)

    def table(self) -> dict[str, Tensor]:
        """The momentum of each parameter; not copies."""
        return {
            f"{name}/momentum": row
            for names, _, momentum in self.stacks
            for name, row in zip(names, momentum.unbind(), strict=True)
        }


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of a batch, `b rows columns`, up to singular values of about 0.7 to 1.2."""
    fast = matrices.is_cuda or (matrices.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if fast else torch.float32).contiguous()
    for a, b, c in ROUNDS:
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "the trainer gives every parameter of a turn a gradient"
    return parameter.grad


def _matrix(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A parameter or its gradient as [out, rest] in the order of the parameter's memory (orthogonality does not mind).

    Of the parameter itself, and of a gradient laid out as it is, this is a view.
    """
    if parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.shape[0], -1)


def _hidden(named: dict[str, nn.Parameter], elementwise: Collection[str] | None) -> set[str]:
    """Names of the parameters that are Muon's."""
    matrices = [name for name, p in named.items() if p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 1]
    kept = tuple(elementwise if elementwise is not None else (*matrices[:1], *matrices[-1:]))
    return {name for name in matrices if "embedding" not in name and not (kept and name.startswith(kept))}
