"""What errors say: the nearest names, all of them where asked, and validation problems in words."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentkit.errors import close, nearest, wording


def test_the_nearest_names() -> None:
    assert close("eular", ["euler", "heun"]) == "did you mean 'euler'?"
    assert close("zzz", ["euler", "heun"]) == ""
    assert nearest("eular", ["heun", "euler"]) == "did you mean 'euler'?"
    assert nearest("eular", ["heun", "euler"], every=True) == "did you mean 'euler'? allowed: euler, heun"
    assert nearest("zzz", ["heun", "euler"]) == "allowed: euler, heun"
    many = [f"n{i:02d}" for i in range(30)]
    assert nearest("zzz", many).endswith("n19, ...")
    assert nearest("zzz", many, every=True).endswith("n28, n29")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")

    side: int = Field(default=1, ge=1, le=9)
    share: float = Field(default=0.5, gt=0, lt=1, allow_inf_nan=False)
    kind: Literal["a", "b"] = "a"
    on: bool = False
    text: Annotated[str, Field(max_length=3)] = ""
    rows: tuple[int, ...] = ()
    below: "Section | None" = None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("side", 0, "must be at least 1 (got 0)"),
        ("side", 10, "must be at most 9 (got 10)"),
        ("side", "many", "must be a whole number (got 'many')"),
        ("side", 1.5, "must be a whole number (got 1.5)"),
        ("share", 0, "must be greater than 0 (got 0)"),
        ("share", 1, "must be less than 1 (got 1)"),
        ("share", "x", "must be a number (got 'x')"),
        ("share", float("nan"), "must be a finite number (got nan)"),
        ("kind", "c", "must be 'a' or 'b' (got 'c')"),
        ("on", "maybe", "must be true or false (got 'maybe')"),
        ("text", 3, "must be text (got 3)"),
        ("text", "long", "must have at most 3 characters (got 'long')"),
        ("rows", 3, "must be a list (got 3)"),
        ("below", 3, "must be a section of keys (got 3)"),
    ],
)
def test_validation_problems_in_words(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Section(**{field: value})
    assert wording(caught.value.errors()[0]) == said
