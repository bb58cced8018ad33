"""Backends: networks of a model that OpenVINO computes, converted once and kept in the cache folder.

A converted network answers in the place of the network's own `forward`, so that what calls it knows nothing of it.
What cannot be converted is refused, never computed by torch in silence.
"""

import copy
import hashlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from latentkit.applications.request import Request, known
from latentkit.checkpoints.files import Model, load
from latentkit.data.source import cache_home
from latentkit.errors import InputError
from latentkit.model.first_stage import WHOLE_ELSEWHERE, FirstStage
from latentkit.model.latent_diffusion import LatentDiffusion
from latentkit.nets.layers import sinusoids
from latentkit.nets.unet import Descending

FORMAT = 1
"""Of what is kept; another format has other keys."""
ROOM = 32 << 30
"""Bytes that are kept: of more, conversions that were used longest ago are deleted."""
TRACED = 16
"""Rows and columns that a network is traced on, where its input divides by them: the answer is thrown away."""

Form = tuple[tuple[str, int | None], ...]
"""How a network is called: each argument with the length of its list (None: one tensor; 0: a flag that is on)."""


def check(request: Request, network: LatentDiffusion, low_memory: bool = False) -> None:
    """InputError where a resolved request asks for a backend that is not at hand or cannot draw it."""
    if request.backend != "openvino":
        return
    _openvino()
    device = network.first_stage.latent_mean.device
    if device.type != "cpu":
        raise InputError(f"backend 'openvino' draws on the CPU and the model lies on {device}; load it there")
    if low_memory:
        raise InputError("backend 'openvino' keeps its own copy of the weights: leave out low memory", exit_code=2)
    pixels = known(request.height) * known(request.width)
    if network.first_stage.autoencoder is not None and pixels > WHOLE_ELSEWHERE:
        got = f"{request.width}x{request.height} pixels are asked of backend 'openvino', which takes {WHOLE_ELSEWHERE}"
        raise InputError(f"{got}: more pass the first stage in strips; take backend 'torch'", exit_code=2)


def version() -> str:
    """That of the openvino package."""
    return str(_openvino().get_version())


def cache_folder() -> Path:
    """Where conversions are kept."""
    return cache_home() / "openvino"


def running(network: LatentDiffusion, request: Request) -> AbstractContextManager[Any]:
    """A context, to be entered as often as wanted, in which the request's backend computes the networks it draws with.

    Its LoRAs must be on when a network is first called in it.
    """
    if request.backend != "openvino":
        return nullcontext()
    again, own = _AGAIN.get(network.denoiser), network.first_stage.autoencoder
    calls = [Converted(network.denoiser.unet, anew=_part(again, "denoiser.unet"))]
    if own is not None:
        for name in ("encoder", "decoder"):
            part = None if request.autoencoder else _part(again, f"first_stage.autoencoder.{name}")
            calls.append(Converted(getattr(own, name), own.config, part))
    others = [known(guide.model).network.denoiser.unet for guide in (request.guidance_model, request.refiner) if guide]
    others += [known(file.content) for file, *_ in request.control or ()]
    return _Running([*calls, *(Converted(other) for other in others)], network.first_stage)


def _part(again: Callable[[], LatentDiffusion] | None, name: str) -> Callable[[], nn.Module] | None:
    return None if again is None else lambda: again().get_submodule(name)


def conversions() -> list[Path]:
    """Files of all that is kept, without what is being written."""
    files = cache_folder().iterdir() if cache_folder().is_dir() else ()
    return [file for file in files if file.suffix in (".bin", ".xml") and "." not in file.stem]


def read(name: str | Path, *, whole: bool = False, dtype: torch.dtype | None = None) -> Model:
    """The model called `name` for drawing by OpenVINO; `dtype` None: bfloat16 if the machine has instructions for it.

    Unless it stays `whole`, its networks lose their weights in memory as they are converted: it is good for nothing
    else then, and takes no LoRA.
    """
    dtype = dtype or (torch.bfloat16 if _bf16() else None)
    model = load(name, "cpu", dtype)
    if not whole:
        _AGAIN[model.network.denoiser] = lambda: load(name, "cpu", dtype).network
    return model


_AGAIN: WeakKeyDictionary[nn.Module, Callable[[], LatentDiffusion]] = WeakKeyDictionary()
"""Of models that need not stay whole, by their denoisers, what reads them anew."""


class _Running:
    """See `running`; pictures pass the first stage whole, since strips are torch's work."""

    def __init__(self, calls: list["Converted"], first_stage: FirstStage) -> None:
        self.calls, self.first_stage = calls, first_stage
        self.inside = ExitStack()

    def __enter__(self) -> None:
        self.inside.enter_context(self.first_stage.in_strips(False))
        for call in self.calls:
            vars(call.network)["forward"] = call

    def __exit__(self, *error: object) -> None:
        for call in self.calls:
            vars(call.network).pop("forward", None)  # one that takes two parts is there twice
        self.inside.close()


class Converted:
    """A network as OpenVINO computes it: called as the network, it answers in the type of its first input.

    It computes in bfloat16 where the network's type has 16 bits and the machine has instructions for that, else in
    float32. `shape` is the config of a network that does not hold its own. With `anew`, which makes the network again,
    the network's weights are let go of.
    """

    def __init__(self, network: nn.Module, shape: Any = None, anew: Callable[[], nn.Module] | None = None) -> None:
        self.network = network
        self.shape = shape if shape is not None else getattr(network, "config", None)
        self.anew = anew
        self._kept: _Kept | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Errors: InputError where a gradient is wanted, or the network cannot be converted."""
        form, tensors = self._told(args, named)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise InputError("backend 'openvino' gives no gradient, which this guidance needs; take backend 'torch'")
        if self._kept is None or self._kept.dtype != _dtype(self.network):
            self._kept = _kept(self.network)
        kept = self._kept
        if form not in kept.models:
            kept.models[form] = _Compiled(self._model(kept, form, tensors), "bf16" if kept.half and _bf16() else "f32")
        rows = [(x.float() if x.is_floating_point() else x).contiguous().numpy() for x in tensors]
        answers = [torch.from_numpy(answer).to(tensors[0].dtype) for answer in kept.models[form](rows)]
        return answers[0] if len(answers) == 1 else answers

    def _told(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Form, list[Tensor]]:
        """How the network is called, and with what. Numbers that bfloat16 would round are made safe from it."""
        bound = inspect.signature(type(self.network).forward).bind(self.network, *args, **named).arguments
        if isinstance(self.network, Descending):
            bound["timestep"] = sinusoids(bound["timestep"], self.network.config.channels)
            if self.network.config.classes:
                bound["vector"] = bound["vector"].long()
        form: list[tuple[str, int | None]] = []
        tensors: list[Tensor] = []
        for name, value in list(bound.items())[1:]:
            if isinstance(value, Tensor):
                form.append((name, None))
                tensors.append(value)
            elif isinstance(value, (list, tuple)):
                form.append((name, len(value)))
                tensors += value
            elif value:
                form.append((name, 0))
        return tuple(form), tensors

    def _model(self, kept: "_Kept", form: Form, tensors: list[Tensor]) -> Any:
        """The conversion for one way of calling, made if there is none; its weights stay in the file."""
        about = [FORMAT, version(), type(self.network).__name__, repr(self.shape), form, kept.digest]
        path = cache_folder() / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.xml"
        try:
            model = _core().read_model(path)
            os.utime(path.with_suffix(".bin"))
        except (RuntimeError, OSError):
            logging.getLogger("latentkit").info("a %s is converted for OpenVINO, once", type(self.network).__name__)
            _write(path, self._traced(form, tensors), kept.half)
            model = _core().read_model(path)
        if self.anew is not None:
            self.network.to("meta", kept.dtype)
        return model

    def _traced(self, form: Form, tensors: list[Tensor]) -> Any:
        """OpenVINO's model of the network, for inputs of any size; traced in float32 and by the plain ways."""
        openvino = _openvino()
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        factors = [side // TRACED if side % TRACED == 0 else 1 for side in tensors[0].shape[2:]]
        with _own_forward(self.network), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer: that sizes are taken as they are, where they are fixed
            example = []
            for tensor in tensors:
                if tensor.ndim == 4:
                    h, w = (max(1, side // factor) for side, factor in zip(tensor.shape[2:], factors))
                    tensor = tensor[..., :h, :w]
                example.append(tensor.float() if tensor.is_floating_point() else tensor.clone())
            network = self.network
            if self.anew is not None:
                network = (self.anew() if _gone(network) else network).float()
            elif _dtype(network) != torch.float32:
                network = copy.deepcopy(network, {id(p): nn.Parameter(p.float(), False) for p in network.parameters()})
            try:
                called = {"example_input": tuple(example), "trace_kwargs": {"check_trace": False}}
                return openvino.convert_model(TorchScriptPythonDecoder(_Called(network, form), **called))
            except Exception as error:
                cause = error.__cause__ or error
                why = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
                what = f"this model's {type(network).__name__} cannot be converted for OpenVINO ({why})"
                raise InputError(f"{what}; take backend 'torch'") from error


class _Called(nn.Module):
    """A network called in one form, with all its tensors in a row."""

    def __init__(self, network: nn.Module, form: Form) -> None:
        super().__init__()
        self.network = network
        self.form = form

    def forward(self, *tensors: Tensor) -> Any:
        rest, told = iter(tensors), {}
        for name, count in self.form:
            told[name] = next(rest) if count is None else list(islice(rest, count)) or True
        return self.network(**told)


class _Compiled:
    """A conversion in memory, compiled for the shapes that it was last called with.

    Compiled for any shape it is slower, and what it answers would hang on what was asked before.
    """

    def __init__(self, model: Any, precision: str) -> None:
        self.model, self.precision = model, precision
        self.shapes: list[tuple[int, ...]] = []
        self.compiled: Any = None

    def __call__(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        shapes = [row.shape for row in rows]
        if self.shapes != shapes:
            self.compiled = None  # before another one holds the weights
            model = self.model.clone()
            model.reshape({place: list(shape) for place, shape in zip(model.inputs, shapes, strict=True)})
            options = {
                "INFERENCE_PRECISION_HINT": self.precision,
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": False,
            }
            self.compiled, self.shapes = _core().compile_model(model, "CPU", options), shapes
        return [np.array(answer) for answer in self.compiled(rows, share_inputs=True).to_tuple()]


class _Kept:
    """What is in memory of a network with certain weights, for a number of threads."""

    def __init__(self, digest: str, dtype: torch.dtype, threads: int) -> None:
        self.digest, self.dtype, self.threads = digest, dtype, threads
        self.models: dict[Form, _Compiled] = {}

    @property
    def half(self) -> bool:
        """Whether its type has 16 bits."""
        return self.dtype.itemsize == 2


_MEMORY: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
"""Of each network that lives, what it was last called as."""


def _kept(network: nn.Module) -> _Kept:
    """What is in memory of the network as it is now."""
    kept, threads = _MEMORY.get(network), torch.get_num_threads()
    digest = kept.digest if kept is not None and _gone(network) else _digest(network)
    wanted = digest, _dtype(network), threads
    if kept is None or (kept.digest, kept.dtype, kept.threads) != wanted:
        _MEMORY[network] = kept = _Kept(*wanted)
    return kept


def _digest(network: nn.Module) -> str:
    """The sha256 of all weights."""
    content = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _bf16() -> bool:
    """Whether the machine has instructions for bfloat16."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _gone(network: nn.Module) -> bool:
    return next(network.parameters()).is_meta


@contextmanager
def _own_forward(network: nn.Module) -> Iterator[None]:
    """Inside of this context the network computes by itself."""
    call = vars(network).pop("forward", None)
    try:
        yield
    finally:
        if call is not None:
            vars(network)["forward"] = call


def _write(path: Path, model: Any, half: bool) -> None:
    """The conversion at `path`, whole or not at all; others make room for it."""
    partial = path.with_name(f"{path.stem}.{os.getpid()}.xml")
    pairs = [(partial.with_suffix(end), path.with_suffix(end)) for end in (".bin", ".xml")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _openvino().save_model(model, partial, compress_to_fp16=half)
        for made, wanted in pairs:
            with open(made, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(made, wanted)
    except (OSError, RuntimeError) as error:
        what = f"the conversion for OpenVINO could not be written to {path.parent}: {error}"
        raise InputError(f"{what}; make room there, or set XDG_CACHE_HOME") from None
    finally:
        for made, _ in pairs:
            made.unlink(missing_ok=True)
    kept = sorted(path.parent.glob("*.bin"), key=lambda file: -file.stat().st_mtime)
    total = 0
    for file in kept:
        total += file.stat().st_size
        if total > ROOM and file.stem != path.stem:
            file.unlink(missing_ok=True)
            file.with_suffix(".xml").unlink(missing_ok=True)


def _openvino() -> Any:
    """The package, which would report its use over the network otherwise; InputError where it is not installed."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError:
        what = "backend 'openvino' needs the package openvino, which is not installed"
        raise InputError(f"{what}: pip install latentkit[openvino]", exit_code=2) from None
    return openvino


@cache
def _core() -> Any:
    """OpenVINO's runtime, one for the process."""
    return _openvino().Core()
