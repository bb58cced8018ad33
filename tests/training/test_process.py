"""Never lose work, with real processes: kills and signals at random moments, two processes as one, strace's faults."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file
from toy import Warm, digest, train

KILLS = int(os.environ.get("LATENTKIT_KILLS", 5))  # runs that are killed, each one to three times
PACE = {"pause": 0.01, "save_every": 2}


@pytest.fixture(scope="module")
def warm():
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """The digests of a run that nothing happened to, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    assert warm.wait(warm.start(folder, **PACE)) == 0
    return digest(folder), time.monotonic() - begun


def test_kill_9_at_random_moments(warm, whole, tmp_path):
    expected, taken = whole
    chance = random.Random(KILLS)
    killed = 0
    for trial in range(KILLS):
        folder = tmp_path / f"{trial}"
        for _ in range(chance.randint(1, 3)):
            pid = warm.start(folder, **PACE)
            time.sleep(chance.uniform(0, taken))
            os.kill(pid, signal.SIGKILL)
            killed += warm.wait(pid) == -signal.SIGKILL
        assert warm.wait(warm.start(folder, **PACE)) == 0, Path(f"{folder}.log").read_text()
        assert digest(folder) == expected
        shutil.rmtree(folder)
    assert killed >= KILLS / 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_at_random_moments(warm, whole, tmp_path, number, code):
    """A second signal right after the first changes nothing."""
    expected, taken = whole
    chance = random.Random(code)
    for trial in range(2):
        folder = tmp_path / f"{trial}"
        pid = warm.start(folder, **PACE)
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, taken / 4))
        for _ in range(2):
            os.kill(pid, number)
        status = warm.wait(pid)
        assert status in (code, 0), Path(f"{folder}.log").read_text()
        if status:
            stopped = json.loads(max((folder / "checkpoints").glob("step-*/state.json")).read_bytes())["step"]
            assert f"after step {stopped}; run the same command" in Path(f"{folder}.log").read_text()
        assert warm.wait(warm.start(folder, **PACE)) == 0
        assert digest(folder) == expected


def pair(warm, folder, size=2, **changes):
    """Process ids of one run on several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        warm.start(folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **changes) for rank in range(size)
    ]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder, step=12):
    files = (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def test_two_processes_are_one_run_up_to_rounding(warm, tmp_path):
    """Also where they begin with unequal weights: the first one's count. Metrics are those of the global batch."""
    changes = {"dropout": 0.0, "turns": 2, "optimiser": "adamw", "steps": 4, "unequal": True}
    train(tmp_path / "one", **changes)
    pids = pair(warm, tmp_path / "two", **changes)
    assert [warm.wait(pid) for pid in pids] == [0, 0], Path(f"{tmp_path / 'two'}.log").read_text()
    one, two = tensors(tmp_path / "one", 4), tensors(tmp_path / "two", 4)
    assert set(one) == set(two)
    for name in one:
        if name.startswith("weights/net") and "seen" not in name:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3, msg=name)
    first, second = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in first] == [line["step"] for line in second]
    assert [line["net/loss"] for line in second] == pytest.approx([line["net/loss"] for line in first], rel=1e-3)
    assert second[0]["net/grad_norm"] == pytest.approx(first[0]["net/grad_norm"], rel=1e-2)


def test_two_processes_killed_and_signalled_end_with_the_same_bytes(warm, tmp_path):
    for pid in pair(warm, tmp_path / "whole", **PACE):
        assert warm.wait(pid) == 0, Path(f"{tmp_path / 'whole'}.log").read_text()
    pids = pair(warm, tmp_path / "run", **PACE)
    while not [*tmp_path.glob("run/checkpoints/step-00000004")]:
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        warm.wait(pid)
    pids = pair(warm, tmp_path / "run", **PACE)
    while not [*tmp_path.glob("run/checkpoints/step-00000008")]:
        time.sleep(0.005)
    os.kill(pids[1], signal.SIGTERM)  # one of them is enough: all agree on the step
    statuses = [warm.wait(pid) for pid in pids]
    assert statuses in ([143, 143], [0, 0])
    for pid in pair(warm, tmp_path / "run", **PACE):
        assert warm.wait(pid) == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_what_one_process_finds_not_finite_all_skip(warm, tmp_path):
    pids = pair(warm, tmp_path / "run", broken=[3], broken_rank=1, steps=4)
    assert [warm.wait(pid) for pid in pids] == [0, 0]
    (line,) = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert line["step"] == 3
    assert sorted(line["index"]) == [0, 1, 8, 9]
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run", 4).values())


def test_a_run_of_two_processes_goes_on_with_one(warm, tmp_path):
    pids = pair(warm, tmp_path / "run", **PACE)
    while not [*tmp_path.glob("run/checkpoints/step-00000004")]:
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        warm.wait(pid)
    assert warm.wait(warm.start(tmp_path / "run", **PACE)) == 0
    assert "processes 2 -> 1" in Path(f"{tmp_path / 'run'}.log").read_text()


@pytest.mark.parametrize(
    ("inject", "status"),
    [
        ("fsync:error=EIO:when=12", 0),  # got over
        ("rename:signal=SIGKILL:when=3", -9),
        ("rename:error=ENOSPC:when=3+", 1),  # a named error
    ],
)
def test_faults_of_the_system(tmp_path, inject, status):
    if shutil.which("strace") is None:
        pytest.skip("strace is not here: the faults that it injects were not tried")
    folder = tmp_path / "run"
    name = inject.split(":")[0]
    command = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "-e", f"trace={name}", "-e", f"inject={inject}"]
    program = [sys.executable, toy.__file__, str(folder), "steps=4"]
    done = subprocess.run([*command, *program], capture_output=True, text=True, check=False)
    if "PTRACE" in done.stderr:
        pytest.skip("strace may not trace here: the faults that it injects were not tried")
    assert done.returncode == status, done.stderr
    assert "INJECTED" in (tmp_path / "trace").read_text() or status == -9
    if status == 1:
        assert "What was saved before is unharmed" in done.stderr
    train(folder, steps=4)
    train(tmp_path / "whole", steps=4)
    assert digest(folder) == digest(tmp_path / "whole")
