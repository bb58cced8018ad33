"""The paper's first stages as recipes: the released architectures, and the published settings in our units."""

from pathlib import Path

import pytest

from latentkit.model.presets import FIRST_STAGES
from latentkit.training.recipe import AutoencoderRecipe, check_effect, read_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "first-stages"
PUBLISHED = {  # steps of the README; start of the critic, its weight and layers
    "kl-f4": (176991, 50001, 0.5, 3),
    "kl-f8": (246803, 50001, 0.5, 3),
    "kl-f16": (442998, 50001, 0.5, 3),
    "kl-f32": (406763, 50001, 0.5, 3),
    "vq-f4": (533066, 0, 0.75, 3),
    "vq-f4-noattn": (658131, 11, 0.75, 3),
    "vq-f8": (971043, 1, 0.6, 2),
    "vq-f8-n256": (1608649, 250001, 0.75, 3),
    "vq-f16": (1101166, 250001, 0.75, 2),
}


def test_every_recipe_is_in_the_table() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_first_stage_of_the_paper(name: str) -> None:
    recipe = read_recipe(str(FOLDER / f"{name}.yaml"), [])
    check_effect(recipe)
    assert isinstance(recipe, AutoencoderRecipe)
    assert recipe.network == FIRST_STAGES[name]
    shown = recipe.data.transform
    assert (shown.size, shown.short, shown.crop, shown.flips) == (256, 384, "random", "")
    assert recipe.optimiser.lr == pytest.approx(4.5e-6 * recipe.schedule.batch)
    assert recipe.optimiser.betas == (0.5, 0.9)
    loss, critic = recipe.loss, recipe.loss.adversarial
    assert critic is not None
    assert critic.optimiser.lr == recipe.optimiser.lr
    assert (critic.warmup, critic.ramp, critic.r1, critic.lecam) == (0, 1, 0, 0)
    assert (recipe.schedule.steps, critic.start, critic.weight, critic.network.layers) == PUBLISHED[name]
    assert loss.perceptual is not None
    assert (loss.l1, loss.perceptual.weight, loss.pyramid, loss.structure) == (1, 1, 0, 0)
    elements = 3 * recipe.data.transform.size**2
    if recipe.network.codes:
        assert (loss.codebook.codes, loss.codebook.commitment) == (0.25, 1)
        assert critic.most == 1e4
    else:
        cells = recipe.network.latent_channels * (recipe.data.transform.size // recipe.network.downsampling) ** 2
        assert loss.kl == pytest.approx(1e-6 * cells / elements, rel=1e-3)
        assert critic.most == pytest.approx(1e4 / elements, rel=1e-3)
        assert loss.output_variance
