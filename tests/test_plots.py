"""common/plots.py: files that are real PNG of the right size, and colours exact to the pixel."""

import math
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common import plots
from common.plots import (
    PRED_COLOR,
    TRUTH_COLOR,
    costs_the_picture,
    heat_picture,
    new_figure,
    outline,
    overlay,
    save_curves,
    save_figure,
    save_panels,
)

NAN = float("nan")
PANELS = {"loss": ["train_loss", "val_loss"], "Dice": ["dice"]}
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two line colours


def read_png(path):
    """(h, w, 3) uint8 of a file that must be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def pixels(picture, color):
    """(y, x) of the pixels of exactly this colour."""
    return np.argwhere((picture == color).all(axis=-1))


def curve_rows(epochs):
    return [
        {"epoch": e, "train_loss": 1 / (e + 1), "val_loss": 1.2 / (e + 1), "dice": 1 - 0.8**e}
        for e in range(epochs)
    ]


@pytest.fixture
def figures(monkeypatch):
    """Figures that would have been written."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    return kept


# ---- curves ----


def test_curves_are_a_png_of_the_expected_size(tmp_path):
    save_curves(tmp_path / "curves.png", curve_rows(5), PANELS)
    picture = read_png(tmp_path / "curves.png")
    assert picture.shape == (320, 840, 3)
    left, right = picture[:, :420], picture[:, 420:]
    assert len(pixels(left, BLUE)) > 50 and len(pixels(left, ORANGE)) > 50
    assert len(pixels(right, BLUE)) > 50 and len(pixels(right, ORANGE)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_many_curves_have_colours_and_names_of_their_own_and_a_legend_beside_them(figures, tmp_path):
    columns = [f"drawn_{k}" for k in range(15)]
    rows = [{"epoch": 0} | dict.fromkeys(columns, 0.5)]
    save_curves(tmp_path / "curves.png", rows, {"drawn": columns}, {"drawn_8": "aorta"})
    (axis,) = figures[0].axes
    assert len({line.get_color() for line in axis.lines}) == 15
    assert [line.get_label() for line in axis.lines][7:10] == ["drawn_7", "aorta", "drawn_9"]
    figures[0].draw_without_rendering()
    assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1


def test_columns_that_never_are_above_0_can_be_left_out(figures, tmp_path):
    rows = [{"epoch": 0, "a": 0.0, "b": NAN, "c": NAN}, {"epoch": 1, "a": 0.0, "b": 0.5, "c": NAN}]
    save_curves(tmp_path / "curves.png", rows, {"one": ["a", "b"], "none": ["a", "c"]}, only_above_0=True)
    (axis,) = figures[0].axes
    assert axis.get_title() == "one" and [line.get_label() for line in axis.lines] == ["b"]


def test_curves_draw_the_named_columns_over_epochs(figures, tmp_path):
    rows = curve_rows(4)
    save_curves(tmp_path / "curves.png", rows, PANELS)
    loss, dice = figures[0].axes
    assert [axis.get_title() for axis in (loss, dice)] == ["loss", "Dice"]
    assert [line.get_label() for line in loss.lines] == ["train_loss", "val_loss"]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["train_loss", "val_loss"]
    assert dice.get_legend() is None
    for axis, column in ((loss, "train_loss"), (dice, "dice")):
        assert list(axis.lines[0].get_xdata()) == [0, 1, 2, 3]
        assert list(axis.lines[0].get_ydata()) == [r[column] for r in rows]


def test_curves_over_another_column(figures, tmp_path):
    rows = [{"threshold": 0.25, "dice": 0.5}, {"threshold": 0.5, "dice": 0.7}]
    save_curves(tmp_path / "curves.png", rows, {"Dice": ["dice"]}, x="threshold")
    (axis,) = figures[0].axes
    assert axis.get_xlabel() == "threshold" and list(axis.lines[0].get_xdata()) == [0.25, 0.5]
    assert any(0.25 < tick < 0.5 for tick in axis.get_xticks())  # not at whole numbers only


def test_a_single_epoch_is_visible(tmp_path):
    save_curves(tmp_path / "curves.png", curve_rows(1), PANELS)
    picture = read_png(tmp_path / "curves.png")
    assert len(pixels(picture[:, 420:], BLUE)) > 3


def test_nan_leaves_a_gap(figures, tmp_path):
    rows = curve_rows(5)
    rows[2]["dice"] = NAN
    for row in rows:
        row["val_loss"] = NAN  # never measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_curves(tmp_path / "curves.png", rows, PANELS)
        save_figure(figures[0], tmp_path / "curves.png")
    loss, dice = figures[0].axes
    assert [math.isnan(y) for y in dice.lines[0].get_ydata()] == [False, False, True, False, False]
    assert np.isnan(loss.lines[1].get_ydata()).all() and not np.isnan(loss.lines[0].get_ydata()).any()


@pytest.mark.parametrize("epochs", [0, 1])
def test_curves_of_nothing_but_nan_are_written(tmp_path, epochs):
    rows = [{"epoch": 0, "train_loss": NAN, "val_loss": NAN, "dice": NAN}] * epochs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_curves(tmp_path / "curves.png", rows, PANELS)
    assert read_png(tmp_path / "curves.png").shape == (320, 840, 3)


# ---- overlays ----


def test_overlay_mixes_the_colour_exactly():
    image = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2] = mask[3, 5] = 1
    rgb = overlay(image, mask, (230, 30, 32), 0.4)
    assert rgb.shape == (4, 6, 3) and rgb.dtype == np.uint8
    assert rgb[1, 2].tolist() == [140, 60, 61]  # 0.6 * 80 + 0.4 * (230, 30, 32) = 140, 60, 60.8
    assert rgb[3, 5].tolist() == [230, 150, 151]
    for channel in range(3):
        np.testing.assert_array_equal(rgb[..., channel][mask == 0], image[mask == 0])
    assert image[1, 2] == 80  # the input stays


@pytest.mark.parametrize("alpha, expected", [(0.0, (7, 7, 7)), (1.0, TRUTH_COLOR)])
def test_overlay_of_nothing_and_of_everything(alpha, expected):
    rgb = overlay(np.full((2, 2), 7, np.uint8), np.ones((2, 2), bool), TRUTH_COLOR, alpha)
    assert (rgb == expected).all()


def test_default_overlay_is_in_the_colour_of_predictions():
    rgb = overlay(np.zeros((1, 1), np.uint8), np.ones((1, 1), bool))
    assert rgb[0, 0].tolist() == [round(0.4 * c) for c in PRED_COLOR]


def test_outline_is_the_border_only():
    mask = np.zeros((7, 8), np.uint8)
    mask[1:6, 2:7] = 1
    rgb = np.full((7, 8, 3), 9, np.uint8)
    drawn = outline(rgb, mask, TRUTH_COLOR)
    border = mask.astype(bool)
    border[2:5, 3:6] = False
    np.testing.assert_array_equal((drawn == TRUTH_COLOR).all(-1), border)
    np.testing.assert_array_equal(drawn[~border], rgb[~border])
    assert (rgb == 9).all()  # a copy


def test_outline_at_the_edge_of_the_image_is_closed():
    drawn = outline(np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), bool), PRED_COLOR)
    border = np.ones((4, 5), bool)
    border[1:3, 1:4] = False
    np.testing.assert_array_equal((drawn == PRED_COLOR).all(-1), border)


def test_outline_of_a_point_and_of_nothing():
    point = np.zeros((3, 3), bool)
    point[1, 1] = True
    assert (outline(np.zeros((3, 3, 3), np.uint8), point, PRED_COLOR)[1, 1] == PRED_COLOR).all()
    assert not outline(np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3), bool), PRED_COLOR).any()


# ---- panels ----


def test_panels_are_a_png_of_the_expected_size(tmp_path):
    grey = np.full((20, 20), 77, np.uint8)
    rgb = overlay(grey, np.ones((20, 20), bool), PRED_COLOR, 1.0)
    save_panels(tmp_path / "panels.png", [[grey, rgb], [rgb]], [["grey", "red"], ["red"]], height=2.0)
    picture = read_png(tmp_path / "panels.png")
    assert picture.shape == (450, 400, 3)  # 2 columns of 2 inches, 2 rows of 2.25, 100 dots an inch
    quarters = [picture[:225, :200], picture[:225, 200:], picture[225:, :200], picture[225:, 200:]]
    assert [len(pixels(q, (77, 77, 77))) > 10_000 for q in quarters] == [True, False, False, False]
    assert [len(pixels(q, PRED_COLOR)) > 10_000 for q in quarters] == [False, True, True, False]
    assert (quarters[3] == 255).all()  # the missing panel is blank, without axes


def test_a_row_of_wide_images_is_low(tmp_path):
    wide, square = np.zeros((10, 40), np.uint8), np.zeros((20, 20), np.uint8)
    save_panels(tmp_path / "panels.png", [[wide], [square]], [["wide"], ["square"]], height=2.0)
    # A quarter of 2 inches and 2 inches, with 0.25 for each title.
    assert read_png(tmp_path / "panels.png").shape == (300, 200, 3)


def test_panels_show_grey_values_as_they_are(tmp_path):
    """A dim slice stays dim: no stretching by its own minimum and maximum."""
    dim = np.full((20, 20), 40, np.uint8)
    dim[:10] = 50
    save_panels(tmp_path / "panels.png", [[dim]], [["dim"]])
    picture = read_png(tmp_path / "panels.png")
    assert len(pixels(picture, (40, 40, 40))) > 5000 and len(pixels(picture, (50, 50, 50))) > 5000


def test_panels_keep_the_first_row_on_top(tmp_path):
    image = np.zeros((20, 20), np.uint8)
    image[:5] = 200
    save_panels(tmp_path / "panels.png", [[image]], [["bright on top"]])
    picture = read_png(tmp_path / "panels.png")
    assert pixels(picture, (200, 200, 200))[:, 0].max() < pixels(picture, (0, 0, 0))[-1, 0]


def test_letters_at_the_edges_of_a_panel(tmp_path):
    """White on black: L, with its long foot, stands at the right edge only."""
    black = np.zeros((20, 20), np.uint8)
    save_panels(tmp_path / "panels.png", [[black]], [[""]], edges=[["RL"]])
    picture = read_png(tmp_path / "panels.png")
    dark = pixels(picture, (0, 0, 0))
    low, high = dark.min(0), dark.max(0)
    inside = picture[low[0] + 5 : high[0] - 5, low[1] + 1 : high[1] - 1].min(-1) > 128
    half = inside.shape[1] // 2
    left, right = inside[:, : half // 2], inside[:, -half // 2 :]
    assert inside.sum() == left.sum() + right.sum() and left.sum() > right.sum() > 0, "R has more strokes"


def test_letters_at_the_edges_are_seen_on_white_too(tmp_path):
    """White on white with a dark rim: the letters alone darken a white picture, at both of its edges."""
    white = np.full((20, 20), 255, np.uint8)
    save_panels(tmp_path / "panels.png", [[white]], [[""]], edges=[["RL"]])
    picture = read_png(tmp_path / "panels.png")
    columns = pixels(picture, (0, 0, 0))[:, 1]
    middle = picture.shape[1] / 2
    assert (columns < middle).sum() > 10 and (columns > middle).sum() > 10


def test_heat_picture_is_rgb():
    """On black: jet's dark blue (0, 0, .5) and dark red (.5, 0, 0), divided by the highest value."""
    picture = heat_picture(np.zeros((1, 2), np.uint8), np.array([[0.0, 1.0]]))
    assert picture.tolist() == [[[0, 0, 255], [255, 0, 0]]]
    colour = heat_picture(np.full((2, 2, 3), [0, 255, 0], np.uint8), np.zeros((2, 2)))
    assert colour[0, 0].tolist() == [0, 255, 128]  # (0, 1, .5)


# ---- files ----


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch, capsys):
    path = tmp_path / "curves.png"
    save_curves(path, curve_rows(3), PANELS)
    before = path.read_bytes()

    def full_disk(self, target, **_):
        target.write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    save_curves(path, curve_rows(4), PANELS)
    assert "warning: curves.png is left out: No space left on device" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_pictures_are_png_whatever_their_name(tmp_path):
    figure, axes = new_figure(2, 3, (3.0, 1.5))
    assert axes.shape == (2, 3)
    save_figure(figure, str(tmp_path / "picture"))
    assert read_png(tmp_path / "picture").shape == (150, 300, 3)


def test_one_panel_still_gives_a_grid_of_axes():
    assert new_figure(1, 1, (1.0, 1.0))[1].shape == (1, 1)


@pytest.mark.parametrize("error", [IndexError("index 65"), ValueError("no mesh to show"), MemoryError()])
def test_a_picture_that_fails_costs_the_picture(capsys, error):
    with costs_the_picture("case_3d.png"):
        raise error
    assert "warning: case_3d.png is left out: " in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), costs_the_picture("case_3d.png"):
        raise KeyboardInterrupt


def test_curves_that_cannot_be_drawn_do_not_end_a_run(tmp_path, capsys):
    save_curves(tmp_path / "none" / "curves.png", [{"epoch": 0, "lr": 1.0}], {"rate": ["lr"]})
    save_curves(tmp_path / "curves.png", [{"epoch": 0}], {"rate": ["lr"]})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("warning: curves.png is left out: ")
    assert second.startswith("warning: curves.png is left out: KeyError: 'lr' (plots.py, line ")
