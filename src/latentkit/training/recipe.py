"""Recipe: the training file. One recipe is one run of one stage; unknown keys are errors."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from latentkit.data.dataset import Transform
from latentkit.diffusion.schedule import NoiseSchedule
from latentkit.errors import InputError, close, nearest, wording
from latentkit.model.conditioners.clip import ClipConfig
from latentkit.model.conditioners.label import LabelConfig
from latentkit.model.denoiser import PredictionName
from latentkit.model.first_stage import KINDS, FirstStageConfig
from latentkit.nets.towers import TextEncoderConfig
from latentkit.nets.unet import UNetConfig
from latentkit.training.diffusion import DiffusionLoss
from latentkit.training.ema import Averaging
from latentkit.training.first_stage.autoencoder import DIFFERENCES, ReconstructionLoss
from latentkit.training.optimizers import Optimiser
from latentkit.training.run.progress import warn
from latentkit.training.trainer import Schedule


class DataRecipe(BaseModel):
    """Which pictures, and how they are shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    split: str | None = None
    """Train on the items of this split alone."""
    holdout: str | None = None
    """Validate on the items of this split; null: on 5 % of the items, fixed by their digests, kept out of training."""
    transform: Transform
    workers: int = Field(default=0, ge=0)
    keywords: float = Field(default=0.0, ge=0, le=1)
    """Share of the draws of pictures with keywords that say some keywords, or the caption's words shuffled, instead."""


class Sampling(BaseModel):
    """How a model draws unless it is told otherwise: written into the model file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampler: str = "dpm++2m"
    spacing: str = "uniform"
    steps: int = Field(default=12, ge=1)
    guidance_scale: float = 2.0
    guidance_low: float = 0.0
    guidance_high: float = Field(default=1e9, gt=0)
    prompts: tuple[str, ...] = ()
    """Prompts (or class names) of the sample sheets; empty: captions of the held-out pictures."""


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    licence: str | None = None
    data: DataRecipe
    optimiser: Optimiser = Optimiser()
    schedule: Schedule
    averaging: Averaging = Averaging()
    checkpointing: bool = False
    """Keep activations of block borders only, and compute the rest again in the backward pass."""


class AutoencoderRecipe(_Common):
    """The first stage."""

    stage: Literal["autoencoder"]
    network: FirstStageConfig
    """One whose blocks are listed by level is a tiny autoencoder."""
    loss: ReconstructionLoss = ReconstructionLoss()
    start: str | None = None
    """An autoencoder's model file or run folder, or a whole model's, that training goes on from; null: from nothing."""
    frozen_encoder: bool = False
    """Train the decoder of `start` alone, so that latents that were cached, and second stages, stay valid."""

    @model_validator(mode="after")
    def _something_frozen(self) -> Self:
        if self.frozen_encoder and self.start is None:
            raise ValueError("frozen_encoder needs an autoencoder to start from; name it as start")
        return self


class DiffusionRecipe(_Common):
    """The second stage."""

    stage: Literal["diffusion"]
    first_stage: str
    """An autoencoder's model file or run folder, or "identity" for diffusion on pixels."""
    whitening: bool = False
    """Each latent channel gets mean 0 and deviation 1 over the pictures; else one factor for all, as in the paper."""
    network: UNetConfig
    noise: NoiseSchedule = NoiseSchedule()
    prediction: PredictionName = "flow"
    learned_variance: bool = False
    """Learn the variance of a step too (improved DDPM); best with uniform noise levels."""
    text: TextEncoderConfig | None = None
    label: LabelConfig | None = None
    clip: ClipConfig | None = None
    """CLIP-shaped text towers with CLIP's vocabulary in the place of `text`, as Stable Diffusion has them."""
    loss: DiffusionLoss = DiffusionLoss()
    sampling: Sampling = Sampling()


Recipe = Annotated[AutoencoderRecipe | DiffusionRecipe, Field(discriminator="stage")]
STAGES = ("autoencoder", "diffusion")
_ADAPTER: TypeAdapter[AutoencoderRecipe | DiffusionRecipe] = TypeAdapter(Recipe)


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> AutoencoderRecipe | DiffusionRecipe:
    """Check plain values; InputError lists each problem with its key and the nearest allowed name."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem, values)}" for problem in error.errors())
        raise InputError(f"{where} is not valid:\n{problems}", exit_code=2) from None


def _explain(problem: Any, values: dict[str, Any]) -> str:
    location = [part for part in problem["loc"] if part not in (*STAGES, *KINDS)]
    key = ".".join(map(str, location))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key; {nearest(str(location[-1]), _allowed(values, location[:-1]))}"
    if problem["type"] == "union_tag_not_found":
        typed = next((name for name in values if close(name, ["stage"])), None)
        return f"stage: is missing; write it as one of {', '.join(STAGES)}" + (f" (got {typed!r})" if typed else "")
    if problem["type"] == "union_tag_invalid":
        return f"stage: {values['stage']!r} is unknown; {nearest(str(values['stage']), STAGES, every=True)}"
    return f"{key}: {wording(problem)}"


def _allowed(values: dict[str, Any], path: list[Any]) -> list[str]:
    """The keys that the recipe's schema allows at `path`."""
    schema = _ADAPTER.json_schema()
    defs = schema["$defs"]
    model = "AutoencoderRecipe" if values.get("stage") == "autoencoder" else "DiffusionRecipe"
    node = defs[model]
    for part in path:
        node = node["properties"].get(part, {})
        options = [node, *(option for way in ("anyOf", "allOf", "oneOf") for option in node.get(way, []))]
        reference = next((option["$ref"] for option in options if "$ref" in option), None)
        if reference is None:
            return []
        node = defs[reference.rsplit("/", 1)[1]]
    return list(node.get("properties", {}))


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-3 is a number, as in YAML 1.2; PyYAML alone reads a string, and is changed by a class only."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _plain(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def read_recipe(path: str, overrides: list[str]) -> AutoencoderRecipe | DiffusionRecipe:
    """A recipe file with `key.key=value` overrides (values are YAML); InputError on anything wrong."""
    file = Path(path)
    if file.is_dir():
        known = sorted(str(found) for found in file.glob("*.yaml"))
        said = f"name one of its recipes: {', '.join(known)}" if known else "it holds no recipe (*.yaml)"
        raise InputError(f"{path!r} is a folder; {said}", exit_code=2)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("recipes")
        known = [str(found) for found in folder.glob("*.yaml")]
        raise InputError(f"recipe {path!r} does not exist; {nearest(path, known)}", exit_code=2)
    try:
        values = _plain(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path!r} is not YAML: {error}", exit_code=2) from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path!r} holds no keys; see the files in recipes/", exit_code=2)
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, f"recipe {path!r}")


def check_effect(recipe: AutoencoderRecipe | DiffusionRecipe) -> None:
    """InputError names settings of a first stage that would change nothing; a critic that comes too late is a warning.

    A recipe that has every default written out, as runs keep theirs, is not asked about defaults.
    """
    if not isinstance(recipe, AutoencoderRecipe):
        return
    network, loss = recipe.network, recipe.loss
    problems = []
    if _said(loss, "codebook") and (recipe.frozen_encoder or not network.codes):
        why = "frozen_encoder keeps the codebook" if network.codes else "the network has no codebook (network.codes)"
        problems.append(f"loss.codebook: {why}; leave it out")
    book = loss.codebook
    if book.running_mean is not None and book.codes and _said(book, "codes"):
        problems.append("loss.codebook.codes: running_mean moves the codes in its place; leave out one of them")
    if loss.kl and _said(loss, "kl") and (recipe.frozen_encoder or not network.has_posterior):
        why = "frozen_encoder keeps the posterior" if network.has_posterior else "the network has no posterior"
        problems.append(f"loss.kl: {why}; leave it out")
    critic = loss.adversarial
    parts = [*(getattr(loss, name) for name in DIFFERENCES), loss.perceptual, critic and critic.weight]
    if not any(parts):
        problems.append(f"loss: nothing compares pictures; give one of {', '.join(DIFFERENCES)} a weight above 0")
    if problems:
        raise InputError("settings that change nothing:\n" + "\n".join(f"  {line}" for line in problems), exit_code=2)
    if critic is not None and critic.start >= recipe.schedule.steps:
        warn(f"loss.adversarial.start: the critic counts from step {critic.start}, after the last of this run")


def _said(part: BaseModel, name: str) -> bool:
    """Whether a key was set, and not only written out with all the others as it is by default."""
    fields = type(part).model_fields
    whole = part.model_fields_set == set(fields)
    return name in part.model_fields_set and not (whole and getattr(part, name) == fields[name].default)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r} is not of the form key.key=value", exit_code=2)
    *path, last = key.split(".")
    node = values
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {part!r} is a value, not a section", exit_code=2)
        node = child
    try:
        node[last] = _plain(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: {error}", exit_code=2) from None


def resolved(recipe: AutoencoderRecipe | DiffusionRecipe) -> dict[str, Any]:
    """The recipe with every default written out, as plain values."""
    return recipe.model_dump(mode="json")
