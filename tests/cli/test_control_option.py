"""`--control FILE:HINT.png:WEIGHT`, and terms behind it."""

from pathlib import Path

import pytest
import torch

from latentkit.cli.generate import _control
from latentkit.data.pictures import to_png
from latentkit.errors import InputError


def test_a_control_is_a_file_a_hint_a_weight_and_terms(tmp_path: Path) -> None:
    (tmp_path / "hint.png").write_bytes(to_png(torch.zeros(3, 8, 8)))
    (tmp_path / "c.safetensors").write_bytes(b"weights")
    both = f"{tmp_path / 'c.safetensors'}:{tmp_path / 'hint.png'}"
    for text, expected in (
        ("", [1.0]),
        (":0.8", [0.8]),
        (":0.8:start=0.1:end=0.6:guess", [0.8, {"start": 0.1, "end": 0.6, "guess": True}]),
        (":kind=canny:pooled", [1.0, {"kind": "canny", "pooled": True}]),
    ):
        file, hint, *rest = _control(both + text)
        assert file.path == tmp_path / "c.safetensors"  # type: ignore[attr-defined]
        assert hint.picture.array.shape == (8, 8, 3)  # type: ignore[attr-defined]
        assert rest == expected
    for text, message in (
        (f"{both}:start=soon", "start 'soon', which is no number"),
        ("start=1", "is not FILE:HINT"),
        (f"{both}:end=0.3:end=0.9", "says end twice"),
        (f"{both}:guess=no", "guess takes no value"),
        (f"{both}:pooled=0", "pooled takes no value"),
    ):
        with pytest.raises(InputError, match=message):
            _control(text)
