"""The benchmark of DLoRA's loss and bytes, on a tiny model: what rows share and save, how rates are found."""

from types import SimpleNamespace

import dlora_accuracy
import pytest
import torch
from dlora_accuracy import ROWS, run, tables, tune, tuned
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from tests.dlora.cases import serve, tiny_base


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Five steps of some rows."""
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    blocks = list(torch.randint(0, 32, (20, 6)))
    task = SimpleNamespace(
        model=lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        collate=lambda chosen: {"input_ids": torch.stack(chosen), "labels": torch.stack(chosen)},
    )
    with serve(base, torch.float32) as (_, address):
        names = ("local LoRA, r = 8", "cloud, r = 8", "int8", "core, r = 8", "1/8 active, drop", "noise 3")
        return [run(name, 0.01, 0, task, blocks, blocks, base, address, steps=5) for name in names]


@pytest.mark.thorough
def test_a_run_across_the_cloud_is_the_local_run(found):
    local, cloud, *_ = found
    assert cloud["loss"] == pytest.approx(local["loss"], abs=1e-5)
    assert "sent_per_token" not in local


@pytest.mark.thorough
def test_the_saved_adapter_is_what_was_trained(found):
    for row in found[:4]:
        assert row["loss_stock_peft"] == pytest.approx(row["loss"], abs=1e-3 if "int8" in row["row"] else 1e-5)


@pytest.mark.thorough
def test_packing_cores_and_killed_modules_send_less(found):
    _, cloud, *others, _ = found
    for row in others:
        assert 0 < row["sent_per_token"] < 0.6 * cloud["sent_per_token"]
        assert 0 < row["received_per_token"] < 0.6 * cloud["received_per_token"]


@pytest.mark.parametrize(("best", "tried"), [(1.2e-2, 3), (6e-3, 4), (2.4e-2, 4), (3e-3, 4)])
def test_the_grid_goes_on_where_the_best_rate_lies_at_its_end(best, tried):
    rates = []

    def try_rate(rate):
        rates.append(rate)
        return abs(rate - best)

    tune("core, r = 8", [], try_rate)
    assert len(rates) == tried
    assert min(rates, key=lambda rate: abs(rate - best)) == best
    known = [{"row": "core, r = 8", "lr": rate, "loss": abs(rate - best)} for rate in rates]
    tune("core, r = 8", known, lambda rate: pytest.fail("known already"))
    assert tuned(known, "core, r = 8") == best
    with pytest.raises(ValueError, match="run with --tune first"):
        tuned(known, "bf16")


def test_rows_that_share_a_rate_name_one_that_has_its_own():
    assert all(ROWS[row.like].like is None for row in ROWS.values() if row.like)


@pytest.mark.thorough
def test_tables_and_picture(found, tmp_path):
    text = tables(found, [])
    assert all(f"| {row['row']} " in text for row in found)
    dlora_accuracy.plot(found, str(tmp_path / "loss.png"))
    assert imread(tmp_path / "loss.png").std() > 0.01, "an empty picture"
