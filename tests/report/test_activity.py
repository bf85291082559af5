"""The picture of Kill-and-Revive: what it contains, and what is refused."""

import numpy as np
import pytest
from matplotlib.image import imread

from d2ft_peft.report import activity_figure, plot_activity


ACTIVITY = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=bool)
NAMES = ["model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj"]


def labels(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_rows_are_modules_and_columns_are_intervals():
    axes = activity_figure(ACTIVITY, NAMES).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_array(), ACTIVITY.T)
    assert labels(axes) == ["0.q_proj", "0.v_proj", "1.q_proj"]
    assert axes.get_ylim() == (2.5, -0.5) and axes.get_xlabel() == "interval"
    assert axes.get_title() == "1 of 3 modules active at a time, 2 were at some time"


def test_columns_are_as_wide_as_intervals_lasted():
    axes = activity_figure(ACTIVITY, NAMES, began=[0, 10, 14]).axes[0]
    edges = axes.collections[0].get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, 10, 14, 21] and axes.get_xlabel() == "optimizer step"


def test_many_modules_keep_few_labels_and_a_bounded_size():
    figure = activity_figure(np.eye(300, dtype=bool), [f"layers.{i}" for i in range(300)])
    assert len(labels(figure.axes[0])) <= 40 and max(figure.get_size_inches()) <= 14
    assert labels(activity_figure(np.ones((1, 1)), ["model.layers.0"]).axes[0]) == ["0"]


def test_it_is_written_and_the_path_returned(tmp_path):
    path = plot_activity(ACTIVITY, NAMES, tmp_path / "new" / "activity.png")
    pixels = imread(path)
    assert path == tmp_path / "new" / "activity.png" and min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ACTIVITY, NAMES[:2]), r"activity has shape \(3, 3\), it must be \[intervals, modules\] .* 2 modules"),
        ((ACTIVITY[:0], NAMES), "with at least one interval"),
        ((ACTIVITY[0], NAMES), r"activity has shape \(3,\)"),
        ((ACTIVITY, NAMES, [0, 5]), "began=.* must be the step at which each of 3 intervals began, ascending"),
        ((ACTIVITY, NAMES, [0, 5, 5]), "ascending"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        activity_figure(*arguments)
