"""The causal language modelling script on a tiny model, a tokenizer of its own and text made on the spot."""

import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.causal_lm import DataArguments, load_blocks, main, pack


pytestmark = pytest.mark.filterwarnings("ignore:the adapter's base model is the local path")
WORDS = ["the", "cat", "dog", "sees", "likes", "a", "bird", "fish", "big", "small"]


def write_text(path, lines, seed):
    rng = np.random.default_rng(seed)
    pattern = [
        " ".join(["the", WORDS[rng.integers(1, 3)], "sees", "a", WORDS[rng.integers(6, 10)]]) for _ in range(lines)
    ]
    path.write_text("\n".join(pattern) + "\n")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A folder with a model of three blocks, its tokenizer and two text files."""
    root = tmp_path_factory.mktemp("assets")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
        intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    write_text(root / "train.txt", 200, seed=0)
    write_text(root / "validation.txt", 40, seed=1)
    return root


@pytest.fixture
def run(assets, tmp_path):
    """Runs the script and returns its result and its output folder."""

    def run_script(*args, output="out"):
        argv = [
            "--model_name", assets / "model", "--train_file", assets / "train.txt",
            "--validation_file", assets / "validation.txt", "--block_size", 12, "--output_dir", tmp_path / output,
            "--cache_dir", tmp_path / "cache", "--per_device_train_batch_size", 4,
            "--gradient_accumulation_steps", 5, "--max_steps", 4, "--learning_rate", 1e-2, "--logging_steps", 1,
            "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *args,
        ]  # fmt: skip
        return main([str(value) for value in argv]), tmp_path / output

    return run_script


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", ["d2ft", "plain"])
@pytest.mark.parametrize("args", [(), ("--train_boundary", "false"), ("--r", "4", "--lora_alpha", "8")])
def test_what_is_saved_is_what_was_evaluated(assets, run, tmp_path, method, args):
    result, output = run("--method", method, *args)
    assert json.loads((output / "all_results.json").read_text()) == result
    assert result["compute_ratio"] == pytest.approx(0.6 if method == "d2ft" else 1)
    adapter = (output / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(assets / "model" if adapter else output)
    model = (PeftModel.from_pretrained(model, output) if adapter else model).eval()
    data = DataArguments(
        model_name="", train_file=str(assets / "train.txt"), validation_file=str(assets / "validation.txt"),
        block_size=12, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    _, validation = load_blocks(data, AutoTokenizer.from_pretrained(output))
    blocks = torch.tensor(validation["input_ids"])
    with torch.no_grad():
        loss = model(blocks, labels=blocks).loss.item()
    assert math.exp(loss) == pytest.approx(result["perplexity"], rel=1e-4)
    # Guessing among the 15 words has perplexity 15.
    assert result["perplexity"] < 14


@pytest.mark.thorough
def test_a_resumed_run_ends_with_the_same_weights(run):
    args = ("--r", 4, "--num_full", 2, "--num_forward_only", 1, "--save_strategy", "steps", "--save_steps", 2)
    whole, whole_output = run(*args, output="whole")
    resumed, output = run(*args, "--resume_from_checkpoint", whole_output / "checkpoint-2", output="resumed")
    assert resumed["perplexity"] == whole["perplexity"]
    weights = load_file(whole_output / "adapter_model.safetensors")
    for name, value in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_fewer_samples_are_fewer_steps(run):
    result, output = run(
        "--method", "plain", "--baseline_fewer_samples", 0.5, "--save_strategy", "steps", "--save_steps", 2
    )
    assert result["compute_ratio"] == 0.5
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="needs method='plain'"):
        run("--baseline_fewer_samples", 0.5)


@pytest.mark.thorough
def test_the_last_line_and_limits_on_samples(run, capsys):
    result, _ = run("--max_train_samples", 20, "--max_eval_samples", 5, "--shortcut", "mean")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"d2ft, full: perplexity {result['perplexity']:.2f}, ")


def test_blocks_are_the_text(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    blocks = pack({"text": ["the cat\n", "a dog\n", "a"]}, "text", tokenizer, "", 3)
    assert tokenizer.convert_ids_to_tokens(blocks["input_ids"][0]) == ["the", "cat", "\n"]
    assert tokenizer.convert_ids_to_tokens(blocks["input_ids"][1]) == ["a", "dog", "\n"]
    assert len(blocks["input_ids"]) == 2 and blocks["labels"] == blocks["input_ids"]
    blocks = pack({"text": ["the cat", "a dog"]}, "text", tokenizer, tokenizer.eos_token, 3)
    assert tokenizer.convert_ids_to_tokens(blocks["input_ids"][0]) == ["the", "cat", "</s>"]


def test_the_end_of_the_text_is_held_out(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "model")
    data = DataArguments(
        model_name="", train_file=str(assets / "train.txt"), block_size=6, cache_dir=str(tmp_path), max_eval_samples=9
    )
    train, validation = load_blocks(data, tokenizer)
    assert len(train) == 180 and len(validation) == 9
    held_out = (assets / "train.txt").read_text().splitlines()[180]
    assert tokenizer.decode(validation[0]["input_ids"]).split() == held_out.split()
    data.block_size = 5000
    with pytest.raises(ValueError, match="longer than the text"):
        load_blocks(data, tokenizer)
