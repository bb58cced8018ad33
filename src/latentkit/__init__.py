"""latentkit: a complete latent diffusion system. Nothing heavy is imported until it is used.

model = latentkit.load("emoji")
for event in latentkit.generate(model, latentkit.TextToImage(prompt="red heart", seed=7)):
    ...
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentkit.applications.attachment import Attachment, Guide, WeightsFile
    from latentkit.applications.generate import Progress, Result, draw, generate, replay
    from latentkit.applications.request import (
        ClassToImage,
        ImageToImage,
        Inpainting,
        Request,
        TextToImage,
        Unconditional,
    )
    from latentkit.checkpoints.files import Model, load
    from latentkit.errors import InputError

__version__ = "0.1.0"

_HOMES = {
    "latentkit.applications.generate": ("Progress", "Result", "draw", "generate", "replay"),
    "latentkit.applications.attachment": ("Attachment", "Guide", "WeightsFile"),
    "latentkit.applications.request": (
        "ClassToImage",
        "ImageToImage",
        "Inpainting",
        "Request",
        "TextToImage",
        "Unconditional",
    ),
    "latentkit.checkpoints.files": ("Model", "load"),
    "latentkit.errors": ("InputError",),
}

__all__ = [  # noqa: RUF022
    "load",
    "Model",
    "generate",
    "draw",
    "replay",
    "Progress",
    "Result",
    "Request",
    "TextToImage",
    "ClassToImage",
    "Unconditional",
    "ImageToImage",
    "Inpainting",
    "Attachment",
    "Guide",
    "WeightsFile",
    "InputError",
]


def __getattr__(name: str) -> Any:
    """The public names, each imported when it is first used."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'latentkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
