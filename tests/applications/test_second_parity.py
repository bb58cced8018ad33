"""Stable Diffusion 2 against diffusers, from its folder and from a single file that says as little as released ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peer_pipelines import (
    NEGATIVE,
    PROMPT,
    SCALE,
    SCHEDULERS,
    SEED,
    SIZE,
    agree,
    ours,
    pipeline,
    scheduler,
    theirs,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import latentkit
from latentkit.checkpoints.layouts import open_model, write_model
from latentkit.diffusion.schedule import SIGMA_CAP
from latentkit.model.presets import PRESETS, Preset

pytestmark = pytest.mark.parity
V = {"prediction_type": "v_prediction"}
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, str] | None]] = {
    "base": ({}, (), {"modelspec.prediction_type": "epsilon"}),
    "768-v": (V, (), None),
    "zero-terminal": (V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, ("v_pred", "ztsnr"), None),
}
"""Of each kind: what its scheduler says, what marks its file has, and the file's metadata."""
STEPS = 5
ASKED: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": SCALE}
FIELDS: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "guidance_scale": SCALE}


class Second(NamedTuple):
    """The peer's pipeline, what its scheduler says, and ours of its folder and of a single file."""

    pipe: Any
    says: dict[str, Any]
    models: list[latentkit.Model]

    def scheduled(self, kind: str) -> dict[str, Any]:
        """Fields of ours that ask for the path that the peer now takes."""
        spacing = {"spacing": "trailing"} if "timestep_spacing" in self.says else {}
        return FIELDS | scheduler(self.pipe, kind, **self.says) | spacing


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One random pipeline, saved: what its network predicts is for its scheduler to say."""
    folder = tmp_path_factory.mktemp("second")
    pipe = pipeline("SD 2", folder)
    pipe.save_pretrained(folder / "saved")
    return pipe, folder


@pytest.fixture(scope="module", params=KINDS)
def second(request: pytest.FixtureRequest, peer: tuple[Any, Path]) -> Second:
    (pipe, folder), (says, marks, metadata) = peer, KINDS[request.param]
    scheduler(pipe, "DDIM", **says)
    pipe.scheduler.save_pretrained(folder / "saved" / "scheduler")
    single = folder / f"{request.param}.safetensors"
    opened = open_model(folder / "saved")
    write_model(single, opened, "ldm")
    tensors = load_file(single)
    assert {name for name in tensors if "." not in name} == ({"v_pred"} if says else set()) | set(marks)
    blocks = "cond_stage_model.model.transformer.resblocks."
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{blocks}2.")}
    unused = {name.replace(f"{blocks}2.", f"{blocks}23."): torch.randn_like(tensor) for name, tensor in last.items()}
    kept = {name: tensor for name, tensor in tensors.items() if "." in name or name in marks}
    save_file(unused | kept, single, metadata)
    architecture = opened.model.architecture
    plain = replace(architecture, prediction="eps", schedule=replace(architecture.schedule, zero_terminal=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "sd2.1-base", Preset(plain))
        patch.setitem(PRESETS, "sd2.1", Preset(replace(plain, prediction="v")))
        models = [latentkit.load(path, "cpu") for path in (folder / "saved", single)]
    assert models[0].network.architecture == models[1].network.architecture == architecture
    return Second(pipe, says, models)


def begin_anew(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The peer's history begins behind its first step, as ours does where that is from pure noise."""
    if step == 0:
        pipe.scheduler.lower_order_nums = 0
    return tensors


@pytest.mark.parametrize(("kind", "negative"), [("DDIM", ""), ("DPM++(2M)", NEGATIVE)])
def test_text_to_image(kind: str, negative: str, second: Second) -> None:
    fields = second.scheduled(kind)
    more: dict[str, Any] = {}
    if kind == "DPM++(2M)" and "rescale_betas_zero_snr" in second.says:
        more = {"callback_on_step_end": begin_anew}
        second.pipe.scheduler.alphas_cumprod[-1] = 1 / SIGMA_CAP**2  # the peer's own stands for a sigma of 4096 only
    there = theirs(second.pipe, **ASKED, **more, negative_prompt=negative, height=SIZE, width=SIZE)
    for model in second.models:
        agree(ours(model, latentkit.TextToImage(**fields, negative=negative)), there)


def test_a_multistep_sampler_from_pure_noise_differs_where_it_is_said_to(second: Second) -> None:
    """DPM++(2M) of a zero-terminal schedule: the peer's convention, as it is, draws other pictures.

    Its last alpha_bar is 2^-24 where it should be 0, a sigma of 4096 (ours: `SIGMA_CAP`); and its second step corrects
    by the estimate at that sigma, over an interval whose length in log-sigma is that arbitrary number's, so that the
    picture depends on it. Ours begins the history behind it. Only both make the two programs equal.
    """
    if "rescale_betas_zero_snr" not in second.says:
        pytest.skip("other schedules begin at finite noise, and are equal as they are")
    apart = []
    for sigma, history in ((False, False), (True, False), (False, True), (True, True)):
        fields = second.scheduled("DPM++(2M)")
        if sigma:
            second.pipe.scheduler.alphas_cumprod[-1] = 1 / SIGMA_CAP**2
        more: dict[str, Any] = {"callback_on_step_end": begin_anew} if history else {}
        there = theirs(second.pipe, **ASKED, **more, height=SIZE, width=SIZE)[0]
        mine = ours(second.models[0], latentkit.TextToImage(**fields))[0]
        apart.append(float((mine - there).abs().max() / there.std()))
    assert apart[3] < 1e-4 < min(apart[:3])
    assert apart[0] > 1e-3


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_image_to_image(kind: str, second: Second, tmp_path: Path) -> None:
    """The peer is given the mean of the encoder's distribution, from which ours starts."""
    import diffusers as untyped

    diffusers: Any = untyped
    fields = second.scheduled(kind)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**second.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    cells = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(cells.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
    picture.save(tmp_path / "init.png")
    with torch.no_grad():
        z = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.mode()
    start = z * pipe.vae.config.scaling_factor
    there = theirs(pipe, **ASKED, negative_prompt=NEGATIVE, image=start, strength=0.6)
    for model in second.models:
        asked = latentkit.ImageToImage(tmp_path / "init.png", **fields, negative=NEGATIVE, strength=0.6)
        agree(ours(model, asked), there)
