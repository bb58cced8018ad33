"""Never lose work, in one process: a fault or a kill at every file call, damage to every file."""

import errno
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from toy import digest, make, train

from latentkit.errors import InputError
from latentkit.training.run.store import Damaged, FileCalls, SaveError, Store
from latentkit.training.trainer import Callback

CHANGES = ("mkdir", "open", "write", "truncate", "fsync", "rename", "unlink", "rmdir")
FULL = ("mkdir", "open", "write", "fsync")  # what a full disk refuses


class Kill(BaseException):
    """Stands for kill -9: nothing may catch it."""


def faulty(at: int, error: BaseException | None, names: tuple[str, ...] = CHANGES, forever: bool = False):
    """File calls of which the `at`-th (of those named) fails, or all from it on; and the list of the calls made.

    A killed process makes no further calls: after a Kill they all kill again. A failing write leaves half behind.
    """
    made: list[str] = []

    def wrap(name):
        real = getattr(FileCalls(), name)

        def call(*arguments):
            if name not in names:
                return real(*arguments)
            made.append(name)
            number = len(made) - 1
            if error is not None and (number == at or (number > at and (forever or isinstance(error, Kill)))):
                if name == "write" and number == at:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise error
            return real(*arguments)

        return call

    return FileCalls(**{name: wrap(name) for name in CHANGES}, sleep=lambda seconds: None), made


def stopped(trainer, steps: int) -> None:
    """Train so many steps and die."""
    stream = trainer.batches

    def limited(step):
        yield from itertools.islice(stream(step), steps)
        raise Kill

    trainer.batches = limited
    with trainer.run, pytest.raises(Kill):
        trainer.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to, the same run stopped at step 8, and the file calls from there to its end."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder / "run")
    stopped(make(folder / "half"), 8)
    shutil.copytree(folder / "half", folder / "counted")
    calls, made = faulty(-1, None)
    train(folder / "counted", calls)
    assert digest(folder / "counted") == digest(folder / "run")
    assert len(made) > 45
    return folder, digest(folder / "run"), made


def resumed(folder: Path) -> dict[str, str]:
    """What the same command makes of a folder that something happened to."""
    train(folder)
    assert not [*folder.rglob("tmp-*")], "leftovers stay"
    return digest(folder)


@pytest.mark.parametrize("turns", [1, 2])
def test_resume_at_every_step(tmp_path, turns):
    """With steps in mid-window, mid-interval, and one that is skipped."""
    train(tmp_path / "whole", turns=turns, broken=[6])
    expected = digest(tmp_path / "whole")
    for k in range(1, 12):
        trainer = make(tmp_path / f"{k}", turns=turns, broken=[6])
        trainer.schedule = trainer.schedule.model_copy(update={"save_every": k})
        stopped(trainer, k)
        train(tmp_path / f"{k}", turns=turns, broken=[6])
        assert digest(tmp_path / f"{k}") == expected


def test_kill_at_every_file_call(tmp_path, whole):
    source, expected, made = whole
    for at in range(len(made)):
        folder = tmp_path / f"{at}"
        shutil.copytree(source / "half", folder)
        with pytest.raises(Kill):
            train(folder, faulty(at, Kill())[0])
        store = Store(folder / "checkpoints")
        assert [store.read(step).step for step in store.steps()][-1] >= 8, "a checkpoint that has its name is whole"
        assert resumed(folder) == expected, f"call {at}: {made[at]}"
        shutil.rmtree(folder)


def test_one_fault_at_every_file_call_is_got_over(tmp_path, whole):
    source, expected, made = whole
    for at in range(len(made)):
        number = (errno.EIO, errno.ENOSPC)[at % 2]
        folder = tmp_path / f"{at}"
        shutil.copytree(source / "half", folder)
        train(folder, faulty(at, OSError(number, os.strerror(number)))[0])
        assert digest(folder) == expected, f"call {at}: {made[at]}"
        shutil.rmtree(folder)


def test_a_disk_full_from_any_call_on_harms_no_checkpoint(tmp_path, whole):
    source, expected, made = whole
    count = sum(name in FULL for name in made)
    for at in range(count - 1):  # the last is a line of timings, for which nothing stops
        folder = tmp_path / f"{at}"
        shutil.copytree(source / "half", folder)
        error = OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(SaveError, match=r"What was saved before is unharmed; free some space") as stop:
            train(folder, faulty(at, error, FULL, forever=True)[0])
        assert stop.value.exit_code == 1
        assert resumed(folder) == expected, f"call {at}"
        shutil.rmtree(folder)


def test_training_goes_on_while_the_disk_is_full_and_saves_when_it_is_not(tmp_path, whole, capsys):
    full = True
    real = FileCalls()

    def write(descriptor, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real.write(descriptor, data)

    trainer = make(tmp_path / "run", calls=None)
    trainer.run.calls = trainer.run.store.calls = trainer.run.metrics.calls = real._replace(
        write=write, sleep=lambda seconds: None
    )

    def free(step, trainer):
        nonlocal full
        full = step < 7

    trainer.callbacks = (Callback(1, free),)
    with trainer.run:
        trainer.train()
    assert trainer.run.store.steps() == [8, 12]
    told = capsys.readouterr().err
    assert "No space left" in told
    assert "Training goes on; the next try is after 4 steps" in told
    expected = dict(whole[1])
    assert {name: value for name, value in digest(tmp_path / "run").items() if "snapshots" not in name} == {
        name: value for name, value in expected.items() if "snapshots" not in name
    }


def test_a_write_is_tried_three_more_times(tmp_path):
    waits = []
    calls, _ = faulty(0, OSError(errno.EIO, "Input/output error"), ("write",), forever=True)
    with pytest.raises(SaveError, match="look at the disk"):
        Store(tmp_path, calls._replace(sleep=waits.append)).save(1, {}, {})
    assert len(waits) == 3
    assert 0 < sum(waits) < 10
    assert not [*tmp_path.iterdir()]


def test_kill_at_every_call_that_makes_a_run_folder(tmp_path):
    calls, made = faulty(-1, None)
    make(tmp_path / "counted" / "run", calls).run.close()
    for at in range(len(made)):
        with pytest.raises(Kill):
            make(tmp_path / f"{at}" / "run", faulty(at, Kill())[0])
        make(tmp_path / f"{at}" / "run").run.close()
    for at in range(len(made)):
        make(tmp_path / f"error-{at}" / "run", faulty(at, OSError(errno.EIO, "Input/output error"))[0]).run.close()
    with pytest.raises(SaveError, match="run folder"):
        make(tmp_path / "refused" / "run", faulty(0, OSError(errno.EROFS, "Read-only"), forever=True)[0])


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path):
    """The order that a power cut needs: all files flushed, the manifest last, the folder, the rename, its folder."""
    events = []
    names = {}
    real = FileCalls()

    def open_(path, *rest):
        descriptor = real.open(path, *rest)
        names[descriptor] = Path(path).relative_to(tmp_path).as_posix()
        return descriptor

    def note(name):
        def call(first, *rest):
            events.append((name, names[first] if isinstance(first, int) else Path(first).name))
            return getattr(real, name)(first, *rest)

        return call

    calls = real._replace(open=open_, **{name: note(name) for name in ("write", "fsync", "rename", "unlink")})
    store = Store(tmp_path, calls)
    for step in (1, 2):
        store.save(step, {"weights": {}}, {})
    events.clear()
    store.save(3, {"weights": {}}, {"step": 3})
    folder = "tmp-step-00000003"
    files = [f"{folder}/{name}" for name in ("weights.safetensors", "state.json", "manifest.json")]
    durable = [(call, name) for name in files for call in ("write", "fsync")]
    durable += [("fsync", folder), ("rename", folder), ("fsync", ".")]
    assert [event for event in events if event[1] or event[0] != "write"][: len(durable)] == durable
    assert {event[0] for event in events[len(durable) :]} <= {"rename", "unlink"}, "the oldest goes only afterwards"


def test_the_two_newest_are_kept(tmp_path):
    store = Store(tmp_path)
    for step in (1, 5, 3_000_000_000):
        store.save(step, {}, {"step": step})
    assert store.steps() == [5, 3_000_000_000]
    assert store.load().state == {"step": 3_000_000_000}


def test_a_save_that_reads_back_wrong_is_not_trusted(tmp_path):
    """A disk that loses a byte in silence: the older checkpoints stay."""
    store = Store(tmp_path, FileCalls(sleep=lambda seconds: None))
    store.save(1, {}, {})
    store.save(2, {}, {})

    def lossy(descriptor, data):
        os.write(descriptor, bytes(len(data)))
        return len(data)

    store.calls = store.calls._replace(write=lossy)
    with pytest.raises(SaveError):
        store.save(3, {}, {})
    assert store.steps() == [1, 2]


def damage(file: Path, chance: random.Random) -> str:
    """Flip a bit, cut, lengthen, or remove a file."""
    data = bytearray(file.read_bytes())
    kind = chance.choice(["flip", "flip", "flip", "cut", "lengthen", "remove"])
    if kind == "remove":
        file.unlink()
        return kind
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    else:
        data += b"\0"
    file.write_bytes(data)
    return kind


def test_every_damage_is_found(tmp_path, whole):
    source, _, _ = whole
    good = source / "run" / "checkpoints" / "step-00000012"
    store = Store(tmp_path)
    chance = random.Random(1)
    for trial in range(400):
        shutil.copytree(good, store.path(12))
        file = chance.choice(sorted(store.path(12).iterdir()))
        kind = damage(file, chance)
        with pytest.raises(Damaged):
            pytest.fail(f"trial {trial}: {kind} of {file.name} was not found: {store.read(12).step}")
        shutil.rmtree(store.path(12))


def test_every_byte_of_the_manifest_counts(tmp_path):
    store = Store(tmp_path)
    store.save(1, {}, {"step": 1})
    manifest = store.path(1) / "manifest.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 2 ** (place % 8)]) + data[place + 1 :])
        with pytest.raises(Damaged):
            pytest.fail(f"byte {place} was changed: {store.read(1).step}")


def test_swapped_checkpoints_are_found(tmp_path, whole):
    source, _, _ = whole
    folder = source / "run" / "checkpoints"
    store = Store(tmp_path)
    shutil.copytree(folder / "step-00000008", store.path(12))
    with pytest.raises(Damaged, match="is of step 8"):
        store.read(12)
    shutil.copy(folder / "step-00000012" / "manifest.json", store.path(12))
    with pytest.raises(Damaged, match="differs from the manifest"):
        store.read(12)


def test_a_flipped_bit_falls_back_loudly_to_the_checkpoint_before(tmp_path, whole, capsys):
    source, expected, _ = whole
    shutil.copytree(source / "run", tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000012" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert resumed(tmp_path / "run") == expected
    told = capsys.readouterr().err
    assert "CHECKPOINT DAMAGED" in told
    assert "step-00000012.bad" in told
    assert "going on from step 8" in told
    assert (tmp_path / "run" / "checkpoints" / "step-00000012.bad").is_dir()


def test_a_run_whose_every_checkpoint_is_damaged_never_starts_again_by_itself(tmp_path, whole):
    source, _, _ = whole
    shutil.copytree(source / "run", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        file.write_bytes(b"{}")
    for _ in range(2):  # nor at the second try
        with pytest.raises(InputError, match=r"every checkpoint .* is damaged .*step-00000008\.bad"):
            train(tmp_path / "run")


def test_a_newer_format_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("latentkit.training.run.store.FORMAT", 2)
    Store(tmp_path).save(1, {}, {})
    monkeypatch.undo()
    with pytest.raises(InputError, match="has format 2; this version reads 1"):
        Store(tmp_path).load()
    assert Store(tmp_path).steps() == [1]


def test_an_unreadable_checkpoint_is_left_alone(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(1, {}, {})

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"could not read checkpoint .* Nothing was changed"):
        store.load()
    assert store.steps() == [1]


def test_quarantine_never_overwrites(tmp_path):
    store = Store(tmp_path)
    for _ in range(2):
        store.save(1, {}, {})
        (store.path(1) / "manifest.json").unlink()
        with pytest.raises(InputError):
            store.load()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001.bad", "step-00000001.bad-2"]


def test_state_is_json_and_tables_are_safetensors(whole):
    source, _, _ = whole
    folder = source / "run" / "checkpoints" / "step-00000012"
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert {"step", "ema_updates", "windows", "metrics_length", "machine"} <= set(
        json.loads((folder / "state.json").read_bytes())
    )
