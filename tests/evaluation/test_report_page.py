"""The report page: complete in itself, safe with any text, curves where their values are."""

import re
from html.parser import HTMLParser

from latentkit.evaluation.report import (
    MOST_POINTS,
    Figure,
    beside,
    chart,
    folded,
    page,
    pairs,
    paragraph,
    pictures,
    table,
    verdict,
)


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order; collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_its_text_is_text():
    evil = '<script>alert("x")</script> & "quotes"'
    parts = [
        (evil, paragraph(evil) + table([[evil, 1.5]], [evil, "n"]) + folded(evil, evil)),
        ("pictures", pictures([Figure(b"\x89PNG", evil)]) + beside(chart(evil, {evil: [(0, 1.0), (9, 2.0)]}))),
    ]
    text = page(evil, evil, parts)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "script" not in parser.tags
    assert "<script" not in text
    assert parser.sources == ["data:image/png;base64,iVBORw=="]
    assert not re.search(r"https?://", text)


def test_pairs_stay_together_and_a_verdict_is_text():
    one, two = Figure(b"\x89PNG", "drawn"), Figure(b"\x89PNG", "training")
    text = page("t", "l", [("s", pairs([(one, two), (two, one)]) + verdict(["a < b", "c"]))])
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert [part.count("<figure>") for part in text.split('<div class="pair">')] == [0, 2, 2]
    assert "<p>a &lt; b</p><p>c</p>" in text


def places(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()]
        for line in re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    ]


def test_curves_rise_and_fall_with_their_values():
    rising, falling = places(chart("c", {"a": [(0, 1.0), (10, 5.0)], "b": [(0, 5.0), (10, 1.0)]}))
    assert rising[0][0] == falling[0][0] < rising[1][0]
    assert rising[0][1] == falling[1][1] > rising[1][1] == falling[0][1]


def test_a_log_axis_is_even_in_ratios():
    (points,) = places(chart("c", {"a": [(0, 1.0), (1, 10.0), (2, 100.0)]}, log=True))
    assert abs((points[0][1] - points[1][1]) - (points[1][1] - points[2][1])) < 0.2


def test_values_that_cannot_be_drawn_are_left_out():
    nan = float("nan")
    (points,) = places(chart("c", {"a": [(0, nan), (1, 2.0), (2, None), (3, 4.0)], "none": [(0, nan)]}))
    assert len(points) == 2
    assert "No values" in chart("c", {"a": []})
    assert "No values" in chart("c", {"a": [(0, -1.0)]}, log=True)
    assert len(places(chart("c", {"a": [(0, 3.0)]}))[0]) == 1  # one point, no division by an empty range


def test_long_curves_are_averaged():
    (points,) = places(chart("c", {"a": [(i, float(i % 2)) for i in range(10 * MOST_POINTS)]}))
    assert len(points) <= MOST_POINTS
    assert max(y for _, y in points) - min(y for _, y in points) < 0.2


def labels(svg):
    return re.findall(r'text-anchor="end">([^<]*)<', svg)


def test_axes_are_marked_with_round_numbers():
    assert labels(chart("c", {"a": [(0, 0.0), (1, 10.0)]})) == ["0", "5", "10"]
    assert labels(chart("c", {"a": [(0, 0.001), (1, 100.0)]}, log=True)) == ["0.001", "0.01", "0.1", "1", "10", "100"]
    assert labels(chart("c", {"a": [(0, 0.3), (1, 2.5)]}, log=True)) == ["0.5", "1", "2"]
    assert len(labels(chart("c", {"a": [(0, 1.01), (1, 1.02)]}, log=True))) >= 2


def test_only_curves_over_time_have_a_last_value():
    assert "last: " in chart("c", {"a": [(0, 1.0), (1, 2.25)]})
    still = chart("c", {"a": [(0, 1.0), (1, 2.25)]}, over_time=False)
    assert "last: " not in still
    assert "<b>" not in still
