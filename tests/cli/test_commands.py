"""The command line as a person types it: what it prints, writes, refuses, and how it exits."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

import latentkit
from latentkit import cli
from latentkit.applications.metadata import chunks, read
from latentkit.checkpoints import files
from latentkit.checkpoints.adapters.controlnet_names import controlnet_pairs
from latentkit.checkpoints.adapters.lora_files import write_lora
from latentkit.checkpoints.files import save_model
from latentkit.checkpoints.names.rename import given
from latentkit.checkpoints.storage.digest import Digest
from latentkit.cli.output import check_folder, show, slug, write_new
from latentkit.data.pictures import to_png
from latentkit.errors import InputError
from latentkit.nets.controlnet import ControlNet
from latentkit.nets.lora import Change

Run = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, tiny_model(), {"defaults": {"steps": 3}})
    return path


@pytest.fixture
def run(run: Run, model: Path) -> Run:
    """Runs the command in an empty folder that holds the model `tiny.safetensors`; gives the exit code."""
    os.link(model, "tiny.safetensors")
    return run


M = ("-m", "tiny.safetensors")


def test_generate_prints_paths_and_never_writes_over(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (
        ["out/red-heart-7.png", "out/red-heart-8.png"],
        ["out/red-heart-7-2.png", "out/red-heart-8-2.png"],
    ):
        assert run("generate", "Red heart", *M, "-n", "2", "--seed", "7") == 0
        shown = capsys.readouterr()
        assert shown.out.split() == expected
        assert shown.err == ""
    first, second = (Path(name).read_bytes() for name in ("out/red-heart-7.png", "out/red-heart-7-2.png"))
    assert first == second


def test_every_option_reaches_the_request(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("init.png").write_bytes(to_png(torch.zeros(3, 16, 16)))
    words = (
        "--steps 4 --seed 5 --guidance 3.5 --sampler euler --spacing karras --size 40x24 --negative dog --init init.png"
    )
    options = shlex.split(f"{words} --strength 0.5 -o here --json --grid --exact")
    assert run("generate", "cat", *M, *options) == 0
    line, grid = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    request = read(Path(line["path"]).read_bytes(), "x").request
    got = request.model_dump(exclude={"init", "guidance_low", "guidance_high"}, exclude_none=True)
    assert got == {
        "task": "image-to-image",
        "prompt": "cat",
        "negative": "dog",
        "seed": 5,
        "width": 40,
        "height": 24,
        "sampler": "euler",
        "spacing": "karras",
        "steps": 4,
        "guidance_scale": 3.5,
        "strength": 0.5,
    }
    assert (line["steps"], line["path"], grid["path"]) == (4, "here/cat-5.png", "here/grid.png")
    assert Path("here/grid.png").read_bytes()[:4] == b"\x89PNG"


def test_replay_makes_the_same_bytes_in_another_process(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "red heart", "green apple", *M, "-n", "2", "--seed", "7") == 0
    picture = capsys.readouterr().out.split()[2]
    command = [sys.executable, "-m", "latentkit", "replay", picture, *M, "-o", "again"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["again/green-apple-7-replay.png"]
    assert Path(done.stdout.strip()).read_bytes() == Path(picture).read_bytes()


def test_every_option_of_guidance_reaches_the_request_and_is_replayed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model("weak.safetensors", tiny_model(label=True), {})
    options = (
        "--seed 1 --also 'dog:-0.5' --also 'a: b' --guidance 3 --guidance-kind apg --guidance-rescale 0.7 "
        "--guidance-low 0.1 --guidance-high 50 --pag 2 --sampler 'Euler a' --eta 0.5 --guidance-model weak.safetensors"
    )
    assert run("generate", "cat", *M, *shlex.split(options)) == 0
    request = read(Path(capsys.readouterr().out.strip()).read_bytes(), "x").request
    assert request.guidance_model is not None
    assert request.guidance_model.digest == Digest(Path("weak.safetensors"))()
    got = request.model_dump(exclude={"guidance_model", "task", "width", "height", "spacing"}, exclude_none=True)
    assert got == {
        "prompt": "cat",
        "negative": "",
        "also": (("dog", -0.5), ("a: b", 1.0)),
        "seed": 1,
        "steps": 3,
        "sampler": "euler_ancestral",
        "eta": 0.5,
        "guidance_scale": 3.0,
        "guidance_kind": "apg",
        "guidance_rescale": 0.7,
        "guidance_low": 0.1,
        "guidance_high": 50.0,
        "pag_scale": 2.0,
    }
    assert run("replay", "out/cat-1.png", *M, "--guidance-model", "tiny.safetensors") == 2
    assert "tiny.safetensors is not the guidance model of out/cat-1.png" in capsys.readouterr().err
    assert run("replay", "out/cat-1.png", *M) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "needs the guidance model whose file has the sha256" in said
    assert "--guidance-model FILE" in said
    assert run("replay", "out/cat-1.png", *M, "--guidance-model", "weak.safetensors") == 0
    assert Path("out/cat-1-replay.png").read_bytes() == Path("out/cat-1.png").read_bytes()


def test_replay_says_what_differs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    save_model("other.safetensors", tiny_model(label=True), {})
    run("generate", "cat", *M, "--seed", "1")
    assert run("replay", "out/cat-1.png", "-m", "other.safetensors") == 1
    told = capsys.readouterr().err
    assert "model other" in told
    assert "instead of tiny" in told
    assert "the bytes differ from out/cat-1.png" in told
    assert Path("out/cat-1-replay.png").exists()
    assert run("replay", "out/cat-1.png") == 2
    assert "not shipped; give it with -m" in capsys.readouterr().err


def test_replay_believes_little(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run("generate", "cat", *M, "--seed", "1")
    path, threads = Path("out/cat-1.png"), torch.get_num_threads()
    machine = read(path.read_bytes(), "x").machine.model_copy(update={"threads": 4096})
    record = read(path.read_bytes(), "x").model_copy(update={"machine": machine})
    path.write_bytes(to_png(torch.zeros(3, 8, 8), chunks(record)))
    assert run("replay", str(path), *M) == 1
    assert "threads 1 instead of 4096" in capsys.readouterr().err
    assert torch.get_num_threads() == threads
    monkeypatch.setattr("latentkit.cli.replay.LARGEST", 10)
    assert run("replay", str(path), *M) == 1
    assert "is larger than" in capsys.readouterr().err


def test_replay_of_image_to_image_asks_for_the_very_picture(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_bytes(to_png(torch.zeros(3, 16, 16)))
    Path("b.png").write_bytes(to_png(torch.ones(3, 16, 16)))
    assert run("generate", "cat", *M, "--seed", "1", "--init", "a.png") == 0
    assert run("replay", "out/cat-1.png", *M) == 2
    assert "was drawn from another picture (whose pixels have the sha256" in (told := capsys.readouterr().err)
    assert "give it with --init PICTURE" in told
    assert run("replay", "out/cat-1.png", *M, "--init", "b.png") == 2
    assert "b.png is not the init of out/cat-1.png: its sha256 is" in capsys.readouterr().err
    assert run("replay", "out/cat-1.png", *M, "--init", "a.png") == 0


def test_inpainting_and_its_replay(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_bytes(to_png(torch.zeros(3, 32, 32)))
    Path("m.png").write_bytes(to_png(torch.linspace(-1, 1, 32).sign().expand(1, 32, 32)))
    assert run("generate", "cat", *M, "--seed", "1", "--init", "a.png", "--mask", "m.png") == 0
    assert run("replay", "out/cat-1.png", *M, "--init", "a.png") == 2
    assert "drawn from a mask picture (whose pixels have the sha256" in capsys.readouterr().err
    assert run("replay", "out/cat-1.png", *M, "--init", "a.png", "--mask", "m.png") == 0
    assert run("generate", "dog", *M, "--seed", "1", "--init", "a.png", "--extend", "8,0,0,0", "--no-paste") == 0
    request = read(Path("out/dog-1.png").read_bytes(), "x").request
    assert (request.width, request.extend, request.paste) == (40, (8, 0, 0, 0), False)


def test_a_lora_and_a_controlnet_and_their_replay(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    network = tiny_model()
    weight = network.denoiser.unet.down[0].blocks[0].residual.conv_in.weight
    change = Change(torch.ones(1, *weight.shape[1:]), torch.ones(len(weight), 1, 1, 1) * 0.1)
    write_lora("style.safetensors", network, {"denoiser.unet.down.0.blocks.0.residual.conv_in.weight": change})
    control = ControlNet(network.architecture.network)
    save_file(given(controlnet_pairs(control, "ldm"), control.state_dict()), "edges.safetensors")
    Path("hint.png").write_bytes(to_png(torch.zeros(3, 16, 16)))
    options = ("--lora", "style.safetensors:0.5", "--lora", "style.safetensors")
    assert run("generate", "cat", *M, "--seed", "1", *options, "--control", "edges.safetensors:hint.png:0.8") == 0
    request = read(Path("out/cat-1.png").read_bytes(), "x").request
    assert [weight for _, weight in request.lora or ()] == [0.5, 1.0]
    assert [weight for _, _, weight in request.control or ()] == [0.8]
    capsys.readouterr()
    given_ = []
    for wanted, option, value in (
        ("needs the hint picture", "--hint", "hint.png"),
        ("needs the LoRA whose file has", "--lora", "style.safetensors"),
        ("needs the ControlNet whose file has", "--control", "edges.safetensors"),
    ):
        assert run("replay", "out/cat-1.png", *M, *given_) == 2
        assert wanted in capsys.readouterr().err
        given_ += [option, value]
    assert run("replay", "out/cat-1.png", *M, *given_) == 0
    assert run("replay", "out/cat-1.png", *M, "--lora", "edges.safetensors") == 2
    assert "edges.safetensors is no lora of out/cat-1.png: its sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generat", "x"], 2, "Did you mean 'generate'?"),
        (["generate", "x", "--sed", "1"], 2, "--seed"),
        (["generate", "x", "-m", "tiny.safetensor"], 2, "did you mean 'tiny.safetensors'"),
        (["generate", "x", *M, "--sampler", "dpmpp"], 2, "sampler 'dpmpp' is unknown"),
        (["generate", "x", *M, "--size", "big"], 2, "not WIDTHxHEIGHT"),
        (["generate", "x", *M, "--size", "30"], 2, "multiples of"),
        (["generate", "x", *M, "--strength", "2"], 2, "must be at most 1"),
        (["generate", "x", *M, "--guidance-kind", "cgf"], 2, "guidance_kind: must be"),
        (["generate", "x", *M, "--also", "y:1000"], 2, "weight of also 1: must be at most 100"),
        (["generate", "x", *M, "--guidance-model", "tiny.safetensor"], 2, "did you mean 'tiny.safetensors'"),
        (["generate", "x", *M, "--init", "none.png"], 2, "none.png: cannot be read"),
        (["generate", "x", *M, "--depth", "none.png"], 2, "none.png: cannot be read"),
        (["generate", "x", *M, "--noise-level", "20"], 2, "takes no noise level; upscaling and"),
        (["generate", "x", *M, "--lora", "none.pt:0.5"], 2, "none.pt: cannot be read"),
        (["generate", "x", *M, "--control", "a.safetensors"], 2, "is not FILE:HINT.png"),
        (["generate", "x", *M, "--extend", "8,8"], 2, "not LEFT,TOP,RIGHT,BOTTOM"),
        (["generate", "x", *M, "-o", "tiny.safetensors"], 2, "cannot go to tiny.safetensors: tiny.safetensors is no"),
        (["generate", "x", *M, "-o", "tiny.safetensors/x"], 2, "tiny.safetensors is no folder; name another"),
        (["generate", "x", *M, "-o", "x" * 300], 2, "File name too long"),
        (["generate", "x", *M, "--size", "30", "-o", "out/x"], 2, "multiples of"),
        (["reconstruct", "broken.safetensors", *M], 1, "broken.safetensors: "),
        (["compare-samplers", "x", *M, "--sampler", "dpmpp"], 2, "sampler 'dpmpp' is unknown"),
        (["generate", "x", "-m", "broken.safetensors"], 1, "truncated"),
        (["replay", "none.png", *M], 2, "none.png: cannot be read"),
        (["replay", "tiny.safetensors", *M], 1, "is not a PNG"),
    ],
)
def test_wrong_input(words: list[str], code: int, message: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.safetensors").write_bytes(b"\x10")
    assert run(*words) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not Path("out").exists()


def test_a_contact_sheet_that_cannot_be_written_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    Path("pictures/gray.png").write_bytes(to_png(torch.zeros(3, 8, 8)))
    assert run("data", "check", "pictures", "--sheet", "missing/sheet.png") == 1
    assert "missing/sheet.png could not be written: No such file" in capsys.readouterr().err


def test_a_contact_sheet_is_a_png_and_is_named_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    Path("pictures/gray.png").write_bytes(to_png(torch.zeros(3, 8, 8)))
    assert run("data", "check", "pictures", "--sheet", "sheet.jpg") == 2
    assert "name it sheet.png" in capsys.readouterr().err
    assert not Path("sheet.jpg").exists()


def test_the_cache_is_shown_and_cleared(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    place = Path("cache/latentkit/latents")
    assert run("data", "cache") == 0
    assert capsys.readouterr().out == f"{place}: 0.0 MB\n"
    (place / "abc").mkdir(parents=True)
    (place / "abc" / "manifest.json").write_text('{"source": "/pictures of mine"}')
    (place / "abc" / "bucket-0.bin").write_bytes(b"x" * 3_000_000)
    assert run("data", "cache") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{place}: 3.0 MB"
    assert shown[1].endswith("/pictures of mine")
    assert run("data", "cache", "--clear") == 0
    assert capsys.readouterr().out == f"{place}: 0.0 MB; 1 caches deleted, 3.0 MB freed\n"
    assert not (place / "abc").exists()


def test_conversions_are_counted_and_cleared_too(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    place = Path("cache/latentkit/openvino")
    place.mkdir(parents=True)
    for name in ("one.bin", "one.xml", "two.77.bin"):  # the last is being written
        (place / name).write_bytes(b"x" * 2_000_000)
    assert run("data", "cache") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"{place}: 4.0 MB"]
    assert run("data", "cache", "--clear") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"{place}: 0.0 MB; 2 files deleted, 4.0 MB freed"]
    assert [path.name for path in place.iterdir()] == ["two.77.bin"]


def test_replay_of_a_truncated_picture(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", "cat", *M, "--seed", "1")
    whole = Path("out/cat-1.png").read_bytes()
    capsys.readouterr()
    Path("cut.png").write_bytes(whole[:-30])
    assert run("replay", "cut.png", *M) == 1
    shown = capsys.readouterr()
    assert "the bytes differ from cut.png: it is truncated" in shown.err
    assert Path(shown.out.strip()).read_bytes() == whole
    Path("cut.png").write_bytes(whole[:60])
    assert run("replay", "cut.png", *M) == 1
    assert "what says how it was drawn is lost" in capsys.readouterr().err


def test_verbose_shows_where_an_error_came_from(run: Run) -> None:
    with pytest.raises(InputError):
        run("-v", "generate", "x", "-m", "none.safetensors")


def test_signals_end_with_their_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "load", interrupted)
    assert run("generate", "x", *M) == 130
    monkeypatch.setattr(files, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert run("generate", "x", *M) == 143


def test_version_and_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"latentkit {latentkit.__version__}\n"
    assert run("--help") == 0
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert all(name in commands for name in ("generate", "replay", "fit", "train", "data"))


def test_nothing_heavy_is_imported_before_it_is_used(model: Path) -> None:
    program = f"""
import sys
import latentkit
assert not {{"numpy", "pydantic", "typer"}} & sys.modules.keys()
assert "generate" in dir(latentkit)
from latentkit.cli import application
import typer.main
typer.main.get_command(application())
heavy = {{"torch", "numpy", "PIL", "pydantic", "yaml", "tokenizers"}} & sys.modules.keys()
assert not heavy, heavy
latentkit.load({str(model)!r})
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_lead_somewhere() -> None:
    assert all(hasattr(latentkit, name) for name in latentkit.__all__)
    assert sorted(name for names in latentkit._HOMES.values() for name in names) == sorted(latentkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        latentkit.lode  # noqa: B018


def test_names_of_files(tmp_path: Path) -> None:
    assert slug("../../A slice of: pizza!") == "a-slice-of-pizza"
    assert slug("猫 😀") == "猫"
    assert len(slug("x y " * 100)) <= 48
    assert [write_new(tmp_path, "a", "png", b"x").name for _ in range(3)] == ["a.png", "a-2.png", "a-3.png"]
    assert write_new(tmp_path / "new" / "folder", "a", "png", b"x").read_bytes() == b"x"
    with pytest.raises(InputError, match="could not be written"):
        write_new(tmp_path, "none/a", "png", b"x")
    with pytest.raises(InputError, match="pictures cannot go to"):
        write_new(tmp_path / "a.png", "a", "png", b"x")


@pytest.mark.parametrize("place", ["loop", "gone", "new/" + "n" * 300, "file/new"])
def test_a_folder_that_cannot_be_is_refused_before_the_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="pictures cannot go to"):
        check_folder(tmp_path / place)
    check_folder(tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone", "loop"]
    with pytest.raises(InputError, match="pictures cannot go to"):
        write_new(tmp_path / place, "a", "png", b"x")


def test_a_failed_write_leaves_no_half_picture(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_new(tmp_path, "a", "png", "text")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_progress_is_shown_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentkit.applications.generate import Progress

    def shown(seconds: float, terminal: bool) -> str:
        clock = iter([0.0, seconds / 2, seconds])
        monkeypatch.setattr("latentkit.cli.output.time.monotonic", lambda: next(clock))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        assert not list(show(Progress((0,), i, 2, i / 2, torch.zeros(1), i) for i in (1, 2)))
        return capsys.readouterr().err

    cli.LOG.setLevel("INFO")
    assert shown(1.0, terminal=True) == ""
    assert "step 1/2  5 s left" in shown(10.0, terminal=True)
    assert shown(10.0, terminal=False) == ""
    assert "\x1b" not in shown(100.0, terminal=False) != ""
    cli.LOG.setLevel("ERROR")
    assert shown(100.0, terminal=True) == ""
    cli.LOG.setLevel("NOTSET")
