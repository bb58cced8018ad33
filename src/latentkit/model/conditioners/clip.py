"""Prompts through one or two CLIP text towers: Stable Diffusion 1, 2 and XL, and own models of that shape.

A prompt of any length is read in windows, their contexts one after another; the vector is that of the first. A full
window ends at its last comma, if that is near enough, and emphasis multiplies the states of the tokens and then scales
the window so that its mean is what it was: both as AUTOMATIC1111 does (here for each picture alone, so that a batch
equals its singles).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.model.conditioners.prompt import Prompt, escaped, pieces
from latentkit.model.conditioners.tokenizer import END, START, clip_tokenizer, from_json
from latentkit.model.conditioning import Conditioning
from latentkit.nets.clip import VIT_BIGG_TEXT, VIT_H_TEXT, VIT_L_TEXT, ClipText, ClipTextConfig

BACK = 20
"""Tokens at a window's end that go into the next one rather than be torn from what they were said with by a comma."""
SCALED = (0.5, 2.0)
"""How far a window may be scaled back: a mean near zero says nothing, and would scale by anything."""


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP text towers that read a prompt; their contexts stand side by side, widths added."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    towers: tuple[ClipTextConfig, ...]
    absent: Literal["empty", "zero"] = "empty"
    """What "no prompt" is: the empty one, or rows of zeros (SD XL base)."""

    def __post_init__(self) -> None:
        if len({(tower.vocabulary, tower.length) for tower in self.towers}) != 1:
            raise InputError("a prompt is read by one CLIP text tower, or by several of one vocabulary and length")

    @property
    def context_width(self) -> int:
        """Width of the context tokens."""
        return sum(tower.width for tower in self.towers)

    @property
    def vector_width(self) -> int:
        """Width of the vector, 0 where no tower makes one."""
        return sum(tower.projection or 0 for tower in self.towers)


SD1_TEXT = ClipConfig((VIT_L_TEXT,))
SD2_TEXT = ClipConfig((replace(VIT_H_TEXT, layers=23, projection=None),))
"""The last of ViT-H's 24 blocks and its projection are never used: files that hold them lose them."""
_BIGG = replace(VIT_BIGG_TEXT, skip=1, final_norm=False)
SDXL_TEXT = ClipConfig((replace(VIT_L_TEXT, skip=1, final_norm=False), _BIGG), absent="zero")
REFINER_TEXT = ClipConfig((_BIGG,))


class ClipConditioner(nn.Module):
    """Prompts to the context slot and, where a tower projects, to the vector slot.

    `tokenizer` is JSON text; None is CLIP's own vocabulary. Ids from the vocabulary's size on are learnt vectors.
    """

    def __init__(self, config: ClipConfig, tokenizer: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._tokenizer = clip_tokenizer() if tokenizer is None else from_json(tokenizer)
        first, size = config.towers[0], self._tokenizer.get_vocab_size()
        if size > first.vocabulary:
            raise InputError(f"the tokenizer has {size} tokens, the text tower {first.vocabulary}")
        start, end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if start is None or end is None:
            raise InputError(f"the model's tokenizer has no {START} and {END}: it is not one of CLIP's")
        self._start, self._end = start, end
        self._comma = self._tokenizer.token_to_id(",</w>")
        self._learnt: dict[str, tuple[Tensor, ...]] = {}
        self.towers = nn.ModuleList(ClipText(tower) for tower in config.towers)

    @property
    def room(self) -> int:
        """Tokens of a prompt that one window holds."""
        return self.config.towers[0].length - 2

    def learn(self, name: str, vectors: Sequence[Tensor]) -> None:
        """From now on `name` in a prompt stands for `vectors`, `n d` for each tower (Gal et al. 2022).

        Of more than there are towers the last ones count: SD XL's refiner has only the second of two.
        InputError for vectors of another width or number than the towers take.
        """
        vectors = vectors[-len(self.towers) :]
        shapes = [tuple(one.shape) for one in vectors]
        widths = [tower.width for tower in self.config.towers]
        count = shapes[0][0] if shapes and len(shapes[0]) == 2 else 0
        if not 0 < count <= self.room or shapes != [(count, width) for width in widths]:
            raise InputError(
                f"textual inversion {name!r} has vectors of shape {shapes}; this model takes 1 to {self.room} of width "
                + " and as many of width ".join(map(str, widths))
            )
        if not name.strip() or not all(torch.isfinite(one).all() for one in vectors):
            raise InputError(f"textual inversion {name!r} has no name, or holds values that are not finite")
        self._learnt[name] = tuple(one.detach() for one in vectors)

    @contextmanager
    def knowing(self, learnt: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
        """Inside of this context each name in a prompt stands for its vectors, as `learn` says."""
        before, self._learnt = self._learnt, dict(self._learnt)
        try:
            for name, vectors in learnt.items():
                self.learn(name, vectors)
            yield
        finally:
            self._learnt = before

    def from_batch(self, batch: dict[str, Any]) -> list[str]:
        """The captions of a training batch, in which brackets are brackets."""
        return [escaped(caption) for caption in batch["caption"]]

    def absent(self, count: int) -> list[None]:
        """What stands for "no prompt"."""
        return [None] * count

    def forward(self, prompts: Sequence[str | Prompt | None]) -> Conditioning:
        """Rows for the prompts, on the towers' device; InputError for emphasis or a clip skip that cannot be."""
        asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        if len({prompt.skip for prompt in asked}) > 1:
            return Conditioning.cat([self([prompt]) for prompt in prompts])
        windows = [list(self._windows(prompt.text or "")) for prompt in asked]
        together = [window for each in windows for window in each]
        ids = torch.tensor([ids for ids, _ in together])
        weights = torch.tensor([weights for _, weights in together])
        contexts, vectors = zip(*(self._read(i, ids, weights, asked[0].skip) for i in range(len(self.towers))))
        context = torch.cat(contexts, -1)
        pooled = [vector for vector in vectors if vector is not None]
        vector = torch.cat(pooled, -1) if pooled else None
        rows, first = [], 0
        for prompt, each in zip(asked, windows):
            here, first = first, first + len(each)
            row = Conditioning(
                context=context[here:first].flatten(0, 1)[None],
                vector=None if vector is None else vector[here : here + 1],
            )
            rows.append(_silent(row) if prompt.text is None and self.config.absent == "zero" else row)
        return Conditioning.cat(rows)

    def state(self) -> dict[str, Any]:
        """What rebuilds it, for the model file."""
        return {"tokenizer": self.tokenizer}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _units(self, text: str) -> Iterator[list[int]]:
        """The tokens of a text, those of one learnt name together."""
        if not self._learnt:
            yield from ([token] for token in self._ids(text))
            return
        rows, behind = {}, self.config.towers[0].vocabulary
        for name, vectors in self._learnt.items():
            rows[name] = list(range(behind, behind + len(vectors[0])))
            behind += len(vectors[0])
        names = sorted(rows, key=len, reverse=True)
        plain = 0
        for match in mentions(text, names):
            yield from ([token] for token in self._ids(text[plain : match.start()]))
            yield rows[names[(match.lastindex or 1) - 1]]
            plain = match.end()
        yield from ([token] for token in self._ids(text[plain:]))

    def _windows(self, prompt: str) -> Iterator[tuple[list[int], list[float]]]:
        """Ids and weights of each window, start, end and padding (-1) included."""
        groups = pieces(prompt)
        for group in groups:
            units = [(unit, weight) for text, weight in group for unit in self._units(text)]
            if not units and len(groups) > 1 and group is groups[-1]:
                continue
            ids: list[int] = []
            weights: list[float] = []
            comma = 0
            for unit, weight in units:
                if len(ids) + len(unit) > self.room:
                    back = len(unit) == 1 and unit[0] != self._comma and comma and len(ids) - comma < BACK
                    end = comma if back else len(ids)
                    yield self._window(ids[:end], weights[:end])
                    ids, weights, comma = ids[end:], weights[end:], 0
                ids, weights = ids + unit, weights + [weight] * len(unit)
                if unit[-1] == self._comma:
                    comma = len(ids)
            yield self._window(ids, weights)

    def _window(self, ids: list[int], weights: list[float]) -> tuple[list[int], list[float]]:
        rest = self.room - len(ids)
        return [self._start, *ids, self._end, *[-1] * rest], [1.0, *weights, 1.0, *[1.0] * rest]

    def _read(self, number: int, ids: Tensor, weights: Tensor, skip: int) -> tuple[Tensor, Tensor | None]:
        """Context and vector of every window by one of the towers."""
        tower = cast(ClipText, self.towers[number])
        device, pad = tower.position_embedding.device, tower.config.pad
        ids = torch.where(ids < 0, self._end if pad is None else pad, ids)
        learnt = torch.cat([vectors[number] for vectors in self._learnt.values()]).to(device) if self._learnt else None
        context, vector = tower(ids.to(device), self._end, skip, learnt)
        if (weights != 1).any():
            heavy = context.float() * weights.to(device)[..., None]
            mean, after = context.float().mean((1, 2), keepdim=True), heavy.mean((1, 2), keepdim=True)
            context = (heavy * (mean / after).nan_to_num(1.0).clamp(*SCALED)).to(context.dtype)
        return context, vector


def mentions(text: str, names: Sequence[str]) -> Iterator[re.Match[str]]:
    """Where a text says one of `names` as words of their own, in any case: group i + 1 is the name i."""
    pattern = "|".join(f"({re.escape(name)})" for name in names)
    return re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE)


def _silent(row: Conditioning) -> Conditioning:
    """The same row, all zeros."""
    assert row.context is not None
    return Conditioning(
        context=torch.zeros_like(row.context), vector=None if row.vector is None else torch.zeros_like(row.vector)
    )
