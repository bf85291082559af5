"""Tables as text."""

import numpy as np
import pytest

from d2ft_peft.report import format_table


def test_columns_are_aligned_and_numbers_stand_right():
    rows = [{"policy": "plain", "accuracy": 0.86349}, {"policy": "D2FT", "accuracy": 0.8}]
    assert format_table(rows) == (
        "| policy | accuracy |\n"
        "| ------ | -------: |\n"
        "| plain  |   0.8635 |\n"
        "| D2FT   |      0.8 |"
    )  # fmt: skip


def cell(value, **kwargs) -> str:
    return format_table([{"x": value}], **kwargs).splitlines()[2].strip("| ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.123456, "0.1235"),
        (12345.6, "12346"),
        (-1234567.0, "-1234567"),
        (1e-5, "1e-05"),
        (0.0, "0"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e20, "1e+20"),
        (123456, "123456"),
        (np.float32(0.25), "0.25"),
        (np.int64(7), "7"),
        (True, "True"),
        (None, ""),
        ("a|b\nc", "a\\|b c"),
    ],
)
def test_values_without_a_format(value, text):
    assert cell(value) == text


def test_formats_apply_to_the_numbers_of_a_column_only():
    table = format_table([{"a": 0.5, "b": 0.5}, {"a": "-", "b": 3}, {"a": None}], formats={"a": ".1%", "b": ".2f"})
    assert [line.replace(" ", "") for line in table.splitlines()[2:]] == ["|50.0%|0.50|", "|-|3.00|", "|||"]


def test_a_column_with_text_stands_left():
    rule = format_table([{"a": 1, "b": None}, {"a": "-", "b": 2.0}]).splitlines()[1]
    assert rule == "| --- | --: |"


def test_columns_choose_and_order():
    rows = [{"a": 1, "b": 2}, {"c": 3}]
    assert format_table(rows).splitlines()[0] == "|   a |   b |   c |"
    assert format_table(rows, ["c", "a"]).splitlines()[2:] == ["|     |   1 |", "|   3 |     |"]


def test_no_rows_make_a_header():
    assert format_table([], ["a", "loss"]) == "| a   | loss |\n| --- | ---- |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"columns=\[\] must not be empty; name the columns"),
        (([{"a": 1}], []), r"columns=\[\] must not be empty"),
        (([{"a": 1}], ["b"]), r"columns names 'b', which no row has; choose from \['a'\]"),
        (([{"a": 1}], None, {"b": ".1f"}), r"formats names 'b', which is not a column; choose from \['a'\]"),
        (([{"a": 1.0}], None, {"a": "q"}), r"formats\['a'\]='q' does not apply to 1.0: .*; give a specification"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        format_table(*arguments)
