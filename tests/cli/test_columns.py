"""What a data set is for, from its columns."""

import pytest
from datasets import ClassLabel, Image, Value

from d2ft_peft.cli.data_columns import Columns, find_columns


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
    ],
)
def test_what_cannot_be_learned_is_said(features, given, says):
    with pytest.raises(ValueError, match=says):
        find_columns(features, Columns(**given))
