"""One recipe, one run."""

from pathlib import Path

from latentkit.training.recipe import AutoencoderRecipe, DiffusionRecipe


def train(recipe: AutoencoderRecipe | DiffusionRecipe, folder: Path | None = None) -> Path:
    """Train `recipe` into `folder` (runs/NAME) or go on with it; returns the model file's path."""
    folder = folder or Path("runs") / recipe.name
    if isinstance(recipe, AutoencoderRecipe):
        from latentkit.applications.stages.train_autoencoder import train_autoencoder

        return train_autoencoder(recipe, folder)
    from latentkit.applications.stages.train_diffusion import train_diffusion

    return train_diffusion(recipe, folder)
