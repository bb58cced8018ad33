"""FirstStage: pixels to model latents and back; the only owner of latent scaling, and of how large pictures pass."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, cast

import torch
from jaxtyping import Float
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.bottleneck import Posterior, posterior
from latentkit.nets.strips import Strips
from latentkit.nets.tiny import TinyAutoencoder, TinyConfig

KINDS = ("<autoencoder>", "<tiny>")
"""No names of fields, so that what says where a value is wrong can leave them out."""


def _kind(value: Any) -> str:
    """Which of `KINDS` plain values, or a config, are: only a tiny one's blocks are listed by level."""
    blocks = value.get("blocks") if isinstance(value, dict) else getattr(value, "blocks", None)
    return KINDS[isinstance(blocks, list | tuple)]


FirstStageConfig = Annotated[
    Annotated[AutoencoderConfig, Tag(KINDS[0])] | Annotated[TinyConfig, Tag(KINDS[1])], Discriminator(_kind)
]

WHOLE_PIXELS = {"cpu": 1 << 17}
"""Pixels of a picture up to which it passes the autoencoder whole; in strips it takes half the memory, and on a CPU
hardly more time."""
WHOLE_ELSEWHERE = 1 << 22
"""Of other devices, where what lies between the strips would go to the host and back: 2048 x 2048, if they fit."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device (of one that is no CUDA device, and of "cpu", on the host)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class FirstStage(nn.Module):
    """Three stations: pixels in [-1, 1], raw latents (the autoencoder's), model latents (mean 0, deviation 1).

    `config` None is the identity first stage: pixel-space diffusion through the same code.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: FirstStageConfig | None, picture_channels: int) -> None:
        super().__init__()
        self.autoencoder: Autoencoder | None = None
        if isinstance(config, TinyConfig):
            self.autoencoder = cast(Autoencoder, TinyAutoencoder(config))  # it offers the same
        elif config is not None:
            self.autoencoder = Autoencoder(config)
        self.picture_channels = picture_channels
        self.latent_channels = config.latent_channels if config else picture_channels
        self.downsampling = config.downsampling if config else 1
        self._in_strips: bool | None = None  # by their size
        self.register_buffer("latent_mean", torch.zeros(self.latent_channels))
        self.register_buffer("latent_std", torch.ones(self.latent_channels))

    @property
    def dtype(self) -> torch.dtype:
        """The type that the autoencoder computes in."""
        return next(self.autoencoder.parameters()).dtype if self.autoencoder else torch.float32

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Fix mean and deviation `c` of the raw latents over the whole data set."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def moments(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z hl wl"]:
        """Mean and log-variance of the raw posterior, `b 2c h/f w/f`, float32 (identity: the pixels, no variance)."""
        if self.autoencoder is None:
            return torch.cat([pixels, torch.full_like(pixels, -30.0)], dim=1).float()
        strips = self._strips(pixels[0, 0].numel(), len(pixels))
        found: Posterior = (strips or self.autoencoder).encode(pixels.to(self.dtype))
        return torch.cat(found, dim=1).to(self.latent_mean.device)

    def from_moments(
        self, moments: Float[Tensor, "b z h w"], noise: Float[Tensor, "b c h w"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Model latents: a posterior sample with `noise`, or its mean."""
        raw = posterior(moments)
        return self.standardise(raw.mean if noise is None or self.autoencoder is None else raw.sample(noise))

    def standardise(self, raw: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Raw latents to model latents."""
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def encode(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z hl wl"]:
        """Pixels to model latents (the posterior's mean)."""
        return self.from_moments(self.moments(pixels))

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c hp wp"]:
        """Model latents to pixels, float32, not clamped."""
        raw = z.float() * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        if self.autoencoder is None:
            return raw
        strips = self._strips(raw[0, 0].numel() * self.downsampling**2, len(raw))
        return (strips or self.autoencoder).decode(raw.to(self.dtype)).float().to(raw.device)

    @contextmanager
    def in_strips(self, on: bool = True) -> Iterator[None]:
        """Inside of this context pictures of any size pass in strips, which takes the least memory.

        With `on` false they pass whole up to `WHOLE_ELSEWHERE` pixels, on a CPU too.
        """
        before, self._in_strips = self._in_strips, on
        try:
            yield
        finally:
            self._in_strips = before

    def _strips(self, pixels: int, count: int) -> Strips | None:
        """What `count` pictures of so many pixels pass instead of the whole network, if they are large: values stay.

        Large is also what would fill more than half of the free memory of a device that is no CPU. What lies between
        the segments goes to files where it would fill more than half of the host's.
        """
        network = self.autoencoder
        if not isinstance(network, Autoencoder) or torch.is_grad_enabled():
            return None
        device, config = network.from_latent.weight.device, network.config
        widths = config.multipliers[1:] + config.multipliers[-1:]  # of what each level of the decoder begins with
        widest = max(config.channels * m / 4**level for level, m in enumerate(widths)) / config.stem**2
        between = round(3 * pixels * widest * self.dtype.itemsize)  # as much as the whole network takes at its peak
        usual = WHOLE_PIXELS.get(device.type, WHOLE_ELSEWHERE)
        if device.type not in WHOLE_PIXELS and count * between > free_memory(device) // 2:
            usual = 0
        if pixels <= {None: usual, True: 0, False: WHOLE_ELSEWHERE}[self._in_strips]:
            return None
        spill = between > free_memory(torch.device("cpu")) // 2
        return Strips(network, tempfile.gettempdir() if spill else None)
