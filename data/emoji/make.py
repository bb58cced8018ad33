"""Draw the emoji data set of this folder: every fully-qualified emoji but the skin-tone variants, with its CLDR name.

    python data/emoji/make.py            writes emoji-000000.tar, emoji-000001.tar ... beside this file
    python data/emoji/make.py --check    draws again and compares with the shards here; exit code 1 if they differ

Needs Pillow with complex layout and the Debian packages named in `SOURCES`; installs nothing and says what is missing.
Same package versions, same pictures and texts; the same bytes too when Pillow compresses with the same zlib.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import PIL
from PIL import Image, ImageFont, features

HERE = Path(__file__).resolve().parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLDR = Path("/usr/share/unicode/cldr/common")
ANNOTATIONS = (CLDR / "annotations/en.xml", CLDR / "annotationsDerived/en.xml")
SOURCES = {  # file -> the Debian package that holds it
    FONT: "fonts-noto-color-emoji",
    EMOJI_TEST: "unicode-data",
    ANNOTATIONS[0]: "unicode-cldr-core",
    ANNOTATIONS[1]: "unicode-cldr-core",
}

SIZE = 128  # pixels a side of a picture
STRIKE = 109  # pixels per em of the font's only bitmap strike: larger or smaller requests fail
CELL = (136, 128)  # pixels of every bitmap in that strike: the 128 x 128 drawing between two empty margins
MARGIN = (CELL[0] - SIZE) // 2
PER_SHARD = 1000  # glyphs
HOLDOUT_PERCENT = 5
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = "\ufe0f"  # CLDR's annotations leave it out of their keys
STAND_INS = ("\U0010ffff", "\U0001f1fd\U0001f1fd")  # drawn for what the font lacks: .notdef, and a flag of no country


class Emoji(NamedTuple):
    """One line of emoji-test.txt with its annotation."""

    codepoints: str  # "1F468 200D 1F373", as in emoji-test.txt
    name: str
    keywords: list[str]
    group: str
    subgroup: str

    @property
    def text(self) -> str:
        return "".join(chr(int(point, 16)) for point in self.codepoints.split())

    @property
    def key(self) -> str:
        return self.codepoints.lower().replace(" ", "_")

    @property
    def split(self) -> str:
        """'holdout' for 5 % of the glyphs, by the SHA-256 of the code points; the rest is 'train'."""
        digest = hashlib.sha256(self.codepoints.encode()).digest()
        return "holdout" if int.from_bytes(digest[:8], "big") % 100 < HOLDOUT_PERCENT else "train"

    @property
    def metadata(self) -> bytes:
        fields = {
            "name": self.name,
            "keywords": self.keywords,
            "group": self.group,
            "subgroup": self.subgroup,
            "label": self.group,
            "codepoints": self.codepoints,
            "emoji": self.text,
            "split": self.split,
        }
        return json.dumps(fields, ensure_ascii=False).encode()


def missing() -> list[str]:
    """Debian packages to install before anything can be drawn, sorted."""
    packages = {package for path, package in SOURCES.items() if not path.is_file()}
    if not features.check("raqm"):
        packages.add("libraqm0")
    return sorted(packages)


def versions() -> str:
    """Versions of everything the result depends on, in one line."""
    parts = [f"Pillow {PIL.__version__}", *(f"{name} {features.version(name)}" for name in ("raqm", "zlib"))]
    for package in sorted(set(SOURCES.values())):
        query = ["dpkg-query", "-W", "-f", "${Package} ${Version}", package]
        try:
            parts.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            parts.append(f"{package} (version unknown)")
    return ", ".join(parts)


def annotations() -> tuple[dict[str, str], dict[str, list[str]]]:
    """English CLDR names and keywords by emoji text without variation selectors."""
    names, keywords = {}, {}
    for path in ANNOTATIONS:
        for node in ET.parse(path).iter("annotation"):
            text = (node.text or "").strip()
            if node.get("type") == "tts":
                names[node.attrib["cp"]] = text
            else:
                keywords[node.attrib["cp"]] = [word.strip() for word in text.split("|")]
    return names, keywords


def emojis() -> Iterator[Emoji]:
    """The fully-qualified emoji of emoji-test.txt without skin tones, in its order."""
    names, keywords = annotations()
    group = subgroup = ""
    for line in EMOJI_TEST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif found := re.fullmatch(r"([0-9A-F ]+?) +; fully-qualified +# \S+ E[\d.]+ (.+)", line):
            codepoints, name = found.groups()
            if any(int(point, 16) in SKIN_TONES for point in codepoints.split()):
                continue
            text = Emoji(codepoints, name, [], group, subgroup).text.replace(VARIATION_SELECTOR, "")
            yield Emoji(codepoints, names.get(text, name), keywords.get(text, []), group, subgroup)


class Pen:
    """Draws a text that is one glyph of the font's bitmap strike, and knows when it is not."""

    def __init__(self) -> None:
        self.font = ImageFont.truetype(FONT, STRIKE, layout_engine=ImageFont.Layout.RAQM)
        self.advance = self.font.getlength("\U0001f600")  # the same for every glyph of the font
        self.stand_ins = [self.cell(text) for text in STAND_INS]

    def cell(self, text: str) -> bytes | None:
        """The glyph's whole bitmap as RGBA bytes with straight alpha, 136 x 128; none where the font has no bitmap."""
        bitmap, _ = self.font.getmask2(text, mode="RGBA")
        if bitmap.size != CELL:
            return None
        # Not ImageDraw.text: on a transparent canvas it leaves the edge colours multiplied by alpha, that is, dark.
        canvas = Image.new("RGBA", CELL)
        canvas.im.paste(bitmap, (0, 0, *CELL))
        return canvas.tobytes()

    def draw(self, text: str) -> Image.Image | str:
        """The 128 x 128 RGBA picture, or the reason why the font has no single glyph for this text."""
        glyphs = self.font.getlength(text) / self.advance
        if glyphs != 1:
            return f"shaped to {glyphs:g} glyphs"
        cell = self.cell(text)
        if cell is None or cell in self.stand_ins:
            return "not in the font"
        parts = text.replace(VARIATION_SELECTOR, "")
        if len(parts) > 1 and any(cell == self.cell(part) for part in parts):
            return "drawn as one of its parts"
        bitmap = Image.frombytes("RGBA", CELL, cell)
        picture = bitmap.crop((MARGIN, 0, MARGIN + SIZE, SIZE))  # the font's own pixels: nothing is resampled
        bitmap.paste((0, 0, 0, 0), (MARGIN, 0, MARGIN + SIZE, SIZE))
        return picture if bitmap.getchannel("A").getbbox() is None else "wider than the picture"


def png(picture: Image.Image) -> bytes:
    """Losslessly compressed bytes; colour under zero alpha is cleared, since nobody can see it."""
    cleared = Image.composite(
        picture, Image.new("RGBA", picture.size), picture.getchannel("A").point(lambda a: 255 * (a > 0))
    )
    buffer = io.BytesIO()
    cleared.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def pack(members: list[tuple[str, bytes]]) -> bytes:
    """A tar file with no trace of time, user or machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(shards: dict[str, bytes]) -> dict[str, bytes]:
    """Members of all shards by name, each picture as its raw pixels, so that the PNG compressor does not matter."""
    contents = {}
    for data in shards.values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, f"{member.name} is not a plain file"
                content = file.read()
                if member.name.endswith(".png"):
                    content = Image.open(io.BytesIO(content)).convert("RGBA").tobytes()
                contents[member.name] = content
    return contents


def make() -> dict[str, bytes]:
    """Shards by file name; what was left out and why, and the counts, go to stderr."""
    pen = Pen()
    drawn: dict[str, tuple[Emoji, bytes]] = {}
    left_out = []
    for emoji in emojis():
        picture = pen.draw(emoji.text)
        if isinstance(picture, str):
            left_out.append(f"  {emoji.name} ({emoji.codepoints}): {picture}")
        else:
            drawn[emoji.key] = (emoji, png(picture))
    report(drawn, left_out)
    keys = sorted(drawn)
    shards = {}
    for number, start in enumerate(range(0, len(keys), PER_SHARD)):
        members = []
        for key in keys[start : start + PER_SHARD]:
            emoji, picture_bytes = drawn[key]
            parts = {"json": emoji.metadata, "png": picture_bytes, "txt": emoji.name.encode()}
            members += [(f"{key}.{suffix}", data) for suffix, data in parts.items()]
        shards[f"emoji-{number:06}.tar"] = pack(members)
    return shards


def report(drawn: dict[str, tuple[Emoji, bytes]], left_out: list[str]) -> None:
    """Print counts per group, identical pictures and what was left out; stop when two captions are equal."""
    names = Counter(emoji.name for emoji, _ in drawn.values())
    if doubles := [name for name, count in names.items() if count > 1]:
        sys.exit(f"make.py: captions must be unique, but several emoji are named {', '.join(doubles)}")
    groups = Counter((emoji.group, emoji.split) for emoji, _ in drawn.values())
    for group in dict.fromkeys(emoji.group for emoji, _ in drawn.values()):
        print(f"| {group} | {groups[group, 'train']} | {groups[group, 'holdout']} |", file=sys.stderr)
    same: dict[bytes, list[Emoji]] = {}
    for emoji, data in drawn.values():
        same.setdefault(data, []).append(emoji)
    for twins in same.values():
        if len(twins) > 1:
            print("identical:", ", ".join(f"{e.name} ({e.split})" for e in twins), file=sys.stderr)
    print(f"{len(drawn)} emoji drawn, {len(left_out)} left out", *left_out, sep="\n", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shards that are there, write nothing")
    arguments = parser.parse_args()
    if packages := missing():
        sys.exit(f"make.py: missing Debian packages; install them with: apt-get install {' '.join(packages)}")
    print(versions(), file=sys.stderr)
    shards = make()
    present = {path.name: path.read_bytes() for path in sorted(HERE.glob("emoji-*.tar"))}
    if not arguments.check:
        for name, data in shards.items():
            (HERE / name).write_bytes(data)
        for name in present.keys() - shards.keys():
            (HERE / name).unlink()
        print(f"wrote {len(shards)} shards, {sum(map(len, shards.values())) / 1e6:.1f} MB", file=sys.stderr)
        return 0
    if present == shards:
        print("the shards are equal byte for byte")
        return 0
    made, there = unpack(shards), unpack(present)
    differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if not differing:
        print("the shards hold the same pictures and texts, compressed differently")
        return 0
    print(f"{len(differing)} members differ: {', '.join(differing[:20])}{' ...' if len(differing) > 20 else ''}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
