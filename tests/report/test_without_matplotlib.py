"""matplotlib is an extra: whoever only trains does without it, and whoever draws is told what to install."""

import importlib
import sys

import pytest
from peft import get_peft_model
from transformers import TrainingArguments

from d2ft_peft import D2FTConfig, D2FTTrainer, report
from tests.distributed.launch import run
from tests.models import TINY


def train_and_draw(folder: str) -> dict:
    """In a process that has imported the package and, until here, nothing else."""
    loaded = "matplotlib" in sys.modules
    sys.modules["matplotlib"] = None  # whatever imports it from here on fails, as if it were not installed
    tiny, said = TINY["vit"], []
    model = get_peft_model(tiny.build(), D2FTConfig(num_full=1, modules_to_save=["classifier"]))
    batch = tiny.batch(4)
    args = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    table = report.format_table([{"compute": trainer.state.log_history[-1]["compute_ratio"]}])
    for name in ("plot_schedule", "OPERATION_COLORS"):
        try:
            getattr(report, name)
        except ImportError as error:
            said.append(str(error))
    return {"loaded": loaded, "table": table, "said": said}


@pytest.mark.distributed
def test_training_and_tables_do_without_it_and_figures_say_what_to_install(tmp_path):
    (found,) = run(__name__, "train_and_draw", tmp_path, str(tmp_path), processes=1)
    assert not found["loaded"], "importing d2ft_peft imports matplotlib"
    assert found["table"].splitlines()[-1] == "|     0.5 |"
    assert found["said"] == [
        f"d2ft_peft.report.{name} is drawn by matplotlib, which is not installed; "
        'install it with pip install "d2ft_peft[report]".'
        for name in ("plot_schedule", "OPERATION_COLORS")
    ]


def test_a_figure_that_is_imported_says_it_too(monkeypatch):
    monkeypatch.delitem(sys.modules, "d2ft_peft.report.figures", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "d2ft_peft\[report\]"'):
        from d2ft_peft.report import schedule_figure  # noqa: F401


def test_another_module_that_is_missing_is_named_as_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, "d2ft_peft.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "d2ft_peft.report._checks", None)
    with pytest.raises(ModuleNotFoundError, match=r"d2ft_peft.report._checks"):
        _ = report.plot_schedule


def test_every_public_name_is_there():
    module = importlib.import_module("d2ft_peft.report")
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="'d2ft_peft.report' has no attribute 'plot_shedule'"):
        _ = module.plot_shedule
