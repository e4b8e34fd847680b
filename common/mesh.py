"""Closed surface meshes of label maps, and a web page that shows them offline.

The page draws with plain JavaScript on a canvas, so it needs neither network nor graphics card nor WebGL.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import printable, replacing
from common.surface_nets import smooth, surface_nets
from common.volumes import expand_box, resample, resampled_shape

SIZE_LIMIT = 5_000_000  # bytes of a page
SMALLEST_STEP_MM = 1.0  # side of the cubes that a label is resampled to, unless all voxels are larger


def surface_mesh(
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    max_faces: int = 220_000,
    smoothing: int = 20,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One closed, smooth surface for each label.

    Each label is resampled to cubes, as the share of the cube that it fills (0 to 1). The cubes have the
    smallest spacing as side, 1 mm at least. The level 0.5 is then meshed with surface nets (Gibson 1998): one
    vertex in each cell that the surface cuts, at the mean of the cuts of its edges. Where that would give
    more than `max_faces`, larger cubes are taken: the surface stays closed, which merging vertices would not
    ensure. Where labels touch, each has its own wall.

    Args:
        labels: (z, y, x) bool or integers; 0 is background, and so is everything outside the array.
        spacing_mm: z y x.
        smoothing: rounds of Taubin's filter (1995), which keeps the volume.

    Returns:
        vertices: (n, 3) float32, x y z in mm; 0 is the centre of the first voxel.
        faces: (m, 3) int32, counter-clockwise seen from outside. Every edge belongs to two faces, or to four
            where two parts of a label touch along an edge of cubes.
        vertex_labels: (n,) the label of each vertex, ascending.
        All three are empty for an empty mask.

    Raises:
        ValueError: as `check_labels`.
    """
    check_labels(labels, spacing_mm)
    step_mm = max(SMALLEST_STEP_MM, min(spacing_mm))
    while True:
        parts = [(label, *_label_mesh(*found, spacing_mm, step_mm)) for label, *found in _masks(labels)]
        num_faces = sum(len(faces) for _, _, faces in parts)
        if num_faces <= max_faces:
            break
        step_mm *= 1.02 * (num_faces / max_faces) ** 0.5  # the number of faces falls with the square
    vertices, faces, names, count = [np.zeros((0, 3))], [np.zeros((0, 3), int)], [], 0
    for label, points, triangles in parts:
        vertices.append(smooth(points, triangles, smoothing))
        faces.append(triangles + count)
        names.append(np.full(len(points), label, labels.dtype))
        count += len(points)
    names = np.concatenate(names) if names else np.zeros(0, labels.dtype)
    return np.concatenate(vertices).astype(np.float32), np.concatenate(faces).astype(np.int32), names


def check_labels(labels: np.ndarray, spacing_mm: Sequence[float]) -> None:
    """Refuse what cannot be meshed or drawn.

    Raises:
        ValueError: `labels` is not 3-D, not of bool or whole numbers, or `spacing_mm` is not three numbers
            above 0.
    """
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
    """Each label in turn as (label, its mask in a box with a rim of 3 voxels, first voxel of the box)."""
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
    """(vertices x y z in mm, faces) of a mask whose first voxel lies at `start` in the whole volume."""
    from scipy import ndimage

    shape = resampled_shape(mask.shape, spacing_mm, (step_mm,) * 3)
    share = resample(mask, shape)
    cubes_per_voxel = np.divide(shape, mask.shape)
    # A binary mask has steps; blurring by half a voxel of the mask makes slopes of them. With zeros all
    # around, less than half of any blur beyond the mask is inside it: the surface closes in the padding.
    sigma = np.maximum(0.5 * cubes_per_voxel, 0.6)
    share = ndimage.gaussian_filter(np.pad(share, 3), sigma, mode="constant")
    # What is thinner than the blur is nowhere half full: the level then lies at half of its fullest place.
    points, faces = surface_nets(share - min(0.5, 0.5 * share.max()))
    voxels = (points - 3 + 0.5) / cubes_per_voxel - 0.5 + start
    return (voxels * spacing_mm)[:, ::-1], faces


# ---- a page that shows meshes ----


def save_html(
    path: str | Path,
    meshes: Sequence[tuple[str, Sequence[int], np.ndarray, np.ndarray]],
    title: str,
) -> None:
    """Write a web page that needs no other file. Dragging turns, the wheel zooms, boxes show and hide a mesh.

    A page of 220,000 faces has 2.7 MB, or 4.4 MB if they are one mesh, whose indices then need 32 bits.

    Args:
        meshes: (name, (r, g, b) of 0 to 255, vertices (n, 3) x y z in mm, faces (m, 3)) for each mesh. A
            vertex is stored with 16 bits for each axis of the box around all meshes: 0.015 mm steps in 1 m.

    Raises:
        ValueError: no mesh has a vertex, or the page would have more than 5 MB.
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
    script = json.dumps({"size": size, "meshes": content}).replace("<", "\\u003c")  # no tag begins in it
    page = PAGE.replace("@TITLE@", html.escape(printable(title))).replace("@DATA@", script)
    if len(page.encode()) > SIZE_LIMIT:
        raise ValueError(
            f"{path}: the page has {len(page) / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.1f} MB; "
            "make the mesh with a smaller max_faces"
        )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf8")


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
      const pixel = y * width + x;
      if (z < depth[pixel]) {
        depth[pixel] = z;
        pixels[pixel] = shades[u * screen[a + 3] + v * screen[b + 3] + w * screen[c + 3] | 0];
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
