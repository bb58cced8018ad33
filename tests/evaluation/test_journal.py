"""Journals as a killed run leaves them."""

from latentkit.evaluation.journal import curves, lines


def test_torn_lines_and_absent_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(lines(path)) == []
    path.write_text('{"step": 1, "a": 2}\n{"step": 2, "a": nu')
    assert list(lines(path)) == [{"step": 1, "a": 2}]


def test_numbers_by_name_and_rows_by_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 2, "b": null, "c": [3, 4.5], "d": "word"}\n{"step": 2, "a": 3.5, "c": [null, 5]}\n'
    )
    assert curves(path) == {"a": [(1, 2), (2, 3.5)], "c/0": [(1, 3)], "c/1": [(1, 4.5), (2, 5)]}
