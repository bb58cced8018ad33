"""A tiny random model of every part, for the tests of files, applications and the command line."""

import torch

from latentkit.diffusion.noise import keyed_normal
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.conditioners.text import train_tokenizer
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig

CAPTIONS = ["red heart", "a slice of pizza", "green apple", "cat with smile"]
CLASSES = ["animal", "food", "symbol"]


def tiny_model(*, text: bool = True, label: bool = False, latent: bool = True, channels: int = 3) -> LatentDiffusion:
    """A model of 32x32 pixels, always the same, with no weight at zero, so that every part has a say."""
    own = AutoencoderConfig(
        picture_channels=channels, latent_channels=4, channels=16, multipliers=(1, 2), blocks=1, stem=2, attention=False
    )
    architecture = Architecture(
        network=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2),
        first_stage=own if latent else None,
        picture_channels=channels,
        size=(32, 32) if latent else (8, 8),
        text=TextEncoderConfig(vocabulary=300, length=8, width=32, layers=1, heads=2) if text else None,
        label=LabelConfig(width=32) if label else None,
    )
    state = {"text": {"tokenizer": train_tokenizer(CAPTIONS, 300)}, "label": {"classes": CLASSES}}
    model = LatentDiffusion(fit_network(architecture), state)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        drawn = keyed_normal(parameter.shape, 1, index, name)
        if parameter.ndim > 1:
            parameter.data = drawn * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * drawn + float(name.endswith("weight"))
    z = model.first_stage.latent_channels
    model.first_stage.set_statistics(torch.linspace(-0.1, 0.1, z), torch.linspace(0.5, 1.5, z))
    return model.eval().requires_grad_(False)
