"""Request: one job of drawing or editing, filled alike by the command line, Python and every later front door."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from latentkit.applications.attachment import Attached, Attachment, Guiding, Weights
from latentkit.checkpoints.files import invalid
from latentkit.model.latent_diffusion import LatentDiffusion

T = TypeVar("T")
Task = Literal[
    "text-to-image",
    "class-to-image",
    "layout-to-image",
    "semantic-to-image",
    "unconditional",
    "image-to-image",
    "inpainting",
    "upscaling",
    "variation",
]
PICTURES = ("init", "mask", "depth", "semantic_map", "variation")
"""Fields that hold a picture."""
ENTRIES = {
    "also": ("prompt", "weight"),
    "lora": ("file", "weight"),
    "control": ("file", "hint", "weight", "terms"),
    "embedding": ("file", "name"),
    "layout": ("class", "left", "top", "right", "bottom"),
}
"""What the entries of fields that hold several consist of."""
OPTIONS = ("eta", "churn")
"""Fields that go to the sampler as they are."""


def _pairs(value: Any) -> Any:
    """Lists as the tuples that a request holds."""
    return (
        tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value) if isinstance(value, list) else value
    )


Words = Annotated[str, StringConstraints(max_length=2_000)]
Weight = Annotated[float, Field(ge=-100, le=100)]
Weighted = Annotated[tuple[tuple[Words, Weight], ...], BeforeValidator(_pairs), Field(min_length=1, max_length=8)]


Loras = Annotated[tuple[tuple[Weights, Weight], ...], BeforeValidator(_pairs), Field(min_length=1, max_length=16)]
Share = Annotated[float, Field(ge=0, le=1)]


class Terms(BaseModel):
    """When and how a ControlNet works."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    start: Share = 0.0
    end: Share = 1.0
    """It works in the steps that lie wholly between these shares of all steps."""
    guess: bool = False
    """Where guidance leads to alone, its upper residuals counting for less: for hints without words."""
    pooled: bool = False
    """It adds the mean over the picture, as a shuffle ControlNet does whose file does not say so."""
    kind: str | None = Field(default=None, max_length=100)
    """Of the hint, for a ControlNet of several kinds: a name in `nets.controlnet.KINDS`, or a number."""

    @model_validator(mode="after")
    def _some_steps(self) -> "Terms":
        if self.start >= self.end:
            raise ValueError(f"start {self.start:g} must be below end {self.end:g}")
        return self


OwnTerms = Annotated[Terms, BeforeValidator(lambda value: Terms(**value) if isinstance(value, dict) else value)]
TAGS = ("<plain>", "<termed>")
Plain = Annotated[tuple[Weights, Attached, Weight], Tag(TAGS[0])]
Termed = Annotated[tuple[Weights, Attached, Weight, OwnTerms], Tag(TAGS[1])]
Control = Annotated[
    Plain | Termed, Discriminator(lambda entry: TAGS[isinstance(entry, list | tuple) and len(entry) > 3])
]
Controls = Annotated[
    tuple[Control, ...],
    BeforeValidator(_pairs),
    Field(min_length=1, max_length=8),
]
Side = Annotated[int, Field(ge=0, le=8192)]
Sides = Annotated[tuple[Side, Side, Side, Side], BeforeValidator(_pairs)]
Boxes = Annotated[
    tuple[tuple[Words | int, Share, Share, Share, Share], ...], BeforeValidator(_pairs), Field(max_length=1_000)
]
Extent = Annotated[tuple[Side, Side], BeforeValidator(_pairs)]
Score = Annotated[float, Field(ge=0, le=10)]
Inversions = Annotated[
    tuple[tuple[Weights, Words | None], ...], BeforeValidator(_pairs), Field(min_length=1, max_length=16)
]


class Request(BaseModel):
    """One picture to draw. What is None is the model's own choice, and is filled in by `resolve`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    task: Task | None = None
    """None: told by what is given."""
    prompt: str | None = Field(default=None, max_length=10_000)
    label: str | None = Field(default=None, max_length=1_000)
    """A class name."""
    also: Weighted | None = None
    """More prompts (or classes, of a model that knows only those), each with its weight; the first has weight 1."""
    negative: str = Field(default="", max_length=10_000)
    """What guidance leads away from."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """None: drawn at random."""
    width: int | None = Field(default=None, ge=1, le=8192)
    height: int | None = Field(default=None, ge=1, le=8192)
    sampler: str | None = Field(default=None, max_length=100)
    spacing: str | None = Field(default=None, max_length=100)
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, le=1000)
    """1 is no guidance."""
    guidance_low: float | None = Field(default=None, ge=0)
    guidance_high: float | None = Field(default=None, gt=0)
    """Guidance works at the noise levels (sigmas) from low to high."""
    guidance_kind: Literal["cfg", "cfg++", "apg"] | None = None
    """None is "cfg": plain. "cfg++" has scales 0 to 1; "apg" bears high scales."""
    guidance_rescale: float | None = Field(default=None, ge=0, le=1)
    """Share of the contrast gained by guidance that is given back."""
    guidance_model: Guiding | None = None
    """A weaker model to lead away from, instead of the negative prompt: autoguidance."""
    pag_scale: float | None = Field(default=None, ge=0, le=1000)
    """Strength of perturbed-attention guidance."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Share of the values that dynamic thresholding leaves in range, for models that draw pixels."""
    eta: float | None = Field(default=None, ge=0)
    """Share of ancestral noise, of samplers that take it."""
    churn: float | None = Field(default=None, ge=0)
    """Temporary noise, of samplers that take it."""
    init: Attached | None = None
    """The picture that image-to-image and inpainting start from, and that upscaling makes larger."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Share of the path that is done again from the init picture."""
    mask: Attached | None = None
    """What inpainting repaints of the init picture: white (1) is repainted, black (0) is kept."""
    extend: Sides | None = None
    """Pixels that inpainting adds to the init picture at its left, top, right and bottom, instead of a mask."""
    paste: bool | None = None
    """The kept pixels are the init picture's own; without, they have passed the first stage."""
    depth: Attached | None = None
    """How near everything is to be, for a model that takes that: white is near; only the order of grays counts."""
    semantic_map: Attached | None = None
    """The class of each pixel (`Attachment.read(path, decode_map)`), for a model that takes that."""
    layout: Boxes | None = None
    """Boxes to fill: each a class (its name or number), and left, top, right and bottom in 0..1."""
    noise_level: int | None = Field(default=None, ge=0, le=100_000)
    """Timestep of the noise on the small picture (upscaling), or on what a variation is told of its picture.

    The higher, the freer is what is drawn.
    """
    variation: Attached | None = None
    """The picture to draw variations of, for a model that is told pictures."""
    original_size: Extent | None = None
    """Width and height that the picture is said to have had before it was cut, pixels (SD XL); None: the size drawn."""
    crop: Extent | None = None
    """Pixels that are said to have been cut off at the left and the top (SD XL); None: none."""
    target_size: Extent | None = None
    """Width and height that the picture is said to be drawn for, pixels (SD XL base); None: the size drawn."""
    aesthetic_score: Score | None = None
    """How much people are said to like the picture, 0 to 10 (SD XL's refiner); None: 6."""
    negative_aesthetic_score: Score | None = None
    """The same of what guidance leads away from; None: 2.5."""
    refiner: Guiding | None = None
    """A model of the same latents that does the last steps, told the same prompts: SD XL's refiner."""
    refiner_switch: float | None = Field(default=None, gt=0, lt=1)
    """Share of the trained noise levels, from the noisiest, that is left to the model before the refiner takes over."""
    clip_skip: int | None = Field(default=None, ge=1, le=100)
    """1: CLIP's text towers as the model has them; each more leaves one more of their last blocks out of the context.

    This is AUTOMATIC1111's number, one more than diffusers'; it holds for negative prompts too.
    """
    autoencoder: Weights | None = None
    """Another one in the place of the model's own, for the same latents: a tiny one, or one that decodes better."""
    embedding: Inversions | None = None
    """Textual inversions, each with the name that stands for it in prompts (None: the file's own)."""
    lora: Loras | None = None
    """LoRAs, each with its weight, put on the model one after another."""
    control: Controls | None = None
    """ControlNets, each with its hint picture and its weight, and more `Terms` where they are not the usual ones."""
    backend: Literal["torch", "openvino"] | None = None
    """What computes the networks; None is torch. OpenVINO converts them once (`docs/backends.md`)."""


def ask(**fields: Any) -> Request:
    """A `Request`; InputError says which field is wrong, and the nearest name of one that does not exist."""
    try:
        return Request(**fields)
    except ValidationError as error:
        raise invalid(error, "request", Request.model_fields, 2, ENTRIES) from None


TextToImage = partial(ask, task="text-to-image")
ClassToImage = partial(ask, task="class-to-image")
Unconditional = partial(ask, task="unconditional")


def ImageToImage(init: str | Path | Attachment, **fields: Any) -> Request:
    """A request that starts from a picture (a file, or an `Attachment`)."""
    return ask(task="image-to-image", init=_attached(init), **fields)


def Inpainting(
    init: str | Path | Attachment,
    mask: str | Path | Attachment | None = None,
    extend: tuple[int, int, int, int] | None = None,
    **fields: Any,
) -> Request:
    """A request that repaints what is white in `mask`, or adds pixels at the left, top, right and bottom."""
    given = {"mask": None if mask is None else _attached(mask), "extend": extend}
    return ask(task="inpainting", init=_attached(init), **given, **fields)


def _attached(picture: str | Path | Attachment) -> Attachment:
    return picture if isinstance(picture, Attachment) else Attachment.read(picture)


def told(network: LatentDiffusion, words: str | None) -> dict[str, str | None]:
    """The field that `words` go into: the prompt, or the class of a model that knows only classes."""
    return {"label" if "text" not in network.conditioners and "label" in network.conditioners else "prompt": words}


def canvas_size(request: Request) -> tuple[int, int]:
    """Height and width of the init picture, or of the semantic map, with what is added at its sides."""
    height, width = known(known(request.init or request.semantic_map).picture).array.shape[:2]
    left, top, right, bottom = request.extend or (0, 0, 0, 0)
    return height + top + bottom, width + left + right


def models_of(request: Request, network: LatentDiffusion) -> list[LatentDiffusion]:
    """All models that are told what the request says: that which draws, its refiner, its guidance model."""
    others = [guide.model.network for guide in (request.refiner, request.guidance_model) if guide and guide.model]
    return [network, *others]


def known(value: T | None) -> T:
    """A field of a resolved request, which is never None."""
    assert value is not None, "the request is not resolved"
    return value
