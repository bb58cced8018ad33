"""What samples mean: the stated way between the values of a file and the 0..1 that everything else is made of."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from latentkit.errors import InputError, wording

SAMPLES: dict[str, Any] = {"uint8": np.uint8, "uint16": np.uint16, "int16": np.int16, "float32": np.float32}


class Range(BaseModel):
    """Values from `low` to `high`, evenly (linear, window) or by their logarithm (log).

    Values outside are refused where it is linear; a window and a log cut them to its ends.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["linear", "window", "log"] = "linear"
    low: float
    high: float
    samples: Literal["uint8", "uint16", "int16", "float32"] = "float32"
    """The type of the values that a model of such pictures writes."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"range {self.low}..{self.high}: low must be less than high, and both finite")
        if self.kind == "log" and self.low <= 0:
            raise ValueError(f"range of kind log from {self.low}: low must be above 0; what is below it counts as it")
        return self

    def same(self, other: "Range") -> bool:
        """Whether both read values alike, in whatever type they write them."""
        return self.model_copy(update={"samples": other.samples}) == other

    def to_unit(self, values: np.ndarray) -> np.ndarray:
        """Values of any type as float32 in 0..1; InputError for some that are outside where it is linear."""
        x = values.astype(np.float64)
        if self.kind == "linear" and x.size and (x.min() < self.low or x.max() > self.high):
            got, stated = f"{x.min():.6g}..{x.max():.6g}", f"{self.low:.6g}..{self.high:.6g}"
            said = "state a wider one, or kind: window to cut them"
            raise InputError(f"holds values in {got}, outside the stated range {stated}; {said}")
        x = x.clip(self.low, self.high)
        if self.kind == "log":
            x = np.log(x / self.low) / math.log(self.high / self.low)
        else:
            x = (x - self.low) / (self.high - self.low)
        return np.asarray(x, np.float32)

    def to_values(self, picture: Tensor, samples: str | None = None) -> np.ndarray:
        """A picture `c h w` in [-1, 1] as the h w c values of a file, in the type `samples` (None: the stated one).

        Whole numbers are rounded and cut to what their type holds; InputError for NaN and infinite values.
        """
        x = (picture.detach().cpu().double().permute(1, 2, 0).numpy().clip(-1, 1) + 1) / 2
        if not np.isfinite(x).all():
            raise InputError("the picture holds NaN or infinite values and was not written")
        if self.kind == "log":
            x = self.low * np.exp(x * math.log(self.high / self.low))
        else:
            x = self.low + x * (self.high - self.low)
        dtype = SAMPLES[samples or self.samples]
        if dtype == np.float32:
            return np.asarray(x, dtype)
        limits = np.iinfo(dtype)
        return np.asarray(x.round().clip(limits.min, limits.max), dtype)


def check_same(what: str, trained: Range | None, here: Range | None) -> None:
    """InputError where a model, named by `what`, was trained on a stated range and the recipe's is not that."""
    if trained is not None and (here is None or not trained.same(here)):
        raise InputError(
            f"{what} was trained on values by data.transform.range: {trained}, the recipe's is {here or 'none'}; "
            "state the same",
            exit_code=2,
        )


def transform_of(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a model was shown its pictures: the recipe's `data.transform` as plain values, empty where none is told."""
    found: Any = provenance
    for key in ("recipe", "data", "transform"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def ends_in_alpha(provenance: Mapping[str, Any], channels: int) -> bool:
    """Whether the last of so many channels of a model's pictures is alpha.

    Models of 2 and 4 channels from before that was told are taken to have it, unless their range is stated.
    """
    told = provenance.get("alpha", transform_of(provenance).get("range") is None)
    return channels in (2, 4) and told is True


def stated(provenance: Mapping[str, Any], where: str) -> Range | None:
    """The range that a model's pictures were read by; InputError about `where` for one that makes no sense."""
    found = transform_of(provenance).get("range")
    try:
        return None if found is None else Range.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{where}: its range of values is invalid: {wording(first)}") from None
