"""A model is one file: safetensors whose metadata holds all that rebuilds it.

It is written whole or not at all, and read strictly. The metadata entry `latentkit` is JSON: format, kind,
architecture, state (tokenizer, class names) and provenance. Nothing that is read from a file is imported
or called.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentkit.checkpoints.names.rename import finite
from latentkit.checkpoints.storage.archive import read_archive
from latentkit.checkpoints.storage.digest import Digest
from latentkit.checkpoints.storage.mapping import let_go
from latentkit.errors import InputError, nearest, wording
from latentkit.model.first_stage import FirstStage, FirstStageConfig
from latentkit.model.latent_diffusion import Architecture, LatentDiffusion, fit_network
from latentkit.nets.autoencoder import AutoencoderConfig
from latentkit.nets.tiny import TinyConfig
from latentkit.nets.unet import UNetConfig

FORMAT: Literal[1] = 1
SHIPPED = Path(__file__).resolve().parent.parent / "models"
RUN_MODEL = "model.safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MOST_BLOCKS = 2000
CHUNK = 1 << 24
Kind = Literal["latent-diffusion", "autoencoder"]


class Place(NamedTuple):
    """Where weights compute, and in which type (None: see `compute_type`)."""

    device: torch.device
    dtype: torch.dtype | None = None


class Model(NamedTuple):
    """A loaded model with the name and the sha256 of its file (empty for one that is still being trained)."""

    network: LatentDiffusion
    provenance: dict[str, Any] = {}  # noqa: RUF012
    name: str = "unsaved"
    sha256: str | Digest = ""
    place: Place | None = None
    """Where its parts compute when it is their turn, if they rest in their file (`load` with `low_memory`)."""

    @property
    def digest(self) -> str:
        """The sha256 of its file or folder, worked out when it is first asked for (see `Digest`).

        Empty, which is said on stderr, where that is no longer the one that was loaded.
        """
        if isinstance(self.sha256, str):
            return self.sha256
        try:
            return self.sha256()
        except InputError as error:
            logging.getLogger("latentkit").warning(f"{error}: its pictures' records do not tell the file")
            return ""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    kind: Kind
    architecture: dict[str, Any]
    state: dict[str, Any]
    provenance: dict[str, Any]


def invalid(
    error: ValidationError,
    what: str,
    allowed: Iterable[str] = (),
    exit_code: int = 1,
    parts: Mapping[str, tuple[str, ...]] = {},
) -> InputError:
    """The first lines of a pydantic error as an `InputError` about `what`; unknown names get the nearest `allowed`.

    `parts` are what the entries of a field consist of.
    """
    lines = []
    for entry in error.errors(include_url=False)[:4]:
        loc = [part for part in entry["loc"] if not str(part).startswith("<")]  # tags of kinds
        place = ".".join(map(str, loc))
        if len(loc) > 2 and loc[0] in parts and isinstance(loc[2], int):
            named = [parts[str(loc[0])][loc[2]], *map(str, loc[3:])]
            place = f"{' '.join(named)} of {loc[0]} {int(loc[1]) + 1}"
        if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(
                f"{place!r} is unknown" + (f"; {nearest(place, allowed)}" if allowed and len(loc) == 1 else "")
            )
        else:
            lines.append(f"{place}: {wording(entry)}" if place else wording(entry))
    return InputError(f"{what}: " + "; ".join(lines), exit_code=exit_code)


class Shapes(TorchFunctionMode):
    """Makes modules on the meta device without drawing weights (torch imports its compiler to draw there)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shipped() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find(name: str | Path) -> Path:
    """The model file that `name` means: a shipped model's bare name, a file, or the model in a run folder.

    Errors: InputError (exit code 2) with the nearest names.
    """
    if str(name) in shipped():
        return SHIPPED / f"{name}.safetensors"
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if found := _in_folder(path):
            return found
        raise InputError(f"folder {name} holds no model; a run writes {RUN_MODEL} when it is finished", exit_code=2)
    beside = [str(path.with_name(p.name)) for p in path.parent.glob("*") if p.suffix == ".safetensors" or _in_folder(p)]
    runs = [str(p) for p in Path("runs").glob("*") if _in_folder(p)]
    known = {*shipped(), *beside, *runs}
    hint = nearest(str(name), known) if known else "no model is shipped and none lies there"
    where = f"it is no shipped model ({', '.join(shipped()) or 'none'}), no file and no run folder"
    raise InputError(f"no model {str(name)!r}: {where} such as runs/NAME; {hint}", exit_code=2)


def _in_folder(folder: Path) -> Path | None:
    """The model of a run folder: `model.safetensors` (one stage), or the one model file that a fit puts there."""
    if (folder / RUN_MODEL).is_file():
        return folder / RUN_MODEL
    found = [path for path in folder.glob("*.safetensors") if not path.name.startswith("tmp-")]
    return found[0] if len(found) == 1 else None


def compute_type(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in: as stored, but float32 on a CPU that has no fast bfloat16."""
    if device.type != "cpu" or stored == torch.float32:
        return stored
    fast = stored == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def brought(weight: Tensor, place: Place) -> Tensor:
    """A weight as it computes at `place`, laid out as is fastest there; the same tensor where nothing changes."""
    dtype = place.dtype or compute_type(weight.dtype, place.device)
    convolution = weight.ndim == 4 and dtype == torch.bfloat16
    return weight.to(place.device, dtype, memory_format=torch.channels_last if convolution else torch.preserve_format)


def bring(parameter: nn.Parameter, place: Place) -> None:
    """Let a parameter hold its weight as it computes at `place`; what is copied from a file leaves memory there."""
    weight = parameter.data
    ready = brought(weight, place)
    parameter.data = ready
    if ready is not weight:
        let_go([weight])


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    low_memory: bool = False,
) -> Model:
    """The model called `name` (see `find`), ready to generate, on `device` (a GPU where there is one).

    Files and folders of other programs are read too (see `layouts.py`). With `low_memory` its parts rest in the file,
    and are in memory and on the device only while `generate` needs them.
    """
    from latentkit.checkpoints import layouts, probe  # they read our own files with what is here
    from latentkit.checkpoints.adapters.survey import instead
    from latentkit.checkpoints.parts import Parts

    place = Place(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), dtype)
    foreign = Path(name)
    if str(name) in shipped() or not foreign.exists() or layouts.layout_of(foreign) == "latentkit":
        try:
            path = find(name)
            digest = _digest(path, place)
            network, provenance = load_model(path, place.device, dtype, low_memory)
        except InputError as error:
            raise instead(error, foreign, "a whole model") from None
        stem = path.resolve().parent.name if path.name == RUN_MODEL else path.stem
        return Model(network, provenance, stem, digest, place if low_memory else None)
    digest = _digest(foreign, place)
    try:
        network, provenance, _, certain, _ = layouts.open_model(foreign, keep=not low_memory)
    except InputError as error:
        raise instead(error, foreign, "a whole model") from None
    for buffer in network.buffers():
        buffer.data = buffer.data.to(place.device)
    if not low_memory:
        let_go(network.first_stage.parameters())  # its turn is the last
        for parameter in network.parameters():
            bring(parameter, place)
    if not certain:
        resting = {name: [(module, place)] for name, module in network.named_children()} if low_memory else {}
        with Parts(resting) as parts:
            probe.settle(network, str(foreign), parts.turn if low_memory else None)
    return Model(network, provenance, foreign.stem, digest, place if low_memory else None)


def _digest(path: Path, place: Place) -> Digest:
    """A file's digest, worked out beside all else where that takes nothing from what computes."""
    digest = Digest(path)
    if place.device.type != "cpu":

        def work() -> None:
            with suppress(InputError):  # who asks for it is told
                digest()

        threading.Thread(target=work, daemon=True).start()
    return digest


def save_model(
    path: str | Path, model: LatentDiffusion, provenance: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the whole model to `path`, its weights as `dtype`, the latent statistics in float32.

    `provenance["defaults"]` holds the sampler settings that suit it (fields of `Request`). Errors: InputError for
    non-finite weights or a disk that refuses; a file that was at `path` before is then unharmed.
    """
    architecture = model.architecture
    prediction = {"eps": "epsilon"}.get(architecture.prediction, architecture.prediction)
    height, width = architecture.size
    spec = {"resolution": f"{width}x{height}", "prediction_type": prediction}
    document = _Document(
        format=FORMAT,
        kind="latent-diffusion",
        architecture=asdict(architecture),
        state=model.state(),
        provenance=provenance,
    )
    _write(Path(path), document, model, dtype, spec)


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    resting: bool = False,
) -> tuple[LatentDiffusion, dict[str, Any]]:
    """The model in the file at `path`, frozen and in evaluation mode, and its provenance.

    `dtype` None takes `compute_type`; `resting` weights are mapped, as they lie in the file. Errors: InputError names
    what is wrong with the file.
    """
    path = Path(path)
    document, tensors = _read(path, "latent-diffusion", resting)
    architecture = _architecture(path, document, Architecture)
    affordable(path, [architecture.network, architecture.first_stage, *architecture.towers()], len(tensors))
    try:
        with torch.device("meta"), Shapes():
            model = LatentDiffusion(architecture, document.state)
        own = architecture.first_stage
        fits = own is None or own.picture_channels == architecture.picture_channels
        if not fits or fit_network(architecture) != architecture:
            raise ValueError("its parts do not fit together")
    except Exception as error:
        raise InputError(f"{path}: its architecture cannot be built: {short(error)}") from None
    _fill(path, model, tensors, Place(torch.device(device), dtype), resting)
    return model, document.provenance


def save_autoencoder(
    path: str | Path, first_stage: FirstStage, provenance: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write a first stage (autoencoder and latent statistics) to `path`; errors as `save_model`."""
    if first_stage.autoencoder is None:
        raise InputError("the identity first stage has no autoencoder to save")
    architecture = asdict(first_stage.autoencoder.config)
    document = _Document(format=FORMAT, kind="autoencoder", architecture=architecture, state={}, provenance=provenance)
    _write(Path(path), document, first_stage, dtype, {})


def load_autoencoder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
) -> FirstStage:
    """The first stage in an autoencoder's file, or that of a whole model's, frozen; errors as `load_model`."""
    path = Path(path)
    document, tensors = _read(path, None)
    if document.kind == "latent-diffusion":
        return load_model(path, device, dtype)[0].first_stage
    config = _architecture(path, document, FirstStageConfig)
    affordable(path, [config], len(tensors))
    try:
        with torch.device("meta"), Shapes():
            first_stage = FirstStage(config, config.picture_channels)
    except Exception as error:
        raise InputError(f"{path}: its architecture cannot be built: {short(error)}") from None
    _fill(path, first_stage, tensors, Place(torch.device(device), dtype))
    return first_stage


def short(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _write(path: Path, document: _Document, module: nn.Module, dtype: torch.dtype, spec: dict[str, str]) -> None:
    """One safetensors file with a header of fixed order, so that equal models are equal bytes."""
    buffers = dict(module.named_buffers())
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if name in buffers else dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise InputError(f"the model was not saved to {path}: {_names(wrong)} not finite as {dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    chunks = [memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()) for name in order]
    content = hashlib.sha256()
    for chunk in chunks:
        content.update(chunk)
    provenance = document.provenance
    metadata = {
        "latentkit": json.dumps(document.model_dump(), ensure_ascii=False, allow_nan=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"latentkit/{document.kind}",
        "modelspec.implementation": "latentkit",
        "modelspec.title": str(provenance.get("name", path.stem)),
        "modelspec.hash_sha256": f"0x{content.hexdigest()}",
    }
    metadata |= {f"modelspec.{key}": value for key, value in spec.items()}
    if provenance.get("licence"):
        metadata["modelspec.license"] = str(provenance["licence"])
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, chunk in zip(order, chunks):
        shape, end = list(tensors[name].shape), offset + len(chunk)
        header[name] = {"dtype": TYPES[tensors[name].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"the model could not be saved to {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, kind: Kind | None, resting: bool = False) -> tuple[_Document, dict[str, Tensor]]:
    """The document and the tensors of a file of `kind` (None: either).

    They are read once: mapped, they would count twice. `resting` ones are mapped, and out of memory yet.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            pickled = start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")
            if pickled or path.suffix.lower() in PICKLES:
                raise InputError(f"{path}: is a pickle, which can run code when it is read; give a .safetensors model")
        with safe_open(path, "pt") as tables:
            metadata = tables.metadata() or {}
            document = _document(path, metadata, kind)
            tensors = {} if resting else {name: _unread(tables, name) for name in tables.offset_keys()}
        hashed = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(8 + int.from_bytes(start[:8], "little"))
            for tensor in tensors.values():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.readinto(data)
                hashed.update(data)
            while resting and (chunk := file.read(CHUNK)):
                hashed.update(chunk)
        content = f"0x{hashed.hexdigest()}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(f"{path}: is truncated, damaged or no safetensors file ({short(error)})") from None
    if content != metadata.get("modelspec.hash_sha256"):
        raise InputError(f"{path}: is damaged: its weights are not those that were written; get the file again")
    return document, read_archive(path).tensors if resting else tensors


def _unread(tables: Any, name: str) -> Tensor:
    """Memory for a tensor of a file (of another type than `TYPES`, the tensor)."""
    entry = tables.get_slice(name)
    dtype = next((dtype for dtype, word in TYPES.items() if word == entry.get_dtype()), None)
    return torch.empty(entry.get_shape(), dtype=dtype) if dtype else tables.get_tensor(name).clone()


def _document(path: Path, metadata: dict[str, str], kind: Kind | None) -> _Document:
    if "latentkit" not in metadata:
        raise InputError(f"{path}: is a safetensors file but no latentkit model: its metadata has no 'latentkit'")
    try:
        document = _Document.model_validate_json(metadata["latentkit"])
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            got = f"{path}: has model format {first['input']!r}"
            raise InputError(f"{got}; this version reads format {FORMAT}: update latentkit") from None
        raise invalid(error, f"{path}: its model description is invalid") from None
    if kind is not None and document.kind != kind:
        raise InputError(f"{path}: holds a model of kind {document.kind!r}; wanted is {kind!r}")
    return document


def _architecture(path: Path, document: _Document, config: Any) -> Any:
    try:
        return TypeAdapter(config).validate_json(json.dumps(document.architecture), strict=True)
    except ValidationError as error:
        raise invalid(error, f"{path}: its architecture is invalid") from None


def affordable(what: object, parts: Iterable[Any], most: int = MOST_BLOCKS) -> None:
    """Refuse configs that ask for more blocks than can be meant, before any is built; InputError."""
    blocks: list[int] = []
    for part in parts:
        if isinstance(part, TinyConfig):
            blocks += part.blocks
        elif isinstance(part, AutoencoderConfig):
            blocks.append(len(part.multipliers) * part.blocks)
        elif isinstance(part, UNetConfig):
            blocks += [part.blocks * (1 + depth) for depth in part.depth] + [part.middle_depth]
        elif part is not None:
            blocks.append(part.layers)
    if any(count < 0 for count in blocks) or sum(blocks) > most:
        raise InputError(f"{what}: its architecture asks for {sum(blocks)} blocks; at most {most} are built")


def _names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + rest + (" is" if len(ordered) == 1 else " are")


def _fill(path: Path, module: nn.Module, tensors: dict[str, Tensor], place: Place, resting: bool = False) -> None:
    """Give `module`, built on the meta device, the tensors of the file; InputError names those that do not fit."""
    expected = module.state_dict()
    shape = {name: tuple(tensors[name].shape) for name in expected.keys() & tensors.keys()}
    complaints: dict[str, Iterable[str]] = {
        "missing": expected.keys() - tensors.keys(),
        "not known to this architecture": tensors.keys() - expected.keys(),
        "of another shape": [name for name in shape if shape[name] != tuple(expected[name].shape)],
        "not of floating type": [name for name, tensor in tensors.items() if tensor.dtype not in TYPES],
        "not finite": [name for name, t in tensors.items() if t.dtype in TYPES and not _finite(t)],
    }
    wrong = [f"{_names(names)} {complaint}" for complaint, names in complaints.items() if names]
    if wrong:
        raise InputError(f"{path}: does not hold the model that it describes: " + "; ".join(wrong))
    parameters = dict(module.named_parameters())
    ready = {}
    for name in expected:
        tensor = tensors.pop(name)  # what is copied is let go of
        if name not in parameters:
            tensor = tensor.to(place.device, torch.float32)
        ready[name] = tensor if resting or name not in parameters else brought(tensor, place)
    module.load_state_dict(ready, assign=True)
    module.eval().requires_grad_(False)


def _finite(tensor: Tensor) -> bool:
    found = finite(tensor)
    let_go([tensor])
    return found
