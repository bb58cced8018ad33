"""Makes `heads-one.safetensors` and `heads-many.safetensors`, in two minutes, with `tests` on the path.

Two small networks of one shape in the layout of the released code, one trained with one attention head and one with
sixteen, their metadata stripped: nothing in the files says which is which.
"""

from dataclasses import replace
from pathlib import Path

import family
import torch
from safetensors.torch import load_file, save_file

from latentkit.checkpoints.ldm_file import write_single
from latentkit.checkpoints.probe import leaves
from latentkit.model.conditioning import Conditioning
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion

HERE = Path(__file__).resolve().parent
WIDTH = 2
"""Channels of one of the many heads."""
STEPS, BATCH = 3000, 8
_CLASSES = family.ARCHITECTURES["classes"]
ONE = replace(
    _CLASSES,
    network=replace(_CLASSES.network, multipliers=(1,), depth=(0,), heads=1),
    first_stage=replace(family.VQ, channels=8),
)
MANY = replace(ONE, network=replace(ONE.network, heads=None, head_width=WIDTH))


def trained(architecture: Architecture) -> LatentDiffusion:
    """Trained on what attention is for: cells of two colours in any order; and on pieces of pictures."""
    torch.manual_seed(0)
    model = LatentDiffusion(architecture, {"label": {"classes": ["cat", "dog"]}})
    denoiser, stage = model.denoiser, model.first_stage
    with torch.no_grad():
        raw = stage.encode(leaves(76, 16 * stage.downsampling))
        stage.set_statistics(torch.zeros(3), raw.std().expand(3))
        latents = stage.encode(leaves(76, 16 * stage.downsampling))[12:]
        told = Conditioning.cat([model.condition({}, 1)] * BATCH)
        dict(denoiser.named_parameters())["unet.middle.block_in.transformer.project_out.weight"].normal_(std=0.1)
    optimiser = torch.optim.AdamW(denoiser.parameters(), 4e-3, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS):
        if step % 2:
            colours, cells = torch.randn(BATCH, 3, 2), torch.randint(2, (BATCH, 1, 8, 8)).expand(-1, 3, -1, -1)
            x0 = colours.gather(2, cells.flatten(2)).view(BATCH, 3, 8, 8)
        else:
            y, x = torch.randint(9, (2,)).tolist()
            x0 = latents[torch.randint(len(latents), (BATCH,))][:, :, y : y + 8, x : x + 8]
        times = architecture.schedule.steps * (0.2 + 0.6 * torch.rand(BATCH).double())
        sigma = torch.from_numpy(architecture.schedule.at(times.numpy()))
        rows, eps = sigma.float()[:, None, None, None], torch.randn_like(x0)
        answer = denoiser.network(x0 + rows * eps, sigma, told)
        loss = (answer - denoiser.prediction.target(x0, eps, rows)).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        falling.step()
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train both and write their files."""
    torch.set_num_threads(1)
    for name, architecture in (("one", ONE), ("many", MANY)):
        path = HERE / f"heads-{name}.safetensors"
        model = trained(architecture)
        write_single(path, model, name, torch.float16)
        save_file({**load_file(path), "scale_factor": 1 / model.first_stage.latent_std[0]}, path)


if __name__ == "__main__":
    main()
