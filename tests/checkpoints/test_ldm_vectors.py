"""The released code's own networks, from vectors it made: its names load, its numbers come out, its bytes go back.

LATENTKIT_VECTORS names the folder of the vectors.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentkit.checkpoints.names.ldm_names import FIRST_STAGE, UNET, autoencoder_pairs, unet_pairs
from latentkit.checkpoints.names.rename import Pair, given, prefixed, taken
from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
from latentkit.nets.unet import UNet, UNetConfig

FOLDER = os.environ.get("LATENTKIT_VECTORS")
pytestmark = pytest.mark.skipif(not FOLDER, reason="LATENTKIT_VECTORS does not name the folder of the vectors")

UNETS = {
    "unet_ffhq_like": UNetConfig(
        3, 3, 32, (1, 1, 2, 2), 1, (0, 1, 1, 1), heads=None, head_width=32, plain_attention=True
    ),
    "unet_churches_like": UNetConfig(
        4, 4, 32, (1, 1, 2, 2, 2), 1, (1, 1, 1, 1, 0), scale_shift=True, plain_attention=True, residual_resampling=True
    ),
    "unet_sd2_like": UNetConfig(
        4, 4, 32, (1, 2, 2, 2), 1, (1, 1, 1, 0), heads=None, head_width=16, context_width=48
    ),
}  # fmt: skip


def vectors(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict, and inputs with outputs."""
    from safetensors.torch import load_file

    tensors = load_file(Path(FOLDER or "") / f"{name}.safetensors")
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    return state, {key[3:]: value for key, value in tensors.items() if key.startswith("io.")}


def filled(network: torch.nn.Module, pairs: list[Pair], tensors: dict[str, Tensor]) -> None:
    """Every tensor of theirs is used, and goes back to the same bytes."""
    assert sorted(pair.theirs for pair in pairs) == sorted(tensors)
    state, complaints = taken(pairs, tensors, network.state_dict())
    assert not complaints
    back = given(pairs, state)
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].view(torch.int16), tensor.view(torch.int16))
    network.load_state_dict(state)


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_a_unet_of_the_released_code(name: str) -> None:
    tensors, io = vectors(name)
    network = UNet(UNETS[name])
    filled(network, prefixed(unet_pairs(network), UNET), tensors)
    answer = network(io["x"], io["t"].float(), io.get("context"))
    assert io["y"].std() > 0.1
    assert (answer - io["y"]).abs().max() < 1e-5 * io["y"].abs().max()


@torch.no_grad()
def test_the_other_order_of_heads_gives_other_numbers() -> None:
    tensors, io = vectors("unet_churches_like")
    network = UNet(UNETS["unet_churches_like"])
    filled(network, prefixed(unet_pairs(network, new_order=True), UNET), tensors)
    assert (network(io["x"], io["t"].float()) - io["y"]).abs().max() > 1e-2 * io["y"].abs().max()


@torch.no_grad()
def test_the_first_stage_with_a_codebook() -> None:
    tensors, io = vectors("ae_vq_f4")
    network = Autoencoder(AutoencoderConfig(latent_channels=3, channels=32, multipliers=(1, 2, 2), blocks=1, codes=64))
    filled(network, prefixed(autoencoder_pairs(network), FIRST_STAGE), tensors)
    network = network.double()
    assert network.codebook is not None
    moments = network.to_moments(network.encoder(io["x"].double()))
    torch.testing.assert_close(moments, io["moments"], atol=1e-10, rtol=0)
    assert torch.equal(network.codebook.nearest(moments).flatten(), io["indices"])
    torch.testing.assert_close(network.codebook(moments), io["zq"], atol=1e-10, rtol=0)
    torch.testing.assert_close(network.decode(moments), io["dec"], atol=1e-10, rtol=0)
    torch.testing.assert_close(network.encode(io["x"].double()).mean.double(), io["moments"], atol=1e-6, rtol=1e-6)
