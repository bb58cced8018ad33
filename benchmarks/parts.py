"""What the speed benchmark runs: each part's work by our library and by the peer, on the same weights and inputs."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peer
import torch
from torch import Tensor, nn

from latentkit.applications.backend import Converted
from latentkit.applications.generate import Result, generate
from latentkit.applications.request import TextToImage
from latentkit.checkpoints.files import load, save_model
from latentkit.diffusion.noise import PictureNoise, keyed_batch
from latentkit.model.conditioners.text import TextConditioner, train_tokenizer
from latentkit.model.first_stage import WHOLE_PIXELS
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.model.presets import KL_F8, SCHEDULE, SD1
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.bottleneck import Posterior, posterior
from latentkit.nets.strips import Strips
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNet, UNetConfig
from latentkit.training.diffusion import DiffusionLoss, DiffusionObjective
from latentkit.training.first_stage.autoencoder import AutoencoderObjective, ReconstructionLoss
from latentkit.training.first_stage.losses import pyramid_l1, structure
from latentkit.training.optimizers import Optimiser, Stepper

CAPTIONS = ["a red heart", "a slice of pizza", "the flag of a far country", "a cat with sunglasses"]
GUIDANCE = 5.0


@dataclass(frozen=True)
class Sizes:
    """How large the work is."""

    autoencoder: dict[str, Any]
    unet: dict[str, Any]
    text: dict[str, Any]
    autoencoder_batch: int
    autoencoder_pixels: int
    unet_batch: int
    latent: int
    drawn: int
    steps: int
    stable_diffusion: UNetConfig = SD1
    stable_diffusion_first_stage: AutoencoderConfig = KL_F8
    stable_diffusion_latent: int = 64


FULL = Sizes(
    autoencoder={"channels": 64},
    unet={"channels": 128, "multipliers": (1, 2, 2), "depth": (1, 1, 0), "heads": 4},
    text={"vocabulary": 512, "length": 16, "width": 256, "layers": 2, "heads": 4},
    autoencoder_batch=8,
    autoencoder_pixels=64,
    unet_batch=16,
    latent=16,
    drawn=4,
    steps=10,
)
QUICK = Sizes(
    autoencoder={"channels": 32, "multipliers": (1, 2), "blocks": 1},
    unet={"channels": 32, "multipliers": (1, 2), "depth": (1, 0), "blocks": 1, "heads": 2},
    text={"vocabulary": 300, "length": 8, "width": 32, "layers": 1, "heads": 2},
    autoencoder_batch=2,
    autoencoder_pixels=32,
    unet_batch=2,
    latent=8,
    drawn=2,
    steps=4,
    stable_diffusion=UNetConfig(channels=32, multipliers=(1, 2), depth=(1, 0), heads=2, context_width=768),
    stable_diffusion_first_stage=AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1),
    stable_diffusion_latent=32,
)


class Part(NamedTuple):
    """One thing that is measured: each run of a side handles `pictures` pictures."""

    pictures: int
    ours: Callable[[], Callable[[], Tensor]]
    theirs: Callable[[peer.Variant, bool], Callable[[], Tensor]]
    """The peer's run in a variant; False: with weights of its own, so that ours need not be in memory."""
    check: Callable[[], dict[str, float]]
    """Differences of the two sides in float32."""
    gradients: Callable[[peer.Variant], dict[str, Tensor]] | None = None
    """In training, those of a variant of the peer: see `peer.trusted`."""


def redraw(module: nn.Module) -> None:
    """Weights that are random everywhere: layers that start at zero would hide the branches behind them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            drawn = torch.randn(parameter.shape, generator=generator) * deviation
            parameter.data = drawn.to(parameter.dtype)


def trained(loss: Callable[[], Tensor], named: dict[str, nn.Parameter], bf16: bool) -> Callable[[], Tensor]:
    """One training step as our trainer does it: autocast, backward pass, clipping, fused AdamW."""
    stepper = Stepper(named.items(), Optimiser(lr=1e-5))
    parameters = list(named.values())

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if norm > 1:
            torch._foreach_mul_(gradients, 1 / norm)
        stepper.step(1e-5)
        for parameter in parameters:
            parameter.grad = None
        return value.detach()

    return step


def compared(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], pairs: list[tuple[nn.Parameter, nn.Parameter]]
) -> dict[str, float]:
    """How far two losses and their gradients with respect to pairs of parameters lie apart."""

    def gradients(loss: Callable[[], Tensor], side: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, [pair[side] for pair in pairs])

    (value, mine), (other, yours) = gradients(ours, 0), gradients(theirs, 1)
    apart = [
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(mine, yours, strict=True) if a.abs().max() > 1e-6
    ]
    return {"loss": float(((value - other) / value).abs()), "gradients": max(apart)}


def paired(ours: nn.Module, theirs: nn.Module, rules: list[tuple[str, str]]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters, each with the peer's of the same meaning."""
    others = dict(theirs.named_parameters())
    return [(parameter, others[peer.renamed(name, rules)]) for name, parameter in ours.named_parameters()]


def autoencoder_part(sizes: Sizes, _: Path) -> Part:
    """Training of the first stage in Stable Diffusion's layout."""
    config, weights = AutoencoderConfig(**sizes.autoencoder), ReconstructionLoss()
    side, cells = sizes.autoencoder_pixels, sizes.autoencoder_pixels // config.downsampling
    draws = torch.arange(sizes.autoencoder_batch)
    pixels = keyed_batch(draws, (3, side, side), 0, "pixels").clamp(-1, 1)
    noise = keyed_batch(draws, (config.latent_channels, cells, cells), 0, "posterior")

    def ours() -> tuple[Autoencoder, Callable[[], Tensor]]:
        network = Autoencoder(config)
        redraw(network)
        objective = AutoencoderObjective(network.to(memory_format=torch.channels_last), weights, 0)
        return network, lambda: objective.loss("autoencoder", {"pixels": pixels, "draw": draws}, {})[0]

    def compare(decoded: Tensor, pixels: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        parts = (decoded - pixels).abs().mean(), pyramid_l1(decoded, pixels), structure(decoded, pixels)
        value = weights.l1 * parts[0] + weights.pyramid * parts[1] + weights.structure * parts[2]
        return value + weights.kl * Posterior(mean, log_variance).kl()

    def theirs(variant: peer.Variant, network: Autoencoder | None) -> tuple[Any, Callable[[], Tensor]]:
        other = peer.prepared(config, variant, network)
        return other, peer.autoencoder_loss(other, variant, pixels, noise, compare)

    def check() -> dict[str, float]:
        network, loss = ours()
        other, other_loss = theirs(peer.Variant(False, False, False), network)
        return compared(loss, other_loss, paired(network, other, peer.AUTOENCODER))

    def our_step() -> Callable[[], Tensor]:
        network, loss = ours()
        return trained(loss, dict(network.named_parameters()), bf16=True)

    def peer_step(variant: peer.Variant, same: bool) -> Callable[[], Tensor]:
        other, loss = theirs(variant, ours()[0] if same else None)
        return trained(loss, dict(other.named_parameters()), variant.bf16)

    def gradients(variant: peer.Variant) -> dict[str, Tensor]:
        return peer.gradients(*theirs(variant, ours()[0]), variant.bf16)

    return Part(len(pixels), our_step, peer_step, check, gradients)


def architecture(sizes: Sizes, drawing: bool) -> Architecture:
    """The diffusion model: Stable Diffusion 1's U-Net and autoencoder, narrower, with an own text encoder."""
    full = AutoencoderConfig(**sizes.autoencoder)
    unused = AutoencoderConfig(channels=32, multipliers=(1,), blocks=1, attention=False)  # latents come from a cache
    side = sizes.latent * full.downsampling
    return fit_network(
        Architecture(
            network=UNetConfig(linear_projection=False, **sizes.unet),
            first_stage=full if drawing else unused,
            size=(side, side),
            schedule=SCHEDULE,
            prediction="eps",
            text=TextEncoderConfig(**sizes.text),
        )
    )


def conditioner(sizes: Sizes) -> TextConditioner:
    """A text conditioner with a tokenizer of its own, its weights random."""
    text = TextConditioner(TextEncoderConfig(**sizes.text), train_tokenizer(CAPTIONS, sizes.text["vocabulary"]))
    redraw(text)
    return text


def unet_part(sizes: Sizes, _: Path) -> Part:
    """Training of the U-Net on cached latents, jointly with a text encoder (which is ours on both sides)."""
    shape, settings = architecture(sizes, drawing=False), DiffusionLoss(condition_dropout=0.0)
    draws = torch.arange(sizes.unet_batch)
    latent = (shape.network.channels_in, sizes.latent, sizes.latent)
    moments = keyed_batch(draws, (2 * latent[0], *latent[1:]), 0, "moments")
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(sizes.unet_batch)]
    batch = {"moments": moments, "draw": draws, "caption": captions, "label": torch.full_like(draws, -1)}

    def ours() -> tuple[LatentDiffusion, DiffusionObjective]:
        text = conditioner(sizes)
        model = LatentDiffusion(shape, {"text": text.state()})
        redraw(model.denoiser)
        model.conditioners["text"] = text
        objective = DiffusionObjective(model.to(memory_format=torch.channels_last), settings, 0)
        return model, objective

    def theirs(variant: peer.Variant, model: LatentDiffusion | None) -> tuple[Any, Any, Callable[[], Tensor]]:
        network = peer.prepared(shape.network, variant, None if model is None else model.denoiser.unet)
        text = conditioner(sizes)
        sigma = settings.sigma.sigmas(draws, shape.schedule, 0)
        rows = sigma.float()[:, None, None, None]
        target = keyed_batch(draws, latent, 0, "noise")
        x0 = posterior(moments).sample(keyed_batch(draws, latent, 0, "posterior"))
        x = (x0 + rows * target) * torch.rsqrt(1 + rows**2)
        timestep = torch.from_numpy(shape.schedule.to_timestep(sigma.numpy())).float()
        ids = text.tokens(captions)
        return network, text, peer.diffusion_loss(network, variant, text.encoder, ids, x, timestep, target)

    def check() -> dict[str, float]:
        model, objective = ours()
        network, text, loss = theirs(peer.Variant(False, False, False), model)
        pairs = paired(model.denoiser.unet, network, peer.UNET)
        pairs += zip(model.conditioners.parameters(), text.parameters(), strict=True)
        return compared(lambda: objective.loss("diffusion", batch, {})[0], loss, pairs)

    def our_step() -> Callable[[], Tensor]:
        _, objective = ours()
        named = dict(objective.module.named_parameters())
        return trained(lambda: objective.loss("diffusion", batch, {})[0], named, bf16=True)

    def peer_step(variant: peer.Variant, same: bool) -> Callable[[], Tensor]:
        network, text, loss = theirs(variant, ours()[0] if same else None)
        named = {f"{i}.{name}": p for i, m in enumerate((network, text)) for name, p in m.named_parameters()}
        return trained(loss, named, variant.bf16)

    def gradients(variant: peer.Variant) -> dict[str, Tensor]:
        network, _, loss = theirs(variant, ours()[0])
        return peer.gradients(network, loss, variant.bf16)

    return Part(len(draws), our_step, peer_step, check, gradients)


def generation_part(sizes: Sizes, folder: Path) -> Part:
    """Words to pictures by Euler's method with guidance, from a model file through the library's only path."""
    file = folder / "model.safetensors"
    shape = architecture(sizes, drawing=True)
    if not file.exists():
        text = conditioner(sizes)
        model = LatentDiffusion(shape, {"text": text.state()})
        redraw(model)
        save_model(file, model, {})
    seeds = range(sizes.drawn)
    words = [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds]
    asked = {"sampler": "euler", "spacing": "uniform", "steps": sizes.steps, "guidance_scale": GUIDANCE}

    def ours(dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
        model = load(file, "cpu", dtype)
        requests = [TextToImage(prompt=prompt, seed=seed, **asked) for prompt, seed in zip(words, seeds)]

        def draw() -> Tensor:
            done = [event for event in generate(model, requests) if isinstance(event, Result)]
            return torch.stack([event.picture for event in sorted(done, key=lambda event: event.number)])

        return draw

    def theirs(variant: peer.Variant, same: bool) -> Callable[[], Tensor]:
        text = conditioner(sizes)
        source = load(file, "cpu", torch.float32).network if same else None
        if source is not None:
            text.load_state_dict(source.conditioners["text"].state_dict())
        network = peer.prepared(shape.network, variant, source.denoiser.unet if source else None)
        first_stage = peer.prepared(shape.first_stage, variant, source.first_stage.autoencoder if source else None)
        noise = PictureNoise(list(seeds), (shape.first_stage.latent_channels, sizes.latent, sizes.latent)).initial()
        ids = text.tokens([""] * len(words) + words)
        return peer.pictures(network, first_stage, variant, text.encoder, ids, noise, sizes.steps, GUIDANCE)

    def check() -> dict[str, float]:
        mine, yours = ours(torch.float32)(), theirs(peer.Variant(False, False, False), True)()
        assert (mine.abs() < 1).float().mean() > 0.5, "nearly all pixels are clipped: nothing is compared"
        return {"pictures": float((mine - yours).abs().max())}

    return Part(sizes.drawn, ours, theirs, check)


def evaluated(
    config: UNetConfig | AutoencoderConfig,
    inputs: tuple[Tensor, ...],
    call: Callable[..., Tensor],
    cache: Path | None = None,
) -> Part:
    """One evaluation of a large network in bfloat16; `call(network, *inputs)` makes it, alike for both sides.

    Ours is computed by OpenVINO where `cache` says where to keep its conversion. Checked in float32 on a quarter of
    the side; "error" is our relative error in bfloat16, and "bfloat16" the same as a multiple of the peer's.
    """

    def network(dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.device("meta"):
            made = Autoencoder(config) if isinstance(config, AutoencoderConfig) else UNet(config)
        made = made.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
        redraw(made)
        for part in made.modules():
            if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(part.weight)
        return made

    def prepared(module: nn.Module, variant: peer.Variant) -> Callable[[], Tensor]:
        dtype = torch.bfloat16 if variant.bf16 else torch.float32
        module = module.to(dtype).to(memory_format=variant.layout).eval().requires_grad_(False)
        rows = tuple(x.to(dtype) if x.ndim > 1 else x for x in inputs)

        def run() -> Tensor:
            with torch.inference_mode():
                return call(module, *rows)

        return run

    def engaged(module: nn.Module) -> nn.Module:
        """The network, from now on computed by OpenVINO if that is asked for; it keeps no weights of its own then."""
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = str(cache)
            name = "" if isinstance(module, UNet) else "decoder"
            part = module.get_submodule(name)
            vars(part)["forward"] = Converted(part, config, lambda: network().get_submodule(name))
        return module

    def ours() -> Callable[[], Tensor]:
        run = prepared(engaged(network(torch.bfloat16)), peer.Variant(True, cache is None, False))
        run()
        return run

    def theirs(variant: peer.Variant, same: bool) -> Callable[[], Tensor]:
        other = peer.prepared(config, variant, network() if same else None)
        if variant.compiled:
            other.forward = torch.compile(other.forward)
            if hasattr(other, "decode"):
                other.decode = torch.compile(other.decode)
        return prepared(other, variant)

    def check() -> dict[str, float]:
        small = tuple(x[..., : x.shape[-1] // 4, : x.shape[-1] // 4] if x.ndim == 4 else x for x in inputs)
        halves = tuple(x.bfloat16() if x.ndim > 1 else x for x in small)
        with torch.no_grad():
            mine = network()
            other = peer.prepared(config, peer.Variant(False, False, False), mine).eval()
            exact, rounded = call(other, *small), call(other.bfloat16(), *halves).float()
            del other
            low = copy.deepcopy(mine).bfloat16()
            same = call(engaged(mine), *small)
            del mine
            own = call(engaged(low.to(memory_format=torch.channels_last)), *halves).float()
        scale = exact.square().mean().sqrt()
        errors = [float((each - exact).square().mean().sqrt() / scale) for each in (own, rounded)]
        return {
            "pictures": float((same - exact).abs().max() / exact.abs().max()),
            "error": errors[0],
            "bfloat16": errors[0] / errors[1],
        }

    return Part(1, ours, theirs, check)


def stable_diffusion_unet(sizes: Sizes, folder: Path, openvino: bool = False) -> Part:
    """One evaluation of Stable Diffusion 1's U-Net with both guidance branches; weights are random."""
    config, side = sizes.stable_diffusion, sizes.stable_diffusion_latent
    x = keyed_batch(range(2), (config.channels_in, side, side), 0, "x")
    context = keyed_batch(range(2), (77, config.context_width or 0), 0, "context")

    def call(network: nn.Module, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        if isinstance(network, UNet):
            return network(x, timestep, context)
        return network(x, timestep, encoder_hidden_states=context).sample

    return evaluated(config, (x, torch.full((2,), 501.0), context), call, folder if openvino else None)


def stable_diffusion_decode(sizes: Sizes, folder: Path, openvino: bool = False) -> Part:
    """One picture through the decoder of Stable Diffusion's first stage; weights are random."""
    config, side = sizes.stable_diffusion_first_stage, sizes.stable_diffusion_latent
    z = keyed_batch(range(1), (config.latent_channels, side, side), 0, "z")

    def call(network: nn.Module, z: Tensor) -> Tensor:
        if not isinstance(network, Autoencoder):
            return network.decode(z).sample
        in_strips = not openvino and (z.shape[-1] * config.downsampling) ** 2 > WHOLE_PIXELS["cpu"]  # as `FirstStage`
        return (Strips(network) if in_strips else network).decode(z)

    return evaluated(config, (z,), call, folder if openvino else None)


MAKERS = {
    "sd-unet": stable_diffusion_unet,
    "sd-decode": stable_diffusion_decode,
    "sd-openvino": partial(stable_diffusion_unet, openvino=True),
    "sd-openvino-decode": partial(stable_diffusion_decode, openvino=True),
    "autoencoder": autoencoder_part,
    "unet": unet_part,
    "generation": generation_part,
}
