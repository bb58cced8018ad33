"""Training a first stage from a recipe: with its own perceptual network, a critic, from another's weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentkit.applications.pictures import open_data
from latentkit.applications.stages.train import train
from latentkit.applications.stages.train_diffusion import encoder_digest
from latentkit.checkpoints.files import load_autoencoder
from latentkit.errors import InputError
from latentkit.nets.autoencoder import Autoencoder
from latentkit.training.recipe import parse_recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(2)
    for number in range(6):
        pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((24, 16)).save(folder / f"{number}.png")
    return folder


def recipe(pictures: Path, *, loss: dict[str, Any] | None = None, **changes: Any) -> Any:
    return parse_recipe(
        {
            "stage": "autoencoder",
            "name": "small",
            "data": {"path": str(pictures), "transform": {"size": 16, "channels": 3, "crop": "random"}},
            "network": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": False},
            "loss": loss or {},
            "optimiser": {"warmup": 0},
            "averaging": {"power": []},
            "schedule": {"steps": 6, "batch": 2, "save_every": 3, "sample_every": 6, "log_every": 2, "device": "cpu"},
        }
        | changes
    )


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(pictures), tmp_path_factory.mktemp("runs") / "plain")


CRITIC = {"start": 2, "warmup": 1, "ramp": 2, "network": {"channels": 4, "layers": 1}}


def test_with_an_own_perceptual_network_and_a_critic(pictures: Path, tmp_path: Path) -> None:
    loss = {"perceptual": {"steps": 4}, "adversarial": CRITIC}
    path = train(recipe(pictures, loss=loss, checkpointing=True), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["autoencoder/perceptual"] > 0
    assert lines[-2]["critic/loss"] > 0
    assert len(lines[-1]["validation/latent_std"]) == 4
    assert 0 < lines[-1]["validation/ssim"] < 1
    assert lines[-1]["validation/frechet"] > 0
    assert lines[-1]["validation/features"] == "latentkit-random-conv-v1"
    assert "validation/lpips" not in lines[-1], "its own network is not LPIPS"
    own = [json.loads(line) for line in (tmp_path / "run" / "perceptual" / "metrics.jsonl").read_text().splitlines()]
    assert own[-1]["step"] == 4
    assert {name.split(".")[0] for name in load_autoencoder(path).state_dict()} <= {
        "autoencoder", "latent_mean", "latent_std"
    }, "no critic in the model"  # fmt: skip
    shutil.copytree(tmp_path / "run" / "perceptual", tmp_path / "killed" / "perceptual")
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "killed")
    again = train(recipe(pictures, loss=loss, checkpointing=True), tmp_path / "killed")
    assert again.read_bytes() == path.read_bytes(), "also where it was killed between its features and its first step"


def test_a_decoder_alone_goes_on_from_another_run(pictures: Path, plain: Path, tmp_path: Path) -> None:
    """Also from a run's folder; the encoder keeps every bit, so that cached latents stay what they were."""
    asked = recipe(
        pictures, start=str(plain.parent), frozen_encoder=True, loss={"adversarial": CRITIC}, averaging={"power": []}
    )
    old, new = (load_autoencoder(path).state_dict() for path in (plain, train(asked, tmp_path / "run")))
    for name, value in old.items():
        encoder = name.startswith(("autoencoder.encoder", "autoencoder.to_moments"))
        if encoder:
            assert torch.equal(new[name], value)
    assert not torch.equal(new["autoencoder.decoder.conv_out.weight"], old["autoencoder.decoder.conv_out.weight"])
    digests = [encoder_digest(_network(path)) for path in (plain, tmp_path / "run" / "model.safetensors")]
    assert digests[0] == digests[1]
    other = _network(plain)
    with torch.no_grad():
        other.to_moments.bias[0] += 1e-3
    assert encoder_digest(other) != digests[0]


def _network(path: Path) -> Autoencoder:
    found = load_autoencoder(path).autoencoder
    assert found is not None
    return found


WITHOUT_WEIGHTS = (
    r"loss\.perceptual\.weights: no file 'a'; it is torchvision's vgg16, vgg16-397923af\.pth of .*which you bring\. "
    r"To train without: loss\.perceptual='\{network: own\}'"
)


def test_what_does_not_fit_is_refused(pictures: Path, plain: Path, tmp_path: Path) -> None:
    network = {"channels": 8, "multipliers": [1, 1], "blocks": 1, "attention": False}
    known = {"perceptual": {"network": "vgg16", "weights": str(plain), "heads": "b"}}
    for asked, message in (
        (
            recipe(pictures, start=str(plain), network=network),
            r"holds another autoencoder \(there -> in the recipe\):\n  network\.multipliers: \(1, 2\) -> \(1, 1\)$",
        ),
        (recipe(pictures, start=str(plain), network={"blocks": [1, 1]}), r"\n  network\.blocks: 1 -> \(1, 1\)\n"),
        (
            recipe(pictures, loss=known),
            r"loss\.perceptual\.heads: no file 'b'; it is LPIPS's layers.* vgg\.pth of",
        ),
        (recipe(pictures, start="nothing.safetensors"), "nothing.safetensors"),
        (recipe(pictures, loss={"perceptual": {"network": "vgg16", "weights": "a", "heads": "b"}}), WITHOUT_WEIGHTS),
        (recipe(pictures, loss={"adversarial": {"start": 2}}), "at least 24 px a side; the smallest here are 16"),
    ):
        with pytest.raises(InputError, match=message):
            train(asked, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_encoder": True}, "needs an autoencoder to start from"),
        ({"loss": {"perceptual": {"network": "vgg16", "weights": "a"}}}, "vgg16 takes both weights and heads"),
        ({"loss": {"perceptual": {"heads": "a"}}}, "own takes no weights and heads"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(pictures: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(pictures, **changes)


def test_known_weights_are_read_from_files(pictures: Path, tmp_path: Path) -> None:
    """Both as torch and as safetensors files; what is wrong with one is named."""
    from safetensors.torch import save_file

    from latentkit.nets.perceptual import Trunk
    from latentkit.training.first_stage.perceptual import Perceptual, read_distance, read_tensors

    trunk = Trunk("alexnet")
    places = (0, 3, 6, 8, 10)
    weights = {
        f"features.{place}.{kind}": getattr(trunk.stages[i][0], kind).detach()
        for i, place in enumerate(places)
        for kind in ("weight", "bias")
    }
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(trunk.widths)}
    torch.save(weights, tmp_path / "alexnet.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    settings = Perceptual(
        network="alexnet", weights=str(tmp_path / "alexnet.pth"), heads=str(tmp_path / "heads.safetensors")
    )
    still = {"path": str(pictures), "transform": {"size": 32, "channels": 3}}
    seen = {"perceptual": settings.model_dump(mode="json")}
    train(recipe(pictures, loss=seen, data=still), tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert told["validation/lpips"] > 0
    distance = read_distance(settings)
    assert torch.equal(distance.heads[4], heads["lin4.model.1.weight"].flatten())
    a, b = torch.rand(2, 1, 32, 40), torch.rand(2, 1, 32, 40)
    assert (distance(a, b) > 0).all()
    assert float(distance(a, a).sum()) == 0
    with pytest.raises(InputError, match="no file"):
        read_tensors(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(
        InputError, match=r"text\.pth cannot be read as weights; give a state dict as torch\.save writes it"
    ):
        read_tensors(tmp_path / "text.pth")
    torch.save({"a": 3}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="something other than named tensors"):
        read_tensors(tmp_path / "other.pth")


def test_pictures_of_several_shapes_and_sizes(pictures: Path, tmp_path: Path) -> None:
    """Tall and wide ones keep their shape; random parts at two sizes, turned latents, a critic and codes at once."""
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    for number in range(6):
        with Image.open(pictures / f"{number}.png") as wide:
            wide.resize((48, 32)).save(shapes / f"{number}.png")
            wide.transpose(Image.Transpose.ROTATE_90).save(shapes / f"{number + 6}.png")
    transform = {"size": 16, "channels": 3, "crop": "random", "zoom": 2, "buckets": True, "flips": "h"}
    network = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": False, "codes": 16, "latent_channels": 2}
    asked = recipe(
        pictures,
        data={"path": str(shapes), "transform": transform},
        network=network,
        loss={"adversarial": CRITIC, "equivariance": 0.25},
    )
    train(asked, tmp_path / "run")
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["validation/psnr"] > 5
    assert last["step"] == 6
    shown = open_data(asked.data, 0, asked.network.downsampling)[0]
    assert {shown.shapes[bucket] for bucket in shown.buckets or ()} == {(20, 12), (12, 20)}
