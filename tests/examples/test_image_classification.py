"""The image classification script on a tiny model and images made on the spot."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from peft import PeftModel
from PIL import Image as Picture
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    TrainerState,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from examples.image_classification import Flips, ImageMethodArguments, adapt, collate, main, transform


pytestmark = pytest.mark.filterwarnings("ignore:the adapter's base model is the local path")
CLASSES = ["dark", "middle", "bright"]


def pictures(count, seed):
    """Noise, brighter from class to class."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 80, (12, 14, 3)) + 85 * (i % 3)
        yield Picture.fromarray(pixels.astype(np.uint8)), i % 3


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A folder with a model of three blocks, parquet files and an image folder."""
    root = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=7)
    ViTForImageClassification(config).save_pretrained(root / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "model")
    features = Features({"img": Image(), "kind": ClassLabel(names=CLASSES)})
    for split, count in (("train", 60), ("test", 15)):
        images, labels = zip(*pictures(count, seed=count), strict=True)
        rows = Dataset.from_dict({"img": list(images), "kind": list(labels)}, features=features)
        rows.to_parquet(root / "parquet" / f"{split}.parquet")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / "folder" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return root


@pytest.fixture
def run(assets, tmp_path):
    """Runs the script and returns its result and its output folder."""

    def run_script(*args, output="out", data=("--dataset_name", "parquet")):
        argv = [
            "--model_name", assets / "model", data[0], assets / data[1], "--output_dir", tmp_path / output,
            "--cache_dir", tmp_path / "cache", "--per_device_train_batch_size", 4,
            "--gradient_accumulation_steps", 5, "--max_steps", 4, "--learning_rate", 1e-2, "--logging_steps", 1,
            "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", *args,
        ]  # fmt: skip
        return main([str(value) for value in argv]), tmp_path / output

    return run_script


def reload(assets, output):
    """The trained model, as somebody would load it elsewhere."""
    path = assets / "model" if (output / "adapter_config.json").is_file() else output
    torch.manual_seed(9)
    model = AutoModelForImageClassification.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True)
    return (PeftModel.from_pretrained(model, output) if path != output else model).eval()


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", ["d2ft", "plain"])
@pytest.mark.parametrize("args", [(), ("--train_boundary", "false"), ("--r", "4", "--lora_alpha", "8")])
def test_what_is_saved_is_what_was_evaluated(assets, run, tmp_path, method, args):
    result, output = run("--method", method, *args)
    assert json.loads((output / "all_results.json").read_text()) == result
    # Rows that no loss reads are a large part of two blocks: more samples than 60 % run.
    assert 0.6 <= result["compute_ratio"] < 1 if method == "d2ft" else result["compute_ratio"] == 1
    model = reload(assets, output)
    files = {"test": str(assets / "parquet" / "test.parquet")}
    rows = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["test"][:]
    batch = transform(rows, "img", "kind", ViTImageProcessor.from_pretrained(assets / "model"), flips=None)
    with torch.no_grad():
        logits = model(torch.stack(list(batch["pixel_values"]))).logits
    correct = (logits.argmax(-1) == torch.tensor(batch["labels"])).float()
    assert correct.mean().item() == pytest.approx(result["accuracy"])
    assert result["accuracy"] > 0.5


@pytest.mark.parametrize("given", [{}, {"train_boundary": False}, {"r": 4}])
def test_d2ft_and_plain_train_the_same_parameters(assets, given):
    trained = []
    for method in ("d2ft", "plain"):
        model = AutoModelForImageClassification.from_pretrained(assets / "model")
        model = adapt(model, ImageMethodArguments(method=method, **given), seed=0)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        trained.append({name.removeprefix("base_model.model.").replace("d2ft_layers.default.", "")
                           .replace("modules_to_save.default.", "") for name in names})  # fmt: skip
    assert trained[0] == trained[1] and "classifier.weight" in trained[0]


@pytest.mark.thorough
def test_other_sources_of_images(run):
    result, _ = run(data=("--dataset_name", "folder"))
    assert result["accuracy"] > 0.5
    result, _ = run("--validation_share", 0.2, data=("--train_file", "parquet/train.parquet"))
    assert result["accuracy"] > 0.5


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", [(), ("--num_full", 2, "--num_forward_only", 1), ("--method", "plain", "--r", 4)])
def test_a_resumed_run_ends_with_the_same_bits_flips_included(run, method):
    args = (*method, "--save_strategy", "steps", "--save_steps", 2)
    whole, whole_output = run(*args, output="whole")
    resumed, output = run(*args, "--resume_from_checkpoint", whole_output / "checkpoint-2", output="resumed")
    assert resumed["accuracy"] == whole["accuracy"]
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


def test_options_reach_model_and_data(run, capsys):
    samples = ("--max_train_samples", 20, "--max_eval_samples", 6)
    result, output = run(
        "--image_size", 32, "--heads_per_subnet", 2, "--compute_budget", 0.4, "--policy", "bilevel", *samples
    )
    assert result["compute_ratio"] == pytest.approx(0.4)
    assert json.loads((output / "adapter_config.json").read_text())["heads_per_subnet"] == 2
    assert f"d2ft, full: accuracy {result['accuracy']:.1%}" in capsys.readouterr().out.splitlines()[-1]


def test_images_are_flipped_in_training_only_and_sizes_interpolate(assets):
    process = ViTImageProcessor.from_pretrained(assets / "model")
    image = Picture.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1)))
    rows, flips = {"img": [image], "kind": [0]}, Flips(seed=0)
    as_it_is = torch.as_tensor(transform(rows, "img", "kind", process, flips=None)["pixel_values"][0])
    seen = []
    for epoch in range(20):
        flips.on_epoch_begin(None, TrainerState(epoch=float(epoch)), None)
        once, again = (transform(rows, "img", "kind", process, flips)["pixel_values"][0] for _ in range(2))
        assert torch.equal(torch.as_tensor(once), torch.as_tensor(again))
        seen.append(torch.as_tensor(once).numpy().tobytes())
    assert set(seen) == {as_it_is.numpy().tobytes(), as_it_is.flip(-1).numpy().tobytes()}
    batch = collate([{"pixel_values": torch.zeros(3, 4, 4), "labels": 1}] * 2, interpolate_pos_encoding=True)
    assert batch["interpolate_pos_encoding"] and batch["pixel_values"].shape == (2, 3, 4, 4)
