"""The page of a run: in a real browser, self-contained, and closed to what names and labels may hold."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from d2ft_peft.schedule import Schedule


pytest.importorskip("plotly", reason="plotly is not installed")

from d2ft_peft.report import RunRecord, page, read_run, write_page  # noqa: E402
from d2ft_peft.report.run_record import Activity  # noqa: E402
from d2ft_peft.report.web_figures import web_figures  # noqa: E402

from .browser import open_page  # noqa: E402


HOSTILE = "</script><script>document.body.dataset.error='broken in'</script><img src=x onerror=alert(1)>\"'&"


def schedule(rows: int = 5, blocks: int = 3, heads: int = 2) -> Schedule:
    rng = np.random.default_rng(0)
    operations = rng.integers(0, 3, (rows, blocks * heads))
    operations[0] = 2
    return Schedule(operations, np.full(rows, 4.0), None, None, None, np.repeat(np.arange(blocks), heads))


def record(hostile: str = "", steps: int = 6) -> RunRecord:
    activity, one = Activity(), schedule()
    for step in range(1, steps + 1):
        activity.add(step, step, one)
    history = [
        {
            "step": step, "loss": 2 - step / 10, "grad_norm": 1.0, "learning_rate": 1e-3, "compute_ratio": 0.6,
            "communication_ratio": 0.7, "flops_ratio": 0.61, "padding_ratio": 0.1, "step_seconds": 0.5,
            "peak_memory_mib": 100.0 + step, "sent_mib_per_step": 3.0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    history += [{"step": steps, "eval_loss": 1.2, "eval_accuracy": 0.8, f"eval_{hostile}x": 0.5}]
    history += [{"step": steps, "train_runtime": 100.0, "train_loss": 1.5, "flops_ratio": 0.605}]
    return RunRecord(
        f"run {hostile}", {"model": f"model {hostile}", "budget, compute": 0.6, f"fact {hostile}": hostile}, history,
        activity, one.to_dict(), {f"fisher {hostile}": list(np.linspace(0, 1, 6)), "weight_magnitude": [1.0] * 6},
        one.blocks.tolist(),
    )  # fmt: skip


class Elements(HTMLParser):
    """Names of elements and attributes of a document."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.thorough
def test_a_browser_draws_every_figure_and_runs_no_foreign_code(tmp_path):
    path = write_page(record(HOSTILE), tmp_path / "deep" / "report.html", record(steps=3))
    document = open_page(path, tmp_path / "profile")
    figures = web_figures(record(HOSTILE), record(steps=3))
    body = re.search(r"<body[^>]*>", document).group()
    assert "data-error" not in body
    assert f'data-drawn="{len(figures)}"' in body and len(figures) == 16
    assert document.count('class="main-svg"') >= len(figures)
    elements = Elements()
    elements.feed(document)
    assert {"svg", "section"} <= elements.tags and not elements.tags & {"img", "iframe", "a"}
    assert not [name for name in elements.attributes if name.startswith("on")]


def test_nothing_is_fetched_and_nothing_that_came_from_outside_is_markup():
    text = page(record(HOSTILE))
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "broken in" in own and "<img" not in own and own.count("<script") == own.count("</script>") == 1
    own = re.sub(r"<script type.*?</script>|&lt;.*?&gt;", "", own, flags=re.DOTALL)
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", own)
    assert links == ["data:,"]
    assert "</script><script>document" not in text


def test_the_headline_has_the_numbers_that_matter():
    text = page(record(), record(steps=3))
    cards = dict(re.findall(r'class="label">(.*?)</div><div class="value">(.*?)</div>', text))
    assert cards == {
        "Compute": "60.5%", "Time": "1.7 min", "Accuracy": "80.0%", "Evaluation loss": "1.2",
        "Training loss, mean": "1.5", "Peak memory": "0.10 GiB", "Communication": "70.0%",
    }  # fmt: skip
    assert "100% of plain" in text


def test_a_run_that_logged_nothing_has_a_page():
    assert "Nothing was logged" in page(RunRecord())


def test_figures_that_no_number_is_there_for_are_left_out():
    plain = RunRecord(history=[{"step": 1, "loss": 1.0, "learning_rate": 0.1}, {"step": 2, "loss": float("nan")}])
    assert [figure.name for figure in web_figures(plain)] == ["loss", "learning_rate"]


def test_shares_of_a_long_run_are_joined_and_stay_shares():
    activity, whole = Activity(), Schedule.all_full(2, 6, blocks=[0, 0, 1, 1, 2, 2])
    for step in range(1, 1001):
        activity.add(step, step, whole if step <= 500 else schedule())
    shares = np.array(activity.shares)
    assert len(shares) <= 240 and activity.first[0] == 1 and activity.last[-1] == 1000
    assert activity.first[1:] == [last + 1 for last in activity.last[:-1]]
    assert np.allclose(shares.sum(axis=2), 1)
    widths = np.array(activity.last) - activity.first + 1
    of_half = activity.add(1001, 1001, schedule()) or np.array(activity.shares)[-1]
    mean = np.average(shares[:, :, 2], axis=0, weights=widths)
    assert np.allclose(mean, 0.5 + 0.5 * of_half[:, 2])
    activity.cut(500)
    assert activity.last[-1] == 500 or activity.first[-1] <= 500


def test_a_record_is_read_back_and_anything_else_is_refused(tmp_path):
    one = record(HOSTILE)
    (tmp_path / "d2ft_run.json").write_text(one.to_json())
    assert read_run(tmp_path) == one == read_run(tmp_path / "d2ft_run.json")
    (tmp_path / "d2ft_run.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged, or no record of a D2FT run"):
        read_run(tmp_path)


def test_a_trainers_own_state_is_enough(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "tiny"}))
    assert read_run(tmp_path).last("step") == 10
    assert read_run(tmp_path).about == {"model": "tiny", "r": 8}
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        read_run(tmp_path / "checkpoint-10")


def test_a_folder_without_a_run_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"has neither d2ft_run.json nor a trainer_state.json"):
        read_run(tmp_path)
