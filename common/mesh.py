"""Closed surface meshes of label maps, and a web page that shows them offline.

The page draws with plain JavaScript on a canvas: no network, no graphics card, no WebGL is needed.
"""

import base64
import html
import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from common.volumes import expand_box, resample, resampled_shape

TAUBIN = (0.5, -0.53)  # a step inwards, then one outwards: smooths without shrinking
SIZE_LIMIT = 5_000_000  # bytes of a page
EDGES = [  # of a cell of eight voxels: (corner, corner, axis z y x)
    (corner, tuple(np.add(corner, np.eye(3, dtype=int)[axis]).tolist()), axis)
    for axis in range(3)
    for corner in product((0, 1), repeat=3)
    if corner[axis] == 0
]


def surface_mesh(
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    step_mm: float | None = None,
    max_faces: int = 220_000,
    smoothing: int = 20,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One closed, smooth surface for each label.

    Each label is resampled to cubes of `step_mm` as a share of 0 to 1, and its 0.5 level is meshed with
    surface nets (Gibson 1998): one vertex in each cell that the surface cuts, at the mean of the cuts of its
    edges. More faces than `max_faces` are avoided by larger cubes, so the surface stays closed; vertex
    clustering would join sheets that are close. Where labels touch, each has its own wall.

    Args:
        labels: (z, y, x) bool or integers from 0, 0 is background; outside the array is background.
        spacing_mm: z y x.
        step_mm: side of the cubes; default: the smallest spacing, at least 1 mm.
        smoothing: rounds of Taubin's filter (1995), which keeps the volume.

    Returns:
        vertices: (n, 3) float32, mm, x y z; 0 is the centre of the first voxel.
        faces: (m, 3) int32, counter-clockwise seen from outside. Every edge has two faces; where two parts of
            a label touch along an edge of cubes, four.
        vertex_labels: (n,) the label of each vertex.
        All empty for an empty mask.

    Raises:
        ValueError: labels that are not 3-D whole numbers, or a spacing that is not above 0.
    """
    check_labels(labels, spacing_mm)
    step = step_mm or max(1.0, min(spacing_mm))
    while True:
        parts = [(label, *_label_mesh(*found, spacing_mm, step)) for label, *found in _masks(labels)]
        num_faces = sum(len(faces) for _, _, faces in parts)
        if num_faces <= max_faces:
            break
        step *= 1.02 * (num_faces / max_faces) ** 0.5  # the number of faces falls with the square
    vertices, faces, names, count = [np.zeros((0, 3))], [np.zeros((0, 3), int)], [], 0
    for label, points, triangles in parts:
        vertices.append(_smooth(points, triangles, smoothing))
        faces.append(triangles + count)
        names.append(np.full(len(points), label, labels.dtype))
        count += len(points)
    names = np.concatenate(names) if names else np.zeros(0, labels.dtype)
    return np.concatenate(vertices).astype(np.float32), np.concatenate(faces).astype(np.int32), names


def check_labels(labels: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """ValueError unless `labels` is 3-D, bool or integer, with three spacings above 0."""
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"labels {labels.shape} {labels.dtype}: (z, y, x) of bool or whole numbers are needed"
        )
    if np.shape(spacing_mm) != (3,) or not np.isfinite(spacing_mm).all() or min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm {tuple(spacing_mm)}: three numbers above 0 are needed, z y x")


def split_mesh(
    vertices: np.ndarray, faces: np.ndarray, vertex_labels: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{label: (vertices, faces)} of a result of `surface_mesh`."""
    parts = {}
    for label in np.unique(vertex_labels).tolist():
        first, last = np.searchsorted(vertex_labels, label), np.searchsorted(vertex_labels, label, "right")
        inside = (faces[:, 0] >= first) & (faces[:, 0] < last)
        parts[label] = vertices[first:last], faces[inside] - np.int32(first)
    return parts


def _masks(labels: np.ndarray):
    """(label, mask of its box and some voxels around, first voxel) of each label, ascending."""
    from scipy import ndimage

    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is not None:
            start, stop = expand_box([s.start for s in box], [s.stop for s in box], 3, labels.shape)
            yield label, labels[tuple(map(slice, start, stop))] == label, start


def _label_mesh(
    mask: np.ndarray, start: Sequence[int], spacing_mm: Sequence[float], step_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """(vertices mm x y z, faces) of one mask whose first voxel is `start`."""
    from scipy import ndimage

    shape = resampled_shape(mask.shape, spacing_mm, (step_mm,) * 3)
    share = resample(mask, shape)
    # A binary mask has steps; half a source voxel of blur makes them slopes.
    ratio = np.divide(shape, mask.shape)
    share = ndimage.gaussian_filter(np.pad(share, 3), np.maximum(0.5 * ratio, 0.6))
    points, faces = surface_nets(share - 0.5)
    voxels = (points - 3 + 0.5) / ratio - 0.5 + start
    return (voxels * spacing_mm)[:, ::-1], faces


def surface_nets(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The zero level of a (z, y, x) field that is below 0 all around: (points (n, 3) in voxels z y x, faces).

    Faces are (m, 3), counter-clockwise seen from the negative side once the points are read as x y z.
    """
    inside = field >= 0
    cells = np.zeros(np.subtract(field.shape, 1), np.uint8)  # how many of the eight corners are inside
    for corner in product((0, 1), repeat=3):
        cells += inside[tuple(slice(c, c + n) for c, n in zip(corner, cells.shape, strict=True))]
    places = np.argwhere((cells > 0) & (cells < 8))
    index = np.full(cells.shape, -1, np.int32)
    index[tuple(places.T)] = np.arange(len(places))

    points, cuts = np.zeros((len(places), 3)), np.zeros(len(places))
    for first, second, axis in EDGES:
        a, b = field[tuple((places + first).T)], field[tuple((places + second).T)]
        cut = (a >= 0) != (b >= 0)
        position = places[cut] + np.array(first, float)
        position[:, axis] += a[cut] / (a[cut] - b[cut])
        points[cut] += position
        cuts += cut
    points /= np.maximum(cuts, 1)[:, None]

    quads = []
    for axis in range(3):
        low, high = (
            np.moveaxis(inside, axis, 0)[:-1],
            np.moveaxis(inside, axis, 0)[1:],
        )
        across = np.moveaxis(index, axis, 0)  # one cell for each pair along the axis
        for leaves, order in ((low & ~high, 1), (high & ~low, -1)):
            i, j, k = np.nonzero(leaves)
            around = [across[i, j - dj, k - dk] for dj, dk in ((0, 0), (1, 0), (1, 1), (0, 1))]
            # The axes that remain after `moveaxis` are (y, x), (z, x), (z, y): the middle pair is mirrored.
            quads.append(np.stack(around[:: order * (1 if axis == 1 else -1)], axis=1))
    quads = np.concatenate(quads)
    corners = points[quads]
    shorter = np.linalg.norm(corners[:, 0] - corners[:, 2], axis=1) <= np.linalg.norm(
        corners[:, 1] - corners[:, 3], axis=1
    )
    first = np.where(shorter[:, None], quads[:, [0, 1, 2]], quads[:, [0, 1, 3]])
    second = np.where(shorter[:, None], quads[:, [0, 2, 3]], quads[:, [1, 2, 3]])
    return points, np.concatenate([first, second])


def _smooth(points: np.ndarray, faces: np.ndarray, rounds: int) -> np.ndarray:
    """Taubin's filter: each vertex moves towards the mean of its neighbours, then a little more back."""
    from scipy import sparse

    if not len(points):
        return points
    rows, columns = faces[:, [0, 1, 2, 1, 2, 0]].ravel(), faces[:, [1, 2, 0, 0, 1, 2]].ravel()
    near = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(points),) * 2)
    near.data[:] = 1
    degree = np.asarray(near.sum(axis=1)).reshape(-1, 1)
    for _ in range(rounds):
        for step in TAUBIN:
            points = points + step * (near @ points / degree - points)
    return points


# ---- a page that shows meshes ----


def save_html(
    path: str | Path,
    meshes: Sequence[tuple[str, Sequence[int], np.ndarray, np.ndarray]],
    title: str,
    size_limit: int = SIZE_LIMIT,
) -> None:
    """Write one page that needs nothing else: drag turns, the wheel zooms, boxes show and hide.

    Args:
        meshes: (name, (r, g, b) 0-255, vertices (n, 3) mm x y z, faces (m, 3)) each; vertices are stored as
            16 bits an axis of the common box, so 1 m has steps of 0.015 mm.
        size_limit: bytes; a page of 220,000 faces has 2.7 MB, 4.4 MB as one label (32-bit indices).

    Raises:
        ValueError: no mesh with a vertex, or a page above the limit.
    """
    meshes = [mesh for mesh in meshes if len(mesh[2])]
    if not meshes:
        raise ValueError(f"{path}: no mesh to show; the mask is empty")
    low = np.min([vertices.min(axis=0) for _, _, vertices, _ in meshes], axis=0)
    high = np.max([vertices.max(axis=0) for _, _, vertices, _ in meshes], axis=0)
    scale = float((high - low).max()) / 65535 or 1.0
    content = []
    for name, color, vertices, faces in meshes:
        wide = len(vertices) > 65536
        content.append(
            {
                "name": name,
                "color": [int(c) for c in color],
                "vertices": _base64(np.rint((vertices - low) / scale), "<u2"),
                "faces": _base64(faces, "<u4" if wide else "<u2"),
                "wide": wide,
            }
        )
    size = ((high - low) / scale).tolist()
    script = json.dumps({"size": size, "meshes": content}).replace("<", "\\u003c")  # no tag may begin in it
    page = PAGE.replace("@TITLE@", html.escape(title)).replace("@DATA@", script)
    if len(page.encode()) > size_limit:
        raise ValueError(
            f"{path}: the page has {len(page) / 1e6:.1f} MB, more than {size_limit / 1e6:.1f} MB; "
            "make the mesh with a smaller max_faces"
        )
    path = Path(path)
    partial = path.with_name(f".partial_{path.name}")
    try:
        partial.write_text(page, encoding="utf8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
html, body { margin: 0; height: 100%; overflow: hidden; font: 14px sans-serif; background: #fff; color: #222 }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none; cursor: grab }
#side { position: absolute; top: 8px; left: 8px; max-height: calc(100% - 16px); overflow: auto }
#side label { display: block; line-height: 1.35; cursor: pointer }
#side i { display: inline-block; width: 11px; height: 11px; margin: 0 5px; border-radius: 3px }
#help { position: absolute; right: 10px; bottom: 8px; color: #888 }
</style></head><body>
<canvas id="view"></canvas><div id="side"><b>@TITLE@</b></div>
<div id="help">drag: turn &middot; wheel: zoom &middot; shift + drag: move &middot; double click: reset</div>
<script>
"use strict";
const data = @DATA@;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;  // little endian
const side = document.getElementById("side"), canvas = document.getElementById("view");
const start = { azimuth: 0.5, elevation: 0.15, zoom: 1, right: 0, up: 0 };
let camera = { ...start }, waiting = false, image = null, depth = null, pixels = null;

function unit(out, i) {
  const length = Math.hypot(out[i], out[i + 1], out[i + 2]) || 1;
  for (let k = 0; k < 3; k++) out[i + k] /= length;
}

const meshes = data.meshes.map(m => {
  const stored = new Uint16Array(bytes(m.vertices)), points = new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) points[i] = stored[i] - data.size[i % 3] / 2;
  const faces = m.wide ? new Uint32Array(bytes(m.faces)) : new Uint16Array(bytes(m.faces));
  const normals = new Float32Array(points.length);
  for (let f = 0; f < faces.length; f += 3) {  // a vertex gets the sum over its faces, weighted by area
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    const u = [0, 1, 2].map(k => points[b + k] - points[a + k]);
    const v = [0, 1, 2].map(k => points[c + k] - points[a + k]);
    for (let k = 0; k < 3; k++) {
      const n = u[(k + 1) % 3] * v[(k + 2) % 3] - u[(k + 2) % 3] * v[(k + 1) % 3];
      normals[a + k] += n; normals[b + k] += n; normals[c + k] += n;
    }
  }
  for (let i = 0; i < normals.length; i += 3) unit(normals, i);
  const shades = new Uint32Array(256);  // colour from dark over full to a highlight, alpha first
  for (let s = 0; s < 256; s++) {
    const rgb = m.color.map(c => s < 225 ? c * s / 225 : c + (255 - c) * (s - 225) / 60);
    shades[s] = (255 << 24 | rgb[2] << 16 | rgb[1] << 8 | rgb[0]) >>> 0;
  }
  const row = document.createElement("label"), box = document.createElement("input");
  const mark = document.createElement("i");
  box.type = "checkbox"; box.checked = true; box.onchange = redraw;
  mark.style.background = `rgb(${m.color})`;
  row.append(box, mark, m.name); side.append(row);
  return { points, faces, normals, shades, box, screen: new Float32Array(points.length / 3 * 4) };
});

function draw() {
  waiting = false;
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  const context = canvas.getContext("2d");
  if (!image || image.width !== width || image.height !== height) {
    canvas.width = width; canvas.height = height;
    image = context.createImageData(width, height);
    pixels = new Uint32Array(image.data.buffer); depth = new Float32Array(width * height);
  }
  pixels.fill(0xffffffff); depth.fill(Infinity);
  const [sx, sy, sz] = data.size, { azimuth, elevation, zoom } = camera;
  const fit = 0.92 * Math.min(height / Math.hypot(sz, 0.3 * Math.hypot(sx, sy)), width / Math.hypot(sx, sy));
  const scale = fit * zoom, ca = Math.cos(azimuth), sa = Math.sin(azimuth);
  const ce = Math.cos(elevation), se = Math.sin(elevation);
  // Rows: right, up, towards the eye. Azimuth 0 looks at the front, the patient's right is on the left.
  const R = [-ca, -sa, 0, sa * se, -ca * se, ce, -sa * ce, ca * ce, se];
  const light = [-0.37, 0.46, 0.81];  // from the upper left, in the same axes
  for (const m of meshes) if (m.box.checked) drawMesh(m, R, scale, width, height, ratio, light);
  context.putImageData(image, 0, 0);
}

function drawMesh({ points, faces, normals, shades, screen }, R, scale, width, height, ratio, light) {
  const x0 = width / 2 + camera.right * ratio, y0 = height / 2 + camera.up * ratio;
  for (let i = 0, o = 0; i < points.length; i += 3, o += 4) {
    const [x, y, z] = [points[i], points[i + 1], points[i + 2]];
    const [p, q, r] = [normals[i], normals[i + 1], normals[i + 2]];
    screen[o] = x0 + scale * (R[0] * x + R[1] * y + R[2] * z);
    screen[o + 1] = y0 - scale * (R[3] * x + R[4] * y + R[5] * z);
    screen[o + 2] = -(R[6] * x + R[7] * y + R[8] * z);
    const n0 = R[0] * p + R[1] * q + R[2] * r, n1 = R[3] * p + R[4] * q + R[5] * r;
    const n2 = R[6] * p + R[7] * q + R[8] * r;
    const lit = Math.max(0, n0 * light[0] + n1 * light[1] + n2 * light[2]);
    screen[o + 3] = Math.min(255, 50 + 115 * lit + 60 * Math.max(0, n2) + 30 * lit ** 30);
  }
  for (let f = 0; f < faces.length; f += 3) {
    const a = 4 * faces[f], b = 4 * faces[f + 1], c = 4 * faces[f + 2];
    const ax = screen[a], ay = screen[a + 1], bx = screen[b], by = screen[b + 1];
    const cx = screen[c], cy = screen[c + 1];
    const area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay);
    if (area >= 0) continue;  // seen from behind: rows grow downwards
    const left = Math.max(0, Math.ceil(Math.min(ax, bx, cx)));
    const right = Math.min(width - 1, Math.floor(Math.max(ax, bx, cx)));
    const top = Math.max(0, Math.ceil(Math.min(ay, by, cy)));
    const bottom = Math.min(height - 1, Math.floor(Math.max(ay, by, cy)));
    for (let y = top; y <= bottom; y++) for (let x = left; x <= right; x++) {
      const v = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / area;
      const w = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / area;
      if (v < 0 || w < 0 || v + w > 1) continue;
      const u = 1 - v - w, z = u * screen[a + 2] + v * screen[b + 2] + w * screen[c + 2];
      const at = y * width + x;
      if (z < depth[at]) {
        depth[at] = z;
        pixels[at] = shades[u * screen[a + 3] + v * screen[b + 3] + w * screen[c + 3] | 0];
      }
    }
  }
}

function redraw() { if (!waiting) { waiting = true; requestAnimationFrame(draw); } }
canvas.onpointerdown = e => canvas.setPointerCapture(e.pointerId);
canvas.onpointermove = e => {
  if (!e.buttons) return;
  if (e.shiftKey) { camera.right += e.movementX; camera.up += e.movementY; } else {
    camera.azimuth -= e.movementX * 0.008;
    camera.elevation = Math.max(-1.57, Math.min(1.57, camera.elevation + e.movementY * 0.008));
  }
  redraw();
};
canvas.onwheel = e => { e.preventDefault(); camera.zoom *= Math.exp(-e.deltaY * 0.001); redraw(); };
canvas.ondblclick = () => { camera = { ...start }; redraw(); };
window.onresize = redraw;
redraw();
</script></body></html>
"""
