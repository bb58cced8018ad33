"""First stages of released files are measured like our own."""

from pathlib import Path

import family
import pytest
import torch

from latentkit.checkpoints.diffusers_folder import write_folder
from latentkit.checkpoints.ldm_file import write_single
from latentkit.data.pictures import to_png
from latentkit.data.source import open_source
from latentkit.evaluation.first_stage import evaluate, open_first_stage


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_the_first_stage_of_stable_diffusion(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(to_png(torch.rand(3, 19, 24) * 2 - 1))
    model = family.model("SD 1", torch.float16)
    place = tmp_path / ("model.safetensors" if layout == "single" else "model")
    if layout == "single":
        write_single(place, model, "test")
    else:
        write_folder(place, model)
    opened = open_first_stage(place, "cpu")
    assert (opened.background, opened.values) == ("white", None)
    assert opened.first_stage.dtype == torch.float32
    source = open_source(tmp_path / "pictures")
    found, same = evaluate(opened.first_stage, source), evaluate(model.first_stage.float(), source)
    assert found.psnr == pytest.approx(same.psnr, rel=1e-4)
    assert found.latent_std == pytest.approx(same.latent_std, rel=1e-3)
