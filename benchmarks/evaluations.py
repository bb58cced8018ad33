"""How many evaluations of the network until a picture is the 200-step one, for every deterministic sampler and spacing?

    python benchmarks/evaluations.py [-m emoji] [--json FILE] [--figure FILE]

The distance is the root mean square difference of the pixels from the 200-step picture, in % of their range, averaged
over the model's own sample prompts (seeds 0, 1, ...). The peer is the first line: Euler's method on evenly spaced time,
which is DDIM, what the paper draws with.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import latentkit
from latentkit.applications.compare_samplers import Drawn, compare, evaluations_until
from latentkit.applications.generate import Progress
from latentkit.applications.request import ask, told
from latentkit.cli.output import show
from latentkit.diffusion.samplers.driver import table

SPACINGS = ("uniform", "karras", "kl_optimal", "exponential", "beta")
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 30, 40)
WITHIN = (0.02, 0.01)
AT = 10


def summary(found: list[Drawn]) -> dict[str, Any]:
    """One sampler and spacing: evaluations until each distance, and the best distance within `AT` evaluations."""
    near = [float(d.distance.mean()) for d in found if d.evaluations <= AT and d.distance is not None]
    return {
        "sampler": found[0].sampler,
        "spacing": found[0].spacing,
        **{f"until {share:.0%}": evaluations_until(found, share) for share in WITHIN},
        f"at {AT}": min(near) if near else None,
        "points": [[d.evaluations, float(d.distance.mean())] for d in found if d.distance is not None],
    }


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance by evaluations of the best spacing of each sampler, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    best = {name: min((r for r in rows if r["sampler"] == name), key=_rank) for name in {r["sampler"] for r in rows}}
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    for row in sorted(best.values(), key=_rank):
        evaluations, distances = zip(*row["points"])
        axes.loglog(evaluations, [100 * d for d in distances], marker=".", label=f"{row['sampler']}, {row['spacing']}")
    axes.set_xlabel("evaluations of the network")
    axes.set_ylabel("distance from the 200-step picture, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def _rank(row: dict[str, Any]) -> float:
    return row[f"at {AT}"] if row[f"at {AT}"] is not None else float("inf")


def main() -> None:
    """Draw, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="emoji")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="PNG (needs matplotlib)")
    options = parser.parse_args()

    model = latentkit.load(options.model)
    words = model.provenance.get("recipe", {}).get("sampling", {}).get("prompts") or [None]
    requests = [ask(seed=seed, **told(model.network, each)) for seed, each in enumerate(words)]
    names = [name for name, entry in table().items() if not entry.stochastic and entry.evaluations]
    methods = [(name, spacing) for name in names for spacing in SPACINGS]
    found: dict[tuple[str, str | None], list[Drawn]] = {}
    for drawn in show(compare(model, requests, methods, STEPS)):
        assert not isinstance(drawn, Progress)
        found.setdefault((drawn.sampler, drawn.spacing), []).append(drawn)
    rows = [summary(each) for each in found.values()]
    print(f"{'sampler':<16}{'spacing':<14}{'until 2 %':>10}{'until 1 %':>10}{f'at {AT}':>10}")
    for row in sorted(rows, key=_rank):
        until = [str(row[f"until {share:.0%}"] or f"> {max(STEPS)}") for share in WITHIN]
        near = "-" if row[f"at {AT}"] is None else f"{100 * row[f'at {AT}']:.2f} %"
        print(f"{row['sampler']:<16}{row['spacing']:<14}{until[0]:>10}{until[1]:>10}{near:>10}")
    if options.json:
        told_ = {"model": options.model, "digest": model.digest, "prompts": len(requests), "rows": rows}
        options.json.write_text(json.dumps(told_, indent=1) + "\n")
    if options.figure:
        figure(rows, options.figure)


if __name__ == "__main__":
    main()
