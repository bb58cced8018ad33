"""What the first-stage benchmark trains: our autoencoder or diffusers' of the same shape, by processor time."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peer
import torch
from diffusers import VQModel
from torch import Tensor, nn

from latentkit.data.dataset import Pictures, Transform
from latentkit.data.source import open_source
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.bottleneck import Posterior
from latentkit.training.first_stage.autoencoder import AutoencoderObjective, ReconstructionLoss
from latentkit.training.first_stage.codebook import CodebookLoss
from latentkit.training.optimizers import Optimiser, Stepper

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
SIDE, BATCH, CROPS, HELD_CROPS = 64, 8, 3000, 192
KL = 1e-6
CODEBOOK = CodebookLoss(codes=0.25, commitment=1.0)
"""What diffusers' VQModel has (beta on the wrong side, as in the released 2021 models)."""
LOSS = ReconstructionLoss(l1=1.0, pyramid=0.0, structure=0.0, kl=KL, codebook=CODEBOOK)
WARMUP, DECAY = 20, 0.2
"""Steps over which the rate rises, and the last share of the time over which it falls."""
CONFIGS = {
    "kl": AutoencoderConfig(channels=32, multipliers=(1, 2, 2), blocks=1, latent_channels=3),
    "vq": AutoencoderConfig(channels=32, multipliers=(1, 2, 2), blocks=1, latent_channels=3, codes=512),
    "standard": AutoencoderConfig(channels=32, multipliers=(1, 2, 2, 3), blocks=2, latent_channels=24),
    "stem": AutoencoderConfig(channels=96, multipliers=(1, 1), blocks=2, latent_channels=24, stem=4, attention=False),
}
"""f4 of both kinds, and the two designs of f8 whose times to equal error are compared."""


class Side(NamedTuple):
    """One of the two that are compared."""

    network: nn.Module
    loss: Callable[[Tensor, Tensor, int], Tensor]
    """Of pixels, draw numbers and step."""
    settle: Callable[[int], None]
    reconstruct: Callable[[Tensor], Tensor]
    bf16: bool


def ours(config: AutoencoderConfig, seed: int) -> Side:
    """Our autoencoder with our objective, as the trainer calls it."""
    network = Autoencoder(config).to(memory_format=torch.channels_last)
    objective = AutoencoderObjective(network, LOSS, seed)
    shared: dict[str, Tensor] = {}

    def loss(pixels: Tensor, draws: Tensor, step: int) -> Tensor:
        return objective.loss("autoencoder", {"pixels": pixels, "draw": draws, "step": step}, shared)[0]

    def settle(step: int) -> None:
        sums = {name: shared.pop(name).detach().float() for name in objective.summed if name in shared}
        objective.settle("autoencoder", step, sums, shared)

    return Side(network, loss, settle, lambda pixels: network.decode(network.encode(pixels).mean), True)


def vq_model(config: AutoencoderConfig) -> VQModel:
    """VQModel of the same architecture (`stem` 1)."""
    levels = len(config.multipliers)
    return VQModel(
        in_channels=config.picture_channels,
        out_channels=config.picture_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * m for m in config.multipliers),
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.codes or 1,
        vq_embed_dim=config.latent_channels,
        mid_block_add_attention=config.attention,
    )


def theirs(config: AutoencoderConfig, variant: peer.Variant) -> Side:
    """diffusers' AutoencoderKL or VQModel with the same loss."""
    model: Any = vq_model(config) if config.codes else peer.autoencoder(config)
    model.to(memory_format=variant.layout)
    encode, decode = model.encode, model.decode
    if variant.compiled:
        encode, decode = torch.compile(encode), torch.compile(decode)

    def compare(decoded: Tensor, pixels: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        return (decoded - pixels).abs().mean() + KL * Posterior(mean, log_variance).kl()

    def loss(pixels: Tensor, draws: Tensor, step: int) -> Tensor:
        pixels = pixels.contiguous(memory_format=variant.layout)
        if config.codes:
            found = decode(encode(pixels).latents)
            return (found.sample.float() - pixels).abs().mean() + found.commit_loss.float().mean()
        posterior = encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape)
        return compare(decode(z).sample.float(), pixels, mean, log_variance)

    def reconstruct(pixels: Tensor) -> Tensor:
        found = model.encode(pixels)
        return model.decode(found.latents if config.codes else found.latent_dist.mean).sample

    return Side(model, loss, lambda step: None, reconstruct, variant.bf16)


def pictures(name: str, photographs: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out pictures of a set, `n c h w` in [-1, 1]: emoji on white, or crops of photographs."""
    kept = folder / f"{name}.pt"
    if not kept.exists():
        if name == "emoji":
            source, still = open_source(str(EMOJI)), Transform(size=SIDE, background="white")
            parts = [Pictures(source.select(split), still, 0) for split in ("train", "holdout")]
            stacks = [torch.stack([part.view(i, 0)[1] for i in range(len(part))]) for part in parts]
        else:
            source, crops = open_source(photographs), Transform(size=SIDE, crop="random", zoom=4)
            numbers = [[i for i in range(len(source)) if (i % 8 == 0) == held] for held in (False, True)]
            parts = [Pictures(source.subset(chosen), crops, 0) for chosen in numbers]
            stacks = [
                torch.stack([part.take(draw % len(part), draw)[1] for draw in range(count)])
                for part, count in zip(parts, (CROPS, HELD_CROPS), strict=True)
            ]
        partial = kept.with_suffix(f".{os.getpid()}")
        torch.save(stacks, partial)
        partial.replace(kept)
    train, held = torch.load(kept, weights_only=True)
    return train, held


@torch.no_grad()
def psnr(side: Side, held: Tensor) -> float:
    """Mean over held-out pictures, in decibels, latents without noise, float32."""
    errors = [((side.reconstruct(x).clamp(-1, 1) - x) / 2).square().flatten(1).mean(1) for x in held.split(16)]
    return float((-10 * torch.log10(torch.cat(errors).clamp_min(1e-10))).mean())


def step_of(side: Side, train: Tensor, seed: int, rate: float) -> Callable[[int, float], None]:
    """One training step: autocast, backward pass, clipping, AdamW; called with its number and the rate's share."""
    named = [(name, p) for name, p in side.network.named_parameters()]
    stepper = Stepper(named, Optimiser(lr=rate))
    chosen = torch.Generator().manual_seed(seed)

    def step(number: int, share: float) -> None:
        index = torch.randint(len(train), (BATCH,), generator=chosen)
        draws = number * BATCH + torch.arange(BATCH)
        with torch.autocast("cpu", torch.bfloat16, enabled=side.bf16):
            loss = side.loss(train[index], draws, number)
        loss.backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in named]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if norm > 1:
            torch._foreach_mul_(gradients, 1 / norm)
        for (_, p), gradient in zip(named, gradients, strict=True):
            p.grad = gradient
        stepper.step(rate * share)
        for _, p in named:
            p.grad = None
        side.settle(number)

    return step


def made(arm: dict[str, Any]) -> Side:
    """The side that an arm names, with weights of its own seed."""
    torch.manual_seed(arm["seed"])
    config = CONFIGS[arm["config"]]
    return ours(config, arm["seed"]) if arm["side"] == "ours" else theirs(config, peer.Variant(*arm["variant"]))


def warmed(side: Side, train: Tensor) -> None:
    """Compile and fill caches: three backward passes whose gradients are thrown away."""
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=side.bf16):
            side.loss(train[:BATCH], torch.arange(BATCH), 0).backward()
        side.network.zero_grad(set_to_none=True)


def train_arm(arm: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train for `seconds` of this process's processor time, compilation not counted, and measure."""
    train, held = pictures(arm["set"], arm["photographs"], folder)
    side = made(arm)
    warmed(side, train)
    step = step_of(side, train, arm["seed"], arm["rate"])
    begun, wall, number, spent = time.process_time(), time.monotonic(), 0, 0.0
    while spent < arm["seconds"]:
        falling = (1 - spent / arm["seconds"]) / DECAY
        step(number, min(1.0, (number + 1) / WARMUP, falling))
        number += 1
        spent = time.process_time() - begun
    return {
        "psnr": psnr(side, held),
        "steps": number,
        "processor_seconds": spent,
        "wall_seconds": time.monotonic() - wall,
        "parameters": sum(p.numel() for p in side.network.parameters()),
    }


def pace_arm(arm: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Processor seconds of a step, the least of eight; RuntimeError where compiling it changes its gradients."""
    train, _ = pictures(arm["set"], arm["photographs"], folder)

    def gradients(variant: peer.Variant) -> dict[str, Tensor]:
        side = made(arm | {"variant": list(variant)})
        torch.manual_seed(1)
        return peer.gradients(side.network, lambda: side.loss(train[:BATCH], torch.arange(BATCH), 0), side.bf16)

    peer.trusted(peer.Variant(*arm["variant"]), gradients)
    side = made(arm)
    warmed(side, train)
    step, times = step_of(side, train, 0, 1e-4), []
    for number in range(8):
        begun = time.process_time()
        step(number, 1.0)
        times.append(time.process_time() - begun)
    return {"seconds_a_step": min(times)}
