"""Does the emoji model draw what it is told? Every training caption is drawn once and looked for among the glyphs.

    python benchmarks/retrieval.py [-m emoji] [--json FILE] [--sheet FOLDER]

A picture obeys its caption when, of all training glyphs, the one nearest to it (squared distance at 32x32 pixels, RGB
on white) is the caption's own; pixel-identical glyphs count as one. Sampler, steps and guidance are fixed below, the
seed of caption i is i, nothing is tried twice. Beside it: captions whose words are reordered, keywords instead of the
name, held-out captions, and how near samples lie to training pictures (KID and nearest neighbours, own features).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import latentkit
from latentkit.applications.generate import draw
from latentkit.applications.pictures import write_sheet
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.source import Source, open_source, track
from latentkit.diffusion.noise import keyed_bits
from latentkit.evaluation.metrics.features import NETWORK, features
from latentkit.evaluation.metrics.kid import kid
from latentkit.evaluation.metrics.neighbours import memorisation

SETTINGS = {"sampler": "dpm++2m", "spacing": "uniform", "steps": 12, "guidance_scale": 2.0}
SIDE = 32
UNSEEN = [
    *("purple apple", "cat with sunglasses", "green car", "blue heart with arrow", "red flag", "pizza face"),
    *("yellow rocket", "woman cat", "black rose", "two hearts on fire", "horse in snow", "clock with face"),
]


def small(pictures: Tensor) -> Tensor:
    """`b 3 h w` as what is compared, `b d`."""
    return F.adaptive_avg_pool2d(pictures, SIDE).flatten(1)


def glyphs(source: Source, size: int) -> Tensor:
    """Every picture of a source on white, `b 3 size size`."""
    pictures = Pictures(source, Transform(size=size, channels=3, background="white"), 0)
    return torch.stack([pictures.view(i, 0)[1] for i in range(len(pictures))])


def identical(pictures: Tensor) -> Tensor:
    """For each picture the first one with the same pixels, `b`."""
    first: dict[bytes, int] = {}
    return torch.tensor([first.setdefault(p.numpy().tobytes(), i) for i, p in enumerate(pictures)])


def drawn(model: latentkit.Model, prompts: list[str], title: str) -> Tensor:
    """One picture a prompt, `b 3 h w`, seed i for prompt i."""
    pictures = draw(model.network, SETTINGS, prompts, range(len(prompts)))
    return torch.stack(list(track(pictures, len(prompts), title)))


def obeyed(pictures: Tensor, reference: Tensor, same: Tensor, wanted: Tensor) -> dict[str, float]:
    """Shares of pictures whose own glyph is the nearest, and among the nearest five."""
    distance = torch.cdist(small(pictures), small(reference))
    nearest = same[distance.topk(min(5, len(reference)), largest=False).indices]
    hits = nearest == same[wanted][:, None]
    return {"first": float(hits[:, 0].float().mean()), "within five": float(hits.any(1).float().mean())}


def reordered(caption: str, index: int) -> str:
    """The words of a caption in another order."""
    words = caption.split()
    order = sorted(range(len(words)), key=lambda i: int(keyed_bits(i + 1, "reordered", index)[i]))
    return " ".join(words[i] for i in (order if order != list(range(len(words))) else order[::-1]))


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("--data", default=str(Path(__file__).parents[1] / "data" / "emoji"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="folder for sheets of what was drawn")
    parser.add_argument("--only-captions", action="store_true", help="the first figure alone")
    options = parser.parse_args()

    model = latentkit.load(options.model)
    source = open_source(options.data)
    train, held = source.select("train"), source.select("holdout")
    size = model.network.architecture.size[0]
    reference, held_reference = glyphs(train, size), glyphs(held, size)
    captions = [item.caption or "" for item in train.items]
    everything = torch.arange(len(train))
    same = identical(reference)

    begun = time.monotonic()
    pictures = drawn(model, captions, "captions")
    figures: dict[str, object] = {"model": options.model, "digest": model.digest, **SETTINGS}
    figures["captions"] = {"count": len(captions), **obeyed(pictures, reference, same, everything)}
    print(f"captions {figures['captions']}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if not options.only_captions:
        several = torch.tensor([i for i, caption in enumerate(captions) if len(caption.split()) > 1])
        words = [reordered(captions[i], int(i)) for i in several]
        figures["reordered words"] = {
            "count": len(words),
            **obeyed(drawn(model, words, "reordered"), reference, same, several),
        }
        keyed = torch.tensor([i for i, item in enumerate(train.items) if len(item.keywords) > 1])[:400]
        words = [" ".join(train.items[i].keywords[:4]) for i in keyed]
        figures["keywords"] = {
            "count": len(words),
            **obeyed(drawn(model, words, "keywords"), reference, same, keyed),
        }
        both = torch.cat([reference, held_reference])
        wanted = torch.arange(len(train), len(both))
        held_pictures = drawn(model, [item.caption or "" for item in held.items], "held out")
        figures["held-out captions"] = {
            "count": len(held),
            **obeyed(held_pictures, both, identical(both), wanted),
        }
        seen, seen_held, truth, held_truth = (
            features(group) for group in (pictures, held_pictures, reference, held_reference)
        )
        figures["features"] = NETWORK
        figures["kid, drawn captions to training glyphs"] = kid(seen, truth)._asdict()
        figures["kid, held-out glyphs to training glyphs"] = kid(held_truth, truth)._asdict()
        near = memorisation(seen_held, held_truth, truth)
        figures["held-out captions, nearest training glyph"] = {
            "ratio to real held-out glyphs": near.ratio, "drawn": near.drawn, "held-out glyphs": near.held,
            "nearer than any": near.copies, "of": len(held_pictures),
        }  # fmt: skip
        if options.sheet:
            write_sheet(options.sheet / "captions.png", list(pictures[:: len(pictures) // 128][:128]), 16)
            write_sheet(options.sheet / "held-out.png", list(held_pictures), 16)
            write_sheet(options.sheet / "held-out-truth.png", list(held_reference), 16)
            write_sheet(options.sheet / "unseen.png", list(drawn(model, UNSEEN * 4, "unseen")), len(UNSEEN))
    text = json.dumps(figures, indent=2, ensure_ascii=False, default=str)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
