"""Captions through an own byte-pair tokenizer and an encoder trained jointly with the U-Net."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentkit.errors import InputError
from latentkit.model.conditioning import Conditioning
from latentkit.nets.towers import TextEncoder, TextEncoderConfig

PAD, END = "<pad>", "<end>"


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> str:
    """A byte-level byte-pair tokenizer learnt from `captions`, lower-cased, as its JSON text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    return tokenizer.to_str()


class TextConditioner(nn.Module):
    """Captions to the context slot and, pooled, to the vector slot; the absent caption is the empty one."""

    def __init__(self, config: TextEncoderConfig, tokenizer: str) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        self.config = config
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:
            raise InputError(f"the model's tokenizer cannot be read: {error}") from None
        if self._tokenizer.get_vocab_size() > config.vocabulary:
            raise InputError(
                f"the tokenizer has {self._tokenizer.get_vocab_size()} tokens, the encoder {config.vocabulary}"
            )
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(config)

    @property
    def context_width(self) -> int:
        """Width of the context tokens it makes."""
        return self.config.width

    @property
    def vector_width(self) -> int:
        """Width of the vector it makes."""
        return self.config.width

    def from_batch(self, batch: dict[str, Any]) -> list[str]:
        """The captions of a training batch."""
        return list(batch["caption"])

    def absent(self, count: int) -> list[str]:
        """What stands for "no caption"."""
        return [""] * count

    @property
    def room(self) -> int:
        """Tokens that are read of a caption."""
        return self.config.length - 1

    def count(self, caption: str) -> int:
        """Tokens of a whole caption, of which `room` are read."""
        return len(self._tokenizer.encode(caption.strip()).ids)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Ids `b n`: the caption's tokens, cut to fit, an end token, padding (0)."""
        end = self._tokenizer.token_to_id(END)
        ids = torch.zeros(len(captions), self.config.length, dtype=torch.long)
        for row, caption in enumerate(captions):
            found = self._tokenizer.encode(caption.strip()).ids[: self.room] if caption.strip() else []
            ids[row, : len(found) + 1] = torch.tensor([*found, end])
        return ids

    def forward(self, captions: Sequence[str]) -> Conditioning:
        """Rows for the captions, on the encoder's device."""
        context, vector = self.encoder(self.tokens(captions).to(self.encoder.position_embedding.device))
        return Conditioning(context=context, vector=vector)

    def state(self) -> dict[str, Any]:
        """What rebuilds it, for the model file."""
        return {"tokenizer": self.tokenizer}
