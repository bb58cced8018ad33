"""diffusers' pipelines of the 2021 models of texts and of nothing at all: whole drawings from their own folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_pipelines import SCHEDULERS, SEED, STEPS, scheduler
from safetensors.torch import load_file

import latentkit
from latentkit.applications.request import Request
from latentkit.checkpoints.diffusers_folder import read_folder, write_folder

pytestmark = pytest.mark.parity
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pizza", ",", *LETTERS, *(f"##{one}" for one in LETTERS)]


def drawn(folder: Path, **asked: Any) -> torch.Tensor:
    """Our picture, 0 to 1."""
    events = latentkit.generate(latentkit.load(folder, "cpu"), Request(seed=SEED, steps=STEPS, **asked))
    return (next(event.picture for event in events if hasattr(event, "picture")) + 1) / 2


def coder(kind: str) -> Any:
    diffusers: Any = pytest.importorskip("diffusers")
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32,) * 4,
    }
    if kind == "AutoencoderKL":
        return diffusers.AutoencoderKL(**shape, latent_channels=4)
    made = diffusers.VQModel(**shape, latent_channels=3, num_vq_embeddings=400, scaling_factor=0.5)
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_nothing_asked_for(kind: str, tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )  # fmt: skip
    pipe = diffusers.LDMPipeline(vqvae=coder("VQModel"), unet=unet, scheduler=diffusers.DDIMScheduler())
    ours = scheduler(pipe, kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "saved")
    generator = torch.Generator("cpu").manual_seed(SEED)
    theirs = torch.from_numpy(pipe(num_inference_steps=STEPS, generator=generator, output_type="np").images[0])
    assert theirs.std() > 0.05
    assert (drawn(tmp_path / "saved", **ours) - theirs.permute(2, 0, 1)).abs().max() < 1e-4


def of_texts(folder: Path, kind: str) -> Any:
    """A random pipeline with heads whose widths together are not the encoder's, as the released one has them."""
    diffusers: Any = pytest.importorskip("diffusers")
    import transformers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(4)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    shape = {"encoder_layers": 2, "encoder_attention_heads": 2, "head_dim": 8, "d_model": 24, "encoder_ffn_dim": 96}
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(WORDS), max_position_embeddings=77, **shape)).eval()
    for weight in bert.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    assert len(tokenizer) == len(WORDS)
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=coder("AutoencoderKL"), bert=bert, tokenizer=tokenizer, unet=unet, scheduler=diffusers.DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any) -> torch.Tensor:
    asked = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "generator": torch.Generator("cpu").manual_seed(SEED)}
    return torch.from_numpy(pipe("Pizzas, and a cat", output_type="np", **asked).images[0]).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["DDIM"])
def test_texts(kind: str, tmp_path: Path) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    pipe = of_texts(tmp_path / "words", kind)
    ours = scheduler(pipe, kind)
    pipe.save_pretrained(tmp_path / "saved")
    wanted = theirs(pipe)
    assert wanted.std() > 0.05
    asked = {"prompt": "Pizzas, and a cat", "guidance_scale": 4.0, **ours}
    assert (drawn(tmp_path / "saved", **asked) - wanted).abs().max() < 1e-4
    write_folder(tmp_path / "again", read_folder(tmp_path / "saved"))
    written = load_file(tmp_path / "again" / "bert" / "model.safetensors")
    assert written.keys() == pipe.bert.state_dict().keys()
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    other.set_progress_bar_config(disable=True)
    assert type(other) is type(pipe)
    for part in ("vqvae", "unet", "bert"):
        one, two = getattr(pipe, part).state_dict(), getattr(other, part).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one if not name.startswith("to_logits")), part
    scheduler(other, kind)
    assert (theirs(other) - wanted).abs().max() < 1e-6
