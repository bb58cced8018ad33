"""The names of a LoRA's tensors: which weight of a model they change, and which part of the change they are.

Sources: kohya-ss/sd-scripts `networks/lora.py`; LyCORIS `modules`; diffusers `state_dict_utils.py`; peft.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from latentkit.checkpoints.names import diffusers_names, ldm_names
from latentkit.checkpoints.names.rename import Pair
from latentkit.checkpoints.names.tower_names import hugging_face_text
from latentkit.model.latent_diffusion import LatentDiffusion

UNET = "denoiser.unet."
KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
PARTS = ("unet", "text_encoder", "text_encoder_2")
ROOTS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")
"""Before the names of a network's layers in files of one network alone."""

LEAVES = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "middle", "alpha": "alpha",
    "dora_scale": "magnitude", "lora.down.weight": "down", "lora.up.weight": "up", "lora_A.weight": "down",
    "lora_B.weight": "up", "lora_A.default.weight": "down", "lora_B.default.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude", "hada_w1_a": "up", "hada_w1_b": "down", "hada_t1": "middle",
    "hada_w2_a": "second up", "hada_w2_b": "second down", "hada_t2": "second middle",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
    "lokr_w1": "left up", "lokr_w1_a": "left up", "lokr_w1_b": "left down", "lokr_w2": "up", "lokr_w2_a": "up",
    "lokr_w2_b": "down", "lokr_t2": "middle", "diff": "up",
}  # fmt: skip
"""The end of a tensor's name, and which part of a `Change` it is."""
STRANGERS = {
    r"\.oft_\w+$|\.oft_R\.": "OFT",
    r"\.boft_\w+": "BOFT",
    r"\.on_input$|\.ia3_l": "IA3",
    r"\.[ab][12]\.weight$|\.bm\.weight$": "GLoRA",
    r"\.vera_lambda_|^vera_": "VeRA",
    r"\.(w|b)_norm$": "changes of norms",
    r"\.diff_b$|lora_(B|up)(\.default)?\.bias$": "changes of biases",
    r"^bundle_emb\.": "embeddings beside the LoRA",
    r"^lllite_": "ControlNet-LLLite",
    r"\.(ip_adapter|to_k_ip|to_v_ip)\.": "an IP-Adapter",
}
"""How tensors of what is not run are named."""
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
"""How diffusers named them in 2023."""
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Place(NamedTuple):
    """Where a tensor of a LoRA belongs."""

    part: str
    layer: str
    kind: str
    """A value of `LEAVES`."""
    flat: bool
    """Whether dots of the layer are underscores."""


def layers(model: LatentDiffusion) -> dict[tuple[str, str], str]:
    """Our weight by (part, layer), the layer as diffusers and, for the U-Net, as CompVis name it, dots and all."""
    return layers_of(model, "diffusers") | layers_of(model, "ldm")


def layers_of(model: LatentDiffusion, layout: str) -> dict[tuple[str, str], str]:
    """The same by one of the two names."""
    unet = model.denoiser.unet
    pairs = (diffusers_names if layout == "diffusers" else ldm_names).unet_pairs(unet)
    found = {("unet", layer): UNET + weight for layer, weight in _weights(pairs)}
    clip = model.architecture.clip
    for index, tower in enumerate(clip.towers if clip else ()):
        ours = f"conditioners.text.towers.{index}."
        found |= {(PARTS[1 + index], layer): ours + weight for layer, weight in _weights(hugging_face_text(tower))}
    return found


def _weights(pairs: list[Pair]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        if pair.theirs.endswith(".weight") and len(pair.ours) == 1:
            yield pair.theirs.removesuffix(".weight"), pair.ours[0]


def place(key: str) -> Place | None:
    """Where a tensor of this name belongs; None where it is of no known form."""
    key = PROCESSOR.sub(lambda m: f".{m[1].replace('to_out', 'to_out.0')}.lora.{m[2]}.weight", key)
    leaf = next((leaf for leaf in LEAVES if key.endswith(f".{leaf}")), None)
    if leaf is None:
        return None
    layer = key.removesuffix(f".{leaf}")
    for prefix, part in KOHYA.items():
        if layer.startswith(prefix):
            return Place(part, layer.removeprefix(prefix), LEAVES[leaf], True)
    for root in ROOTS:
        layer = layer.removeprefix(root)
    part, _, below = layer.partition(".")
    if part not in PARTS:
        return Place("unet", layer, LEAVES[leaf], False)
    if part != "unet":
        head, _, last = below.rpartition(".")
        below = f"{head}.{OLD_TEXT.get(last.removesuffix('_lora'), last)}"
        below = below if below.startswith("text_model.") or below == "text_projection" else f"text_model.{below}"
    return Place(part, below, LEAVES[leaf], False)


def stranger(keys: Iterator[str]) -> str | None:
    """What is not run here and has such names; None for names of LoRAs."""
    known = {pattern: re.compile(pattern) for pattern in STRANGERS}
    return next((f"{STRANGERS[p]} ({key})" for key in keys for p, form in known.items() if form.search(key)), None)
