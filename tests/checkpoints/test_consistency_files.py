"""Latent consistency models in diffusers' layout, and what no other layout can say of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import family
import pytest
import torch

from latentkit.checkpoints.diffusers_folder import read_folder, write_folder
from latentkit.checkpoints.ldm_file import write_single
from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.model.denoiser import GUIDANCE, ConsistencyConfig
from latentkit.model.latent_diffusion import LatentDiffusion


def model(consistency: ConsistencyConfig) -> LatentDiffusion:
    torch.manual_seed(1)
    made = LatentDiffusion(replace(family.ARCHITECTURES["SD 1"], consistency=consistency), {})
    for parameter in made.denoiser.parameters():
        parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("width", [8, None])
def test_a_folder_holds_it_whole(width: int | None, tmp_path: Path) -> None:
    ours = model(ConsistencyConfig(3.0, width))
    write_folder(tmp_path / "saved", ours)
    again = read_folder(tmp_path / "saved")
    assert again.architecture.consistency == ConsistencyConfig(3.0, width)
    written, read = ours.denoiser.state_dict(), again.denoiser.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    assert ("guidance_embedding.weight" in written) == (width is not None)


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("scheduler/scheduler_config.json", "timestep_scaling", 0, "timestep_scaling is 0; give a number above 0"),
        ("scheduler/scheduler_config.json", "timestep_scaling", "10", "timestep_scaling is '10'"),
        ("unet/config.json", "time_cond_proj_dim", 3, "time_cond_proj_dim is '3'; give a whole number from 4 on"),
        ("unet/config.json", "time_cond_proj_dim", 1 << 40, "time_cond_proj_dim is '1099511627776'"),
        ("unet/config.json", "time_cond_proj_dim", None, "time_embedding.cond_proj.weight"),
    ],
)
def test_configs_that_cannot_be_are_refused(file: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "saved", model(ConsistencyConfig(guidance_width=8)))
    path = tmp_path / "saved" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path / "saved")


def test_a_network_that_is_told_a_scale_is_one_whatever_its_scheduler(tmp_path: Path) -> None:
    write_folder(tmp_path / "saved", model(ConsistencyConfig(3.0, 8)))
    path = tmp_path / "saved" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DDIMScheduler"}))
    assert read_folder(tmp_path / "saved").architecture.consistency == ConsistencyConfig(10.0, 8)


def test_the_released_codes_layout_holds_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no latent consistency model"):
        write_single(tmp_path / "lcm.safetensors", model(ConsistencyConfig()), "LCM")


def test_at_the_first_timestep_the_picture_is_the_latent_itself() -> None:
    """There c_skip is 1 and c_out 0; above it the scale of guidance has a say, and none is none."""
    denoiser = model(ConsistencyConfig(guidance_width=8)).denoiser
    context = torch.randn(1, 3, 32)
    x = torch.randn(1, 4, 8, 8)
    sigma = torch.tensor([denoiser.schedule.sigma_min, 5.0], dtype=torch.float64)
    told = telling(context, 4.0)
    at_first = denoiser(x, sigma[:1], told)
    torch.testing.assert_close(at_first, x / (1 + sigma[0].item() ** 2) ** 0.5)
    above = [denoiser(x, sigma[1:], telling(context, scale)) for scale in (4.0, 6.0, None)]
    assert all((above[0] - other).abs().max() > 1e-3 for other in above[1:])


def telling(context: torch.Tensor, scale: float | None) -> Conditioning:
    return Conditioning(context=context, extras={} if scale is None else {GUIDANCE: torch.tensor([scale])})
