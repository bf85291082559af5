"""TRL's trainers: what they make of a model, D2FT lets them; what cannot be scheduled says so."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from d2ft_peft import D2FTCallback, D2FTConfig, partition_model
from tests.models import TINY
from tests.test_trainer import assert_equal, trained


pytestmark = pytest.mark.filterwarnings("ignore")


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(3, 60, (n,), generator=generator))


def tokenizer():
    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="w0", eos_token="w2", bos_token="w1", padding_side="left"
    )


def pairs():
    return [
        {"prompt": words(4, i) + " ", "chosen": words(3 + i % 3, 100 + i), "rejected": words(2 + i % 4, 200 + i)}
        for i in range(16)
    ]


KINDS = {
    "sft": (SFTTrainer, SFTConfig, [{"text": words(4 + i % 5, i)} for i in range(16)], {"max_length": 16}),
    "dpo": (DPOTrainer, DPOConfig, pairs(), {}),
    "grpo": (GRPOTrainer, GRPOConfig, [{"prompt": words(4, i)} for i in range(8)],
             {"num_generations": 2, "max_completion_length": 4}),
}  # fmt: skip


def trainer(kind, folder, config, checkpointing=True, **kwargs):
    """A trainer on a tiny model: plain LoRA, or D2FT with a callback."""
    cls, arguments, data, own = KINDS[kind]
    base = TINY["llama"].build()
    torch.manual_seed(5)
    if config is None:
        lora = LoraConfig(r=4, init_lora_weights="gaussian", target_modules=list(partition_model(base).projections))
        model = get_peft_model(copy.deepcopy(base), lora)
    else:
        model = get_peft_model(copy.deepcopy(base), D2FTConfig(r=4, init_lora_weights="gaussian", **config))
    args = arguments(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, max_grad_norm=0.0, seed=0,
        gradient_checkpointing=checkpointing, **own, **kwargs,
    )  # fmt: skip
    rewards = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if kind == "grpo" else {}
    return cls(
        model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer(),
        callbacks=[] if config is None else [D2FTCallback()], **rewards,
    )  # fmt: skip


@pytest.mark.quick(3)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_full_is_bit_identical_to_the_trainer_alone(tmp_path, kind, checkpointing):
    """The reference passes of DPO, with the adapter disabled, included."""
    weights = []
    for config in (None, {"policy": "all_full", "compute_budget": 1.0}):
        run = trainer(kind, tmp_path, config, checkpointing)
        run.train()
        weights.append(trained(run.model))
    assert_equal(*weights)


@pytest.mark.quick(3)
@pytest.mark.parametrize("policy", ["bilevel", "random", "fewer_samples"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_part_of_the_model_trains(tmp_path, kind, policy):
    run = trainer(kind, tmp_path, {"policy": policy, "compute_budget": 0.5})
    before = {name: value.clone() for name, value in trained(run.model).items()}
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["compute_ratio"] for entry in entries] == pytest.approx([0.5] * 2)
    assert any(not torch.equal(before[name], value) for name, value in trained(run.model).items())


def test_a_loss_without_logits_gives_no_scores(tmp_path):
    """SFTTrainer computes it in a fused kernel, and another forward pass for scores would cost what they save."""
    with pytest.raises(ValueError, match="one forward pass, .* 1 of them with logits .None..*has its loss without"):
        trainer("sft", tmp_path, {"policy": "importance", "compute_budget": 0.5}).train()


def test_inputs_that_are_generated_within_a_step_are_refused(tmp_path):
    trainer("grpo", tmp_path, None).train()
    with pytest.raises(ValueError, match="GRPO generates them"):
        trainer("grpo", tmp_path, {"compute_budget": 0.5}).train()
