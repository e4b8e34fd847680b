"""The shapes of which `phantoms.py` builds a CT of the spine: vertebrae, other bones, soft tissue.

Shapes are given by distances in mm that are negative inside; points are (z, y, x) in mm, directions (up,
front, right). Three lists describe the vertebrae from the head down: `labels` has their numbers in VerSe,
`levels` their place in the tables below (1 to 24; from 25 on the sacrum), `frames` their positions and axes.
"""

import numpy as np
from scipy import ndimage

from common.phantoms import box_between, oval_mm, paint, tube_mm

# Sizes by vertebra, in mm; between these numbers (1 = C1, 8 = T1, 20 = L1) they change evenly.
TABLE_LEVELS = (1, 2, 3, 7, 8, 13, 19, 20, 22, 24)
HEIGHT = (12, 17, 13, 14, 16, 19, 24, 26, 28, 28)  # of the body
DEPTH = (13, 14, 15, 17, 18, 26, 30, 31, 33, 34)
WIDTH = (16, 17, 18, 25, 27, 28, 38, 40, 44, 50)
DISC = (2, 5, 5, 5, 4, 5, 7, 8, 10, 11)  # thickness below the body
CANAL_FRONT = (15, 8, 7.5, 7.5, 7.5, 7.5, 8, 8, 8, 8.5)  # half axes of the canal
CANAL_SIDE = (14, 11, 11, 11, 9.5, 8, 10, 10.5, 11, 12)
SPINE_LENGTH = (6, 16, 12, 30, 30, 30, 24, 26, 28, 22)  # spinous process
SPINE_DROP = (0, 5, 5, 8, 12, 30, 8, 5, 5, 5)
SPINE_HALF = (3, 5, 3.5, 4, 4.5, 4.5, 8, 9, 10, 8)  # half height
SIDE_REACH = (37, 24, 25, 30, 37, 31, 23, 36, 44, 42)  # tip of the transverse process from the midline
SIDE_FRONT = (2, 3, 4, 0, -8, -13, -7, -3, -1, 1)  # of its tip, seen from the canal's centre
PITCH_LEVELS = (1, 3, 8, 13, 19, 22, 24, 29)
PITCH = (12, 8, -20, 0, 18, 0, -22, -55)  # degrees by which the way down leads to the front


def at_level(values: tuple, level: float) -> float:
    """The size of a vertebra at `level` from one of the tables above."""
    return float(np.interp(level, TABLE_LEVELS, values))


class _Frame:
    """Position and axes of one vertebra."""

    def __init__(self, centre, pitch, roll):
        self.centre = np.asarray(centre, float)
        down = np.array([-np.cos(pitch) * np.cos(roll), np.sin(pitch) * np.cos(roll), np.sin(roll)])
        self.up, self.front = -down, np.array([np.sin(pitch), np.cos(pitch), 0])
        right = np.cross(self.up, self.front)
        self.right = right * np.sign(right[2])

    def point(self, up, front, right):
        """(z, y, x) in mm of a point that is given in the vertebra's own axes."""
        return self.centre + up * self.up + front * self.front + right * self.right

    def local(self, axes_mm, reach_mm):
        """Slices of the box within reach, and its voxels' coordinates up, front and right from the centre."""
        box = box_between(axes_mm, self.centre - reach_mm, self.centre + reach_mm)
        z, y, x = np.ix_(*(a[s] - np.float32(c) for a, s, c in zip(axes_mm, box, self.centre, strict=True)))
        return box, *(
            z * float(d[0]) + y * float(d[1]) + x * float(d[2]) for d in (self.up, self.front, self.right)
        )


def _paint_tubes(image, axes_mm, points, radius, hu, edge_mm):
    """Paint a bone or vessel along a chain of points; `hu` may be a pair, whose second is the marrow's."""
    for start, end in zip(points[:-1], points[1:], strict=True):
        reach = radius + edge_mm
        box = box_between(axes_mm, np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        if image[box].size:
            distance = tube_mm(np.ix_(*(a[s] for a, s in zip(axes_mm, box, strict=True))), start, end, radius)
            for depth, value in zip((0, 2), np.atleast_1d(hu), strict=False):
                paint(image[box], distance + depth, value, edge_mm)


def _vertebra_mm(level: int, size: float, up, front, right):
    """Distance to the vertebra of level 1 to 24, in the coordinates of its frame."""
    half_up, half_front, half_right = (size * at_level(v, level) / 2 for v in (HEIGHT, DEPTH, WIDTH))
    canal_front, canal_side = size * at_level(CANAL_FRONT, level), size * at_level(CANAL_SIDE, level)
    back = -half_front - canal_front + (10 * size if level == 1 else 0)  # the canal's centre
    side = np.abs(right)
    tip = size * at_level(SIDE_REACH, level), back + size * at_level(SIDE_FRONT, level)
    canal = oval_mm(front - back, right, canal_front, canal_side)

    slope = 0.25 * half_up + 0.45 * (front - back).clip(-20, 5)  # laminae fall to the back
    ring = np.maximum(np.abs(canal - 2.5 * size) - 2.5 * size, np.abs(up - slope) - 0.75 * half_up)
    if level == 1:
        ring = np.maximum(np.abs(canal - 3 * size) - 3 * size, np.abs(up) - 5 * size)
        body = tube_mm((up, front, side), (-3, -1, 18), (3, -1, 18), 7.5 * size)  # lateral masses
    else:
        ring = np.maximum(ring, front + half_front - 2)
        waist = 1 - 0.12 * (1 - (up / half_up) ** 2).clip(0, 1)
        body = oval_mm(front, right, half_front, half_right, 2.3) / waist + half_right * (1 - waist)
        hollow = 2.2 * size * (-body / half_right).clip(0, 1)  # of the end plates
        body = np.maximum(body, np.abs(up) - half_up + hollow)
        pedicle = canal_side + 2.5 * size
        radius = np.clip(0.36 * half_up, 2.6, 6)
        body = np.minimum(
            body,
            tube_mm(
                (up, front, side),
                (0.35 * half_up, -half_front + 3, pedicle),
                (0.3 * half_up, back, pedicle),
                radius,
            ),
        )
        joint = (
            (0.9 * half_up, back - 1, canal_side + 4 * size),
            (-1.05 * half_up, back - 6, canal_side + 2 * size),
        )
        body = np.minimum(body, tube_mm((up, front, side), *joint, 4 * size, 3.5 * size))
    if level == 2:
        body = np.minimum(
            body, tube_mm((up, front, right), (half_up - 2, 0, 0), (half_up + 14 * size, 0, 0), 5.5 * size)
        )
    root = 0.1 * half_up, back - 1, canal_side + 3
    end = (4 if level < 20 else 3) * size  # those of the thorax bear ribs
    wing = tube_mm((up, front, side), root, (0.1 * half_up, tip[1], tip[0] - 3), 4 * size, end)
    reach, drop, half = (size * at_level(v, level) for v in (SPINE_LENGTH, SPINE_DROP, SPINE_HALF))
    start = -0.35 * half_up, back - canal_front - 3
    blade = tube_mm((up, front), start, (start[0] - drop, start[1] - reach + half), half)
    blade = np.maximum(np.maximum(blade, side - 3.8 * size), front - back + canal_front)
    solid = np.minimum(np.minimum(body, ring), np.minimum(wing, blade))
    return np.maximum(solid, -canal)


def lay_out(rng, variant: str) -> tuple[list[int], list[float], list[_Frame], float]:
    """A whole spine: its labels, levels and frames (see above), and its size as a factor on all lengths."""
    extra = {"normal": [], "T13": [28], "L6": [25]}[variant]
    labels = sorted([*range(1, 25), *extra], key=lambda label: 19.5 if label == 28 else label)
    levels = [{28: 19, 25: 24}.get(label, label) for label in labels] + list(range(25, 30))
    size = rng.uniform(0.88, 1.06)
    pitches = np.deg2rad(np.interp(levels, PITCH_LEVELS, np.array(PITCH) * rng.uniform(0.5, 1.3, len(PITCH))))
    waves, phase = rng.uniform(0.5, 1.2), rng.uniform(0, 2 * np.pi)
    rolls = np.deg2rad(
        12 * rng.uniform() ** 2 * np.sin(np.linspace(0, 2 * np.pi * waves, len(levels)) + phase)
    )
    rolls += np.deg2rad(rng.uniform(-2, 2))
    frames, place, before = [], np.zeros(3), 0.0
    for level, pitch, roll in zip(levels, pitches, rolls, strict=True):
        half = size * (at_level(HEIGHT, level) / 2 if level < 25 else 13)
        frame = _Frame(place, pitch, roll)
        frame.centre = place = place - (before + half) * frame.up
        frames.append(frame)
        disc = 0  # the parts of the sacrum have grown together
        if level < 24:
            disc = at_level(DISC, level)
        elif level == 24:
            disc = 10
        before = half + size * disc
    return labels, levels, frames, size


def paint_soft_tissue(rng, image, axes_mm, levels, frames, size, edge_mm) -> None:
    """Skin, fat, muscles, organs, air and vessels around the spine."""
    z, y, x = np.ix_(*axes_mm)
    heights = [f.centre[0] for f in frames][::-1]
    level = np.interp(z, heights, levels[::-1]).astype(np.float32)
    y = y - np.interp(z, heights, [f.centre[1] for f in frames][::-1]).astype(np.float32)
    x = x - np.interp(z, heights, [f.centre[2] for f in frames][::-1]).astype(np.float32)
    texture = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), 8 / edge_mm)
    texture /= texture.std()

    def by_level(*pairs):
        return size * np.interp(level, *zip(*pairs, strict=True)).astype(np.float32)

    half_x = by_level((1, 75), (5, 62), (9, 165), (20, 150), (26, 175))
    half_y = by_level((1, 85), (5, 62), (9, 100), (20, 105), (26, 105))
    middle_y = y - half_y + by_level((1, 62), (5, 55), (9, 62), (20, 68), (26, 70))
    skin = oval_mm(middle_y, x, half_y, half_x, 2.3)
    paint(image, skin, -100 + 6 * texture, edge_mm)
    paint(image, skin + rng.uniform(6, 20) * size, np.where(texture > 0.9, -70, 42 + 10 * texture), edge_mm)
    muscle = oval_mm(y + 38 * size, np.abs(x) - 26 * size, 20 * size, 24 * size)
    paint(image, np.maximum(muscle, skin + 8), 55 + 6 * texture, edge_mm)
    belly = np.maximum(oval_mm(y - 50 * size, x, 55 * size, 110 * size), 19.5 * 8 - level * 8)
    paint(image, belly, np.where(texture > -0.1, 45, -95) + 5 * texture, edge_mm)
    psoas = np.maximum(
        oval_mm(y + 2, np.abs(x) - 36 * size, 18 * size, by_level((19, 6), (24, 17))), (19 - level) * 20
    )
    paint(image, psoas, 58.0, edge_mm)
    for side in (-1, 1):
        kidney = tube_mm((level * 30, y, x), (20 * 30, 2, side * 60), (22 * 30, 8, side * 66), 26 * size)
        paint(image, kidney, rng.choice([35.0, 180.0]), edge_mm)
    wide = by_level((8, 55), (10, 92), (15, 122), (19, 112))
    cage = oval_mm(y - 48 * size, x, 78 * size, wide, 2.2)
    heart, column = oval_mm(y - 45 * size, x + 6, 60 * size, 36 * size), oval_mm(y, x, 24 * size, 26 * size)
    middle = np.minimum(np.minimum(heart, column), np.maximum(y + 5, np.abs(x) - 27 * size))
    apex, base = 8.7 + (np.abs(x) / 50 - 1) ** 2, 17.2 - y / 45 + (np.abs(x) / 60 - 1) ** 2
    lung = np.maximum(np.maximum(cage, 2 - middle), np.maximum(apex - level, level - base) * 15)
    paint(image, lung, -860 + 20 * texture, edge_mm)
    windpipe = np.maximum(
        oval_mm(y - by_level((1, 28), (7, 24), (11, 42)), x, 9 * size, 9 * size), (level - 11.5) * 20
    )
    paint(image, windpipe, -980.0, edge_mm)
    aorta = oval_mm(y - by_level((10, 22), (24, 32)), x + by_level((10, 22), (22, 8)), 11 * size, 11 * size)
    aorta = np.maximum(aorta, np.maximum(10.5 - level, level - 23.5) * 25)
    paint(image, aorta, rng.choice([45.0, 160.0, 320.0]), edge_mm)
    gas = np.maximum(oval_mm(y - 70 * size, x, 18 * size, 60 * size), (19.5 - level) * 25)
    paint(image, np.maximum(gas, (0.4 - texture) * 12), -700.0, edge_mm)


def paint_other_bones(rng, image, axes_mm, labels, levels, frames, size, edge_mm) -> None:
    """Ribs, sacrum, pelvis and skull: as bright as vertebrae and not labelled, as in VerSe."""
    hu = rng.uniform(380, 600), rng.uniform(120, 260)
    for level, frame in zip(levels, frames, strict=True):
        if 8 <= level <= 19:
            half_front, half_right = size * at_level(DEPTH, level) / 2, size * at_level(WIDTH, level) / 2
            tip, length = size * at_level(SIDE_REACH, level), 2.4 if level < 18 else 0.9
            wide, deep = size * np.interp(level, (8, 10, 15, 19), (62, 100, 130, 118)), size * 88
            for side in (-1, 1):
                chain = [
                    frame.point(3, -half_front, side * (half_right + 4)),
                    frame.point(1, -half_front - 17, side * (tip + 5)),
                ]
                chain += [
                    frame.centre
                    + (-36 * size * (a - 0.4), deep * (0.58 - np.cos(a)), side * wide * np.sin(a))
                    for a in np.arange(0.6, length, 0.2)
                ]
                _paint_tubes(image, axes_mm, chain, 4.5 * size, hu, edge_mm)
    sacrum = frames[len(labels) :]
    for number, frame in enumerate(sacrum):
        box, up, front, right = frame.local(axes_mm, 75 * size)
        if image[box].size:
            shrink = size * (1 - 0.17 * number)
            bone = np.maximum(oval_mm(front, right, 15 * shrink, 26 * shrink, 2.5), np.abs(up) - 12.5 * size)
            wing = np.maximum(oval_mm(front + 6, right, 12 * shrink, 52 * shrink), np.abs(up) - 13 * size)
            crest = np.maximum(
                np.maximum(np.abs(right) - 3, np.abs(front + 24 * shrink) - 10), np.abs(up) - 9
            )
            bone = np.minimum(np.minimum(bone, wing), crest)
            for depth, value in zip((0, 2), hu, strict=True):
                paint(image[box], bone + depth, value, edge_mm)
    for side in (-1, 1):
        crest = [(-40, -18, 58), (5, -12, 66), (30, 15, 88), (34, 50, 112), (12, 85, 122)]
        for drop in (0, 12, 24, 36):
            chain = [
                sacrum[0].centre + np.multiply((up - drop, front, side * (right - 0.3 * drop)), size)
                for up, front, right in crest
            ]
            _paint_tubes(image, axes_mm, chain, 8 * size, hu, edge_mm)
    top = frames[0]
    box, up, front, right = top.local(axes_mm, 110 * size)
    if image[box].size:
        skull = tube_mm((up, front, right), (72 * size, 5, 0), (73 * size, 15, 0), 66 * size)
        foramen = np.maximum(15 * size - np.hypot(front + 8, right), skull)
        skull = np.maximum(np.abs(skull + 3.5) - 3.5, foramen)
        paint(image[box], np.maximum(skull + 4, -skull - 40), 35.0, edge_mm)
        paint(image[box], skull, 750.0, edge_mm)
    jaw = [top.point(-8 - 0.45 * f, f, r) for f, r in ((28, -48), (70, -36), (92, 0), (70, 36), (28, 48))]
    _paint_tubes(image, axes_mm, jaw, 7 * size, (900, 400), edge_mm)


def paint_vertebrae(rng, image, axes_mm, labels, levels, frames, size, edge_mm) -> np.ndarray:
    """Paint discs, canal and vertebrae; returns the label map, uint8 with VerSe's numbers."""
    nearest = np.full(image.shape, 99, np.float32)
    second, label = nearest.copy(), np.zeros(image.shape, np.uint8)
    for number, level, frame in zip(labels, levels, frames, strict=False):
        box, up, front, right = frame.local(axes_mm, 85 * size)
        if not image[box].size:
            continue
        half_up, half_front, half_right = (size * at_level(v, level) / 2 for v in (HEIGHT, DEPTH, WIDTH))
        column = oval_mm(front, right, half_front, half_right, 2.3)
        if level > 1:
            disc = np.maximum(
                column,
                np.abs(up + half_up + size * at_level(DISC, level) / 2)
                - size * at_level(DISC, level) / 2
                - 2,
            )
            paint(image[box], disc, 85.0, edge_mm)
        canal = oval_mm(
            front + half_front + size * at_level(CANAL_FRONT, level),
            right,
            *(size * at_level(v, level) for v in (CANAL_FRONT, CANAL_SIDE)),
        )
        paint(image[box], np.maximum(canal, np.abs(up) - half_up - 8), 22.0, edge_mm)
        distance = _vertebra_mm(level, size, up, front, right)
        closer = distance < nearest[box]
        second[box] = np.where(closer, nearest[box], np.minimum(second[box], distance))
        nearest[box] = np.where(closer, distance, nearest[box])
        label[box] = np.where(closer, number, label[box])
    bone = np.maximum(nearest, (nearest - second) / 2 + 0.5)  # 1 mm of joint space between two vertebrae
    texture = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), 1)
    paint(image, bone, rng.uniform(430, 620), edge_mm)
    paint(image, bone + 1.3, rng.uniform(160, 280) + 25 * texture / texture.std(), edge_mm)
    return np.where(bone < 0, label, 0).astype(np.uint8)


def paint_screws(rng, image, axes_mm, levels, frames, size, edge_mm) -> None:
    """Two pedicle screws in each of four vertebrae, joined by a rod on either side."""
    first = int(rng.integers(15, 21))
    used = [
        (level, frame)
        for level, frame in zip(levels, frames, strict=True)
        if first <= level < first + 4 and level < 25
    ]
    for side in (-1, 1):
        rod = []
        for level, frame in used:
            half_front, inner = size * at_level(DEPTH, level) / 2, size * (at_level(CANAL_SIDE, level) + 2.5)
            rod.append(frame.point(3, -half_front - 34 * size, side * (inner + 3)))
            _paint_tubes(
                image,
                axes_mm,
                [rod[-1], frame.point(2, half_front - 8, side * inner * 0.6)],
                2.8,
                3000.0,
                edge_mm,
            )
        _paint_tubes(image, axes_mm, rod, 3.0, 3000.0, edge_mm)
