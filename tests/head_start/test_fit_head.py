"""A head is found by what it does, reads its features from any model, and is fitted in place."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from d2ft_peft import D2FTConfig, fit_head
from d2ft_peft.costs import flop_counter
from d2ft_peft.head_start import HeadStartRefused, find_head, fit, head_features, looks_new
from d2ft_peft.head_start.linear_fit import fit_linear
from d2ft_peft.partition import base_model
from tests.models import _BASE, _NO_DROPOUT, _TEXT, TINY


TEXT = {**_BASE, **_TEXT, "num_labels": 3}
MODELS = {
    "vit": (tf.ViTConfig, tf.ViTForImageClassification, {**_BASE, "image_size": 16, "patch_size": 8, "num_labels": 3}),
    "bert": (tf.BertConfig, tf.BertForSequenceClassification, {**TEXT, **_NO_DROPOUT}),
    "bert tokens": (tf.BertConfig, tf.BertForTokenClassification, {**TEXT, **_NO_DROPOUT}),
    "llama": (tf.LlamaConfig, tf.LlamaForSequenceClassification, {**TEXT, "num_key_value_heads": 2}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForSequenceClassification, {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": (
        tf.GPT2Config, tf.GPT2ForSequenceClassification,
        {**_TEXT, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16, "num_labels": 3},
    ),
}  # fmt: skip


def build(name, seed=0, **overrides):
    torch.manual_seed(seed)
    config, model, kwargs = MODELS[name]
    return model(config(**{**kwargs, **overrides}))


def wrap(model, mode):
    head = ["score"] if hasattr(model, "score") else ["classifier"]
    options = {
        "full": {"modules_to_save": head},
        "boundary": {"train_boundary": True},
        "lora": {"r": 4, "modules_to_save": head},
    }
    return get_peft_model(model, D2FTConfig(**options[mode]))


def batches(name, sizes=(5, 4, 4, 1), seed=1):
    """Ragged lengths, right-padded; a last batch of one."""
    g = torch.Generator().manual_seed(seed)
    for n in sizes:
        if name == "vit":
            yield {
                "pixel_values": torch.randn(n, 3, 16, 16, generator=g),
                "labels": torch.randint(3, (n,), generator=g),
            }
            continue
        lengths = torch.randint(2, 9, (n,), generator=g)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(3, 60, mask.shape, generator=g) * mask
        labels = torch.randint(3, (n,), generator=g)
        if name == "bert tokens":
            labels = torch.randint(3, mask.shape, generator=g).where(mask.bool(), torch.tensor(-100))
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def features_of(model, name):
    """What the head reads, the slow way: transformers' hidden states of the last token, or the layer's own input."""
    base, found, labels = base_model(model).eval(), [], []
    layer = find_head(model, next(batches(name))).layer
    for batch in batches(name):
        seen = []
        handle = layer.register_forward_hook(lambda layer, args, output, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            base(**batch)
        handle.remove()
        x, y = seen[0], batch["labels"]
        if y.ndim == 2:
            x, y = x[y != -100], y[y != -100]
        elif x.ndim == 3:
            x = x[torch.arange(len(x)), batch["attention_mask"].sum(1) - 1]
        found.append(x)
        labels.append(y)
    return torch.cat(found), torch.cat(labels)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("vit", "full"), ("vit", "boundary"), ("bert", "lora"), ("bert", "boundary"), ("bert tokens", "full"),
        ("llama", "boundary"), ("qwen3", "lora"), ("gpt2", "full"),
    ],
)  # fmt: skip
def test_the_head_of_any_model_is_found_and_fitted_to_what_it_reads(name, mode):
    model = wrap(build(name), mode)
    head = find_head(model, next(batches(name)))
    assert ("score" if head.selects else "classifier") in head.name
    assert head.layer.weight.requires_grad and head.selects == (name in ("llama", "qwen3", "gpt2"))
    assert looks_new(head, model.config)
    x, y = features_of(model, name)
    weight, bias = head.layer.weight.detach().clone(), head.layer.bias
    expected = fit_linear([x.clone()], y, "single_label_classification", weight, bias)
    others = [p for p in model.parameters() if p is not head.layer.weight and p is not bias]
    before = [p.detach().clone() for p in others]
    model.train()
    result = fit_head(model, batches(name), progress=False)
    torch.testing.assert_close(head.layer.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)
    assert (result.samples, result.features, result.outputs) == (len(x), 32, 3)
    assert result.loss_after < result.loss_before == pytest.approx(expected.loss_before, rel=1e-5)
    assert all(torch.equal(*pair) for pair in zip(others, before, strict=True))
    assert not looks_new(head, model.config) and model.training
    assert not model._forward_hooks and not head.layer._forward_hooks


@pytest.mark.thorough
def test_logits_that_are_equal_by_chance_do_not_matter():
    """A head of zeros gives every token the same logits; so does bfloat16 with one output for many."""
    model = wrap(build("llama"), "lora")
    head = find_head(model, next(batches("llama")))
    nn.init.zeros_(head.layer.weight)
    assert find_head(model, next(batches("llama"))).selects and looks_new(head, model.config)
    x, y = features_of(model, "llama")
    expected = fit_linear([x.clone()], y, "single_label_classification", head.layer.weight, None)
    fit_head(model, batches("llama"), progress=False)
    torch.testing.assert_close(head.layer.weight.double(), expected.weight, rtol=1e-3, atol=1e-4)


def test_a_model_of_half_precision_is_fitted_in_a_wider_type():
    model = wrap(build("bert").bfloat16(), "full")
    result = fit_head(model, batches("bert"), progress=False)
    head = find_head(model, next(batches("bert"))).layer
    assert head.weight.dtype == torch.bfloat16 and result.loss_after < result.loss_before


def test_one_number_and_several_labels_are_fitted_by_their_own_loss():
    model = wrap(build("bert", num_labels=1), "full")
    numbers = [{**batch, "labels": batch["labels"].float() * 7} for batch in batches("bert")]
    result = fit_head(model, numbers, progress=False)
    assert result.problem == "regression" and result.accuracy is None and result.loss_after < result.loss_before / 2
    model = wrap(build("vit"), "full")
    several = [{**batch, "labels": nn.functional.one_hot(batch["labels"], 3).float()} for batch in batches("vit")]
    result = fit_head(model, several, progress=False)
    assert result.problem == "multi_label_classification" and result.loss_after < result.loss_before
    with torch.no_grad():
        loss = torch.stack([model.eval()(**b).loss * len(b["labels"]) for b in several]).sum() / 14
    assert result.loss_after == pytest.approx(loss.item(), rel=1e-5)


def test_ignored_samples_and_those_beyond_the_memory_are_left_out(monkeypatch):
    ignored = [{**b, "labels": b["labels"].where(torch.arange(len(b["labels"])) > 0, -100)} for b in batches("vit")]
    assert fit_head(wrap(build("vit"), "full"), ignored, progress=False).samples == 14 - 4
    monkeypatch.setattr(fit, "FEATURE_BYTES", 9 * 32 * 4)
    monkeypatch.setattr(head_features, "_BLOCK_ELEMENTS", 4 * 32)
    assert fit_head(wrap(build("vit"), "full"), batches("vit"), progress=False).samples == 9


def test_flops_of_the_pass_and_of_the_fit_are_counted():
    model = wrap(build("bert"), "full")
    with flop_counter() as counter, torch.no_grad():
        for batch in batches("bert"):
            model.eval()(**batch)
    result = fit_head(model, batches("bert"), progress=False)
    of_fit = (result.flops - counter.get_total_flops()) / (4 * 14 * 32 * 3)
    assert of_fit == round(of_fit) and 3 < of_fit < 90


def test_what_cannot_be_fitted_says_why():
    frozen = get_peft_model(build("bert"), D2FTConfig())
    with pytest.raises(HeadStartRefused, match="no trained nn.Linear makes the logits"):
        fit_head(frozen, batches("bert"))
    causal = get_peft_model(TINY["llama"].build(), D2FTConfig(train_boundary=True))
    with pytest.raises(HeadStartRefused, match="predicts the next token"):
        fit_head(causal, [TINY["llama"].batch()])
    model = wrap(build("bert"), "full")
    with pytest.raises(HeadStartRefused, match="a batch has no labels"):
        fit_head(model, [{k: v for k, v in b.items() if k != "labels"} for b in batches("bert")])
    with pytest.raises(HeadStartRefused, match="is not what the model takes"):
        fit_head(model, batches("vit"))
    with pytest.raises(ValueError, match="batches is empty"):
        fit_head(model, [])


def test_of_a_head_of_two_layers_the_last_one_is_fitted():
    kwargs = {**_BASE, **_TEXT, "num_labels": 3}
    model = tf.RobertaForSequenceClassification(tf.RobertaConfig(**kwargs))
    lora = get_peft_model(model, LoraConfig(target_modules=["query", "dense"], modules_to_save=["classifier"]))
    assert find_head(lora, next(batches("bert"))).name.endswith("classifier.modules_to_save.default.out_proj")


def test_logits_of_two_layers_together_are_no_head():
    """DeiT with a distillation token averages two heads."""
    kwargs = {**_BASE, "image_size": 16, "patch_size": 8, "num_labels": 3}
    model = tf.DeiTForImageClassificationWithTeacher(tf.DeiTConfig(**kwargs))
    with pytest.raises(HeadStartRefused, match="no trained nn.Linear"):
        find_head(model, {"pixel_values": torch.randn(1, 3, 16, 16)})


def test_a_trained_head_is_not_new():
    model = wrap(build("vit"), "full")
    head, batch = find_head(model, next(batches("vit"))), next(batches("vit"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.eval()(**batch).loss.backward()
    optimizer.step()
    assert not looks_new(head, model.config)
    nn.init.zeros_(head.layer.bias)
    assert looks_new(head, model.config)  # the weights alone have hardly moved
    head.layer.weight.data.mul_(3)
    assert not looks_new(head, model.config)
