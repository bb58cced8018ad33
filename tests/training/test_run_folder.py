"""The run folder: one recipe, one process, journals that only grow."""

import errno
import subprocess
import sys
import types

import pytest

from latentkit.errors import InputError
from latentkit.training.run.run_folder import Journal, RunFolder
from latentkit.training.run.store import FileCalls

RECIPE = {"name": "toy", "optimiser": {"lr": 1e-5, "betas": (0.9, 0.99)}, "steps": 10}


def test_same_recipe_is_taken_again(tmp_path):
    for _ in range(2):
        RunFolder(tmp_path / "runs" / "toy", RECIPE).close()
    names = {entry.name for entry in (tmp_path / "runs" / "toy").iterdir()}
    assert names == {".lock", "recipe.yaml", "metrics.jsonl", "timings.jsonl", "samples", "checkpoints"}


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    RunFolder(tmp_path, RECIPE).close()
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}
    other = {"name": "toy", "optimiser": {"lr": 2e-5, "betas": [0.9, 0.99], "clip": 1.0}}
    with pytest.raises(InputError) as error:
        RunFolder(tmp_path, other)
    lines = str(error.value).splitlines()
    assert lines[1:4] == [
        "  optimiser.lr: 1e-05 -> 2e-05",
        "  optimiser.clip: (absent) -> 1.0",
        "  steps: 10 -> (absent)",
    ]
    assert "Nothing was changed" in lines[4]
    assert before == {entry: entry.read_bytes() for entry in tmp_path.iterdir() if entry.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"not a run folder .*holiday\.jpg"):
        RunFolder(tmp_path, RECIPE)
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "holiday.jpg", RECIPE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_recipe_that_cannot_be_read_is_an_input_error(tmp_path):
    RunFolder(tmp_path, RECIPE).close()
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match="cannot be read"):
        RunFolder(tmp_path, RECIPE)


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    program = (
        "import sys; from latentkit.training.run.run_folder import RunFolder; from latentkit.errors import InputError\n"
        f"try: RunFolder({str(tmp_path)!r}, {RECIPE!r})\n"
        "except InputError as error: sys.exit(str(error))"
    )
    with RunFolder(tmp_path, RECIPE):
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "in use by another process" in second.stderr
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_rank_that_does_not_write_writes_nothing(tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, writes=False) as run:
        run.resume(0, 0)
        run.log(1, {"loss": 1.0})
        run.time(1, {"seconds": 1.0})
        run.snapshot(1, {}, {})
    assert not (tmp_path / "run").exists()


def test_journal_cuts_back_drops_torn_lines_and_tells_when_lines_are_missing(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, FileCalls())
    journal.add({"step": 1, "loss": float("nan"), "norm": float("inf")})
    kept = journal.sync()
    journal.add({"step": 2})
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    journal = Journal(path, FileCalls())
    assert path.read_text() == '{"step": 1, "loss": null, "norm": null}\n{"step": 2}\n'
    journal.cut(kept)
    assert path.stat().st_size == kept
    journal.add({"step": 2, "again": True})
    assert path.read_text().splitlines()[1:] == ['{"step": 2, "again": true}']
    journal.cut(1000)
    assert "lines are missing" in capsys.readouterr().err


def test_journal_keeps_lines_that_a_full_disk_refused(tmp_path, capsys):
    real = FileCalls()
    full = True

    def write(descriptor, data):
        if full:
            real.write(descriptor, data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real.write(descriptor, data)

    journal = Journal(tmp_path / "metrics.jsonl", real._replace(write=write))
    journal.add({"step": 1})
    with pytest.raises(OSError, match="No space"):
        journal.sync()
    full = False
    journal.add({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "the line is kept" in capsys.readouterr().err


def test_tensorboard_is_used_where_it_is(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunFolder(tmp_path, RECIPE) as run:
        run.resume(7, 0)
        run.log(8, {"loss": 0.5, "index": [1]})
    assert written == [(str(tmp_path / "tensorboard"), 7), ("loss", 0.5, 8), "closed"]


def test_no_tensorboard_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunFolder(tmp_path, RECIPE) as run:
        run.resume(0, 0)
        run.log(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
