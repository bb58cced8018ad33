"""A 512-pixel picture through Stable Diffusion's decoder in bfloat16: time, and memory of whole processes.

python benchmarks/decode.py [--pairs 5] [--side 512] [--out FILE]

Random weights are written to a temporary folder in diffusers' layout, which both sides read. Every run is a process of
its own that imports what its side needs, loads, decodes twice and tells the second time and its peak; the sides take
turns. diffusers runs in either memory format and is taken at its faster one. It also says how far the two pictures lie
apart.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CELL = 8


def write(folder: Path) -> None:
    """The first stage's weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    ).bfloat16().save_pretrained(folder / "vae")


def ours(folder: Path) -> Callable[[Any], Any]:
    """Model latents to pixels."""
    import torch

    from latentkit.checkpoints.lone import lone_first_stage

    first_stage = lone_first_stage(folder / "vae", torch.device("cpu"), torch.bfloat16)
    assert first_stage is not None
    return first_stage.decode


def theirs(folder: Path, channels_last: bool) -> Callable[[Any], Any]:
    """The same by diffusers."""
    import torch
    from diffusers import AutoencoderKL

    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16).eval().to(memory_format=layout)

    def decode(z: Any) -> Any:
        z = z / network.config.scaling_factor
        return network.decode(z.bfloat16().contiguous(memory_format=layout)).sample.float()

    return decode


SIDES: dict[str, Callable[[Path], Callable[[Any], Any]]] = {
    "ours": ours,
    "diffusers, contiguous": lambda folder: theirs(folder, False),
    "diffusers, channels last": lambda folder: theirs(folder, True),
}


def work(name: str, folder: Path, side: int, threads: int) -> dict[str, float]:
    """Load, decode twice; seconds of the second, peak MiB of the process."""
    import torch

    torch.set_num_threads(threads)
    decode = SIDES[name](folder)
    z = torch.randn(1, 4, side // CELL, side // CELL, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        decode(z)
        begun = time.perf_counter()
        picture = decode(z)
        seconds = time.perf_counter() - begun
    unit = 1024 if sys.platform == "linux" else 1024**2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    torch.save(picture, folder / f"{name}.pt")
    return {"seconds": seconds, "peak": peak}


def run(*arguments: str) -> Any:
    """What a process of its own prints, as JSON."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table; with --out, write it as JSON too."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="pixels (default 512)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        name, folder = asked.worker[0], Path(asked.worker[1])
        print(json.dumps(write(folder) if name == "write" else work(name, folder, asked.side, asked.threads)))
        return
    with tempfile.TemporaryDirectory() as place:
        run("--worker", "write", place)  # this process stays small: Linux counts its peak into its children's

        def one(name: str) -> dict[str, float]:
            settings = ("--side", str(asked.side), "--threads", str(asked.threads))
            return dict(run("--worker", name, place, *settings))

        first = {name: one(name) for name in SIDES}
        peer = min((name for name in SIDES if name != "ours"), key=lambda name: first[name]["seconds"])
        pairs = [(one("ours"), one(peer)) for _ in range(asked.pairs)]
        mine, other = (torch.load(Path(place) / f"{name}.pt") for name in ("ours", peer))
    ratios = {what: sorted(a[what] / b[what] for a, b in pairs) for what in ("seconds", "peak")}
    figures = {
        "side": asked.side, "threads": asked.threads, "peer": peer, "first": first, "pairs": pairs,
        "speed": 1 / statistics.median(ratios["seconds"]), "memory": statistics.median(ratios["peak"]),
        "apart": float((mine - other).square().mean().sqrt() / other.std()),
    }  # fmt: skip
    for what, unit in (("seconds", "s"), ("peak", "MiB")):
        values = [statistics.median(pair[side][what] for pair in pairs) for side in (0, 1)]
        low, high = ratios[what][0], ratios[what][-1]
        print(f"{what:8s} ours {values[0]:8.2f} {unit}, {peer} {values[1]:8.2f} {unit}, ours/its {low:.2f}-{high:.2f}")
    print(f"{figures['speed']:.2f} times as fast, {figures['memory']:.2f} of the memory; apart {figures['apart']:.1e}")
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
