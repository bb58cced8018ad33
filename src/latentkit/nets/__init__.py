"""Floor 1: the networks. Tensors in, tensors out; each owns a frozen config dataclass."""
