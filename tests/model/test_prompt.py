"""The grammar of emphasis."""

import pytest

from latentkit.errors import InputError
from latentkit.model.conditioners.prompt import escaped, pieces


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a [weak] word", [("a ", 1), ("weak", 1 / 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[[unbalanced", [("unbalanced", 1 / 1.21)]),
        ("closed) too] often:1.2)", [("closed) too] often:1.2)", 1)]),
        (r"\(literal\] \\ a\b", [(r"(literal] \ a\b", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(much: 1.5 )(none:0)(back:-.5)(dot:2.)", [("much", 1.5), ("none", 0), ("back", -0.5), ("dot", 2)]),
        ("(ratio 16:9 wide)", [("ratio 16:9 wide", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[square:1.3]", [("square:1.3", 1 / 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
                ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("", []),
    ],
)  # fmt: skip
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    (found,) = pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_break_begins_a_window() -> None:
    found = [[piece.text for piece in window] for window in pieces("a cat BREAK (a BREAK dog) BREAKFAST")]
    assert found == [["a cat"], ["", "a"], ["dog", " BREAKFAST"]]


@pytest.mark.parametrize("text", ["a (b) [c] \\ d:2)", "\\(", "((:1.5)", "plain"])
def test_what_is_escaped_is_plain(text: str) -> None:
    assert pieces(escaped(text)) == [[(text, 1.0)]]


@pytest.mark.parametrize("prompt", ["(a:101)", "(a:-101)", "(" * 60 + "a", f"(a:{'9' * 400})"])
def test_weights_beyond_all_measure_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="at most 100 is allowed"):
        pieces(prompt)
