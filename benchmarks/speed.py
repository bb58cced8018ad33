"""Training and drawing speed and memory against diffusers' modules: the same networks, weights, loss and optimiser.

python benchmarks/speed.py [--parts autoencoder unet generation sd-unet sd-decode sd-openvino sd-openvino-decode]
    [--quick] [--profile] [--json FILE]
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parts import Part, Sizes
    from peer import Variant

PARTS = ("autoencoder", "unet", "generation")
LARGE = ("sd-unet", "sd-decode", "sd-openvino", "sd-openvino-decode")
TOLERANCE = {"loss": 1e-5, "gradients": 2e-3, "pictures": 2e-3, "error": 0.1, "bfloat16": 1.1}
"""Largest difference in float32: of the loss (relative), of any gradient (relative to the largest of its tensor), and
of any pixel of a drawn picture, whose range is 2. "error": our relative root mean square error in bfloat16, and
"bfloat16" the same as a multiple of the peer's."""


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def best_peer(part: "Part", compiled: bool) -> "tuple[Variant, dict[str, float | str]]":
    """The peer's fastest variant in a short pre-run, and the seconds (or the failure) of each.

    Eager in both types and formats, then compiled in both formats of the faster type.
    """
    import torch
    from peer import Variant, trusted

    found: dict[Variant, float] = {}
    told: dict[str, float | str] = {}

    def tried(variant: Variant) -> None:
        try:
            torch.compiler.reset()
            if part.gradients is not None:
                trusted(variant, part.gradients)
            run = part.theirs(variant, True)
            run()
            found[variant] = min(seconds(run) for _ in range(3))
            told[str(variant)] = found[variant]
        except Exception as error:
            told[str(variant)] = f"failed: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"
        say(f"  peer {variant}: {told[str(variant)]}")

    def best() -> Variant:
        return min(found, key=lambda variant: found[variant])

    for bf16, channels_last in itertools.product((True, False), repeat=2):
        tried(Variant(bf16, channels_last, False))
    if compiled:
        bf16 = best().bf16
        for channels_last in (True, False):
            tried(Variant(bf16, channels_last, True))
    return best(), told


def time_part(name: str, sizes: "Sizes", folder: Path, pairs: int, compiled: bool) -> dict[str, Any]:
    """Agreement, then alternating runs of ours and of the peer's best variant."""
    from parts import MAKERS

    part = MAKERS[name](sizes, folder)
    differences = part.check()
    say(f"{name}: differences in float32 {differences}")
    for what, value in differences.items():
        if not value <= TOLERANCE[what]:
            raise SystemExit(
                f"{name}: ours and diffusers differ by {value:.2g} in {what} (tolerance {TOLERANCE[what]})"
            )
    variant, tried = best_peer(part, compiled)
    ours, theirs = part.ours(), part.theirs(variant, True)
    for run in (ours, theirs, ours, theirs):
        run()
    times: list[tuple[float, float]] = []
    for index in range(pairs):
        if index % 2:
            other, own = seconds(theirs), seconds(ours)
        else:
            own, other = seconds(ours), seconds(theirs)
        times.append((own, other))
    ratios = sorted(other / own for own, other in times)
    own, other = (statistics.median(column) for column in zip(*times))
    return {
        "ours_pictures_per_second": part.pictures / own,
        "peer_pictures_per_second": part.pictures / other,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "pairs": pairs,
        "peer_variant": variant._asdict(),
        "peer_variants_seconds": tried,
        "differences": differences,
    }


def memory(name: str, sizes: "Sizes", folder: Path, variant: "Variant | None") -> dict[str, float]:
    """This process's peak, MiB, after three runs of one side (`variant` None: ours), and what it held before."""
    from parts import MAKERS

    part = MAKERS[name](sizes, folder)
    unit = 1024 if sys.platform == "linux" else 1024**2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    run = part.ours() if variant is None else part.theirs(variant, False)
    for _ in range(3):
        run()
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


GROUPS = {
    "convolution": ("conv",),
    "linear": ("addmm", "aten::mm", "linear", "bmm"),
    "attention": ("scaled_dot_product",),
    "norm": ("native_group_norm", "native_layer_norm"),
    "activation": ("silu", "gelu"),
    "optimiser": ("_fused_adamw", "_foreach"),
    "copy": ("copy_", "aten::cat", "fill_", "zero_", "contiguous", "clone"),
    "add, multiply": ("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::sum", "aten::lerp"),
}


def profile(name: str, sizes: "Sizes", folder: Path, rows: int) -> dict[str, Any]:
    """Share of each group of operations in the time of ours and of the eager bf16 peer; floating-point rate."""
    import torch
    from parts import MAKERS
    from peer import Variant
    from torch.utils.flop_counter import FlopCounterMode

    part = MAKERS[name](sizes, folder)
    result: dict[str, Any] = {}
    for side, run in {"ours": part.ours(), "diffusers": part.theirs(Variant(True, True, False), True)}.items():
        run()
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                run()
        table = profiler.key_averages()
        milliseconds = dict.fromkeys([*GROUPS, "other"], 0.0)
        for entry in table:
            group = next((g for g, parts in GROUPS.items() if any(p in entry.key for p in parts)), "other")
            milliseconds[group] += entry.self_cpu_time_total / 3e3
        with FlopCounterMode(display=False) as counter:
            run()
        operations = counter.get_total_flops()
        total = sum(milliseconds.values())
        result[side] = {"milliseconds": milliseconds, "gigaflop": operations / 1e9}
        rate = operations / total / 1e6
        print(f"\n{name}, {side}: {total:.1f} ms a run, {operations / 1e9:.1f} GFLOP, {rate:.0f} GFLOP/s")
        for group, value in sorted(milliseconds.items(), key=lambda item: -item[1]):
            print(f"  {group:<14}{value:9.1f} ms {100 * value / total:5.1f} %")
        if rows:
            print(table.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60))
    return result


def child(arguments: argparse.Namespace, job: dict[str, Any]) -> Any:
    """One job in a process of its own; its answer is the last line of its output."""
    command = [sys.executable, __file__, "--child", json.dumps(job), "--threads", str(arguments.threads)]
    command += ["--quick"] if arguments.quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + f"{job} failed with exit code {done.returncode}")
    *shown, answer = done.stdout.splitlines()
    print(*shown, sep="\n", end="\n" if shown else "", flush=True)
    return json.loads(answer)


def answer(arguments: argparse.Namespace) -> Any:
    """The work of a child process."""
    import torch
    from parts import FULL, QUICK
    from peer import Variant

    torch.set_num_threads(arguments.threads)
    job = json.loads(arguments.child)
    sizes, folder = QUICK if arguments.quick else FULL, Path(job["folder"])
    if job["do"] == "time":
        return time_part(job["part"], sizes, folder, job["pairs"], job["compiled"])
    if job["do"] == "memory":
        return memory(job["part"], sizes, folder, Variant(**job["variant"]) if job["variant"] else None)
    return profile(job["part"], sizes, folder, job["rows"])


def main() -> None:
    """Parse, run each part in child processes (this one stays small, so that their peaks are their own), print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS + LARGE, default=PARTS)
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs of runs (default 15)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="tiny networks, two pairs: does it work, not how fast")
    parser.add_argument("--no-compile", action="store_true", help="leave out the peer's torch.compile variants")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of the comparison")
    parser.add_argument("--rows", type=int, default=0, help="with --profile: also the N slowest operations")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(answer(arguments)))
        return
    if os.getloadavg()[0] > 0.3:
        say(f"this machine is busy (load {os.getloadavg()[0]:.1f}): do not quote these figures")
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts:
            job = {"part": name, "folder": folder}
            if arguments.profile:
                parts[name] = child(arguments, job | {"do": "profile", "rows": arguments.rows})
                continue
            compiled = not (arguments.quick or arguments.no_compile)
            pairs = 2 if arguments.quick else arguments.pairs
            found = child(arguments, job | {"do": "time", "pairs": pairs, "compiled": compiled})
            eager = found["peer_variant"] | {"compiled": False}
            sides = {"ours": None, "peer": eager}
            peaks = {s: child(arguments, job | {"do": "memory", "variant": v}) for s, v in sides.items()}
            parts[name] = found | {"memory": peaks}
    result = {"load": os.getloadavg(), "threads": arguments.threads, "quick": arguments.quick, "parts": parts}
    if not arguments.profile:
        report(parts)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


def report(parts: dict[str, Any]) -> None:
    """The table: pictures a second and peak MiB above what was held before the networks were made."""
    columns = ("", "ours/s", "peer/s", "ratio", "quartiles", "ours MiB", "peer MiB", "ratio")
    print("{:<19}{:>9}{:>9}{:>7}  {:<12}{:>9}{:>9}{:>7}  peer".format(*columns))
    for name, found in parts.items():
        own, other = (found["memory"][side]["peak"] - found["memory"][side]["before"] for side in ("ours", "peer"))
        low, high = found["ratio_quartiles"]
        kinds = found["peer_variant"]
        words = ["bf16" if kinds["bf16"] else "float32", "channels_last" if kinds["channels_last"] else "contiguous"]
        print(
            f"{name:<19}{found['ours_pictures_per_second']:9.2f}{found['peer_pictures_per_second']:9.2f}"
            f"{found['ratio']:7.2f}  {f'{low:.2f}-{high:.2f}':<12}{own:9.0f}{other:9.0f}{own / other:7.2f}  "
            + " ".join([*words, "compiled" if kinds["compiled"] else "eager"])
        )


if __name__ == "__main__":
    main()
