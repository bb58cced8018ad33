"""The committed emoji shards are what their README says, and the script that makes them refuses what it must."""

import hashlib
import importlib.util
import io
import json
import re
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
SHARDS = sorted(FOLDER.glob("emoji-*.tar"))


class Glyph(NamedTuple):
    picture: Image.Image
    caption: str
    fields: dict[str, Any]


@pytest.fixture(scope="module")
def glyphs() -> dict[str, Glyph]:
    found = {}
    for shard in SHARDS:
        with tarfile.open(shard) as tar:
            contents = {member.name: cast(IO[bytes], tar.extractfile(member)).read() for member in tar}
        for key in sorted({name.partition(".")[0] for name in contents}):
            picture = Image.open(io.BytesIO(contents.pop(f"{key}.png")))
            fields = json.loads(contents.pop(f"{key}.json"))
            found[key] = Glyph(picture, contents.pop(f"{key}.txt").decode(), fields)
        assert not contents, "members that belong to no glyph"
    return found


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_emoji", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pen(make: ModuleType) -> Any:
    if packages := make.missing():
        pytest.skip(f"needs the Debian packages {' '.join(packages)}")
    return make.Pen()


def test_shards_are_small_sorted_and_without_time_or_user() -> None:
    assert SHARDS
    assert sum(shard.stat().st_size for shard in SHARDS) < 20e6
    names = []
    for shard in SHARDS:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                names.append(member.name.split("."))
    assert names == sorted(names)
    assert all(len(name) == 2 for name in names), "a key holds a dot"


def test_pictures_are_drawn_on_transparency(glyphs: dict[str, Glyph]) -> None:
    for key, glyph in glyphs.items():
        assert (glyph.picture.mode, glyph.picture.size) == ("RGBA", (128, 128)), key
        assert glyph.picture.getchannel("A").getextrema() == (0, 255), key


def test_captions_are_unique_names(glyphs: dict[str, Glyph]) -> None:
    captions = [glyph.caption for glyph in glyphs.values()]
    assert len(set(captions)) == len(captions)
    assert all(glyph.caption == glyph.fields["name"] and glyph.caption.strip() for glyph in glyphs.values())
    known = "red heart", "pizza", "flag: France", "flag: Scotland", "keycap: 1", "woman firefighter", "pink heart"
    assert set(known) <= set(captions)


def test_fields_agree_with_the_key(glyphs: dict[str, Glyph]) -> None:
    for key, glyph in glyphs.items():
        fields = glyph.fields
        points = [int(point, 16) for point in fields["codepoints"].split()]
        assert "_".join(f"{point:04x}" for point in points) == key
        assert "".join(map(chr, points)) == fields["emoji"]
        assert not any(0x1F3FB <= point <= 0x1F3FF for point in points), f"{key} has a skin tone"
        assert fields["label"] == fields["group"]
        assert fields["subgroup"]
    assert "cheese" in glyphs["1f355"].fields["keywords"]


def test_split_follows_the_hash_rule(glyphs: dict[str, Glyph]) -> None:
    for glyph in glyphs.values():
        digest = hashlib.sha256(glyph.fields["codepoints"].encode()).digest()
        assert glyph.fields["split"] == ("holdout" if int.from_bytes(digest[:8], "big") % 100 < 5 else "train")
    share = sum(glyph.fields["split"] == "holdout" for glyph in glyphs.values()) / len(glyphs)
    assert 0.04 <= share <= 0.06


def test_readme_counts_are_those_of_the_shards(glyphs: dict[str, Glyph]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = {row[0]: (int(row[1]), int(row[2])) for row in re.findall(r"\| (.+?) \| (\d+) \| (\d+) \|", readme)}
    counted = Counter((glyph.fields["group"], glyph.fields["split"]) for glyph in glyphs.values())
    expected: dict[str, tuple[int, ...]] = {
        group: (counted[group, "train"], counted[group, "holdout"]) for group, _ in counted
    }
    expected["**all**"] = tuple(map(sum, zip(*expected.values())))
    assert table == expected
    assert readme.count(f"{len(glyphs):,} pictures") == 1
    twins = sum(a == b for a, b in combinations([glyph.picture.tobytes() for glyph in glyphs.values()], 2))
    assert f"{twins} pairs of glyphs are pixel-identical" in readme


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\U0001f468\u200d\U0001f355", "shaped to 2 glyphs"),  # a man joined with a pizza
        ("\u4e00", "not in the font"),  # .notdef, which has no bitmap
        ("\U0001f1fd\U0001f1fd", "not in the font"),  # a stand-in is drawn for a flag of no country
        ("\U0001f600\u200d", "drawn as one of its parts"),  # the joiner joins nothing
    ],
)
def test_pen_refuses_what_is_not_one_glyph_of_its_own(pen: Any, text: str, reason: str) -> None:
    assert pen.draw(text) == reason


def test_pen_knows_a_font_that_draws_its_notdef(pen: Any, make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make.Pen, "cell", lambda self, text: b"flag" if text == make.STAND_INS[1] else b"tofu")
    assert make.Pen().draw("\U0001f600") == "not in the font"


def test_pen_refuses_a_glyph_that_would_be_cut(pen: Any, make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pen, "cell", lambda text: b"\xff" * (make.CELL[0] * make.CELL[1] * 4))
    assert pen.draw("\U0001f600") == "wider than the picture"


def test_pen_draws_the_committed_pixels(pen: Any, glyphs: dict[str, Glyph]) -> None:
    for key in ("1f600", "1f1eb_1f1f7", "1f469_200d_1f692", "0023_fe0f_20e3"):
        drawn, kept = pen.draw(glyphs[key].fields["emoji"]), glyphs[key].picture
        assert not isinstance(drawn, str), drawn
        on_white = [Image.alpha_composite(Image.new("RGBA", kept.size, "white"), picture) for picture in (drawn, kept)]
        assert on_white[0].tobytes() == on_white[1].tobytes()


def test_missing_packages_are_named(make: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make, "SOURCES", {tmp_path / "font.ttf": "a-font", tmp_path / "names.txt": "some-names"})
    monkeypatch.setattr(make.features, "check", lambda feature: False)
    assert make.missing() == ["a-font", "libraqm0", "some-names"]


def test_equal_captions_stop_the_script(make: ModuleType) -> None:
    drawn = {key: (make.Emoji(key, "grinning face", [], "g", "s"), b"") for key in ("1F600", "1F601")}
    with pytest.raises(SystemExit, match="several emoji are named grinning face"):
        make.report(drawn, [])


def test_check_compares_pixels_and_texts_not_compression(make: ModuleType, glyphs: dict[str, Glyph]) -> None:
    def shard(picture: Image.Image, level: int, caption: bytes) -> dict[str, bytes]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=level)
        return {"emoji-000000.tar": make.pack([("1f600.png", buffer.getvalue()), ("1f600.txt", caption)])}

    face, pizza = glyphs["1f600"].picture, glyphs["1f355"].picture
    one, other = shard(face, 1, b"face"), shard(face, 9, b"face")
    assert one != other
    assert make.unpack(one) == make.unpack(other)
    assert make.unpack(one) != make.unpack(shard(pizza, 1, b"face"))
    assert make.unpack(one) != make.unpack(shard(face, 1, b"grin"))
