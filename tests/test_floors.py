"""The plan of the house, enforced: imports go down only, heavy ones late, files short and named by a noun."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latentkit"

FLOORS = {
    "diffusion": 0,
    "nets": 1,
    "model": 2,
    "checkpoints": 3,
    "data": 3,
    "training": 3,
    "evaluation": 4,
    "applications": 4,
    "cli": 5,
    "server": 5,
    "web": 5,
}
SIDEWAYS = {("training", "data"), ("training", "checkpoints"), ("applications", "evaluation"), ("cli", "server")}
"""Who may import whom on the same floor."""
EVERYWHERE = {"errors", "__version__"}
NEVER = {"transformers", "diffusers", "torchvision"}
NOT_IN = {"diffusion": {"torch.nn", "PIL", "safetensors", "pathlib"}}
HEAVY = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "einops", "jaxtyping"}
NO_NOUNS = {"utils.py", "util.py", "misc.py", "common.py", "helpers.py"}
LONGEST = 500


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a piece of source imports, of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those of functions, nor those for type checkers."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef | ast.For | ast.While):
            for part in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)
        else:
            yield node


def is_or_is_in(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def offences(path: str, source: str) -> list[str]:
    """What a source file at `path` (below src/latentkit) does against the plan."""
    parts, tree, found = PurePosixPath(path).parts, ast.parse(source), []
    room = parts[0] if len(parts) > 1 else None
    if room is not None and room not in FLOORS:
        found.append(f"{room} is no room of the house")
    if room is None and parts[0].removesuffix(".py") not in {"__init__", "__main__", *EVERYWHERE}:
        found.append(f"{path} lies in no room")
    if parts[-1] in NO_NOUNS:
        found.append(f"{parts[-1]} is no noun")
    if source.count("\n") > LONGEST:
        found.append(f"{source.count(chr(10))} lines, more than {LONGEST}")
    names = set(imported(tree))
    for name in names:
        if name.startswith("."):
            found.append(f"relative import {name}")
        if is_or_is_in(name, NEVER | NOT_IN.get(room or "", set())):
            found.append(f"imports {name}")
        target = name.split(".")[1] if name.startswith("latentkit.") else None
        if room in FLOORS and target in FLOORS and target != room:
            if FLOORS[target] > FLOORS[room]:
                found.append(f"imports up: {room} -> {target}")
            elif FLOORS[target] == FLOORS[room] and (room, target) not in SIDEWAYS:
                found.append(f"imports sideways: {room} -> {target}")
        if room in FLOORS and name.startswith("latentkit.") and target not in {*FLOORS, *EVERYWHERE}:
            found.append(f"imports {name}, which is on no floor")
    if room == "cli" or path == "__init__.py":
        early = {name for node in at_import(tree.body) for name in imported(node)}
        found += [f"imports {name} before it is needed" for name in early if is_or_is_in(name, HEAVY)]
    return sorted(found)


def test_the_house_is_as_planned() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 30
    found = {str(p.relative_to(SOURCE)): offences(p.relative_to(SOURCE).as_posix(), p.read_text()) for p in files}
    assert not {path: wrong for path, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("diffusion/spacing.py", "from latentkit.nets.unet import UNet", "imports up: diffusion -> nets"),
        ("nets/unet.py", "def f():\n    import latentkit.model.denoiser", "imports up: nets -> model"),
        ("model/denoiser.py", "from latentkit import training", "imports up: model -> training"),
        ("data/source.py", "from latentkit.training.ema import Ema", "imports sideways: data -> training"),
        ("data/source.py", "from latentkit.checkpoints import files", "imports sideways: data -> checkpoints"),
        ("checkpoints/files.py", "from latentkit.data import source", "imports sideways: checkpoints -> data"),
        ("evaluation/metrics/kid.py", "import latentkit.applications", "imports sideways: evaluation -> applications"),
        (
            "training/trainer.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import latentkit.cli",
            "imports up: training -> cli",
        ),
        ("nets/unet.py", "from ..model import denoiser", "relative import ..model"),
        ("nets/unet.py", "from latentkit.version import NUMBER", "imports latentkit.version, which is on no floor"),
        ("applications/fit.py", "def f():\n    from diffusers import DDIMScheduler", "imports diffusers"),
        ("data/pictures.py", "import torchvision.transforms", "imports torchvision.transforms"),
        ("nets/towers.py", "try:\n    import transformers\nexcept ImportError:\n    pass", "imports transformers"),
        ("diffusion/guidance.py", "from torch import nn", "imports torch.nn"),
        ("diffusion/guidance.py", "import torch.nn.functional as F", "imports torch.nn.functional"),
        ("cli/train.py", "import torch", "imports torch before it is needed"),
        ("cli/train.py", "if 1:\n    from PIL import Image", "imports PIL before it is needed"),
        ("cli/train.py", "class A:\n    import numpy.linalg", "imports numpy.linalg before it is needed"),
        ("__init__.py", "try:\n    import torch\nfinally:\n    pass", "imports torch before it is needed"),
        ("nets/utils.py", "", "utils.py is no noun"),
        ("tools/noun.py", "", "tools is no room of the house"),
        ("noun.py", "", "noun.py lies in no room"),
        ("nets/unet.py", "\n" * 501, "501 lines, more than 500"),
    ],
)
def test_every_offence_is_found(path: str, source: str, offence: str) -> None:
    assert offence in offences(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/trainer.py", "from latentkit.data.loader import Loader\nfrom latentkit.checkpoints import files"),
        ("applications/fit.py", "from latentkit.evaluation.metrics.kid import kid\nimport torch.nn"),
        ("diffusion/schedule.py", "from latentkit.errors import InputError\nimport torch"),
        ("cli/train.py", "def f():\n    import torch\n\nfrom latentkit.applications.request import Request"),
        ("__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_what_is_allowed_is_no_offence(path: str, source: str) -> None:
    assert offences(path, source) == []


def loaded(statements: str) -> set[str]:
    """The heavy modules in a fresh interpreter after `statements`."""
    code = f"{statements}\nimport sys\nprint(*({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    every = "import importlib, pkgutil, latentkit, latentkit.cli as cli\n" + (
        "for module in pkgutil.iter_modules(cli.__path__): importlib.import_module('latentkit.cli.' + module.name)"
    )
    assert loaded(every) == set()
    assert "torch" in loaded("import latentkit.nets.unet")


def test_torchvision_is_not_installed_by_anything() -> None:
    assert importlib.util.find_spec("torchvision") is None
