"""Captions, or ids of layout tokens, through the 2021 models' text transformer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from latentkit.errors import InputError
from latentkit.model.conditioners.tokenizer import from_json
from latentkit.model.conditioning import Conditioning
from latentkit.nets.towers import BertText, BertTextConfig


class BertConditioner(nn.Module):
    """Captions (the absent one is empty) or rows of ids to the context slot.

    `tokenizer` is JSON text. None: the model takes ids alone.
    """

    def __init__(self, config: BertTextConfig, tokenizer: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self._tokenizer = None if tokenizer is None else from_json(tokenizer)
        if self._tokenizer is not None:
            size = self._tokenizer.get_vocab_size()
            if size > config.vocabulary:
                raise InputError(f"the tokenizer has {size} tokens, the encoder {config.vocabulary}")
            self._tokenizer.enable_truncation(config.length)
            self._tokenizer.enable_padding(length=config.length)
        self.encoder = BertText(config)

    def from_batch(self, batch: dict[str, Any]) -> list[str]:
        """The captions of a training batch."""
        return list(batch["caption"])

    def absent(self, count: int) -> list[str]:
        """What stands for "no caption"."""
        return [""] * count

    def forward(self, values: Sequence[str | Sequence[int]]) -> Conditioning:
        """Rows for captions or ids; InputError for a caption without tokenizer, or ids that the encoder has not."""
        rows = [self._ids(value) for value in values]
        ids = torch.tensor(rows, device=self.encoder.position_embedding.device)
        return Conditioning(context=self.encoder(ids))

    def _ids(self, value: str | Sequence[int]) -> list[int]:
        if not isinstance(value, str):
            length, most = self.config.length, self.config.vocabulary
            if len(value) != length or not all(0 <= token < most for token in value):
                raise InputError(f"{len(value)} ids are given; this model takes {length}, each from 0 to {most - 1}")
            return list(value)
        if self._tokenizer is None:
            raise InputError(
                "this model has no vocabulary for captions: lay BERT's (vocab.txt) beside its file", exit_code=2
            )
        return list(self._tokenizer.encode(value).ids)

    def state(self) -> dict[str, Any]:
        """What rebuilds it, for the model file."""
        return {"tokenizer": self.tokenizer}
