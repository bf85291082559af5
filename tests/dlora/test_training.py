"""What a Trainer and its user do to an edge's model ends with the weights of local PEFT LoRA."""

import gc
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from d2ft_peft.dlora import BaseModel, KillReviveCallback, connect
from tests.training.trl_cases import PAIRS, TEXTS, tokenizer

from ..models import TINY
from .cases import adapter, check_close, collate, edge_like, ragged, samples, serve, step, tiny_base, whole
from .test_killed_modules import trained


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    with serve(base) as (cloud, address):
        yield base, address, cloud


def both(llama, config=None, **options):
    """The same adapted model, local and on an edge."""
    base, address, _ = llama
    config = config or {"init_lora_weights": True}
    local = whole(base, adapter(**config))
    return local, edge_like(local, address, base, adapter(**config), **options)


def trainer(model, folder, cls=Trainer, extra=None, **options):
    args = TrainingArguments(
        str(folder), **{
            "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1,
            "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
            "dataloader_pin_memory": False, **options,
        },
    )  # fmt: skip
    return cls(model, args, **{"data_collator": collate, "train_dataset": samples(), **(extra or {})})


def check_same_run(llama, run, tolerance=0.0, **options):
    """Let `run` train both models; equal weights, and nothing is left in the cloud."""
    local, edge = both(llama, **options)
    found = []
    for model in (local, edge):
        torch.manual_seed(5)
        found.append(run(model))
    assert found[0] == found[1]
    check_close(trained(edge), trained(local), tolerance)
    check_empty(llama[2])


def check_empty(cloud):
    """Nothing is in flight, as soon as the cloud has heard that streams were broken off."""
    gc.collect()
    for _ in range(200):
        if not cloud.room.used:
            return
        time.sleep(0.05)
    raise AssertionError(f"{cloud.room.used} tokens are left in flight")


OPTIONS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "batches of like length": {"train_sampling_strategy": "group_by_length"},
    "checkpoints": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant ones": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "clipping": {"max_grad_norm": 0.01},
    "NEFTune": {"neftune_noise_alpha": 5},
    "Adafactor": {"optim": "adafactor"},
    "all columns": {"remove_unused_columns": False},
}


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:.*use_reentrant")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_trainer(llama, tmp_path, options):
    placement = {"edge_blocks": (1, 1)} if "gradient_checkpointing" in options else {}
    check_same_run(llama, lambda model: trainer(model, tmp_path, **options).train().training_loss, **placement)


@pytest.mark.slow
def test_a_compiled_model(llama, tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    check_same_run(llama, lambda model: trainer(model, tmp_path, **options).train().training_loss)


@pytest.mark.quick(1)
@pytest.mark.parametrize("head", ["edge", "cloud"])
def test_evaluation_between_steps_and_the_best_checkpoint_in_the_end(llama, tmp_path, head):
    def run(model):
        best = trainer(
            model, tmp_path / type(model).__name__, extra={"eval_dataset": samples(7)}, eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=0.5,
        )  # fmt: skip
        best.train()
        return best.state.best_global_step

    check_same_run(llama, run, 1e-12, head=head)


@pytest.mark.thorough
def test_a_run_goes_on_in_the_middle_of_an_epoch_and_once_more(llama, tmp_path):
    def run(model):
        folder = tmp_path / type(model).__name__
        trainer(model, folder, save_strategy="steps", save_steps=1).train()
        there = {name: value.clone() for name, value in trained(model).items()}
        again = trainer(model, folder)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        check_close(trained(model), there, 0)
        again.train()

    check_same_run(llama, run)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_hooks_of_parameters_see_whole_gradients_once(llama, in_flight):
    found = []
    for model in both(llama, {}, in_flight=in_flight):
        seen = []
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.register_hook(lambda grad, seen=seen: seen.append(grad) or 2 * grad)
        found.append((step(model, ragged())[1], len(seen)))
    check_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_a_pass_that_is_given_up_or_gone_through_twice_leaves_nothing_in_the_cloud(llama):
    edge, cloud = both(llama, {})[1], llama[2]
    check_empty(cloud)
    given_up = edge(**ragged())
    assert cloud.room.used == ragged()["input_ids"].numel()
    del given_up
    loss = edge(**ragged()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        loss.backward()
    check_empty(cloud)


@pytest.mark.thorough
def test_kill_and_revive_with_parts_in_flight(llama, tmp_path):
    def run(model):
        callback = KillReviveCallback(active=5, interval=2)
        trainer(model, tmp_path, extra={"callbacks": [callback]}, num_train_epochs=2).train()
        return [round(norm, 9) for norm in callback.kill_revive.state.known]

    check_same_run(llama, run, 1e-9, in_flight=2)


class OutOfMemory(Trainer):
    def training_step(self, model, inputs, *args):
        loss = super().training_step(model, inputs, *args)
        if len(inputs["input_ids"]) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return loss


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_halved(llama, tmp_path):
    def run(model):
        small = trainer(model, tmp_path, OutOfMemory, auto_find_batch_size=True, per_device_train_batch_size=10)
        small.train()
        return small._train_batch_size

    check_same_run(llama, run)


@pytest.mark.thorough
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, {"head": "cloud", "in_flight": 2}], ids=str)
def test_a_step_that_breaks_off_leaves_nothing_in_the_cloud(llama, tmp_path, error, options):
    class Breaks(Trainer):
        steps = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.steps += 1
            if self.steps == 2:
                raise error("within a step")
            return loss

    def run(model):
        broken = trainer(model, tmp_path, Breaks, gradient_accumulation_steps=1)
        with pytest.raises(error, match="within a step"):
            broken.train()
        broken.train()

    check_same_run(llama, run, 1e-12, **options)


@pytest.mark.thorough
def test_a_model_made_by_the_trainer(llama, tmp_path):
    local, edge = both(llama)
    start = {name: value.clone() for name, value in trained(local).items()}

    def giving(model):
        return lambda: model

    for model in (local, edge):
        trainer(None, tmp_path, extra={"model_init": giving(model)}).train()
    assert any(not torch.equal(value, start[name]) for name, value in trained(local).items())
    check_close(trained(edge), trained(local), 0)


@pytest.mark.thorough
def test_a_loop_of_ones_own(llama):
    def run(model):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        loader = torch.utils.data.DataLoader(samples(), batch_size=3, collate_fn=collate)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    check_same_run(llama, run)


def size(prediction):
    return {"size": float(np.abs(np.where(prediction.predictions == -100, 0, prediction.predictions)).sum())}


def test_metrics_of_predictions(llama, tmp_path):
    found = []
    for model in both(llama):
        judge = trainer(model, tmp_path, extra={"eval_dataset": samples(7), "compute_metrics": size})
        found.append((judge.evaluate()["eval_size"], judge.predict(samples(5)).predictions))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[1][1], found[0][1])


def test_metrics_of_predictions_are_not_left_out_where_the_head_is_in_the_cloud(llama, tmp_path):
    edge = both(llama, head="cloud")[1]
    judge = trainer(edge, tmp_path, extra={"eval_dataset": samples(7), "compute_metrics": size})
    with pytest.raises(TypeError, match="LogitsInCloud"):
        judge.evaluate()
    with torch.no_grad(), pytest.raises(AttributeError, match="brings back its loss alone"):
        edge(**ragged()).logits.argmax(-1)


def test_losses_of_another_kind_need_the_head_on_the_edge(llama, tmp_path):
    edge = both(llama, head="cloud")[1]
    with pytest.raises(ValueError, match="use head='edge'"):
        trainer(edge, tmp_path, label_smoothing_factor=0.1).train()
    edge.get_base_model().resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(ValueError, match="the vocabulary was resized"):
        step(edge, ragged())


TRL = {
    "sft": (SFTTrainer, SFTConfig, "text", {"max_length": 16}),
    "sft, packed": (SFTTrainer, SFTConfig, "text", {"max_length": 16, "packing": True}),
    "sft without padding": (SFTTrainer, SFTConfig, "text", {"max_length": None, "padding_free": True}),
    "dpo": (DPOTrainer, DPOConfig, "pairs", {}),
}


def of_trl(kind, model, folder):
    cls, arguments, data, own = TRL[kind]
    rows = (PAIRS if data == "pairs" else TEXTS)[:8]
    args = arguments(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=1e-2, **own,
    )  # fmt: skip
    return cls(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TRL)
def test_trainers_of_trl(llama, tmp_path, kind):
    check_same_run(llama, lambda model: of_trl(kind, model, tmp_path).train().training_loss)


@pytest.mark.filterwarnings("ignore")
def test_trainers_of_trl_compute_their_loss_themselves(llama, tmp_path):
    with pytest.raises(ValueError, match="TRL's trainers do"):
        of_trl("sft", both(llama, head="cloud")[1], tmp_path).train()


ADAPTERS = {
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 9}},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_fields_of_the_adapter(llama, config):
    found = []
    for model in both(llama, config):
        torch.manual_seed(3)
        found.append(step(model, ragged())[1])
    check_close(found[1], found[0], 0)


REFUSED = {
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias changes what an adapter computes"),
    "alora": ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, {}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 3]]}, {}, "layer_replication"),
    "head in the cloud": ({"modules_to_save": ["lm_head"]}, {"head": "cloud"}, "would learn nothing"),
    "norm in the cloud": ({"modules_to_save": ["model.norm"]}, {"head": "cloud"}, "would learn nothing"),
    "no head": ({}, {"head": "cloud", "model_class": AutoModelForSequenceClassification}, "no head that predicts"),
}


@pytest.mark.parametrize(("config", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_that_cannot_be_are_refused(llama, config, options, message):
    base, address, _ = llama
    with pytest.raises(ValueError, match=message):
        connect(address, base, adapter(**{"init_lora_weights": True, **config}), dtype=torch.float64, **options)


@pytest.mark.quick(1)
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_grew_on_the_edge(tmp_path, tied):
    base = tiny_base(tmp_path, tie_word_embeddings=tied)
    local = whole(base, adapter())
    batch = ragged()
    batch["input_ids"][0, 2] = batch["labels"][0, 2] = 68
    with serve(base) as (_, address):
        edge = edge_like(local, address, base, adapter())
        found = []
        for model in (local, edge):
            torch.manual_seed(1)
            model.get_base_model().resize_token_embeddings(70, mean_resizing=False)
            found.append(step(model, batch)[1])
    check_close(found[1], found[0], 0)


def test_a_decoder_that_classifies(llama):
    base, address, _ = llama
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    local = whole(base, adapter(**config), AutoModelForSequenceClassification)
    edge = connect(
        address, base, adapter(**config), dtype=torch.float64, model_class=AutoModelForSequenceClassification
    )
    edge.load_state_dict({n: v for n, v in local.state_dict().items() if "lora_" in n or "score" in n}, strict=False)
    batch = {**ragged(), "labels": torch.tensor([0, 1, 0])}
    check_close(step(edge, batch)[1], step(local, batch)[1], 0)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_single_blocks_answer_is_not_to_be_had(llama, asked):
    edge = both(llama)[1]
    with pytest.raises(ValueError, match=f"{asked}=True: of the blocks in the cloud"):
        edge(**ragged(), **{asked: True})
    with pytest.raises(ValueError, match="attention_mask has 4 axes"):
        edge(**{**ragged(), "attention_mask": torch.ones(3, 1, 7, 7, dtype=torch.bool)})


def test_drafts_and_chunks(llama):
    local, edge = (model.eval() for model in both(llama, {}))
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    draft = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float64)
    for how in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 3}):
        prompt = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, **how}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(edge.generate(**prompt), local.generate(**prompt))


def test_a_cloud_that_computes_in_fewer_bits(llama):
    base, address, _ = llama
    local = whole(base, adapter(), dtype=torch.float32)
    with serve(base, torch.bfloat16) as (_, other):
        edge = edge_like(local, other, base, adapter(), torch.float32)
        found, expected = step(edge, ragged())[1], step(local, ragged())[1]
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    check_close(found, expected, 0.05)
    check_close(step(edge_like(local, address, base, adapter(), torch.float32), ragged())[1], expected, 1e-4)


def test_weights_in_pickles_only_are_refused_on_both_sides(llama, tmp_path):
    model = TINY["llama"].build()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no weights in safetensors"):
        connect(llama[1], str(tmp_path), adapter())
    with pytest.raises(OSError, match="no file named model.safetensors"):
        BaseModel.load(str(tmp_path))


def test_where_files_are_is_said_to_whoever_reads_them(llama, monkeypatch):
    base, address, _ = llama
    module, seen = sys.modules[connect.__module__], {}

    def noting(name):
        plain = getattr(module, name)

        def call(*args, **kwargs):
            seen[name] = kwargs.get("revision"), kwargs.get("local_files_only")
            return plain(*args, **kwargs)

        return call

    for name in ("fingerprint", "load_skeleton"):
        monkeypatch.setattr(module, name, noting(name))
    connect(address, base, adapter(), dtype=torch.float64, revision="abc", local_files_only=True)
    assert seen == {"fingerprint": ("abc", True), "load_skeleton": ("abc", True)}
