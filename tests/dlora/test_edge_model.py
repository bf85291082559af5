"""What the edge holds, saves, loads and refuses; what is rounded, and what is kept on disk."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from d2ft_peft.dlora import CloudProgressCallback, connect
from d2ft_peft.dlora.cloud import singular_vectors
from d2ft_peft.dlora.cloud.singular_vectors import leading_directions
from d2ft_peft.dlora.edge.link import CloudError

from ..models import TINY
from .cases import adapter, check_close, collate, edge_like, gradients, ragged, samples, serve, step, tiny_base, whole
from .test_killed_modules import trained


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    with serve(base) as (_, address):
        yield base, address


def plain_with(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder).eval()


def logits(model, **more):
    with torch.no_grad():
        return model.eval()(**{**ragged(), **more}).logits


def copy_adapters(source, target):
    adapters = {name: value for name, value in source.state_dict().items() if "lora_" in name}
    target.load_state_dict(adapters, strict=False)


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=1e-2,
        save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip


def train(model, folder, resume=None, callbacks=()):
    trainer = Trainer(
        model, arguments(folder), data_collator=collate, train_dataset=samples(), callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CROSSINGS = {"hidden": {}, "core": {"crossing": "core"}}


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", CROSSINGS.values(), ids=CROSSINGS)
def test_what_is_saved_is_a_plain_lora_adapter(llama, tmp_path, options):
    base, address = llama
    edge = connect(address, base, adapter(init_lora_weights=True), dtype=torch.float64, **options)
    train(edge, tmp_path / "run")
    edge.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names == set(load_file_names(whole(base, adapter()), tmp_path / "other"))
    plain = plain_with(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(edge))
    assert not torch.allclose(logits(plain), logits(whole(base, LoraConfig(target_modules="all-linear"))))
    torch.testing.assert_close(logits(plain.merge_and_unload()), logits(edge))


def load_file_names(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", CROSSINGS.values(), ids=CROSSINGS)
def test_a_run_resumed_from_a_checkpoint_has_the_same_bits(llama, tmp_path, options):
    base, address = llama

    def edge():
        torch.manual_seed(0)
        config = adapter(init_lora_weights=True, lora_dropout=0.0 if options else 0.1)
        return connect(address, base, config, dtype=torch.float64, **options)

    uninterrupted = edge()
    train(uninterrupted, tmp_path / "run")
    resumed = edge()
    train(resumed, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"))
    check_close(trained(resumed), trained(uninterrupted), 0)


def test_a_loaded_adapter_goes_on_training(llama, tmp_path):
    base, address = llama
    local = whole(base, adapter())
    local.save_pretrained(tmp_path)
    edge = connect(address, base, adapter(), dtype=torch.float64)
    edge.load_adapter(tmp_path, "default", is_trainable=True)
    check_close(step(edge, ragged())[1], step(local, ragged())[1])


def test_a_second_adapter_with_other_modules(llama, tmp_path):
    base, address = llama
    config = adapter(target_modules=["q_proj"])
    local = whole(base, config)
    edge = edge_like(local, address, base, adapter(target_modules=["q_proj"]))
    step(edge, ragged())
    torch.manual_seed(1)
    other = whole(base, adapter(target_modules=["v_proj", "up_proj"], r=2))
    other.save_pretrained(tmp_path)
    for model in (local, edge):
        model.load_adapter(tmp_path, "other", is_trainable=True)
        model.set_adapter("other")
    check_close(step(edge, ragged())[1], step(local, ragged())[1])
    with pytest.raises(ValueError, match="use_dora=True"):
        edge.add_adapter("third", adapter(use_dora=True))


def test_autocast(llama):
    base, address = llama
    local = whole(base, adapter(), dtype=torch.float32)
    edge = edge_like(local, address, base, adapter(), dtype=torch.float32)
    found = []
    for model in (local, edge):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(model, ragged()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.02, atol=0.02)
    assert {grad.dtype for grad in found[1][1].values()} == {torch.float32}


@pytest.mark.thorough
def test_cores_are_lora_with_frozen_factors(llama):
    base, address = llama
    edge = connect(address, base, adapter(r=3, lora_alpha=5), dtype=torch.float64, crossing="core")
    for layer in edge.remote_span.adapters.layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].core)
    local = whole(base, adapter(r=3, lora_alpha=5))
    local.load_state_dict({n: v for n, v in edge.state_dict().items() if "lora_" in n}, strict=False)
    torch.testing.assert_close(logits(edge), logits(local))
    edge.train()
    _, found = step(edge, ragged())
    _, grads = step(local, ragged())
    layers = edge.remote_span.adapters.layers
    assert set(found) == {f"base_model.model.{name}.lora_B.default.core" for name in layers}
    for name, layer in layers.items():
        of_b = grads[f"base_model.model.{name}.lora_B.default.weight"]
        torch.testing.assert_close(
            found[f"base_model.model.{name}.lora_B.default.core"], layer.lora_B["default"].factor.T @ of_b
        )


def test_factors_are_the_leading_directions_of_weights_of_any_width(monkeypatch):
    spectrum = 0.8 ** torch.arange(40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q for n in (60, 50))
    weight = left @ torch.diag(spectrum) @ right.T
    exact = leading_directions(weight, 8)
    monkeypatch.setattr(singular_vectors, "_WHOLE", 10)
    for by_iteration, whole_one in zip(leading_directions(weight, 8), exact, strict=True):
        torch.testing.assert_close(by_iteration, whole_one, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_iteration.T @ by_iteration, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(exact[0].abs(), left[:, :8].abs())


def test_a_core_goes_on_between_its_own_factors_only(llama, tmp_path):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64, crossing="core")
    whole(base, adapter()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another one than the frozen factor"):
        edge.load_adapter(tmp_path, "default")
    edge.remote_span.link._session = None
    layer = next(iter(edge.remote_span.adapters.layers.values()))
    layer.lora_B["default"].factor.add_(1)
    with pytest.raises(CloudError, match="has other factors"):
        step(edge, ragged())


@pytest.mark.quick(2)
@pytest.mark.parametrize(("packing", "tolerance"), [("bf16", 0.05), ("int8", 0.15)])
@pytest.mark.parametrize("options", [{}, {"crossing": "core"}, {"head": "cloud"}, {"edge_blocks": (1, 1)}], ids=str)
def test_packing_rounds_and_saves(llama, packing, tolerance, options):
    base, address = llama
    torch.manual_seed(0)
    exact = connect(address, base, adapter(), dtype=torch.float64, **options)
    packed = connect(address, base, adapter(), dtype=torch.float64, packing=packing, **options)
    copy_adapters(exact, packed)
    for model in (exact, packed):
        step(model, ragged())
    found, expected = (
        torch.cat([grad.flatten() for grad in gradients(model).values()]) for model in (packed, exact)
    )  # fmt: skip
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    sent = [model.remote_span.link.traffic.sent for model in (packed, exact)]
    assert sent[0] < sent[1]


def test_noise_is_added_to_what_leaves(llama):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter(), noise=0.1)
    assert 1e-3 < (logits(edge) - logits(local)).abs().mean() < 1
    assert not torch.equal(logits(edge), logits(edge))


@pytest.mark.thorough
def test_a_run_says_what_crossed(llama, tmp_path):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64)
    log = train(edge, tmp_path, callbacks=[CloudProgressCallback()]).state.log_history
    entries = [entry for entry in log if "loss" in entry]
    assert len(entries) == 6
    sent = [entry["cloud_sent_bytes"] for entry in entries]
    assert sent == sorted(sent) and 0 < sent[0] < sent[-1] <= edge.remote_span.link.traffic.sent
    assert entries[-1]["cloud_active_modules"] == 21 and entries[-1]["cloud_round_trips"] > 100
    with pytest.raises(ValueError, match="without a span"):
        train(whole(base, adapter()), tmp_path, callbacks=[CloudProgressCallback()])


def test_evaluation_and_prediction(llama, tmp_path):
    base, address = llama
    local = whole(base, adapter())
    for head in ("edge", "cloud"):
        edge = edge_like(local, address, base, adapter(), head=head)
        found = []
        for model in (local, edge):
            args = arguments(tmp_path, prediction_loss_only=head == "cloud")
            trainer = Trainer(model, args, data_collator=collate, eval_dataset=samples(7))
            found.append(trainer.evaluate()["eval_loss"])
        assert found[1] == pytest.approx(found[0], rel=1e-6)


class Counted:
    """Bytes to the cloud and round trips of what runs within."""

    def __init__(self, model):
        self.traffic = model.remote_span.link.traffic

    def __enter__(self):
        self.before = self.traffic.sent, self.traffic.received, self.traffic.round_trips
        return self

    def __exit__(self, *error):
        now = self.traffic.sent, self.traffic.received, self.traffic.round_trips
        self.sent, self.received, self.trips = (b - a for a, b in zip(self.before, now, strict=True))


def upper_only(**options):
    return adapter(layers_to_transform=[2], target_modules=["q_proj", "v_proj", "up_proj"], **options)


def test_with_nothing_alive_in_the_span_later_epochs_need_no_network(llama, tmp_path):
    base, address = llama
    local = whole(base, upper_only())
    edge = edge_like(local, address, base, upper_only(), edge_blocks=(0, 1), cache_dir=tmp_path)
    check_close(step(edge, ragged())[1], step(local, ragged())[1])
    for batch in (ragged(), ragged(n=3)):
        with Counted(edge) as again:
            found = step(edge, batch)[1]
        check_close(found, step(local, batch)[1])
        assert again.sent == again.received == again.trips == 0
    other = edge_like(local, address, base, upper_only(), edge_blocks=(0, 1), cache_dir=tmp_path)
    with Counted(other) as after_a_restart:
        step(other, ragged())
    assert after_a_restart.trips == 0
    mixed = {name: torch.cat([value[1:2], ragged(n=3, seed=5)[name][:1]]) for name, value in ragged().items()}
    with Counted(edge) as one_is_new:
        check_close(step(edge, mixed)[1], step(local, mixed)[1])
    with Counted(edge) as both_new:
        step(edge, ragged(n=2, seed=6))
    assert 0 < one_is_new.sent < 0.7 * both_new.sent


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", CROSSINGS.values(), ids=CROSSINGS)
def test_the_lowest_groups_input_crosses_once(llama, tmp_path, options):
    base, address = llama
    plain = connect(address, base, adapter(), dtype=torch.float64, **options)
    edge = connect(address, base, adapter(), dtype=torch.float64, cache_dir=tmp_path, **options)
    for model in (plain, edge):
        copy_adapters(plain, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and "layers.0." not in name and not name.endswith("factor"))
        for layer in (layer for name, layer in model.remote_span.adapters.layers.items() if "layers.0." in name):
            for b in layer.lora_B.values():
                torch.nn.init.zeros_(b.core if options else b.weight)
    with Counted(edge) as first:
        check_close(step(edge, ragged())[1], step(plain, ragged())[1])
    with Counted(edge) as second:
        check_close(step(edge, ragged())[1], step(plain, ragged())[1])
    assert second.received < first.received and second.trips == first.trips - 1


def test_the_cache_is_bounded_and_checked(llama, tmp_path):
    base, address = llama
    edge = connect(
        address, base, upper_only(), dtype=torch.float64, edge_blocks=(0, 1), cache_dir=tmp_path, cache_bytes=5000
    )
    with pytest.warns(UserWarning, match="is full"):
        step(edge, ragged())
    disk = edge.remote_span.cache.disk
    assert 0 < disk.num_bytes <= 5000 and disk.num_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    files = sorted(tmp_path.glob("*.safetensors"))
    loss = step(edge, ragged())[0]
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        files[0].write_bytes(damage(files[0].read_bytes()))
        with pytest.warns(UserWarning, match="fetched again"):
            assert torch.equal(step(edge, ragged())[0], loss)


def test_edge_blocks_that_train_below_the_span_are_not_cached(llama, tmp_path):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter(), edge_blocks=(1, 0), cache_dir=tmp_path)
    step(edge, ragged())
    assert list(tmp_path.iterdir()) == []


def test_only_what_the_edge_owns_is_in_memory(llama):
    base, address = llama
    edge = connect(address, base, LoraConfig(r=2, target_modules="all-linear"), dtype=torch.float64, edge_blocks=(1, 0))
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in edge.parameters()}
    whole_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    of_block = sum(p.nbytes for p in whole_model.model.layers[0].parameters())
    lora = sum(p.nbytes for p in edge.parameters() if p.requires_grad)
    everything = sum(p.nbytes for p in whole_model.parameters())
    assert sum(stored.values()) < everything - 2 * of_block + lora + 1000
    edge.to(torch.float32)
    assert sum(p.untyped_storage().nbytes() for p in edge.parameters()) < 0.6 * sum(stored.values()) + 1000


REFUSED = {
    "edge_blocks": ({"edge_blocks": (2, 1)}, {}, "at least one has to be left"),
    "head": ({"head": "both"}, {}, "head='both'"),
    "packing": ({"packing": "int4"}, {}, "packing='int4'"),
    "killed": ({"killed": "forgotten"}, {}, "killed='forgotten'"),
    "in_flight": ({"in_flight": 0}, {}, "in_flight=0"),
    "connections": ({"connections": 2}, {}, "connections=2"),
    "noise": ({"noise": -1.0}, {}, "noise=-1.0"),
    "noise and cache": ({"noise": 1.0, "cache_dir": "x"}, {}, "leave cache_dir out"),
    "dropout in flight": ({"in_flight": 2}, {"lora_dropout": 0.1}, "no run could be repeated"),
    "dora": ({}, {"use_dora": True}, "use_dora=True"),
    "pissa": ({}, {"init_lora_weights": "pissa"}, "pissa"),
    "bias": ({}, {"bias": "all"}, "bias='all'"),
    "core with dropout": ({"crossing": "core"}, {"lora_dropout": 0.1}, "without dropout"),
    "core outside the span": ({"crossing": "core", "edge_blocks": (1, 0)}, {}, "layers_to_transform"),
    "norms of the cloud": ({}, {"modules_to_save": ["input_layernorm"]}, "belongs to the cloud"),
}


@pytest.mark.parametrize(("options", "lora", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(llama, options, lora, message):
    base, address = llama
    with pytest.raises(ValueError, match=re.escape(message)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        connect(address, base, adapter(**{"init_lora_weights": True, **lora}), dtype=torch.float64, **options)


def test_the_weights_to_merge_into_are_elsewhere(llama):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64)
    for refused in (edge.merge_and_unload, edge.merge_adapter, edge.unload):
        with pytest.raises(ValueError, match="weights that the cloud owns"):
            refused()


def test_an_edge_with_another_base_model_is_refused(llama, tmp_path):
    _, address = llama
    other_weights = tiny_base(tmp_path / "weights", seed=1)
    with pytest.raises(CloudError, match="their weights differ"):
        connect(address, other_weights, adapter(), dtype=torch.float64)
    other_shape = tiny_base(tmp_path / "shape", num_hidden_layers=4)
    with pytest.raises(CloudError, match="their config differ"):
        connect(address, other_shape, adapter(), dtype=torch.float64)


def test_weights_in_several_files_are_the_same_model(llama, tmp_path):
    base, address = llama
    model = TINY["llama"].build().double()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(Path(tmp_path).glob("*.safetensors"))) > 2
    local = whole(base, adapter())
    edge = edge_like(local, address, str(tmp_path), adapter())
    check_close(step(edge, ragged())[1], step(local, ragged())[1])
