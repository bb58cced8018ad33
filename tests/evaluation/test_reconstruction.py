"""A first stage measured: any size of picture, latents by channel, codes, and which figures are left out."""

import io
import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from latentkit.checkpoints.files import save_autoencoder, save_model
from latentkit.data.pictures import BadPicture, decode, tiff_of, to_png, to_samples, to_tensor
from latentkit.data.range import Range
from latentkit.data.source import open_source
from latentkit.errors import InputError
from latentkit.evaluation import first_stage as module
from latentkit.evaluation.first_stage import (
    chosen_codes,
    evaluate,
    lines,
    measure,
    open_distance,
    open_first_stage,
    usage,
)
from latentkit.evaluation.metrics.features import NETWORK
from latentkit.evaluation.reconstruction import as_stored, beside, reconstruct
from latentkit.model.first_stage import WHOLE_PIXELS, FirstStage
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.perceptual import FeatureConfig, OwnTrunk, PerceptualDistance, Trunk

TINY = AutoencoderConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, attention=False)


def made(**changes) -> FirstStage:
    torch.manual_seed(1)
    config = replace(TINY, **changes)
    return FirstStage(config, config.picture_channels).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five pictures of three sizes; the first has a white margin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = tmp_path / "pictures"
    where.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate([(24, 24), (13, 30), (24, 24), (9, 8), (24, 24)]):
        picture = torch.rand(3, height, width, generator=generator) * 2 - 1
        if number == 0:
            picture[:, :4] = 1.0
        (where / f"{number}.png").write_bytes(to_png(picture))
    return where


def test_odd_sizes_are_padded_by_their_edges_and_cut_back():
    stage = made()
    x = torch.rand(3, 13, 30) * 2 - 1
    passed = reconstruct(stage, x)
    assert passed.picture.shape == x.shape
    assert passed.latents.shape == (2, 7, 15)
    padded = torch.cat([x, x[:, -1:]], 1)
    assert torch.equal(passed.picture, reconstruct(stage, padded).picture[:, :13])


def test_figures_of_pixels_themselves_are_perfect(folder):
    """The identity first stage gives everything back."""
    found = evaluate(FirstStage(None, 3), open_source(folder))
    assert (found.pictures, found.psnr, found.psnr_box) == (5, 100.0, 100.0)
    assert found.ssim == found.ms_ssim == pytest.approx(1.0)
    assert found.scales == (1, 2)
    assert found.frechet == pytest.approx(0.0, abs=1e-9)
    assert found.codes is None
    assert found.lpips is None


def test_means_are_over_pictures_and_latents_over_cells(folder):
    stage, source = made(), open_source(folder)
    found = evaluate(stage, source)
    rows = [to_tensor(source.read(i), 3) for i in range(5)]
    passed = [reconstruct(stage, row) for row in rows]
    errors = [float((a - b.picture).square().mean()) / 4 for a, b in zip(rows, passed)]
    assert found.psnr == pytest.approx(sum(-10 * math.log10(error) for error in errors) / 5, rel=1e-5)
    inside = float((rows[0][:, 4:] - passed[0].picture[:, 4:]).square().mean()) / 4
    assert found.psnr_box == pytest.approx(-10 * math.log10(inside), rel=1e-5)  # the one with a margin alone
    cells = torch.cat([p.latents.flatten(1) for p in passed], 1).double()
    assert found.latent_mean == pytest.approx(cells.mean(1).tolist())
    assert found.latent_std == pytest.approx(cells.std(1, correction=0).tolist())
    two = evaluate(stage, source, count=2)  # evenly taken: the first and the third
    assert two.pictures == 2
    assert two.psnr == pytest.approx(-5 * (math.log10(errors[0]) + math.log10(errors[2])), rel=1e-5)


def test_latents_are_raw_whatever_the_statistics(folder):
    stage, source = made(), open_source(folder)
    before = evaluate(stage, source, count=1)
    stage.set_statistics(torch.tensor([3.0, -1.0]), torch.tensor([0.1, 9.0]))
    after = evaluate(stage, source, count=1)
    assert after.latent_mean == before.latent_mean
    assert after.psnr == pytest.approx(before.psnr, rel=1e-4)


def test_codes_are_counted(folder):
    stage = made(codes=4)
    book = stage.autoencoder.codebook.vectors
    book.data = torch.tensor([[9.0, 9.0], [0.0, 0.0], [-9.0, -9.0], [1e-4, 0.0]])
    latents = torch.tensor([[[9.0, 8.0, 0.0, -9.0]], [[9.0, 8.0, 0.0, -9.0]]])
    assert chosen_codes(stage.autoencoder, latents).tolist() == [0, 0, 1, 2]
    book.data[1:] = 1e6
    codes = evaluate(stage, open_source(folder)).codes
    assert codes == (4, 1, 1.0, 144 * 3 + 7 * 15 + 5 * 4)


def test_perplexity_of_an_even_choice():
    codes = usage(made(codes=8).autoencoder, {1: 5, 3: 5, 4: 5, 7: 5})
    assert (codes.codes, codes.chosen, codes.cells) == (8, 4, 20)
    assert codes.perplexity == pytest.approx(4.0)


def test_levels_have_numbers_too():
    """Every pair of 3 and 4 values has a number of its own, from 0 to 11."""
    network = made(levels=(3, 4)).autoencoder
    first, second = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, -0.5, 0.0, 0.5])
    cells = torch.cartesian_prod(first, second).T[:, None]
    assert chosen_codes(network, cells).tolist() == list(range(12))


def test_a_picture_that_went_bad_is_named(folder):
    source = open_source(folder)
    (folder / "2.png").write_bytes(b"nothing")
    found = evaluate(FirstStage(None, 3), source)
    assert found.pictures == 4
    assert list(found.left_out) == ["2.png"]
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="no picture could be measured"):
        evaluate(FirstStage(None, 3), source)


def test_no_picture_cannot_be_measured():
    with pytest.raises(InputError, match="there is none"):
        measure(FirstStage(None, 3), [])


def test_channels_that_do_not_fit_are_refused(folder):
    with pytest.raises(InputError, match="cannot be read as 5 channels") as error:
        evaluate(FirstStage(None, 5), open_source(folder))
    assert not isinstance(error.value, BadPicture)


def test_perceptual_distance_of_pictures_that_are_large_enough(folder):
    distance = PerceptualDistance(OwnTrunk(FeatureConfig(widths=(4, 4, 4, 4, 4))))  # 16 px at least
    stage, source = made(), open_source(folder)
    found = evaluate(stage, source, lpips=distance)
    rows = [to_tensor(source.read(i), 3) for i in (0, 2, 4)]
    values = [float(distance(x[None], reconstruct(stage, x).picture[None])) for x in rows]
    assert found.lpips == pytest.approx(sum(values) / 3, rel=1e-5)


def test_the_middle_of_a_large_picture():
    x = torch.arange(1030.0).expand(1, 4, 1030)
    assert module._middle(x).shape == (1, 4, 1024)
    assert module._middle(x)[0, 0, 0] == 3


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_weights_say_which_trunk_they_are_of(tmp_path, name):
    trunk = Trunk(name)
    places = [place for stage in module_stages(name) for place in stage]
    weights = dict(zip((f"features.{p}.{k}" for p in places for k in ("weight", "bias")), trunk.state_dict().values()))
    torch.save(weights, tmp_path / "trunk.pth")
    heads = {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) for i, width in enumerate(trunk.widths)}
    torch.save(heads, tmp_path / "heads.pth")
    assert open_distance(tmp_path / "trunk.pth", tmp_path / "heads.pth").trunk.name == name


def module_stages(name):
    from latentkit.nets.perceptual import STAGES

    return [[convolution[0] for convolution in stage] for stage in STAGES[name]]


def test_files_of_both_kinds_and_run_folders_open(tmp_path):
    stage = made()
    transform = {"background": "#102030", "range": {"kind": "log", "low": 1.0, "high": 300.0}}
    recipe = {"recipe": {"data": {"transform": transform}}}
    save_autoencoder(tmp_path / "run" / "model.safetensors", stage, recipe)
    save_model(tmp_path / "whole.safetensors", tiny_model(), {}, torch.float32)
    opened = open_first_stage(tmp_path / "run", "cpu")
    assert opened.background == "#102030"
    assert opened.values == Range(kind="log", low=1.0, high=300.0)
    assert len(opened.digest) == 64
    x = torch.rand(3, 16, 16)
    assert torch.equal(reconstruct(opened.first_stage, x).picture, reconstruct(stage, x).picture)
    whole = open_first_stage(tmp_path / "whole.safetensors", "cpu")
    assert whole.background == "white"
    assert whole.values is None
    torch.testing.assert_close(
        reconstruct(whole.first_stage, x).picture, reconstruct(tiny_model().first_stage, x).picture
    )
    with pytest.raises(InputError, match="no model"):
        open_first_stage(tmp_path / "absent")
    transform["range"]["low"] = 400.0
    save_autoencoder(tmp_path / "odd.safetensors", stage, recipe)
    with pytest.raises(InputError, match=r"odd.safetensors: its range of values is invalid"):
        open_first_stage(tmp_path / "odd.safetensors")


def test_a_large_file_of_another_kind_is_not_read_whole(tmp_path):
    path = tmp_path / "model.ckpt"
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04\x00\x00\x08\x08")
        file.truncate(1 << 28)
    tracemalloc.start()
    try:
        assert module._alone(path) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_large_pictures_pass_in_strips(monkeypatch):
    stage, x = made(), torch.rand(3, 33, 64) * 2 - 1
    whole, used = reconstruct(stage, x), []
    monkeypatch.setitem(WHOLE_PIXELS, "cpu", 1000)
    real = FirstStage._strips
    monkeypatch.setattr(FirstStage, "_strips", lambda *given: used.append(real(*given)) or used[-1])
    again = reconstruct(stage, x)
    assert None not in used
    assert len(used) == 2
    torch.testing.assert_close(again.picture, whole.picture, atol=1e-4, rtol=0)


def test_what_is_said(folder):
    found = evaluate(made(codes=4), open_source(folder))
    text = "\n".join(lines(found))
    assert f"features of {NETWORK}, which compare with no Inception figure" in text
    assert "over 1 to 2 scales" in text
    assert "the published 5 do not fit" in text
    assert "of 4 chosen" in text
    assert "LPIPS" not in text
    again = json.loads(json.dumps(found.document()))
    assert again["kid"]["size"] == 2
    assert again["codes"]["codes"] == 4


@pytest.mark.parametrize(
    ("channels", "alpha", "shown"),
    [(1, False, 1), (2, False, 1), (2, True, 2), (3, False, 3), (4, False, 3), (4, True, 4), (12, False, 3)],
)
def test_a_picture_beside_its_reconstruction_and_its_errors(channels, alpha, shown):
    """The error map is of the channel with the largest error, also of one that is not shown, and opaque."""
    x = torch.linspace(-1, 1, channels)[:, None, None].expand(-1, 4, 5)
    other = x.clone()
    other[-1, 1, 2] -= 0.125  # 1/16 of the range, times 4: a quarter of it
    data = beside(x, other, 4, alpha)
    assert Image.open(io.BytesIO(data)).text["Description"].endswith("times 4")
    picture = decode(data, "a")
    assert (picture.array.shape[2], picture.has_alpha) == (shown, alpha)
    assert picture.array.shape[:2] == (8, 3 * 7 + 2)
    assert (picture.array[2:6, 2:7] == to_samples(x[:shown], np.uint8)).all()
    seen = picture.array[2:6, 16:21, : shown - alpha]
    assert (seen[1, 2] == 64).all()
    assert seen.sum() == seen[1, 2].sum()
    if alpha:
        assert (picture.array[2:6, 16:21, -1] == 255).all()


@pytest.mark.parametrize(
    ("dtype", "channels", "tiff", "suffix"),
    [
        (np.uint8, 3, False, "png"),
        (np.uint8, 3, True, "tiff"),
        (np.uint8, 2, False, "tiff"),
        (np.uint8, 4, False, "tiff"),
        (np.uint8, 12, False, "tiff"),
        (np.uint16, 1, False, "png"),
        (np.uint16, 3, False, "tiff"),
        (np.float32, 1, False, "tiff"),
    ],
)
def test_a_plain_reconstruction_has_the_type_of_its_source(dtype, channels, tiff, suffix):
    array = np.random.default_rng(0).random((8, 8, channels))
    array = array.astype(dtype) if dtype == np.float32 else (array * np.iinfo(dtype).max).astype(dtype)
    source = decode(tiff_of(array), "a")
    found, data = as_stored(to_tensor(source, channels), source, None, tiff)
    assert found == suffix
    again = decode(data, "a").array
    assert again.dtype == dtype
    assert np.allclose(again, array, atol=1e-7 if dtype == np.float32 else 0)


def test_a_plain_reconstruction_has_the_values_of_its_source():
    values = Range(low=-1024, high=3071)
    array = np.random.default_rng(0).integers(-1024, 3072, (8, 8, 1)).astype(np.int16)
    source = decode(tiff_of(array), "a", values)
    suffix, data = as_stored(to_tensor(source, 1), source, values, False)
    assert suffix == "tiff"
    import tifffile

    assert np.array_equal(tifffile.imread(io.BytesIO(data)), array[..., 0])


@pytest.mark.parametrize("values", [None, Range(low=0, high=40000)])
def test_a_plain_reconstruction_keeps_alpha(values):
    array = np.random.default_rng(0).integers(1, 40000, (8, 8, 4)).astype(np.uint16)
    source = decode(tiff_of(array, alpha=True), "a", values)
    _, data = as_stored(to_tensor(source, 4), source, values, False)
    again = decode(data, "a")
    assert again.has_alpha
    assert np.abs(again.array.astype(int) - array).max() <= 1


def test_a_plain_reconstruction_of_an_opaque_picture_by_a_model_with_alpha():
    source = decode(to_png(torch.rand(3, 8, 8) * 2 - 1), "a")
    suffix, data = as_stored(to_tensor(source, 4), source, None, False)
    assert (suffix, decode(data, "a").has_alpha) == ("png", True)
