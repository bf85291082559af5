"""What a data set is for, from its columns."""

from shutil import copy

import pytest
from datasets import ClassLabel, Image, List, Value

from d2ft_peft.cli.data_columns import Columns, find_columns
from d2ft_peft.cli.task_data import load_task


TEXT, LABEL, NUMBER = Value("string"), ClassLabel(names=["no", "yes"]), Value("int64")


@pytest.mark.parametrize(
    ("features", "given", "found", "task"),
    [
        ({"sentence": TEXT, "label": NUMBER}, {}, {"text": "sentence", "label": "label"}, "sequence-classification"),
        ({"body": TEXT, "mood": LABEL}, {}, {"text": "body", "label": "mood"}, "sequence-classification"),
        ({"img": Image(), "label": LABEL}, {}, {"image": "img", "label": "label"}, "image-classification"),
        ({"text": TEXT}, {}, {"text": "text"}, "causal-lm"),
        ({"prompt": TEXT, "completion": TEXT}, {}, {"prompt": "prompt", "completion": "completion"}, "causal-lm"),
        ({"question": TEXT, "answer": TEXT}, {}, {"prompt": "question", "completion": "answer"}, "causal-lm"),
        ({"question": TEXT, "answer": TEXT}, {"text": "answer"}, {"text": "answer"}, "causal-lm"),
        ({"a": TEXT, "b": TEXT}, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, "causal-lm"),
        ({"a": TEXT, "b": TEXT}, {"label": "b"}, {"text": "a", "label": "b"}, "sequence-classification"),
    ],
)
def test_columns_are_found(features, given, found, task):
    columns = find_columns(features, Columns(**given))
    assert columns == Columns(**found) and columns.task == task


@pytest.mark.parametrize(
    ("features", "given", "says"),
    [
        ({"text": TEXT}, {"text": "body"}, "column 'body' is not in the data, which has"),
        ({"img": Image()}, {}, "images need labels"),
        ({"a": TEXT, "b": TEXT}, {"prompt": "a"}, "belong together"),
        ({"number": NUMBER}, {}, "nothing can be learned from the columns"),
        ({"parts": List(TEXT)}, {"text": "parts"}, "column 'parts' holds List.*, which is no text"),
    ],
)
def test_what_cannot_be_learned_is_said(features, given, says):
    with pytest.raises(ValueError, match=says):
        find_columns(features, Columns(**given))


ODD = {
    "gap.csv": "text,label\n" + "good,pos\nbad,\n" * 9, "one.csv": "text,label\ngood,pos\n", "empty.csv": "",
    "header.csv": "text,label\n", "broken.jsonl": '{"text": "good", "label": 1}\n{"text": "bad", \n',
    "numbers.csv": "text,label\n" + "good,0.5\nbad,0.25\n" * 9, "alike.csv": "text,label\n" + "good,pos\n" * 9,
    "text.csv": "text\n" + "good\n" * 9, "parts.jsonl": '{"text": ["good"], "label": 1}\n' * 9,
    "empty text.csv": "text,label\n" + "good,pos\n,neg\n" * 9,
    "empty answer.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n' * 9,
    "noise.parquet": "noise", "noise.xyz": "noise", "empty.jsonl": "",
}  # fmt: skip


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("file", "says"),
    {
        "gap.csv": "column 'label' has the labels", "one.csv": "has 1 rows; at least 2 are needed",
        "empty.csv": "is empty", "empty.jsonl": "is empty", "header.csv": "cannot be read",
        "broken.jsonl": "cannot be read: JSON parse error", "numbers.csv": "at least two are needed, no floats",
        "alike.csv": r"has the labels \['pos'\]", "text.csv": r"the columns \['text'\] have no label, and a bert model",
        "parts.jsonl": "nothing can be learned from the columns", "noise.parquet": "cannot be read",
        "empty text.csv": "column 'text' is empty in 9 of 18 rows",
        "empty answer.jsonl": "column 'completion' is empty in 9 of 18 rows",
        "noise.xyz": "ends in .xyz; give one of", "missing.csv": "does not exist",
    }.items(),
)  # fmt: skip
def test_a_file_from_which_nothing_is_learned_is_named(assets, tmp_path, file, says):
    if file in ODD:
        (tmp_path / file).write_text(ODD[file])
    with pytest.raises(ValueError, match=says):
        load_task(str(assets / "bert"), str(tmp_path / file), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_model_without_tokenizer_is_named(assets, tmp_path, model):
    copy(assets / model / "config.json", tmp_path)
    (tmp_path / "good.csv").write_text("text,label\n" + "good,pos\nbad,neg\n" * 9)
    with pytest.raises(ValueError, match="has no tokenizer that can be read .*save one beside it"):
        load_task(str(tmp_path), str(tmp_path / "good.csv"), cache_dir=str(tmp_path / "cache"))


def test_rows_that_differ_in_their_fields_are_read(assets, tmp_path):
    rows = ['{"text": "good film", "label": 1}', '{"text": "bad", "extra": [1, 2], "label": 0}'] * 10
    (tmp_path / "ragged.jsonl").write_text("\n".join(rows))
    task = load_task(str(assets / "bert"), str(tmp_path / "ragged.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert task.name == "sequence-classification" and len(task.train) + len(task.held_out) == 20
