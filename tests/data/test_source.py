"""What a folder means, what is refused in it, and an index that is never stale."""

import io
import json
import os
import random
import tarfile

import pytest

from latentkit.data import folder as folder_module
from latentkit.data import source as source_module
from latentkit.data.pictures import BadPicture
from latentkit.data.source import open_source
from latentkit.errors import InputError


def reasons(source):
    return dict(source.rejected)


def counted(monkeypatch):
    """The keys that are decoded from now on."""
    decoded = []
    real = source_module.decode

    def decode(data, name, values=None):
        decoded.append(name)
        return real(data, name, values)

    monkeypatch.setattr(source_module, "decode", decode)
    return decoded


def shard(path, members):
    """A tar of (name, bytes) or TarInfo members."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def picture(tmp_path_factory, save):
    """picture(seed): the bytes of a small PNG."""

    def make(seed=0, shape=(8, 8, 3)):
        path = tmp_path_factory.mktemp("made") / "a.png"
        save(path, seed, shape)
        return path.read_bytes()

    return make


def test_plain_pictures_at_any_depth(tmp_path, save):
    arrays = {key: save(tmp_path / key, i) for i, key in enumerate(["b.png", "sub/a.png", "sub/deep/c.PNG"])}
    (tmp_path / "notes.md").write_text("words")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    source = open_source(tmp_path)
    assert source.kind == "plain"
    assert [item.key for item in source.items] == sorted(arrays)
    assert source.rejected == []
    assert source.classes == ()
    assert all(item.caption is None and item.label is None for item in source.items)
    for i, item in enumerate(source.items):
        assert (source.read(i).array == arrays[item.key]).all()


def test_class_folders(tmp_path, save):
    for i, key in enumerate(["dog/1.png", "cat/1.png", "cat/young/2.png"]):
        save(tmp_path / key, i)
    source = open_source(tmp_path)
    assert source.kind == "classes"
    assert source.classes == ("cat", "dog")
    assert [item.label for item in source.items] == ["cat", "cat", "dog"]


def test_one_folder_is_no_class_and_numbers_sort_as_numbers(tmp_path, save):
    save(tmp_path / "a/photos/1.png", 0)
    assert open_source(tmp_path / "a").kind == "plain"
    for name in ("10", "9", "1"):
        save(tmp_path / "b" / name / "1.png", 0)
    assert open_source(tmp_path / "b").classes == ("1", "9", "10")


def test_captions_beside_pictures(tmp_path, save):
    for key in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / key, 1)
    (tmp_path / "a.txt").write_bytes("\ufeffa café\nsecond line\n".encode())
    (tmp_path / "b.caption").write_text("a dog")
    (tmp_path / "d.txt").write_text("  \n")
    source = open_source(tmp_path)
    assert source.kind == "captions"
    assert [item.caption for item in source.items] == ["a café", "a dog", None, None]


def test_metadata_jsonl(tmp_path, save):
    for key in ("a.png", "sub/b.png", "c.png", "hints/a.png"):
        save(tmp_path / key, 1)
    lines = [
        {
            "file_name": "a.png",
            "text": "an a",
            "name": "A",
            "split": "val",
            "mood": 3,
            "conditioning_image": "hints/a.png",
        },
        {"file_name": "./sub/b.png", "caption": "a b", "label": 7, "keywords": ["x", "y z"]},
        {"file_name": "gone.png", "text": "?"},
        {"file_name": "../secret.png", "text": "?"},
        {"file_name": "/etc/passwd", "text": "?"},
        {"file_name": "a.png", "text": "again"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = open_source(tmp_path)
    assert source.kind == "metadata"
    first, second = source.items
    assert (first.key, first.caption, first.split, first.label) == ("a.png", "an a", "validation", None)
    assert first.extras == {"name": "A", "mood": 3, "conditioning_image": "hints/a.png"}
    assert (second.key, second.caption, second.label, second.keywords) == ("sub/b.png", "a b", "7", ("x", "y z"))
    named = reasons(source)
    assert named["gone.png"] == "is named in metadata.jsonl, but missing"
    assert named["../secret.png"] == named["/etc/passwd"] == "is named in metadata.jsonl, but leaves the data folder"
    assert named["a.png"].startswith("is named again")
    assert named["c.png"] == "is not named in metadata.jsonl"
    assert "hints/a.png" not in named
    assert len(source.rejected) == 5


def test_metadata_csv_and_splits(tmp_path, save):
    for split in ("train", "test"):
        save(tmp_path / split / "a.png", 1)
        (tmp_path / split / "metadata.csv").write_text('file_name,text,keywords\na.png,"x, y","p|q"\n')
    source = open_source(tmp_path)
    assert [(item.key, item.split, item.caption) for item in source.items] == [
        ("test/a.png", "test", "x, y"),
        ("train/a.png", "train", "x, y"),
    ]
    assert source.items[0].keywords == ("p", "q")
    assert [item.key for item in source.select("train").items] == ["train/a.png"]
    with pytest.raises(InputError, match="did you mean 'train'"):
        source.select("trian")


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("metadata.jsonl", b'{"text": "b"}', "has no file_name; each line names its picture by it"),
        ("metadata.jsonl", b'{"file_name": "b.png"', "is not a JSON object"),
        ("metadata.jsonl", b"[" * 100_000, "is not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "b.png", "text": "caf\xe9"}', "is not UTF-8 text"),
        ("metadata.jsonl", b'{"file_name": "b.png", "text": "\\ud800"}', "is not UTF-8 text"),
        ("metadata.csv", b"b.png,caf\xe9", "is not UTF-8 text"),
        ("metadata.csv", b",no picture", "has no file_name"),
        ("metadata.csv", b"b.png," + b"x" * 200_000, "is not CSV: field larger than field limit"),
    ],
)
def test_a_bad_line_of_metadata_is_named_and_the_rest_is_used(tmp_path, save, name, bad, reason):
    lines = [b'{"file_name": "a.png", "text": "an a"}', bad, b'{"file_name": "c.png", "text": "a c"}']
    if name.endswith(".csv"):
        lines = [b"file_name,text", bad, b"a.png,an a", b"c.png,a c"]
    for key in ("a.png", "b.png", "c.png"):
        save(tmp_path / key, 1)
    (tmp_path / name).write_bytes(b"\n".join(lines))
    found = open_source(tmp_path)
    assert [(item.key, item.caption) for item in found.items] == [("a.png", "an a"), ("c.png", "a c")]
    assert reasons(found)[f"{name} line 2"].startswith(reason)
    assert reasons(found)["b.png"] == f"is not named in {name}"


def test_metadata_without_its_column_is_refused(tmp_path, save):
    save(tmp_path / "a.png", 1)
    (tmp_path / "metadata.csv").write_text("picture,text\na.png,b\n")
    with pytest.raises(InputError, match="no column file_name; its columns are picture, text"):
        open_source(tmp_path)


@pytest.mark.parametrize("data", [b"caf\xe9", b"caf\xe9 au lait", "tea".encode("utf-16"), "tea".encode("utf-16-le")])
def test_a_caption_that_is_not_utf8_is_named_and_its_picture_used_without(tmp_path, save, picture, data):
    root = tmp_path / "set"
    save(root / "a.png", 1)
    (root / "a.txt").write_bytes(data)
    shard(tmp_path / "s.tar", [("b.png", picture()), ("b.txt", data), ("b.json", b'{"text": "tea"}')])
    named, kept = open_source(root), open_source(tmp_path / "s.tar")
    assert (named.items[0].caption, kept.items[0].caption) == (None, "tea")
    assert reasons(named) == {"a.txt": folder_module.NOT_TEXT}
    assert reasons(kept) == {"s.tar/b.txt": folder_module.NOT_TEXT}


def test_a_long_caption_file_is_cut_between_characters(tmp_path, save):
    save(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("\u732b" * folder_module.MAX_CAPTION_BYTES)
    assert set(str(open_source(tmp_path).items[0].caption)) == {"\u732b"}


def test_nothing_usable(tmp_path, save):
    (tmp_path / "photo.txt").write_text("no folder")
    with pytest.raises(InputError, match=r"nowhere does not exist$") as caught:
        open_source(tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="did you mean 'photos'"):
        open_source(tmp_path / "photo")
    with pytest.raises(InputError, match="holds no pictures"):
        open_source(tmp_path / "photos")
    (tmp_path / "photos/a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no usable picture.*\n  a.png: is empty"):
        open_source(tmp_path / "photos")
    with pytest.raises(InputError, match="is a file") as caught:
        open_source(tmp_path / "photos/a.png")
    assert caught.value.exit_code == 2


def test_every_unusable_file_is_named(tmp_path, save):
    outside = tmp_path / "outside"
    save(outside / "secret.png", 5)
    root = tmp_path / "set"
    for i in range(3):
        save(root / f"good{i}.png", i)
    data = (root / "good0.png").read_bytes()
    (root / "cut.png").write_bytes(data[:60])
    (root / "empty.jpg").write_bytes(b"")
    (root / "drawing.svg").write_text("<svg/>")
    (root / "old.gif").write_bytes(b"GIF89a")
    (root / "text.png").write_text("words")
    os.symlink(outside / "secret.png", root / "leaves.png")
    os.symlink(outside, root / "folder")
    os.symlink("loop.png", root / "loop.png")
    os.symlink("good0.png", root / "inside.png")
    os.mkfifo(root / "pipe.png")
    writer = os.open(root / "pipe.png", os.O_RDWR)  # or who opened the pipe would wait for ever
    (root / os.fsdecode(b"bad\xff.png")).write_bytes(data)
    before = sorted(os.listdir(root))
    source = open_source(root)
    assert [item.key for item in source.items] == ["good0.png", "good1.png", "good2.png", "inside.png"]
    named = reasons(source)
    assert named == {
        "bad\ufffd.png": "has a name that is not UTF-8; rename it",
        "cut.png": "is a damaged PNG: truncated or corrupt",
        "drawing.svg": "is SVG, which is a drawing program and not a picture; save it as PNG",
        "empty.jpg": "is empty (0 bytes)",
        "folder": "is a symbolic link to a folder, which is not followed",
        "leaves.png": "is a symbolic link that leaves the data folder",
        "loop.png": "is a symbolic link that leads nowhere",
        "old.gif": "is GIF, which is not read; save it as PNG or WebP",
        "pipe.png": "is not a regular file",
        "text.png": "is not a PNG, JPEG, WebP or TIFF picture",
    }
    assert sorted(os.listdir(root)) == before
    os.close(writer)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, save, monkeypatch):
    save(tmp_path / "a.png", 0)
    save(tmp_path / "shut/b.png", 0)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert reasons(open_source(tmp_path)) == {"shut": "cannot be listed (Permission denied)"}


def test_a_second_open_decodes_nothing(tmp_path, save, monkeypatch, own_cache):
    root = tmp_path / "set"
    for i in range(5):
        save(root / f"{i}.png", i)
    (root / "bad.png").write_bytes(b"x")
    first = open_source(root)
    decoded = counted(monkeypatch)
    again = open_source(root)
    assert decoded == []
    assert again.items == first.items
    assert again.rejected == first.rejected
    assert again.fingerprint == first.fingerprint
    save(root / "3.png", 77)
    changed = open_source(root)
    assert decoded == ["3.png"]
    assert changed.items[3].digest != first.items[3].digest
    assert changed.fingerprint != first.fingerprint
    (root / "new.png").write_bytes((root / "0.png").read_bytes())
    os.remove(root / "1.png")
    assert [item.key for item in open_source(root).items] == ["0.png", "2.png", "3.png", "4.png", "new.png"]
    assert decoded == ["3.png", "new.png"]


def test_same_size_and_time_but_other_bytes_is_seen(tmp_path, save, monkeypatch):
    save(tmp_path / "a.png", 0)
    first = open_source(tmp_path)
    data, times = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.png").stat()
    other = bytearray(data)
    other[-1] ^= 1
    (tmp_path / "a.png").write_bytes(bytes(other))
    os.utime(tmp_path / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    decoded = counted(monkeypatch)
    assert open_source(tmp_path).items[0].digest != first.items[0].digest
    assert decoded == ["a.png"]


@pytest.mark.parametrize("damage", ["cut", "flip", "words", "format"])
def test_a_damaged_index_is_as_good_as_none(tmp_path, save, monkeypatch, own_cache, damage):
    root = tmp_path / "set"
    save(root / "a.png", 0)
    first = open_source(root)
    (index,) = own_cache.rglob("*.json")
    data = index.read_bytes()
    if damage == "format":
        monkeypatch.setattr(source_module, "INDEX_FORMAT", 999)
    else:
        flipped = data.replace(first.items[0].digest.encode(), b"0" * 64)
        index.write_bytes({"cut": data[:-9], "flip": flipped, "words": b"hello"}[damage])
    decoded = counted(monkeypatch)
    assert open_source(root).items == first.items
    assert decoded == ["a.png"]


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, save, monkeypatch):
    save(tmp_path / "set/a.png", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(tmp_path / "set")) == 1


def test_an_interrupted_index_goes_on(tmp_path, save, monkeypatch):
    for i in range(12):
        save(tmp_path / f"{i:02}.png", i)
    real = source_module.decode

    def stop(data, name, values=None):
        if name == "08.png":
            raise KeyboardInterrupt
        return real(data, name, values)

    monkeypatch.setattr(source_module, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path)
    monkeypatch.setattr(source_module, "decode", real)
    decoded = counted(monkeypatch)
    assert len(open_source(tmp_path)) == 12
    assert "08.png" in decoded
    assert "02.png" not in decoded


def test_a_picture_that_changes_after_indexing_is_not_read(tmp_path, save):
    for key in ("a.png", "b.png"):
        save(tmp_path / key, 1)
    source = open_source(tmp_path)
    save(tmp_path / "a.png", 2)
    os.remove(tmp_path / "b.png")
    with pytest.raises(BadPicture, match=r"a\.png: has changed"):
        source.read(0)
    with pytest.raises(BadPicture, match=r"b\.png: can no longer be read"):
        source.read(1)


def test_shards_are_read_by_offset(tmp_path, picture):
    data = [picture(i) for i in range(4)]
    record = {"name": "zero", "keywords": ["k"], "split": "holdout", "label": "L", "group": "g"}
    shard(
        tmp_path / "set-0.tar", [("0.json", json.dumps(record).encode()), ("0.png", data[0]), ("0.txt", b"a zero\nx")]
    )
    members = [("dir/1.png", data[1]), ("dir/1.json", b'{"caption": "one"}'), ("2.PNG", data[2]), ("2.cls", b"3\n")]
    shard(tmp_path / "set-1.tar", [*members, ("3.txt", b"no picture"), ("0.png", data[3])])
    source = open_source(tmp_path)
    assert source.kind == "shards"
    assert source.rejected == []
    by_key = {item.key: item for item in source.items}
    assert list(by_key) == ["2", "dir/1", "set-0.tar/0", "set-1.tar/0"]
    zero = by_key["set-0.tar/0"]
    assert (zero.caption, zero.keywords, zero.label, zero.split) == ("a zero", ("k",), "L", "holdout")
    assert zero.extras == {"group": "g"}
    assert by_key["dir/1"].caption == "one"
    assert by_key["2"].label == "3"
    assert source.data([*by_key].index("dir/1")) == data[1]
    single = open_source(tmp_path / "set-1.tar")
    assert [item.key for item in single.items] == ["0", "2", "dir/1"]


def test_shards_are_indexed_once_and_again_when_they_change(tmp_path, picture, monkeypatch):
    path = tmp_path / "a.tar"
    shard(path, [("0.png", picture(0)), ("0.txt", b"old")])
    first = open_source(tmp_path)
    decoded = counted(monkeypatch)
    assert open_source(tmp_path).items == first.items
    assert decoded == []
    shard(path, [("0.png", picture(0)), ("0.txt", b"new")])
    assert open_source(tmp_path).items[0].caption == "new"


def test_hostile_shards(tmp_path, picture):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    names = ["../up.png", "/abs.png", "a/../../b.png", "back\\slash.png", "bell\a.png"]
    members = [(name, picture(1)) for name in names]
    good = [
        ("good.png", picture(0)),
        ("good.jpg", picture(2)),
        ("good.json", b"[" * 100_000),
        ("x/bad.png", b"nothing"),
    ]
    shard(tmp_path / "a.tar", [*members, (link, b""), (device, b""), *good])
    source = open_source(tmp_path)
    assert [item.key for item in source.items] == ["good"]
    named = reasons(source)
    for name in names[:4]:
        assert named[f"a.tar/{name}"] == "has a name that leaves the shard"
    assert named["a.tar/bell\a.png"] == "has a name with unprintable characters"
    assert named["a.tar/link.png"] == named["a.tar/device.png"] == "is not a plain file (a link, a device or sparse)"
    assert named["a.tar/good.jpg"] == "is a second picture of its key"
    assert named["a.tar/good.json"] == "is not a JSON object; its words are left out"
    assert named["x/bad"] == "is not a PNG, JPEG, WebP or TIFF picture"
    assert len(source.rejected) == 10


def test_damaged_shards_keep_what_is_whole(tmp_path, picture):
    whole = tmp_path / "whole.tar"
    shard(whole, [(f"{i}.png", picture(i)) for i in range(6)])
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        offsets = {member.name: member.offset for member in archive}
    overwritten = bytearray(data)
    overwritten[offsets["3.png"] : offsets["3.png"] + 512] = random.Random(0).randbytes(512)
    (tmp_path / "a.tar").write_bytes(overwritten)
    (tmp_path / "b.tar").write_bytes(data[: offsets["2.png"] + 600])
    import gzip

    (tmp_path / "c.tar").write_bytes(gzip.compress(data))
    whole.unlink()
    source = open_source(tmp_path)
    assert [item.key for item in source.items] == ["2", "a.tar/0", "a.tar/1", "b.tar/0", "b.tar/1"]
    named = reasons(source)
    assert "damaged" in named["a.tar"]
    assert named["b.tar/2.png"] == "is cut off by the end of the shard"
    assert "compressed or not a tar" in named["c.tar"]


def test_links_to_shards_outside_are_refused(tmp_path, picture):
    shard(tmp_path / "out.tar", [("0.png", picture(0))])
    root = tmp_path / "set"
    root.mkdir()
    os.symlink(tmp_path / "out.tar", root / "link.tar")
    with pytest.raises(InputError, match="leaves the data folder"):
        open_source(root)


def test_pictures_beside_shards_are_named(tmp_path, picture):
    shard(tmp_path / "a.tar", [("0.png", picture(0))])
    (tmp_path / "loose.png").write_bytes(picture(1))
    source = open_source(tmp_path)
    assert len(source) == 1
    assert reasons(source) == {"loose.png": "lies beside tar shards, which are read instead"}


def test_a_thousand_pictures_with_one_in_a_hundred_bad(tmp_path, save):
    save(tmp_path / "good.png", 0)
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "good.png").unlink()
    for i in range(1000):
        (tmp_path / f"{i:04}.png").write_bytes(data[:50] if i % 100 == 7 else data)
    source = open_source(tmp_path)
    assert len(source) == 990
    assert len(source.rejected) == 10
    assert len({item.key for item in source.items} | {row.key for row in source.rejected}) == 1000


def test_caption_files_are_bounded(tmp_path, save, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_CAPTION_BYTES", 10)
    save(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_text("x" * 100)
    assert open_source(tmp_path).items[0].caption == "x" * 10
