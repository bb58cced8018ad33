"""Cached latents: those of the pictures and the encoder of now, whole or not at all."""

import os
import signal
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from latentkit.data import latents
from latentkit.data.dataset import Pictures, Transform
from latentkit.data.latents import cache_key, clear, open_latents, stored
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.data.pictures import tiff_of
from latentkit.data.source import open_source
from latentkit.errors import InputError


@pytest.fixture
def folder(tmp_path, save):
    for i in range(14):
        save(tmp_path / "set" / f"{i:02}.png", i, (8, 8, 3) if i % 3 else (8, 14, 3))
    return tmp_path / "set"


def pictures_of(folder, **options):
    return Pictures(open_source(folder), Transform(size=8, **options), 3, multiple=4)


def encode(pixels):
    """Moments whose last bits depend on the other pictures of the call, as a real encoder's do."""
    return torch.cat([pixels + 1e-6 * pixels.mean(), pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1) - 2], dim=1)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.bin"))}


@pytest.mark.parametrize("options", [{}, {"flips": "h"}, {"flips": "hr"}, {"flips": "hv", "buckets": True}])
@pytest.mark.parametrize("half", [False, True])
def test_a_draw_shows_the_same_view_as_the_picture(folder, tmp_path, options, half):
    pictures = pictures_of(folder, **options)
    cache = open_latents(tmp_path / "cache", pictures, encode, "e", batch=4, half=half)
    for draw in range(60):
        index, moments = cache.take(draw % 14, draw)
        used, pixels = pictures.take(draw % 14, draw)
        assert index == used == draw % 14
        assert moments.dtype == torch.float32
        assert torch.allclose(moments[:3], pixels, atol=2e-3 if half else 1e-5)


def test_the_loader_gives_moments_in_place_of_pixels(folder, tmp_path):
    pictures = pictures_of(folder, flips="h", buckets=True)
    cache = open_latents(tmp_path / "cache", pictures, encode, "e")
    order = Order(len(cache), 4, 0, cache.buckets)
    for left, right in zip(islice(Loader(pictures, order).batches(), 6), Loader(cache, order, workers=1).batches()):
        assert left[0]["index"].tolist() == right[0]["index"].tolist()
        assert "pixels" not in right[0]
        assert torch.allclose(left[0]["pixels"], right[0]["moments"][:, :3], atol=1e-5)


def test_statistics_are_those_of_posterior_samples(folder, tmp_path):
    def far_off(pixels):
        log_variance = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1) - 1
        return torch.cat([pixels + torch.tensor([1000.0, 0.0, -5.0])[:, None, None], log_variance], dim=1)

    pictures = pictures_of(folder, flips="h", buckets=True)
    cache = open_latents(tmp_path / "cache", pictures, far_off, "e", batch=5)
    means, variances = [], []
    for index in range(len(pictures)):
        for view in range(2):
            moments = far_off(pictures.view(index, view)[1][None])[0].double()
            means.append(moments[:3].flatten(1))
            variances.append(moments[3:].flatten(1).exp())
    mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
    got_mean, got_deviation = cache.statistics()
    assert got_mean.dtype == torch.float64
    assert torch.allclose(got_mean, mean.mean(1), rtol=1e-12)
    expected = (mean.var(1, unbiased=False) + variance.mean(1)).sqrt()
    assert torch.allclose(got_deviation, expected, rtol=1e-9)


def test_a_second_open_encodes_nothing(folder, tmp_path):
    first = open_latents(tmp_path / "cache", pictures_of(folder), encode, "e")

    def never(pixels):
        raise AssertionError("encoded again")

    second = open_latents(tmp_path / "cache", pictures_of(folder), never, "e")
    assert torch.equal(first.take(3, 3)[1], second.take(3, 3)[1])


def test_nothing_stale_is_ever_used(folder, tmp_path, save):
    root = tmp_path / "cache"
    before = pictures_of(folder)
    old = open_latents(root, before, encode, "e")
    keys = {cache_key(before, "e")}
    stamp = (folder / "05.png").stat()
    save(folder / "05.png", 99)
    os.utime(folder / "05.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    edited = pictures_of(folder)
    new = open_latents(root, edited, encode, "e")
    assert not torch.equal(old.take(5, 0)[1], new.take(5, 0)[1])
    assert torch.allclose(new.take(5, 0)[1][:3], edited.take(5, 0)[1], atol=1e-5)

    other = open_latents(root, edited, lambda x: encode(x) + 1, "other weights")
    assert torch.allclose(other.take(5, 0)[1], new.take(5, 0)[1] + 1, atol=1e-5)
    keys |= {cache_key(edited, "e"), cache_key(edited, "other weights"), cache_key(edited, "e", "float16")}
    for options in ({"flips": "h"}, {"background": "black"}, {"channels": 1}, {"buckets": True}):
        keys.add(cache_key(pictures_of(folder, **options), "e"))
    assert len(keys) == 8
    (folder / "00.png").unlink()
    assert cache_key(pictures_of(folder), "e") not in keys


def test_latents_that_the_first_format_may_have_spoilt_are_not_used(folder, monkeypatch):
    key = cache_key(pictures_of(folder), "e")
    monkeypatch.setattr(latents, "CACHE_FORMAT", 1)
    assert cache_key(pictures_of(folder), "e") != key


def test_latents_of_floating_point_are_those_of_the_pictures(tmp_path):
    """The first pictures of a bucket are encoded twice while a cache is built."""
    array = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tif").write_bytes(tiff_of(array))
    pictures = pictures_of(tmp_path / "set")
    with torch.inference_mode():
        cache = open_latents(tmp_path / "cache", pictures, encode, "e")
    expected = torch.from_numpy(array).movedim(2, 0) * 2 - 1
    assert torch.allclose(cache.take(0, 0)[1][:3], expected, atol=1e-5)
    assert torch.allclose(pictures.sample(0, 0), expected, atol=1e-6), "outside of inference mode, too"


def test_touched_or_renamed_to_the_same_order_is_the_same(folder):
    before = cache_key(pictures_of(folder), "e")
    os.utime(folder / "05.png")
    assert cache_key(pictures_of(folder), "e") == before
    os.rename(folder / "05.png", folder / "05b.png")
    assert cache_key(pictures_of(folder), "e") == before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_cache_is_made_again_loudly(folder, tmp_path, caplog, damage):
    root = tmp_path / "cache"
    pictures = pictures_of(folder)
    open_latents(root, pictures, encode, "e")
    whole = contents(root)
    path = next(root.rglob("*.bin"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "manifest":
        next(root.rglob("manifest.json")).write_text("{")
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-4])
    cache = open_latents(root, pictures, encode, "e")
    assert "damaged" in caplog.text
    assert contents(root) == whole
    assert torch.allclose(cache.take(2, 0)[1][:3], pictures.take(2, 0)[1], atol=1e-5)


def forked(action):
    """Run in a child; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_file_call_loses_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SAVE_EVERY", 0.0)
    pictures = pictures_of(folder, flips="h", buckets=True)
    encoded = []

    def count(pixels):
        encoded.append(len(pixels))
        return encode(pixels)

    open_latents(tmp_path / "whole", pictures, count, "e", batch=2)
    whole, calls = contents(tmp_path / "whole"), len(encoded)

    def killed_at(number, root):
        left = [number]

        def counted(real):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in ("open", "posix_fallocate", "pwrite", "fsync", "replace", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        open_latents(root, pictures, encode, "e", batch=2)

    again = []
    number = 0
    while True:
        number += 1
        root = tmp_path / f"cache{number}"
        if not forked(lambda: killed_at(number, root)):  # noqa: B023
            break
        encoded.clear()
        cache = open_latents(root, pictures, count, "e", batch=2)
        again.append(len(encoded))
        assert contents(root) == whole, number
        assert torch.equal(cache.take(1, 1)[1], open_latents(tmp_path / "whole", pictures, encode, "e").take(1, 1)[1])
        assert not list(root.glob("*.building"))
    assert number > 25
    assert max(again) <= calls + 8
    assert min(again) < calls / 2  # a late kill does not start over


def test_data_reaches_the_disk_before_what_speaks_of_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SAVE_EVERY", 0.0)
    pictures = pictures_of(folder)
    calls = []

    def traced(name, of):
        real = getattr(os, name)

        def call(*arguments):
            first = arguments[0]
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            calls.append((name, os.path.splitext(path)[1] or of))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "replace", "rename"):
        traced(name, "folder")
    open_latents(tmp_path / "cache", pictures, encode, "e", batch=8)
    save = [("pwrite", ".bin"), ("fsync", ".bin"), ("fsync", ".tmp"), ("replace", ".tmp")]
    last = [*save[1:], ("fsync", ".json"), ("rename", ".building"), ("fsync", "folder")]
    assert calls == [*save, *save, *last]


def test_what_was_not_synced_is_encoded_again(folder, tmp_path, monkeypatch):
    """The map must not run ahead of the data: a torn file whose map says nothing is built from nothing."""
    monkeypatch.setattr(latents, "SAVE_EVERY", 1e9)
    pictures = pictures_of(folder)
    open_latents(tmp_path / "whole", pictures, encode, "e", batch=4)

    def stop(pixels, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        open_latents(tmp_path / "cache", pictures, stop, "e", batch=4)
    (torn,) = (tmp_path / "cache").rglob("*.bin")
    torn.write_bytes(b"\xff" * torn.stat().st_size)
    open_latents(tmp_path / "cache", pictures, encode, "e", batch=4)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_quarantined(folder, tmp_path, value):
    pictures = pictures_of(folder, flips="h")
    target = pictures.view(4, 1)[1]

    def broken(pixels):
        moments = encode(pixels)
        moments[(pixels == target).flatten(1).all(1), 4, 2, 2] = value
        return moments

    cache = open_latents(tmp_path / "cache", pictures, broken, "e", batch=4)
    assert cache.quarantined == {"04.png": "its latent holds NaN or infinite values"}
    for draw in range(40):
        index, moments = cache.take(4, draw)
        assert index != 4
        assert torch.isfinite(moments).all()
    mean, deviation = cache.statistics()
    assert torch.isfinite(mean).all()
    assert torch.isfinite(deviation).all()


def test_overflow_of_half_precision_is_not_finite(folder, tmp_path):
    pictures = pictures_of(folder)
    with pytest.raises(InputError, match="have no usable latent"), np.errstate(over="ignore"):
        open_latents(tmp_path / "cache", pictures, lambda x: encode(x) * 1e6, "e", half=True)


def test_a_picture_that_goes_bad_before_it_is_encoded_is_quarantined(folder, tmp_path):
    pictures = pictures_of(folder)
    (folder / "06.png").unlink()
    cache = open_latents(tmp_path / "cache", pictures, encode, "e")
    assert cache.quarantined == {"06.png": "its picture went bad after it was indexed"}
    assert cache.take(6, 0)[0] != 6


def test_a_full_disk_is_said_before_anything_is_encoded(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"No space left on device.* GB are needed"):
        open_latents(tmp_path / "cache", pictures_of(folder), encode, "e")


def test_random_crops_cannot_be_cached(folder, tmp_path):
    with pytest.raises(InputError, match="crop: center"):
        open_latents(tmp_path / "cache", pictures_of(folder, crop="random"), encode, "e")


def test_two_that_open_at_once_encode_once(folder, tmp_path):
    pictures = pictures_of(folder)
    calls = []

    def slow(pixels):
        calls.append(len(pixels))
        threading.Event().wait(0.02)
        return encode(pixels)

    caches = []
    threads = [
        threading.Thread(target=lambda: caches.append(open_latents(tmp_path / "c", pictures, slow, "e", batch=4)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches) == 3
    assert sum(calls) == 14 + 4  # every picture once, and the first call's that finds the latents' shape


def test_caches_are_listed_and_those_that_nobody_uses_are_deleted(folder, tmp_path, monkeypatch):
    root = tmp_path / "cache"
    assert (stored(root), clear(root)) == ([], ([], []))
    used = open_latents(root, pictures_of(folder), encode, "e")
    idle = open_latents(root, pictures_of(folder), encode, "other")
    before = used.take(3, 3)[1]
    assert {one.source for one in stored(root)} == {str(folder)}
    assert all(one.size >= 14 * 6 * 64 * 4 and one.busy for one in stored(root))
    del idle
    assert sorted(one.busy for one in stored(root)) == [False, True]
    gone, left = clear(root)
    assert [one.path.name for one in gone] == [cache_key(pictures_of(folder), "other")]
    assert [one.path.name for one in left] == [cache_key(pictures_of(folder), "e")]
    assert torch.equal(used.take(3, 3)[1], before)
    del used
    assert len(clear(root)[0]) == 1
    assert not list(root.rglob("*.bin"))


def test_a_cache_that_is_being_built_is_not_deleted(folder, tmp_path):
    root = tmp_path / "cache"

    def look(pixels):
        assert clear(root)[0] == []
        assert [one.source for one in stored(root)] == ["half built"]
        return encode(pixels)

    open_latents(root, pictures_of(folder), look, "e")
    (half,) = [one for one in stored(root) if not one.busy]
    os.rename(half.path, half.path.with_suffix(".building"))
    assert [one.source for one in clear(root)[0]] == ["half built"]
