"""Folders with a tiny model and tiny data, and the command line in process."""

import json
import shlex

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from d2ft_peft.cli import app

from ..models import TINY


@pytest.fixture
def d2ft():
    """Runs a command line; the answer as JSON if it asks for it, else as text. `stderr` is what it said besides."""

    def run(line: str, code: int = 0):
        result = CliRunner().invoke(app, shlex.split(line))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        run.stderr = result.stderr
        if code:
            assert result.stdout == "" and "Traceback" not in result.stderr
            return result.stderr
        return json.loads(result.stdout) if "--json" in line else result.stdout

    return run


@pytest.fixture
def config_folder(tmp_path):
    """A folder with the configuration of a tiny model, and nothing else."""

    def make(name: str, **overrides) -> str:
        tiny, folder = TINY[name], tmp_path / name
        tiny.config(**{**tiny.kwargs, **overrides}, architectures=[tiny.model.__name__]).save_pretrained(folder)
        return str(folder)

    return make


WORDS = ["good", "fine", "nice", "bad", "poor", "sad", "film", "book", "the", "a"]


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A folder with tiny pre-trained models, their tokenizer or processor, and data of every kind."""
    root = tmp_path_factory.mktemp("assets")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    for name in ("bert", "llama", "vit"):
        TINY[name].build().save_pretrained(root / name)
        if name != "vit":
            tokenizer.save_pretrained(root / name)
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    rng = np.random.default_rng(0)

    def sentence(label: int) -> str:
        words = [WORDS[3 * (1 - label) + rng.integers(3)]]
        words += [WORDS[6 + rng.integers(4)] for _ in range(rng.integers(1, 7))]
        return " ".join(rng.permutation(words))

    labels = [int(label) for label in rng.integers(0, 2, 80)]
    rows = [f"{sentence(label)},{'pos' if label else 'neg'}" for label in labels]
    (root / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (root / "plain.txt").write_text("\n".join(sentence(label) for label in labels) + "\n")
    pairs = [json.dumps({"prompt": sentence(label), "completion": sentence(label)}) for label in labels]
    (root / "pairs.jsonl").write_text("\n".join(pairs))
    for split, count in (("train", 20), ("test", 6)):
        for index in range(count):
            folder = root / "images" / split / ("dark", "light")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * (index % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    torch.manual_seed(0)
    return root
