"""Pictures at their size, and batches that do not depend on who makes them."""

import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from latentkit.data import dataset
from latentkit.data.dataset import Pictures, Transform, bucket_shapes, nearest_shape, substitute
from latentkit.data.loader import Loader
from latentkit.data.order import Order
from latentkit.data.pictures import tiff_of, to_png, to_tensor, to_tiff
from latentkit.data.source import open_source
from latentkit.errors import InputError


@pytest.fixture
def source(tmp_path, save):
    """24 pictures of several shapes in two classes, half of them with captions."""
    shapes = [(8, 8, 3), (8, 16, 3), (20, 10, 4), (9, 13, 1)]
    for i in range(24):
        save(tmp_path / "set" / "ab"[i % 2] / f"{i:02}.png", i, shapes[i % 4])
        if i % 3:
            (tmp_path / "set" / "ab"[i % 2] / f"{i:02}.txt").write_text(f"picture {i}")
    return open_source(tmp_path / "set")


def same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 2},
        {"size": 8, "flips": "x"},
        {"size": 8, "flips": "hh"},
        {"size": 8, "crop": "left"},
        {"size": 8, "channels": 0},
        {"size": "8"},
        {"size": 8, "unknown": 1},
    ],
)
def test_wrong_transforms(wrong):
    with pytest.raises(ValidationError):
        Transform(**wrong)


def test_a_wrong_colour_is_named():
    with pytest.raises(ValueError, match="white, black or #rrggbb"):
        Transform(size=8, background="wite")


def test_a_picture_of_its_own_size_is_unchanged(tmp_path, save):
    array = save(tmp_path / "a.png", 0, (8, 8, 3))
    pictures = Pictures(open_source(tmp_path), Transform(size=8), 0)
    assert torch.equal(pictures.sample(0, 5), torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1)


@pytest.mark.parametrize("shape", [(8, 16, 3), (16, 8, 3), (4, 400, 3), (31, 7, 3)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_shape_fills_the_square(tmp_path, save, shape, crop):
    save(tmp_path / "a.png", 0, shape)
    pictures = Pictures(open_source(tmp_path), Transform(size=12, crop=crop), 0)
    for draw in range(3):
        assert pictures.sample(0, draw).shape == (3, 12, 12)
    (kept,) = pictures._kept.values()
    assert kept.shape[1] * kept.shape[2] <= 12 * 12 * dataset.MAX_OVERHANG  # a strip is cut before it is scaled


def test_the_centre_is_kept(tmp_path):
    from latentkit.data.pictures import to_png

    x = torch.full((3, 8, 24), -1.0)
    x[:, :, 8:16] = 1
    (tmp_path / "a.png").write_bytes(to_png(x))
    assert (Pictures(open_source(tmp_path), Transform(size=8), 0).sample(0, 0) == 1).all()


def test_random_crops_and_views_are_keyed_by_the_draw(tmp_path, save):
    array = save(tmp_path / "a.png", 0, (8, 24, 3))
    source = open_source(tmp_path)
    pictures = Pictures(source, Transform(size=8, crop="random"), 7)
    x = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    seen = Counter()
    for draw in range(200):
        crop = pictures.sample(0, draw)
        places = [left for left in range(17) if torch.equal(crop, x[:, :, left : left + 8])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 17
    other = Pictures(source, Transform(size=8, crop="random"), 8)
    assert any(not torch.equal(pictures.sample(0, d), other.sample(0, d)) for d in range(5))
    assert all(torch.equal(pictures.sample(0, d), pictures.sample(0, d)) for d in range(5))


@pytest.mark.parametrize(
    ("flips", "count"), [("", 1), ("h", 2), ("v", 2), ("hv", 4), ("r", 4), ("hr", 8), ("vr", 8), ("hvr", 8)]
)
def test_flips_are_the_views_their_letters_say(tmp_path, save, flips, count):
    array = save(tmp_path / "a.png", 0)
    x = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    pictures = Pictures(open_source(tmp_path), Transform(size=8, flips=flips), 0)
    allowed = [x]
    for letter in flips:
        if letter == "h":
            allowed += [a.flip(2) for a in allowed]
        if letter == "v":
            allowed += [a.flip(1) for a in allowed]
        if letter == "r":
            allowed += [torch.rot90(a, k, (1, 2)) for a in allowed for k in (1, 2, 3)]
    views = [pictures.view(0, number)[1] for number in range(count)]
    assert len(pictures.transform.views()) == count
    assert torch.equal(views[0], x)
    for view in views:
        assert any(torch.equal(view, a) for a in allowed)
        assert sum(torch.equal(view, other) for other in views) == 1
    drawn = Counter()
    for draw in range(40 * count):
        sample = pictures.sample(0, draw)
        drawn[next(i for i, view in enumerate(views) if torch.equal(view, sample))] += 1
    assert len(drawn) == count
    assert min(drawn.values()) > 15


def test_depth_is_kept(tmp_path):
    x = torch.rand(1, 8, 8) * 2 - 1
    (tmp_path / "a.png").write_bytes(to_png(x, depth=16))
    (tmp_path / "b.tif").write_bytes(to_tiff(x, depth=32))
    pictures = Pictures(open_source(tmp_path), Transform(size=8, channels=1), 0)
    assert (pictures.sample(0, 0) - x).abs().max() < 1 / 65000
    assert (pictures.sample(1, 0) - x).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"flips": "h"}, {"crop": "random"}])
def test_floating_point_pictures_that_are_kept_stay_as_they_are(tmp_path, options):
    (tmp_path / "a.tif").write_bytes(to_tiff(torch.rand(1, 8, 8) * 2 - 1, depth=32))
    pictures = Pictures(open_source(tmp_path), Transform(size=8, channels=1, **options), 0)
    with torch.inference_mode():  # as a look at held-out pictures does
        first = [pictures.sample(0, draw) for draw in range(6)]
        again = [pictures.sample(0, draw) for draw in range(6)]
    outside = [pictures.sample(0, draw) for draw in range(6)]
    for one, two, three in zip(first, again, outside, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert not any(x.is_inference() for x in outside), "a network can learn from them"


def test_channels_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bands.tif").write_bytes(to_tiff(torch.zeros(6, 8, 8)))
    source = open_source(tmp_path)
    assert Pictures(source, Transform(size=8, channels=6), 0).sample(0, 0).shape == (6, 8, 8)
    with pytest.raises(InputError, match=r"bands\.tif has 6 colour channels.*use channels: 6"):
        Pictures(source, Transform(size=8), 0)


@pytest.mark.parametrize(("size", "multiple"), [(64, 8), (64, 16), (512, 64), (48, 4), (16, 16), (256, 8)])
def test_bucket_shapes(size, multiple):
    shapes = bucket_shapes(size, multiple)
    assert (size, size) in shapes
    assert len(shapes) == len(set(shapes)) <= 20
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert (width, height) in shapes
        assert 0.6 < height * width / size**2 < 1.5
    assert nearest_shape(shapes, 100, 100) == shapes.index((size, size))
    assert nearest_shape(shapes, 10, 1000) == len(shapes) - 1
    assert nearest_shape(shapes, 1000, 10) == 0


def test_buckets_keep_the_aspect(source):
    pictures = Pictures(source, Transform(size=16, buckets=True), 0, multiple=4)
    for index, item in enumerate(source.items):
        shape = pictures.shapes[pictures.bucket_of(index)]
        assert pictures.sample(index, 0).shape == (3, *shape)
        assert (shape[1] > shape[0]) == (item.width > item.height)
    assert len(set(pictures.buckets)) == 4
    with pytest.raises(InputError, match="quarter turns"):
        Pictures(source, Transform(size=16, buckets=True, flips="r"), 0)
    with pytest.raises(InputError, match="not a multiple of 8"):
        Pictures(source, Transform(size=20, buckets=True), 0)


def test_a_batch_says_what_it_holds(source):
    pictures = Pictures(source, Transform(size=8, flips="h"), 0)
    order = Order(len(source), 4, 5)
    (batch,) = next(Loader(pictures, order).batches(7))
    assert batch["step"] == 7
    assert batch["draw"].tolist() == [28, 29, 30, 31]
    assert batch["pixels"].dtype == torch.float32
    for place, (index, draw) in enumerate(zip(batch["index"].tolist(), batch["draw"].tolist())):
        item = source.items[index]
        assert index == order.item(draw)
        assert torch.equal(batch["pixels"][place], pictures.sample(index, draw))
        assert batch["caption"][place] == (item.caption or "")
        assert source.classes[batch["label"][place]] == item.label


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_workers_ranks_and_memory_change_nothing(source, monkeypatch, buckets, kept):
    transform = Transform(size=16, crop="random", flips="hv", buckets=buckets)

    def run(world=1, micro=None, workers=0, start=0, steps=9):
        if not kept:
            monkeypatch.setattr(dataset, "free_memory", lambda: 0)
        pictures = Pictures(source, transform, 3, multiple=4)
        assert (pictures._kept is not None) == kept
        order = Order(len(source), 4, 3, pictures.buckets)
        made = []
        for rank in range(world):
            loader = Loader(pictures, order, micro, rank, world, workers)
            made += [b for batches in islice(loader.batches(start), steps) for b in batches]
        samples = {}
        for batch in made:
            for place, draw in enumerate(batch["draw"].tolist()):
                assert draw not in samples
                samples[draw] = {
                    "step": batch["step"],
                    "index": batch["index"][place],
                    "pixels": batch["pixels"][place],
                    "caption": batch["caption"][place],
                    "label": batch["label"][place],
                }
        return samples

    straight = run()
    assert sorted(straight) == list(range(36))
    for other in (run(workers=3), run(world=2, micro=1), run(world=4, workers=2), run(micro=2)):
        assert other.keys() == straight.keys()
        for draw, sample in other.items():
            same(sample, straight[draw])
    for start in range(1, 9):
        for draw, sample in run(start=start, steps=9 - start).items():
            same(sample, straight[draw])


def test_other_words_are_those_of_the_draw_whatever_the_batch(source):
    source.items = [item._replace(keywords=("one", "two")) for item in source.items]
    pictures = Pictures(source, Transform(size=8), 0)

    def said(micro, world):
        words = {}
        for rank in range(world):
            loader = Loader(pictures, Order(24, 4, 5), micro, rank, world, keywords=0.5)
            for batches in islice(loader.batches(), 12):
                words |= {int(d): c for b in batches for d, c in zip(b["draw"], b["caption"], strict=True)}
        return words

    whole = said(4, 1)
    assert whole == said(1, 2)
    assert 8 < sum(set(words.split()) <= {"one", "two"} for words in whole.values()) < 40


def test_the_commonest_shape(tmp_path, save):
    for i, shape in enumerate([(8, 8, 3), (8, 16, 3), (8, 15, 3), (16, 8, 3)]):
        save(tmp_path / f"{i}.png", i, shape)
    pictures = Pictures(open_source(tmp_path), Transform(size=8, buckets=True), 0, multiple=4)
    assert pictures.shapes[pictures.commonest] == nearest_wide(pictures)
    assert Pictures(open_source(tmp_path), Transform(size=8), 0).commonest == 0


def nearest_wide(pictures):
    return pictures.shapes[pictures.bucket_of(1)]


def test_parts_that_are_not_equal_are_refused(source):
    pictures = Pictures(source, Transform(size=8), 0)
    with pytest.raises(InputError, match="shared by 3"):
        Loader(pictures, Order(24, 4, 0), world=3)
    with pytest.raises(InputError, match="micro-batches of 3"):
        Loader(pictures, Order(24, 4, 0), 3)
    with pytest.raises(InputError, match="order is of 23"):
        Loader(pictures, Order(23, 4, 0))


def test_a_worker_s_error_reaches_the_loop(source, monkeypatch):
    pictures = Pictures(source, Transform(size=8), 0)

    def fail(index, draw):
        raise InputError("no")

    monkeypatch.setattr(pictures, "take", fail)
    for workers in (0, 2):
        with pytest.raises(InputError, match="no"):
            next(Loader(pictures, Order(24, 4, 0), workers=workers).batches())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_goes_bad_is_replaced_named_and_counted(source, workers, monkeypatch):
    monkeypatch.setattr(dataset, "free_memory", lambda: 0)  # nothing kept: every sample reads its file
    good = Pictures(source, Transform(size=8), 0)
    order = Order(24, 4, 1)
    before = [b for (b,) in islice(Loader(good, order).batches(), 12)]
    bad = [3, 10]
    for index in bad:
        path = source.root / source.items[index].key
        path.write_bytes(path.read_bytes()[:40])
    pictures = Pictures(source, Transform(size=8), 0)
    after = [b for (b,) in islice(Loader(pictures, order, workers=workers).batches(), 12)]
    assert sorted(pictures.replaced) == sorted(source.items[i].key for i in bad)
    assert all("changed since" in reason for reason in pictures.replaced.values())
    for old, new in zip(before, after):
        for place, index in enumerate(old["index"].tolist()):
            if index in bad:
                used = int(new["index"][place])
                assert used not in bad
                assert used == next(s for s in (substitute(index, k, [0] * 24) for k in range(9)) if s not in bad)
                assert new["caption"][place] == (source.items[used].caption or "")
                assert torch.equal(new["pixels"][place], to_tensor_of(good, used))
            else:
                assert torch.equal(old["pixels"][place], new["pixels"][place])


def to_tensor_of(pictures, index):
    return pictures.view(index, 0)[1]


def test_a_substitute_is_of_the_same_bucket():
    buckets = np.random.default_rng(0).integers(0, 3, 50).tolist()
    for index in range(50):
        chosen = {substitute(index, attempt, buckets) for attempt in range(40)}
        assert {buckets[i] for i in chosen} == {buckets[index]}
        assert index not in chosen
        assert len(chosen) > 3


@pytest.mark.parametrize(("bad", "stops"), [(10, False), (11, True)])
def test_too_many_bad_pictures_stop_the_run(source, monkeypatch, bad, stops):
    monkeypatch.setattr(dataset, "free_memory", lambda: 0)
    pictures = Pictures(source, Transform(size=8), 0)
    for index in range(bad):
        os.remove(source.root / source.items[index].key)

    def epoch():
        return list(islice(Loader(pictures, Order(24, 4, 1)).batches(), 6))

    if stops:
        with pytest.raises(InputError, match=r"11 of 24 pictures went bad[^\n]*\n  a/00\.png: can no longer be read"):
            epoch()
    else:
        assert len(epoch()) == 6
        assert len(pictures.replaced) == bad


def test_when_no_picture_is_left_it_ends(tmp_path, save):
    save(tmp_path / "a.png", 0)
    pictures = Pictures(open_source(tmp_path), Transform(size=8), 0)
    os.remove(tmp_path / "a.png")
    with pytest.raises(InputError, match="no picture is left"):
        pictures.sample(0, 0)


def test_small_sets_are_decoded_once(source, monkeypatch):
    pictures = Pictures(source, Transform(size=8), 0)
    reads = Counter()
    real = source.read
    monkeypatch.setattr(source, "read", lambda index: reads.update([index]) or real(index))
    for _ in range(3):
        for index in range(24):
            pictures.sample(index, index)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize(
    ("channels", "file", "alpha"),
    [(4, 4, True), (4, 3, True), (2, 1, True), (3, 4, False), (1, 1, False), (2, -2, False), (4, -4, False)],
)
def test_whether_the_last_channel_is_alpha(tmp_path, save, channels, file, alpha):
    """Of a PNG of so many channels, or of a TIFF of as many plain ones."""
    if file > 0:
        save(tmp_path / "0.png", 1, (8, 8, file))
    else:
        (tmp_path / "0.tif").write_bytes(to_tiff(torch.zeros(-file, 8, 8)))
    pictures = Pictures(open_source(tmp_path), Transform(size=8, channels=channels), 0)
    assert pictures.alpha is alpha
    if channels == file == 4:  # and so are others beside it, or it is none
        (tmp_path / "1.tif").write_bytes(to_tiff(torch.zeros(4, 8, 8)))
        assert not Pictures(open_source(tmp_path), pictures.transform, 0).alpha


def test_the_last_of_four_bands_does_not_hide_the_others(tmp_path):
    """Nor where an alpha of the file's own follows them."""
    array = np.broadcast_to(np.array([200, 100, 50, 0, 255], np.uint8), (16, 16, 5))
    (tmp_path / "0.tif").write_bytes(tiff_of(array, alpha=True))
    seen = Pictures(open_source(tmp_path), Transform(size=8, channels=4), 0).sample(0, 0)
    assert ((seen.mean((1, 2)) + 1) * 127.5).tolist() == pytest.approx([200, 100, 50, 0], abs=1)


def test_transparency_lies_on_the_background(source):
    index = next(i for i, item in enumerate(source.items) if item.alpha)
    white = Pictures(source, Transform(size=8), 0).sample(index, 0)
    black = Pictures(source, Transform(size=8, background="black"), 0).sample(index, 0)
    assert (white >= black).all()
    assert (white > black).any()
    kept = Pictures(source, Transform(size=8, channels=4), 0).sample(index, 0)
    assert kept.shape == (4, 8, 8)
    assert to_tensor(source.read(index), 4).shape[0] == 4


@pytest.mark.parametrize("crop", ["random", "center"])
def test_parts_are_cut_from_pictures_of_a_short_side(tmp_path, save, crop):
    """Of 20 x 30 shown as 12 x 18, a part of 8 x 8; one that is smaller is enlarged to that."""
    wide = save(tmp_path / "a.png", 0, (20, 30, 3))
    save(tmp_path / "b.png", 1, (9, 6, 3))
    pictures = Pictures(open_source(tmp_path), Transform(size=8, short=12, crop=crop), 0)
    shown = [pictures.sample(index, draw) for index in (0, 1) for draw in range(40)]
    assert all(x.shape == (3, 8, 8) for x in shown)
    assert pictures._kept[0, 1.5].shape == ((3, 12, 18) if crop == "random" else (3, 12, 12))
    assert pictures._kept[1, 1.5].shape == ((3, 18, 12) if crop == "random" else (3, 12, 12))
    scaled = pictures._kept[0, 1.5]
    places = {(top, left) for top in range(scaled.shape[1] - 7) for left in range(scaled.shape[2] - 7)}
    parts = {
        (scaled[:, top : top + 8, left : left + 8].float() / 127.5 - 1).numpy().tobytes(): (top, left)
        for top, left in places
    }
    found = {parts[x.numpy().tobytes()] for x in shown[:40]}
    assert (len(found) > 20) if crop == "random" else (found == {(2, 2)})
    assert abs(float(scaled.float().mean()) - wide.mean()) < 8
    still = pictures.view(0, 0)[1].numpy().tobytes()
    assert parts[still] == ((2, 5) if crop == "random" else (2, 2)), "held-out pictures show the middle, as large"


@pytest.mark.parametrize("wrong", [{"short": 7}, {"short": 12, "zoom": 2, "crop": "random"}])
def test_a_short_side_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError, match="must be at least size 8, and takes no zoom"):
        Transform(size=8, **wrong)


def test_zoom_shows_random_parts_at_every_size_that_the_picture_has(tmp_path, save):
    large = save(tmp_path / "large.png", 0, (40, 40, 3))
    save(tmp_path / "small.png", 1, (15, 15, 3))
    pictures = Pictures(open_source(tmp_path), Transform(size=8, crop="random", zoom=4), 0)
    shown = [pictures.sample(0, draw) for draw in range(60)]
    assert all(x.shape == (3, 8, 8) for x in shown)
    assert sorted(pictures._kept) == [(0, 1), (0, 2), (0, 4)]
    assert 30 < len({x.numpy().tobytes() for x in shown}) <= 60
    assert torch.equal(shown[7], pictures.sample(0, 7))
    assert pictures._kept[0, 4].shape == (3, 32, 32)
    assert abs(float(pictures._kept[0, 4].float().mean()) - large.mean()) < 1
    for draw in range(20):
        pictures.sample(1, draw)
    assert (1, 2) not in pictures._kept, "it has not twice the pixels"
    still = Pictures(open_source(tmp_path), Transform(size=8), 0)
    assert torch.equal(pictures.view(0, 0)[1], still.view(0, 0)[1])
    with pytest.raises(ValidationError, match="crop: random"):
        Transform(size=8, zoom=2)
