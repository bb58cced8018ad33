"""The first stage against diffusers': quality in equal time, time to equal error, the critic's spectrum, strips.

    python benchmarks/first_stages.py FOLDER [--parts equal-time spectrum equal-error strips] [--photographs FOLDER]

Times of training are processor times of one thread, so that other work on the machine does not count; the two sides of
a comparison run at once, one core each, and change places from seed to seed. Every arm that is finished is kept in
FOLDER and not run again: stop and start at will. The peer runs in the fastest of its types and memory formats, compiled
where that is faster still and leaves its gradients as they are; of three learning rates, each side of `equal-time` and
the peer of `equal-error` take their best. Two quiet cores take about 30 minutes for `equal-time`, 20 for each of
`spectrum` and `equal-error`, 5 for `strips`.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[1]
PARTS = ("equal-time", "spectrum", "equal-error", "strips")
SECONDS, RATE, RATES = 75.0, 1e-3, (5e-4, 1e-3, 2e-3)
"""Of training, our learning rate where there is no choice, and those to choose from."""
PEER_SECONDS, FRACTIONS = 240.0, (5, 7, 10, 14, 20)
"""The peer's time to its error, and by how much shorter the runs of ours are."""
START_STEPS, MORE_STEPS = 2000, 800
"""Of the first stage that the arms of `spectrum` start from, and of each."""
MORE_PARTS: dict[str, dict[str, Any]] = {
    "without": {},
    "critic": {"adversarial": {"start": 100, "warmup": 100, "ramp": 100}},
    "own features": {"perceptual": {"network": "own", "steps": 400}},
}
"""What the arms of `spectrum` have in their loss besides: the default critic, or our own perceptual network."""
STRIP_SIDES, MEMORY_SIDES = (256, 384, 512), (512, 1024, 2048)


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def name_of(arm: dict[str, Any]) -> str:
    """An arm's file name: all that decides its result."""
    told = {key: value for key, value in sorted(arm.items()) if key != "photographs"}
    return "-".join(
        "".join(str(int(x)) for x in value) if isinstance(value, list) else str(value).replace(" ", "_")
        for value in told.values()
    )


def run_at_once(folder: Path, arms: list[dict[str, Any]], turned: bool = False) -> list[dict[str, Any]]:
    """Run arms that are missing, each in a process with a core of its own, and give what all of them found."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[::-1] if turned else cores
    waiting = []
    for index, arm in enumerate(arms):
        record = folder / f"{name_of(arm)}.json"
        if not record.exists():
            say(f"  {name_of(arm)}")
            command = [sys.executable, __file__, str(folder), "--arm", json.dumps(arm), "--core"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            waiting.append(subprocess.Popen([*command, str(cores[index % len(cores)])], env=environment))
    codes = [process.wait() for process in waiting]
    if any(codes):
        raise SystemExit("an arm failed; see above")
    return [dict(json.loads((folder / f"{name_of(arm)}.json").read_text())) for arm in arms]


def child(folder: Path, arm: dict[str, Any], core: int) -> None:
    """Run one arm here and keep what it found."""
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    from arms import pace_arm, train_arm

    kinds = {"train": train_arm, "pace": pace_arm, "spectrum": spectrum_arm, "time": strips_arm, "memory": memory_arm}
    found = kinds[arm["kind"]](arm, folder)
    record = folder / f"{name_of(arm)}.json"
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(arm | found, indent=1) + "\n")
    partial.replace(record)


def best_variant(folder: Path, config: str) -> list[bool]:
    """The peer's fastest type and memory format on this machine, compiled where that is faster still."""
    from peer import Variant

    times: dict[Variant, float] = {}

    def tried(variant: Variant) -> None:
        arm: dict[str, Any] = {"kind": "pace", "config": config, "set": "emoji", "photographs": "", "side": "peer"}
        try:
            times[variant] = run_at_once(folder, [arm | {"variant": list(variant), "seed": 0}])[0]["seconds_a_step"]
        except SystemExit:
            say(f"  the peer does not run {variant}")

    for bf16 in (True, False):
        for channels_last in (True, False):
            tried(Variant(bf16, channels_last, False))
    tried(min(times, key=lambda variant: times[variant])._replace(compiled=True))
    fastest = min(times, key=lambda variant: times[variant])
    say(f"peer of {config}: {fastest}")
    return list(fastest)


def equal_time(folder: Path, photographs: str | None, seeds: int) -> dict[str, Any]:
    """PSNR of ours and of the peer's after equal time: KL and VQ, both sets, every seed.

    Each side's rate is its best of `RATES` at the first seed.
    """
    found: dict[str, Any] = {}
    for config in ("kl", "vq"):
        variant = best_variant(folder, config)
        for pictures in ("emoji", "photographs") if photographs else ("emoji",):
            shared: dict[str, Any] = {"kind": "train", "config": config, "set": pictures, "photographs": photographs}
            sides = [shared | {"seconds": SECONDS, "side": "ours"}]
            sides.append(shared | {"seconds": SECONDS, "side": "peer", "variant": variant})
            first = [run_at_once(folder, [side | {"seed": 0, "rate": rate} for side in sides]) for rate in RATES]
            tried = [[row["psnr"] for row in side] for side in zip(*first, strict=True)]
            best = [side.index(max(side)) for side in tried]
            rows = [[first[best[0]][0], first[best[1]][1]]]
            for seed in range(1, seeds):
                arms = [side | {"seed": seed, "rate": RATES[rate]} for side, rate in zip(sides, best, strict=True)]
                rows.append(run_at_once(folder, arms, turned=seed % 2 == 1))
            ours, peer = zip(*rows, strict=True)
            found[f"{config} f4, {pictures}"] = row = {
                "ours": [row["psnr"] for row in ours],
                "peer": [row["psnr"] for row in peer],
                "steps": [[row["steps"] for row in side] for side in (ours, peer)],
                "ours_by_rate": dict(zip(map(str, RATES), tried[0], strict=True)),
                "peer_by_rate": dict(zip(map(str, RATES), tried[1], strict=True)),
                "variant": told_variant(variant),
                "at_least": all(a["psnr"] >= b["psnr"] for a, b in rows),
            }
            say(f"equal time, {config} f4, {pictures}: {row}")
    return found


def told_variant(variant: list[bool]) -> str:
    """A variant in words."""
    from peer import Variant

    return str(Variant(*variant))


def equal_error(folder: Path, seeds: int) -> dict[str, Any]:
    """How much sooner the stem design reaches the error of the standard layout, same optimiser and loss."""
    variant = best_variant(folder, "standard")
    shared: dict[str, Any] = {"kind": "train", "set": "emoji", "photographs": ""}
    standard = shared | {"config": "standard", "side": "peer", "variant": variant}
    trials = [standard | {"seed": 0, "seconds": PEER_SECONDS / 4, "rate": rate} for rate in RATES]
    tried = [run_at_once(folder, [trial])[0]["psnr"] for trial in trials]
    rate = RATES[tried.index(max(tried))]
    rows = []
    for seed in range(seeds):
        arms = [standard | {"seed": seed, "seconds": PEER_SECONDS, "rate": rate}]
        stem = shared | {"config": "stem", "side": "ours", "seed": seed}
        arms += [stem | {"seconds": PEER_SECONDS / fraction, "rate": RATE} for fraction in FRACTIONS]
        peer, *ours = [row for pair in zip(arms[::2], arms[1::2], strict=True) for row in run_at_once(folder, [*pair])]
        enough = [row["processor_seconds"] for row in ours if row["psnr"] >= peer["psnr"]]
        rows.append(
            {
                "peer": {key: peer[key] for key in ("psnr", "steps", "parameters")},
                "ours": [{key: row[key] for key in ("psnr", "steps", "seconds", "parameters")} for row in ours],
                "ratio": PEER_SECONDS / min(enough) if enough else 0.0,
            }
        )
        told = f"{peer['psnr']:.2f} dB in {PEER_SECONDS:.0f} s; ours {rows[-1]['ratio']:.1f} times sooner"
        say(f"equal error, seed {seed}: {told}")
    by_rate = dict(zip(map(str, RATES), tried, strict=True))
    return {"rows": rows, "rate": rate, "peer_by_rate": by_rate, "variant": told_variant(variant)}


def radial(pictures: "Tensor") -> "Tensor":
    """Mean power of `b c h h` by whole cycles a picture, 0 to h / 2: over channels, pictures and directions."""
    import torch

    power = torch.fft.fft2(pictures.double(), norm="ortho").abs().square().mean((0, 1))
    cycles = torch.fft.fftfreq(len(power), 1 / len(power), dtype=torch.float64)
    ring = (cycles[:, None].square() + cycles[None].square()).sqrt().round().long().flatten()
    total = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring, power.flatten())
    return (total / torch.bincount(ring))[: len(power) // 2 + 1]


def spectral_distance(decoded: "Tensor", pictures: "Tensor") -> float:
    """Mean |ln| of the ratio of two radial spectra over the upper half of the bands: 17 to 32 cycles at 64 px."""
    ratio = radial(decoded) / radial(pictures)
    return float(ratio.log().abs()[len(ratio) // 2 + 1 :].mean())


def spectrum_recipe(name: str, seed: int, steps: int, part: dict[str, Any], start: Path | None) -> dict[str, Any]:
    """A small first stage of f8 on emoji, with a part of the loss more."""
    loss: dict[str, Any] = {"l1": 1.0, "pyramid": 0.5, "structure": 0.1, "kl": 1e-4} | part
    return {
        "stage": "autoencoder",
        "name": name,
        "seed": seed,
        "start": None if start is None else str(start),
        "data": {
            "path": str(ROOT / "data" / "emoji"),
            "split": "train",
            "holdout": "holdout",
            "transform": {"size": 64, "channels": 3, "background": "white", "flips": "h"},
        },
        "network": {
            "latent_channels": 4,
            "channels": 64,
            "multipliers": [1, 1],
            "blocks": 1,
            "stem": 4,
            "attention": False,
        },
        "loss": loss,
        "optimiser": {"name": "muon", "lr": 2e-3 if start is None else 5e-4, "decay": 0.4},
        "averaging": {"decay": 0.995, "power": []},
        "schedule": {"steps": steps, "batch": 8, "precision": "bf16", "save_every": 200, "sample_every": steps},
    }


def spectrum_arm(arm: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one arm, or what all start from, and measure its reconstructions of held-out pictures."""
    import torch
    from arms import pictures

    from latentkit.applications.stages.train import train
    from latentkit.checkpoints.files import load_autoencoder
    from latentkit.evaluation.metrics.features import features
    from latentkit.evaluation.metrics.frechet import frechet
    from latentkit.training.recipe import parse_recipe

    name, seed = arm["arm"], arm["seed"]
    beginning = folder / "runs" / f"start-{seed}"
    steps, start = (START_STEPS, None) if name == "start" else (MORE_STEPS, beginning)
    recipe = spectrum_recipe(f"{name.replace(' ', '-')}-{seed}", seed, steps, MORE_PARTS.get(name, {}), start)
    path = train(parse_recipe(recipe), folder / "runs" / f"{name}-{seed}")
    network = load_autoencoder(path).autoencoder
    assert network is not None
    _, held = pictures("emoji", "", folder)
    with torch.inference_mode():
        decoded = torch.cat([network.decode(network.encode(x).mean) for x in held.split(16)]).clamp(-1, 1)
    error = ((decoded - held) / 2).square().flatten(1).mean(1)
    return {
        "psnr": float(-10 * error.log10().mean()),
        "distance": spectral_distance(decoded, held),
        "frechet": frechet(features(held), features(decoded)),
        "power_of_data": radial(held).tolist(),
        "power": radial(decoded).tolist(),
    }


def spectrum(folder: Path, seeds: int) -> dict[str, Any]:
    """The distance of spectra, Frechet distance and PSNR with and without a critic, or own features, from one start."""
    rows = {}
    for seed in range(seeds):
        shared: dict[str, Any] = {"kind": "spectrum", "seed": seed}
        names = ["start", *MORE_PARTS]
        found = run_at_once(folder, [shared | {"arm": "start"}])
        for pair in (names[1:3], names[3:]):
            found += run_at_once(folder, [shared | {"arm": name} for name in pair], turned=seed % 2 == 1)
        rows[f"seed {seed}"] = {
            name: {k: row[k] for k in ("psnr", "distance", "frechet")} for name, row in zip(names, found)
        }
        for name, row in rows[f"seed {seed}"].items():
            say(f"spectrum, seed {seed}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return rows


def strip_work(size: int, decoding: bool, small: bool) -> tuple[Any, Any, Any]:
    """Stable Diffusion's first stage (or a narrow one) with random weights, what passes through it, in strips too."""
    import torch

    from latentkit.model.presets import KL_F8
    from latentkit.nets.autoencoder import Autoencoder, AutoencoderConfig
    from latentkit.nets.strips import Strips

    torch.manual_seed(0)
    narrow = AutoencoderConfig(channels=32, multipliers=(1, 1, 1, 1), blocks=1)
    network = Autoencoder(narrow if small else KL_F8).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    x = torch.randn(1, 4, size // 8, size // 8) if decoding else torch.rand(1, 3, size, size) * 2 - 1
    return network, Strips, x


def strips_arm(arm: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Processor seconds of a picture whole and in strips, the least of three each, and how far they lie apart."""
    import torch

    decoding = arm["way"] == "decode"
    network, strips, x = strip_work(arm["side"], decoding, small=False)
    ways = {"whole": network, "strips": strips(network)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(3):
        for name, way in ways.items():
            begun = time.process_time()
            with torch.inference_mode():
                results[name] = way.decode(x) if decoding else way.encode(x).mean
            times[name].append(time.process_time() - begun)
    apart = float((results["whole"] - results["strips"]).abs().max() / results["whole"].abs().max())
    return {name: min(taken) for name, taken in times.items()} | {"apart": apart}


def anonymous() -> float:
    """MiB of this process's memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def memory_arm(arm: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Peak MiB of memory, files apart, above what was held with the picture and its result."""
    import torch

    decoding = arm["way"] == "decode"
    network, strips, x = strip_work(arm["side"], decoding, small=True)
    way = network if arm["how"] == "whole" else strips(network, str(folder) if arm["how"] == "spill" else None)
    with torch.inference_mode():
        network.decode(torch.randn(1, 4, 8, 8))
    result = arm["side"] ** 2 * (3 if decoding else 8 / 64) * 4 / 2**20
    before, most, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with torch.inference_mode():
        way.decode(x) if decoding else way.encode(x)
    done.set()
    watcher.join()
    return {"peak": most[0] - before - result}


def strips(folder: Path) -> dict[str, Any]:
    """Time in strips against whole by size, and peak memory of whole, strips and strips with a spill file by area."""
    times, memory = {}, {}
    for way in ("decode", "encode"):
        for side in STRIP_SIDES:
            (found,) = run_at_once(folder, [{"kind": "time", "way": way, "side": side}])
            times[f"{way} {side}"] = {
                "ratio": found["strips"] / found["whole"],
                "whole": found["whole"],
                "apart": found["apart"],
            }
            told = f"{found['strips'] / found['whole']:.2f} times the whole's {found['whole']:.1f} s"
            say(f"strips, {way} of {side} px: {told}")
    for how in ("whole", "host", "spill"):
        arms = [{"kind": "memory", "way": "decode", "how": how, "side": side} for side in MEMORY_SIDES]
        peaks = [run_at_once(folder, [arm])[0]["peak"] for arm in arms]
        memory[how] = dict(zip(map(str, MEMORY_SIDES), peaks, strict=True))
        say(
            f"memory above picture and result, {how}: "
            + ", ".join(f"{k} px {v:.0f} MiB" for k, v in memory[how].items())
        )
    return {"times": times, "memory": memory}


def tables(figures: dict[str, Any]) -> str:
    """What is known, as Markdown."""
    told = []
    if known := figures.get("equal-time"):
        told += ["| first stage, pictures | ours, dB | diffusers, dB | steps | its steps | its way |", "|---" * 6 + "|"]
        for name, row in known.items():
            cells = [" ".join(f"{x:.2f}" for x in row[side]) for side in ("ours", "peer")]
            cells += [" ".join(map(str, steps)) for steps in row["steps"]]
            told.append(f"| {name} | {' | '.join(cells)} | {row['variant']} |")
    if known := figures.get("equal-error"):
        rows = known["rows"]
        ratios, reached = (" ".join(found) for found in (
            [f"{row['ratio']:.1f}" for row in rows], [f"{row['peer']['psnr']:.2f}" for row in rows]
        ))  # fmt: skip
        told.append(f"\nTo the error of the standard layout ({reached} dB by seed) {ratios} times sooner.")
    if known := figures.get("spectrum"):
        told += ["", "| seed, loss | distance of spectra | PSNR, dB | Frechet distance |", "|---" * 4 + "|"]
        for seed, arms in known.items():
            told += [
                f"| {seed}, {name} | {row['distance']:.3f} | {row['psnr']:.2f} | {row['frechet']:.3g} |"
                for name, row in arms.items()
            ]
    if known := figures.get("strips"):
        told += ["", "| way, px | time in strips by the whole's | whole, s | apart |", "|---" * 4 + "|"]
        told += [f"| {k} | {v['ratio']:.2f} | {v['whole']:.1f} | {v['apart']:.1e} |" for k, v in known["times"].items()]
        told += ["", f"| peak MiB | {' | '.join(f'{side} px' for side in MEMORY_SIDES)} |", "|---" * 4 + "|"]
        told += [f"| {k} | {' | '.join(f'{x:.0f}' for x in v.values())} |" for k, v in known["memory"].items()]
    return "\n".join(told)


def main() -> None:
    """Run the parts that are asked for and print tables of all that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--photographs", metavar="FOLDER", help="photographs for equal-time beside the emoji")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.arm:
        return child(folder, json.loads(options.arm), options.core)
    known = folder / "figures.json"
    figures = dict(json.loads(known.read_text())) if known.exists() else {}
    makers = {
        "equal-time": lambda: equal_time(folder, options.photographs, options.seeds),
        "spectrum": lambda: spectrum(folder, options.seeds),
        "equal-error": lambda: equal_error(folder, options.seeds),
        "strips": lambda: strips(folder),
    }
    for part in options.parts:
        figures[part] = makers[part]()
        for file in filter(None, (known, options.json)):
            file.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))


if __name__ == "__main__":
    main()
