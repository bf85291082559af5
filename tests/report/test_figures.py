"""Pictures: what the figures contain, that files are written, and what is refused."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from d2ft_peft.report import (
    OPERATION_COLORS,
    device_loads_figure,
    loss_curves_figure,
    plot_device_loads,
    plot_loss_curves,
    plot_schedule,
    save_figure,
    schedule_figure,
)
from d2ft_peft.schedule import Operation, Schedule


ROOT = Path(__file__).parents[2]
CURVES = {"plain": [(0, 3.0), (1, 0.0), (2, 3.0), (3, 0.0)], "_D2FT": [(0.5, 1.0)]}


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def legend(figure) -> list[str]:
    return labels(figure.legends[0].get_texts())


def hatched(axes) -> list[tuple[float, float]]:
    """Bottom and top of the hatched rows."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in patches]


def is_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01


@pytest.fixture
def schedule() -> Schedule:
    operations = [[2, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [2, 1, 2, 2]]
    return Schedule(operations, blocks=[3, 0, 3, 0], devices=[0, 0, 1, 1], capacities=[6, 4])


def test_schedule_columns_are_grouped_by_block(schedule):
    axes = schedule_figure(schedule).axes[0]
    image = axes.images[0]
    np.testing.assert_array_equal(image.get_array(), schedule.operations[:, [1, 3, 0, 2]])
    assert labels(axes.get_xticklabels()) == ["0", "3"]
    np.testing.assert_array_equal(axes.get_xticks(), [0.5, 2.5])
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5]
    assert axes.get_xlabel() == "transformer block, and its subnets (2 per block)"


def test_schedule_colors_mean_operations(schedule):
    figure = schedule_figure(schedule)
    image = figure.axes[0].images[0]
    drawn = {operation: to_hex(image.cmap(image.norm(int(operation)))) for operation in Operation}
    assert drawn == OPERATION_COLORS
    handles = figure.legends[0].legend_handles
    assert [to_hex(handle.get_facecolor()) for handle in handles[:3]] == [
        OPERATION_COLORS[operation] for operation in (Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT)
    ]


def test_colors_are_told_apart_by_their_brightness_alone():
    # Rec. 709 weights; without hue only this is left.
    rgb = {o: [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for o, c in OPERATION_COLORS.items()}
    brightness = [np.dot(rgb[operation], [0.2126, 0.7152, 0.0722]) for operation in Operation]
    assert np.diff(brightness).max() < -0.2


def test_schedule_legend_and_title(schedule):
    figure = schedule_figure(schedule)
    assert legend(figure) == [
        "FULL (31.2% of cells)",
        "FORWARD_ONLY (12.5% of cells)",
        "SHORTCUT (56.2% of cells)",
        "micro-batch not run (2)",
    ]
    assert figure.axes[0].get_title().startswith("4 micro-batches x 4 subnets: compute 35.4%, communication 37.5%")
    assert schedule_figure(schedule, "mine").axes[0].get_title() == "mine"


def test_rows_that_are_not_run_are_hatched(schedule):
    assert hatched(schedule_figure(schedule).axes[0]) == [(0.5, 2.5)]
    partly = schedule_figure(Schedule([[0, 1], [2, 0]]))
    assert hatched(partly.axes[0]) == []
    assert len(legend(partly)) == 3


def test_a_large_schedule_keeps_few_labels_and_a_bounded_size():
    figure = schedule_figure(Schedule(np.full((200, 960), 2), blocks=np.arange(960) // 8))
    axes = figure.axes[0]
    assert len(axes.get_xticks()) <= 32
    assert len(axes.get_yticks()) <= 18
    assert axes.get_xlabel().endswith("(8 per block)")
    assert max(figure.get_size_inches()) <= 14


def test_a_long_title_wraps_and_is_not_cut_off(schedule):
    figure = schedule_figure(schedule, "a title of many words " * 10)
    figure.draw_without_rendering()
    extent = figure.axes[0].title.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    assert extent.y1 <= figure.bbox.height


def test_bars_are_shares_of_the_all_full_load(schedule):
    figure = device_loads_figure(schedule)
    axes = figure.axes[0]
    bars = axes.containers[0]
    np.testing.assert_allclose([bar.get_height() for bar in bars], schedule.loads / schedule.full_loads)
    assert [text.get_text() for text in axes.texts] == ["42%", "29%"]
    assert legend(figure) == ["load", "capacity"]
    assert axes.get_title() == f"workload variance {schedule.workload_variance:.3g}"


def test_capacities_are_a_line_that_ends_at_all_full():
    schedule = Schedule([[2, 1], [0, 0]], capacities=[50, 0.5])
    line = next(patch for patch in device_loads_figure(schedule).axes[0].patches if not isinstance(patch, Rectangle))
    np.testing.assert_allclose(line.get_data().values, [1, 0.25])
    assert legend(device_loads_figure(Schedule([[2, 1]]))) == ["load"]


@pytest.mark.parametrize("num_devices", [1, 2, 16, 100])
def test_device_labels_stay_readable(num_devices):
    figure = device_loads_figure(Schedule.all_full(2, num_devices))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    ticks = axes.get_xticks()
    assert len(axes.containers[0]) == num_devices
    assert set(ticks) <= set(range(num_devices))
    extents = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(extents, extents[1:], strict=False))
    assert len(axes.texts) == (num_devices if num_devices <= 16 else 0)


def test_curves_are_drawn_as_they_are():
    figure = loss_curves_figure(CURVES, xlabel="steps")
    axes = figure.axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[list(p) for p in c] for c in CURVES.values()]
    assert legend(figure) == ["plain", "_D2FT"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "training loss")
    assert len({line.get_color() for line in axes.lines}) == 2


def test_smoothing_is_said_and_leaves_the_values_visible():
    axes = loss_curves_figure({"plain": CURVES["plain"]}, ylabel="loss", window=3).axes[0]
    pale, smooth = axes.lines
    assert axes.get_ylabel() == "loss (mean of 3 points)"
    np.testing.assert_array_equal(pale.get_ydata(), [3, 0, 3, 0])
    np.testing.assert_allclose(smooth.get_ydata(), [1.5, 2, 1, 1.5])


def test_many_curves_differ_in_color_or_style():
    axes = loss_curves_figure({f"run {i}": [(0, i), (1, i)] for i in range(20)}).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 20


def test_long_names_of_curves_are_not_cut_off():
    figure = loss_curves_figure({f"{i} {'a long name ' * 12}": [(0, 1.0)] for i in range(2)})
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width


def test_pictures_are_written_and_the_path_returned(schedule, tmp_path):
    folder = tmp_path / "new" / "folder"
    paths = [
        plot_schedule(schedule, folder / "schedule.png", title="a title"),
        plot_device_loads(schedule, str(folder / "loads.png")),
        plot_loss_curves(CURVES, folder / "loss.png", xlabel="seconds", window=3),
    ]
    assert paths == [folder / "schedule.png", folder / "loads.png", folder / "loss.png"]
    assert all(map(is_picture, paths))


@pytest.mark.parametrize("name", ["picture", "picture.doc"])
def test_other_endings_are_refused(schedule, tmp_path, name):
    with pytest.raises(ValueError, match=rf"path='.*{name}' must end in a picture format: .png, or one of .*svg"):
        plot_schedule(schedule, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("figure", [schedule_figure, device_loads_figure])
def test_only_schedules_are_drawn(figure):
    with pytest.raises(ValueError, match="schedule is a list, it must be a Schedule"):
        figure([[2, 1]])


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, r"curves=\{\} must not be empty"),
        ({"a": []}, r"curves\['a'\] has shape \(0,\), it must be a list of at least one pair"),
        ({"a": [1.0, 2.0]}, r"curves\['a'\] has shape \(2,\)"),
        ({"a": [(0, "x")]}, r"curves\['a'\] must be pairs \(x, loss\) of numbers"),
        ({"a": [(0, 1), (1, float("nan"))]}, r"curves\['a'\]\[1\]=\(1.0, nan\) must be finite"),
        ({"a": [(0, 1), (2, 1), (1, 1)]}, r"curves\['a'\]\[2\] has x=1, x must not decrease"),
    ],
)
def test_bad_curves_are_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        loss_curves_figure(curves)


@pytest.mark.parametrize("window", [0, 2, -1, 1.0, True])
def test_bad_windows_are_refused(window):
    with pytest.raises(ValueError, match=f"window={window} must be an odd whole number of points"):
        loss_curves_figure(CURVES, window=window)


@pytest.mark.thorough
def test_reports_load_neither_torch_nor_pyplot():
    # A bare package in place of d2ft_peft, whose own __init__ needs torch.
    code = (
        "import sys, types; package = types.ModuleType('d2ft_peft'); package.__path__ = ['d2ft_peft'];"
        "sys.modules['d2ft_peft'] = package; import d2ft_peft.report; d2ft_peft.report.plot_schedule;"
        "sys.exit(str([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.strip() == ""


def test_the_picture_of_the_readme_is_up_to_date_and_small(tmp_path):
    spec = spec_from_file_location("make_operations_figure", ROOT / "docs" / "make_operations_figure.py")
    docs = module_from_spec(spec)
    spec.loader.exec_module(docs)
    schedule = docs.example_schedule()
    for operation, count in ((Operation.FULL, 2), (Operation.FORWARD_ONLY, 2), (Operation.SHORTCUT, 1)):
        assert ((schedule.operations == operation).sum(axis=0) == count).all()
    assert schedule.workload_variance == 0
    assert docs.TARGET.stat().st_size < 150_000
    drawn = imread(save_figure(docs.operations_figure(), tmp_path / "operations.png", dpi=200))
    committed = imread(docs.TARGET)
    assert drawn.shape == committed.shape
    # Means of tiles: another version of matplotlib may move the edges of letters, but no cell and no word.
    tiles = np.abs(drawn - committed).mean(axis=2).reshape(drawn.shape[0] // 20, 20, -1, 20).mean(axis=(1, 3))
    assert tiles.max() < 0.1
