"""common/{mesh,surface_nets,render,views}.py on shapes whose size and place are known."""

import base64
import json
import re
import shutil
import subprocess
from functools import cache

import numpy as np
import pytest

from common.mesh import save_html, split_mesh, surface_mesh
from common.render import _normals, label_colors, make_scene, render_scene, scene_of
from common.surface_nets import surface_nets
from common.views import MISSED, _error_scene, save_triptych, save_turntable, trimmed

RED, GREEN, BLUE = (220, 0, 0), (0, 200, 0), (0, 0, 220)
COLORS = np.array([(0, 0, 0), RED, GREEN, BLUE], np.uint8)


def ball(radius_mm, spacing_mm=(1, 1, 1), size_mm=50, centre_mm=(24, 25, 26)):
    axes = np.ogrid[tuple(slice(0, round(size_mm / s)) for s in spacing_mm)]
    return sum((a * s - c) ** 2 for a, s, c in zip(axes, spacing_mm, centre_mm, strict=True)) <= radius_mm**2


@cache
def three_blocks():
    """Label 1 at the head, 2 at the patient's right, 3 in front of the middle."""
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[30:38, 15:25, 15:25] = 1
    labels[12:20, 15:25, 28:38] = 2
    labels[2:10, 30:38, 15:25] = 3
    return labels


def two_blocks():
    """Label 1 in front of label 2."""
    labels = np.zeros((20, 40, 20), np.uint8)
    labels[5:15, 30:38, 5:15], labels[5:15, 2:10, 5:15] = 1, 2
    return labels


def volume_and_area(vertices, faces):
    a, b, c = np.moveaxis(vertices[faces].astype(float), 1, 0)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    return np.einsum("ij,ij->", a, np.cross(b, c)) / 6, area


def faces_of_edges(faces):
    """How many faces each edge has; every edge must be run as often forwards as backwards."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward, counts = np.unique(edges, axis=0, return_counts=True)
    backward, back_counts = np.unique(edges[:, ::-1], axis=0, return_counts=True)
    assert np.array_equal(forward, backward) and np.array_equal(counts, back_counts)
    return np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)[1]


# ---- meshes ----


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (3, 1, 2), (0.7, 0.7, 0.7)])
def test_mesh_of_a_ball(spacing_mm):
    vertices, faces, labels = surface_mesh(ball(18, spacing_mm), spacing_mm)
    assert (vertices.dtype, faces.dtype, labels.dtype) == (np.float32, np.int32, bool)
    volume, area = volume_and_area(vertices, faces)  # a volume above 0: normals point outwards
    assert volume == pytest.approx(4 / 3 * np.pi * 18**3, rel=0.04)
    assert area == pytest.approx(4 * np.pi * 18**2, rel=0.04)
    assert set(faces_of_edges(faces)) == {2}
    np.testing.assert_allclose(vertices.mean(axis=0), (26, 25, 24), atol=0.1)  # x y z
    radius = np.linalg.norm(vertices - (26, 25, 24), axis=1)
    assert abs(radius - 18).max() < 0.5 * max(spacing_mm)


def test_surface_nets_cut_edges_where_the_field_is_zero():
    z, y, x = np.ogrid[:12, :12, :12]
    field = 3.3 - np.sqrt((z - 5.5) ** 2 + (y - 5.0) ** 2 + (x - 6.0) ** 2)
    points, faces = surface_nets(field)
    assert abs(np.linalg.norm(points - (5.5, 5, 6), axis=1) - 3.3).max() < 0.25
    assert set(faces_of_edges(faces)) == {2} and volume_and_area(points[:, ::-1], faces)[0] > 0


def test_labels_that_touch_keep_their_own_closed_surface():
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[2:15, 3:17, 3:17], labels[15:28, 3:17, 3:17] = 7, 4
    parts = split_mesh(*surface_mesh(labels, (1, 1, 1)))
    assert list(parts) == [4, 7]
    for label, middle in ((4, 21), (7, 8)):
        vertices, faces = parts[label]
        assert set(faces_of_edges(faces)) == {2} and faces.max() == len(vertices) - 1
        assert volume_and_area(vertices, faces)[0] == pytest.approx(13 * 14 * 14, rel=0.06)
        assert vertices[:, 2].mean() == pytest.approx(middle, abs=0.3)


def test_a_mask_at_the_border_is_closed_there():
    vertices, faces, _ = surface_mesh(np.ones((10, 12, 14), np.uint8), (1, 1, 1))
    assert set(faces_of_edges(faces)) == {2}
    assert volume_and_area(vertices, faces)[0] == pytest.approx(10 * 12 * 14, rel=0.1)


@pytest.mark.parametrize("spacing_mm", [(10, 1, 1), (1, 12, 1), (1, 1, 30), (8, 8, 1)])
def test_thick_slices_are_closed_at_the_border(spacing_mm):
    """The blur of a thick slice, 5 mm here, reaches beyond the rim of 3 cubes around the array."""
    vertices, faces, _ = surface_mesh(np.ones((6, 40, 40), np.uint8), spacing_mm)
    assert set(faces_of_edges(faces)) == {2}
    assert volume_and_area(vertices, faces)[0] == pytest.approx(6 * 40 * 40 * np.prod(spacing_mm), rel=0.1)


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (10, 1, 1), (0.2, 0.2, 0.2), (5, 0.3, 0.3)])
def test_a_single_voxel_has_a_small_closed_surface(spacing_mm):
    labels = np.zeros((7, 9, 11), np.uint8)
    labels[3, 4, 5] = 2
    vertices, faces, names = surface_mesh(labels, spacing_mm)
    assert set(names) == {2} and set(faces_of_edges(faces)) == {2}
    np.testing.assert_allclose(vertices.mean(axis=0), np.multiply((5, 4, 3), spacing_mm[::-1]), atol=0.5)
    assert 0 < volume_and_area(vertices, faces)[0] < 8 * np.prod(np.maximum(spacing_mm, 1))


def test_fine_voxels_are_meshed_in_cubes_of_1_mm():
    fine, plain = (surface_mesh(ball(9, (mm,) * 3), (mm,) * 3)[1] for mm in (0.5, 1.0))
    assert len(fine) == pytest.approx(len(plain), rel=0.1)  # at 0.5 mm there would be four times as many


def test_the_budget_of_faces_keeps_shape_and_closure():
    mask = ball(20).astype(np.uint8)
    vertices, faces, _ = surface_mesh(mask, (1, 1, 1), max_faces=1500)
    assert 700 < len(faces) <= 1500 and set(faces_of_edges(faces)) == {2}
    assert volume_and_area(vertices, faces)[0] == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.06)


def test_smoothing_removes_steps_and_keeps_the_volume():
    axes = np.ogrid[:40, :40, :40]
    tilted = (
        (abs(axes[0] - 20 + (axes[1] - 20) * 0.3) < 6) & (abs(axes[1] - 20) < 14) & (abs(axes[2] - 20) < 14)
    )
    rough, smooth = (surface_mesh(tilted, (1, 1, 1), smoothing=n) for n in (0, 10))
    assert volume_and_area(*smooth[:2])[0] == pytest.approx(volume_and_area(*rough[:2])[0], rel=0.01)
    assert volume_and_area(*smooth[:2])[1] < volume_and_area(*rough[:2])[1]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_an_empty_mask_gives_an_empty_mesh(dtype):
    vertices, faces, labels = surface_mesh(np.zeros((4, 5, 6), dtype), (1, 1, 1))
    assert vertices.shape == faces.shape == (0, 3) and labels.shape == (0,)
    assert split_mesh(vertices, faces, labels) == {}


@pytest.mark.parametrize(
    ("labels", "spacing_mm", "message"),
    [
        (np.zeros((4, 4), np.uint8), (1, 1, 1), r"labels \(4, 4\) uint8"),
        (np.zeros((4, 4, 4), np.float32), (1, 1, 1), "float32"),
        (np.zeros((4, 4, 4), np.uint8), (1, 0, 1), r"spacing_mm \(1, 0, 1\)"),
    ],
)
def test_what_is_not_a_label_map_is_refused(labels, spacing_mm, message):
    with pytest.raises(ValueError, match=message):
        surface_mesh(labels, spacing_mm)
    with pytest.raises(ValueError, match=message):
        make_scene(labels, spacing_mm, COLORS)


# ---- the page ----


def test_the_page_holds_the_meshes_and_nothing_from_elsewhere(tmp_path):
    meshes = [
        (name, color, *surface_mesh(ball(r, centre_mm=(20, 24, 26)), (1, 1, 1))[:2])
        for name, color, r in (("T1 </script>", RED, 9), ("L5", BLUE, 14))
    ]
    path = tmp_path / "mesh.html"
    save_html(path, meshes, 'a <b> "title"')
    page = path.read_text(encoding="utf8")
    assert "<title>a &lt;b&gt; &quot;title&quot;</title>" in page
    assert page.count("</script>") == 1 and not re.search(r"https?:|src=|href=|import ", page)
    data = json.loads(re.search(r"const data = (\{.*\});", page)[1])
    low = np.min([m[2].min(axis=0) for m in meshes], axis=0)
    step = (np.max([m[2].max(axis=0) for m in meshes], axis=0) - low).max() / 65535
    for stored, (name, color, vertices, faces) in zip(data["meshes"], meshes, strict=True):
        assert stored["name"] == name and tuple(stored["color"]) == color and not stored["wide"]
        points = np.frombuffer(base64.b64decode(stored["vertices"]), "<u2").reshape(-1, 3)
        np.testing.assert_allclose(points * step + low, vertices, atol=step)
        assert np.array_equal(np.frombuffer(base64.b64decode(stored["faces"]), "<u2").reshape(-1, 3), faces)
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_too_large_or_without_a_mesh_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("common.mesh.SIZE_LIMIT", 10_000)
    mesh = ("ball", RED, *surface_mesh(ball(9), (1, 1, 1))[:2])
    with pytest.raises(ValueError, match=r"more than 0\.0 MB; make the mesh with a smaller max_faces"):
        save_html(tmp_path / "a.html", [mesh], "a")
    with pytest.raises(ValueError, match="no mesh to show"):
        save_html(tmp_path / "a.html", [("none", RED, np.zeros((0, 3)), np.zeros((0, 3), int))], "a")
    assert not list(tmp_path.iterdir())


BROWSER = """
const fs = require("fs"), page = fs.readFileSync(process.argv[2], "utf8");
let pending = null, image = null; const boxes = [];
const append = (...c) => boxes.push(...c.filter(x => x.tag === "input"));
const element = tag => ({ tag, style: {}, append });
const canvas = { clientWidth: 80, clientHeight: 100, style: {}, getContext: () => ({
  createImageData: (width, height) => ({ width, height, data: new Uint8ClampedArray(4 * width * height) }),
  putImageData: i => { image = i; } }) };
const document = { getElementById: id => id === "view" ? canvas : element("div"), createElement: element };
const script = page.match(/<script>([^]*)<\\/script>/)[1]
  + "; return a => { camera.azimuth = a; camera.elevation = 0; };";
const turn = new Function("document", "window", "requestAnimationFrame", script)(
  document, { devicePixelRatio: 1 }, f => { pending = f; });
const views = [];
const look = () => { pending(); views.push(Array.from(image.data)); };
turn(0); look(); turn(Math.PI); look(); turn(0); boxes[1].checked = false; boxes[1].onchange(); look();
console.log(JSON.stringify(views));
"""


def pages_views(folder, labels):
    """(3, 100, 80, 3): the page from the front, from the back, and from the front without its second mesh."""
    parts = split_mesh(*surface_mesh(labels, (1, 1, 1)))
    save_html(folder / "a.html", [(f"label {n}", COLORS[n], *m) for n, m in parts.items()], "blocks")
    (folder / "browser.js").write_text(BROWSER)
    result = subprocess.run(
        ["node", "browser.js", "a.html"], cwd=folder, capture_output=True, text=True, check=True
    )
    return np.array(json.loads(result.stdout), np.uint8).reshape(3, 100, 80, 4)[..., :3]


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's JavaScript in node")
def test_the_page_draws_head_up_with_the_right_side_left(tmp_path):
    views = pages_views(tmp_path, three_blocks())
    front, back, hidden = ({n: where(view, n, 120) for n in (1, 2, 3)} for view in views)
    assert front[1][0] < front[2][0] < front[3][0]
    assert front[2][1] < front[1][1] - 10 and back[2][1] > back[1][1] + 10
    assert front[2] is not None and hidden[2] is None and hidden[3] is not None


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's JavaScript in node")
def test_the_page_hides_what_is_behind(tmp_path):
    front, back, hidden = pages_views(tmp_path, two_blocks())
    assert where(front, 1) and not where(front, 2)
    assert where(back, 2) and not where(back, 1) and where(hidden, 1)


# ---- pictures ----


def where(picture, label, least=40):
    """Centre (row, column) of the pixels in which the label's channel leads by `least`; None without any."""
    others = [c for c in range(3) if c != label - 1]
    lead = picture[..., label - 1].astype(int) - picture[..., others].max(axis=-1)
    rows, columns = np.nonzero(lead > least)
    return (rows.mean(), columns.mean()) if len(rows) else None


def test_views_have_the_head_up_and_the_right_sides():
    scene = make_scene(three_blocks(), (1, 1, 1), COLORS)
    front, left, back, right = (
        {n: where(render_scene(scene, angle, 0, (100, 100)), n) for n in (1, 2, 3)}
        for angle in (0, 90, 180, 270)
    )
    for view in (front, left, back, right):
        assert view[1][0] < view[2][0] < view[3][0]
    assert front[2][1] < front[1][1] - 10 and back[2][1] > back[1][1] + 10  # label 2: the right side
    assert left[3][1] < left[1][1] - 10 and right[3][1] > right[1][1] + 10  # label 3: in front
    above = {n: where(render_scene(scene, 0, 90, (100, 100)), n) for n in (1, 2, 3)}
    assert above[3][0] > above[1][0] + 10 and above[2][1] < above[1][1] - 10  # from above: front is down


def test_what_is_in_front_hides_what_is_behind():
    scene = make_scene(two_blocks(), (1, 1, 1), COLORS)
    front, back = (render_scene(scene, angle, 0, (60, 60)) for angle in (0, 180))
    assert where(front, 1) and not where(front, 2)
    assert where(back, 2) and not where(back, 1)


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("angles", [(0, 0), (70, 35)])
def test_a_ball_is_round_and_of_the_right_size(spacing_mm, angles):
    scene = make_scene(ball(18, spacing_mm), spacing_mm, label_colors(np.ones((1, 1, 1), int), COLORS))
    picture = render_scene(scene, *angles, (120, 120))
    rows, columns = np.nonzero((picture < 250).any(axis=2))
    tall, deep, broad = scene.size_mm
    across, tilt = np.hypot(deep, broad), np.deg2rad(angles[1])
    pixel_mm = max(tall * np.cos(tilt) + across * np.sin(tilt), across) / 120
    assert len(rows) * pixel_mm**2 == pytest.approx(np.pi * 18**2, rel=0.05)
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=2)


def test_light_comes_from_the_upper_left():
    scene = make_scene(ball(18), (1, 1, 1), COLORS[:2])
    picture = render_scene(scene, size=(90, 90)).astype(float)
    inside = (picture < 250).any(axis=2)
    rows, columns = np.nonzero(inside)
    middle = rows.mean(), columns.mean()
    bright = picture.sum(axis=2)[inside]
    upper_left = (rows < middle[0]) & (columns < middle[1])
    lower_right = (rows > middle[0]) & (columns > middle[1])
    assert bright[upper_left].mean() > 1.2 * bright[lower_right].mean()


def test_thick_slices_leave_no_speck_without_a_colour():
    labels = ball(20, (5, 2, 2)).astype(np.uint8) * 2
    colors = np.array([(0, 0, 0), (0, 0, 0), (0, 220, 0)], np.uint8)
    for angle in (0, 45):
        picture = render_scene(make_scene(labels, (5, 2, 2), colors), angle, 0, (100, 100))
        inside = (picture < 250).any(axis=2)
        assert picture[inside][:, 1].min() > 20


def test_an_empty_mask_is_background_and_a_missing_colour_an_error():
    empty = np.zeros((5, 6, 7), np.uint8)
    picture = render_scene(make_scene(empty, (1, 1, 1), COLORS), size=(20, 30))
    assert picture.shape == (20, 30, 3) and (picture == 255).all()
    with pytest.raises(ValueError, match="label 5 has no colour; the table has 4 rows"):
        make_scene(empty + 5, (1, 1, 1), COLORS)


def test_colors_go_in_turn_and_a_single_label_is_like_bone():
    assert label_colors(np.array([[[0, 3]]]), [RED, GREEN]).tolist() == [[0, 0, 0], [*RED], [*GREEN], [*RED]]
    assert label_colors(np.array([[[0, 1]]]), [RED, GREEN])[1].tolist() not in ([*RED], [*GREEN])


def test_large_masks_are_drawn_on_a_coarser_grid(monkeypatch):
    monkeypatch.setattr("common.render.MAX_VOXELS", 20_000)
    scene = make_scene(ball(18), (1, 1, 1), COLORS)
    assert scene.weight.size < 1.6 * (20_000 ** (1 / 3) + 6) ** 3
    np.testing.assert_allclose(scene.size_mm - np.multiply(6, scene.spacing_mm), 37)  # the same field of view


def blurred_edge(half_ramp_mm, sigma_mm, distances_mm):
    """An even fall from 1 to 0 within half_ramp_mm on both sides, blurred by a Gaussian."""
    x = np.arange(-40, 40, 0.01)
    edge = np.clip(0.5 - x / (2 * half_ramp_mm), 0, 1)
    weights = np.exp(-0.5 * (x / sigma_mm) ** 2)
    smooth = np.convolve(edge, weights / weights.sum(), mode="same")
    return np.interp(distances_mm, x, smooth)


def thick_slab():
    """Eight slices of 4 mm with pixels of 1 mm: the first four are filled, from edge to edge."""
    labels = np.zeros((8, 30, 30), np.uint8)
    labels[:4] = 1
    return labels, (4.0, 1.0, 1.0)


@pytest.mark.parametrize("make", ["make_scene", "_error_scene"])
def test_the_mask_is_blurred_by_a_share_of_its_own_voxels(make):
    """0.6 voxels of the mask: 2.4 drawn ones along z, where a voxel of the mask is four drawn ones."""
    labels, spacing_mm = thick_slab()
    if make == "make_scene":
        scene = make_scene(labels, spacing_mm, COLORS, box=((0, 0, 0), labels.shape))
    else:
        scene, _ = _error_scene(labels > 0, labels > 0, spacing_mm, 5.0, 2.0)
    column = scene.density.numpy()[3:-3, 18, 18]  # without the rim
    distances_mm = np.arange(-5.5, 6)  # from the face between the fourth slice and the fifth
    np.testing.assert_allclose(column[10:22], blurred_edge(2.0, 2.4, distances_mm), atol=0.02)


def test_colours_come_from_the_voxel_in_the_middle_of_a_drawn_one():
    labels = np.zeros((6, 3, 3), np.uint8)
    labels[:] = np.array([1, 2, 3, 1, 3, 2])[:, None, None]
    scene = make_scene(labels, (1, 1, 1), COLORS, voxel_mm=3.0)
    assert scene.rgb[3:-3, 3, 3].tolist() == [list(GREEN), list(BLUE)]  # label 2 of 1 2 3, label 3 of 1 3 2


def test_the_rim_of_colours_is_one_voxel_of_the_mask_wide():
    labels = np.zeros((5, 9, 9), np.uint8)
    labels[0], labels[4] = 1, 2
    scene = make_scene(labels, (5, 1, 1), COLORS)  # 5 drawn voxels to a slice
    assert scene.weight[3:-3, 5, 5].tolist() == [255] * 5 + [1] * 5 + [0] * 5 + [1] * 5 + [255] * 5
    assert scene.rgb[3 + 9, 5, 5].tolist() == list(RED) and scene.rgb[3 + 15, 5, 5].tolist() == list(GREEN)


def test_normals_of_a_ball_point_away_from_its_centre_whatever_the_spacing():
    spacing_mm = np.array([3.0, 1.0, 2.0])
    density = np.zeros((25, 61, 37), np.float32)
    z, y, x = (mm * (np.arange(n) - n // 2) for mm, n in zip(spacing_mm, density.shape, strict=True))
    density[:] = np.clip((24 - np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)) / 12 + 0.5, 0, 1)
    none = np.zeros(density.shape, np.uint8)
    scene = scene_of(density, np.ones(3), np.repeat(none[..., None], 3, -1), none, spacing_mm)
    directions = np.array([(1, 0, 0), (0, 1, 0), (0.6, 0.8, 0), (0.6, 0, 0.8), (0, -0.6, 0.8)])  # x y z
    places = 24 * directions[:, ::-1] / spacing_mm + np.array(density.shape) // 2 + 3
    np.testing.assert_allclose(_normals(scene, places), directions, atol=0.05)


# ---- files ----


def test_errors_are_in_mm_also_on_a_coarser_grid(monkeypatch):
    monkeypatch.setattr("common.render.MAX_VOXELS", 30 * 25 * 20)
    shape, spacing_mm = (60, 50, 40), (1.0, 1.0, 1.0)  # drawn as 30 x 25 x 20 voxels of 2 mm
    target, pred = np.zeros(shape, bool), np.zeros(shape, bool)
    target[10:30, 10:40, 10:30] = True
    pred[10:30, 10:40, 10:30] = True
    pred[30:40, 20:30, 16:24] = True  # a horn that grows 10 mm upwards
    scene, color_map = _error_scene(target, pred, spacing_mm, 8.0, 0.1)
    assert scene.spacing_mm == (2.0, 2.0, 2.0)
    # The uppermost drawn voxel of the target is the 14th; three voxels above it are 6 of the scale's 8 mm.
    expected = np.rint(np.multiply(color_map(6 / 8)[:3], 255))
    np.testing.assert_allclose(scene.rgb[3 + 14 + 3, 3 + 12, 3 + 10], expected, atol=3)
    # Beside the prediction, what lies 2 mm off is no more than a drawn voxel; 4 mm off it is missed.
    target[30:34, 10:40, 10:14] = True
    scene, _ = _error_scene(target, pred, spacing_mm, 8.0, 0.1)
    blue = (scene.rgb == MISSED).all(axis=-1)[3:-3, 3:-3, 3:-3]
    assert not blue[15].any() and blue[16, 5:20, 5:7].all() and blue.sum() == 15 * 2


def test_error_colors_say_how_far_and_what_is_missing():
    target, pred = ball(15, centre_mm=(24, 25, 14)), ball(19, centre_mm=(24, 25, 14))
    missed = ball(5, centre_mm=(24, 25, 42))
    scene, color_map = _error_scene(target | missed, pred, (1, 1, 1), 8.0, 2.0)
    color_at = {name: scene.rgb[tuple(np.add(place, 3))] for name, place in
          {"4 mm": (24 + 19, 25, 14), "missed": (24, 25, 42)}.items()}  # fmt: skip
    assert tuple(color_at["missed"]) == MISSED
    np.testing.assert_allclose(color_at["4 mm"], np.multiply(color_map(4 / 8)[:3], 255), atol=3)
    same, _ = _error_scene(target, target, (1, 1, 1), 8.0, 2.0)
    np.testing.assert_array_equal(
        same.rgb[3 + 24 + 15, 3 + 25, 3 + 14], np.rint(np.multiply(color_map(0.0)[:3], 255))
    )
    assert not (same.rgb == MISSED).all(axis=-1).any()


def test_triptych_is_a_picture_also_where_one_mask_is_empty(tmp_path):
    from PIL import Image

    mask = ball(15).astype(np.uint8)
    for name, target, pred in (("a", mask, mask * 2), ("b", mask, mask * 0), ("c", mask * 0, mask)):
        save_triptych(tmp_path / f"{name}.png", target, pred, (1, 1, 1), colors=COLORS, height=60)
        assert Image.open(tmp_path / f"{name}.png").size[0] > 150
    picture = np.array(Image.open(tmp_path / "a.png").convert("RGB"))
    assert where(picture, 1)[1] < where(picture, 2)[1]  # truth is left of the prediction
    with pytest.raises(ValueError, match="neither the target nor the prediction"):
        save_triptych(tmp_path / "d.png", mask * 0, mask * 0, (1, 1, 1), colors=COLORS)
    with pytest.raises(ValueError, match="not of one shape"):
        save_triptych(tmp_path / "d.png", mask, mask[1:], (1, 1, 1), colors=COLORS)


def test_turntable_turns_and_repeats(tmp_path):
    from PIL import Image

    path = tmp_path / "turn.gif"
    save_turntable(path, three_blocks(), (1, 1, 1), colors=COLORS, frames=4, size=(60, 50))
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (4, (50, 60), 0, 100)
        columns = []
        for frame in range(4):
            gif.seek(frame)
            columns.append(where(np.array(gif.convert("RGB")), 2)[1])
    assert columns[0] < 22 and columns[2] > 28 and list(tmp_path.iterdir()) == [path]


def test_trimmed_keeps_one_scale():
    first, second = np.full((2, 50, 60, 3), 255, np.uint8)
    first[20:30, 25:30], second[10:22, 5:50] = 0, 0
    a, b = trimmed([first, second], margin=2)
    assert a.shape == (24, 9, 3) and b.shape == (24, 49, 3)
    blank = np.full((5, 6, 3), 255, np.uint8)
    assert trimmed([blank])[0].shape == blank.shape
