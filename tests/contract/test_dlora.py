"""A life across a link: connected, killed and revived, trained, saved, generated with, loaded by stock PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from d2ft_peft.dlora import BaseModel, Cloud, KillReviveCallback, connect
from tests.models import TINY


@pytest.mark.quick(1)
@pytest.mark.parametrize("placement", [{"edge_blocks": (1, 0)}, {"head": "cloud"}, {"crossing": "core"}], ids=str)
def test_trained_on_the_edge_loaded_anywhere(tmp_path, placement):
    base = str(tmp_path / "base")
    TINY["llama"].build().save_pretrained(base)
    cloud = Cloud(BaseModel.load(base))
    address = f"localhost:{cloud.start()}"
    below = {"layers_to_transform": [1, 2]} if "crossing" in placement else {}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **below)
    edge = connect(address, base, config, **placement)
    batch = TINY["llama"].batch(4)
    data = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(edge, args, train_dataset=data, callbacks=[KillReviveCallback(active=2, interval=2)]).train()
    edge.save_pretrained(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    prompt = {name: batch[name][:, :4] for name in ("input_ids", "attention_mask")}
    found = [model.eval().generate(**prompt, max_new_tokens=4, num_beams=2) for model in (edge, whole)]
    assert torch.equal(*found)
    with torch.no_grad():
        losses = [model(**batch).loss for model in (edge, whole)]
    torch.testing.assert_close(*losses)
    edge.disconnect()
    cloud.stop()
