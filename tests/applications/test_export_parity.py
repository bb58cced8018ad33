"""A model trained by the recipe in Stable Diffusion's layout, exported: diffusers draws the same picture from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import latentkit
from latentkit.applications.generate import Result
from latentkit.applications.stages.train import train
from latentkit.cli import application
from latentkit.training.recipe import read_recipe

pytestmark = [pytest.mark.parity, pytest.mark.slow]  # both of the recipe's stages are trained for some steps

ROOT = Path(__file__).parents[2]
SHORT = [
    f"data.path={ROOT / 'data' / 'emoji' / 'emoji-000001.tar'}", "data.split=holdout", "schedule.steps=12",
    "schedule.batch=4", "schedule.save_every=12", "schedule.sample_every=12", "optimiser.warmup=2",
]  # fmt: skip
PROMPT, NEGATIVE, SEED, STEPS, SCALE = "red heart", "green, blurry", 3, 10, 3.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's model after 12 steps."""
    runs = tmp_path_factory.mktemp("runs")
    first = train(read_recipe(str(ROOT / "recipes" / "emoji-sd-autoencoder.yaml"), SHORT), runs / "first")
    recipe = read_recipe(str(ROOT / "recipes" / "emoji-sd.yaml"), [*SHORT, f"first_stage={first}"])
    return train(recipe, runs / "second")


@pytest.mark.parametrize(("dtype", "grays"), [([], 1.0), (["--dtype", "float32"], 0.02)])
def test_diffusers_draws_the_same_picture(dtype: list[str], grays: float, model: Path, tmp_path: Path) -> None:
    """In the file's own bfloat16 the latent statistics that are folded into the autoencoder are rounded too."""
    import diffusers as untyped

    diffusers: Any = untyped
    arguments = ["convert", str(model), str(tmp_path / "export"), "--to", "diffusers", *dtype]
    said = CliRunner().invoke(application(), arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    asked = latentkit.TextToImage(
        prompt=PROMPT, negative=NEGATIVE, seed=SEED, steps=STEPS, guidance_scale=SCALE, sampler="dpm++2m",
        spacing="trailing",
    )  # fmt: skip
    events = latentkit.generate(latentkit.load(model, "cpu", torch.float32), asked)
    (ours,) = ((event.picture + 1) / 2 for event in events if isinstance(event, Result))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "export", local_files_only=True, torch_dtype=torch.float32
    )
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=SCALE, height=64, width=64,
        generator=torch.Generator("cpu").manual_seed(SEED), output_type="pt",
    ).images[0]  # fmt: skip
    assert theirs.std() > 0.02
    assert 255 * (ours - theirs).abs().max() < grays
