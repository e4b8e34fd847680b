"""The surface where a field on a grid is zero, as smooth triangles."""

from itertools import product

import numpy as np

TAUBIN_STEPS = (0.5, -0.53)  # inwards, then outwards: smooths without shrinking
EDGES = [  # of a cell of eight voxels: (its corners z y x, the axis along which they differ)
    (corner, tuple(np.add(corner, np.eye(3, dtype=int)[axis]).tolist()), axis)
    for axis in range(3)
    for corner in product((0, 1), repeat=3)
    if corner[axis] == 0
]


def surface_nets(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The surface where a field is 0, by surface nets (Gibson 1998).

    Args:
        field: (z, y, x); below 0 all around.

    Returns:
        points: (n, 3) in voxels z y x, one in each cell that the surface cuts.
        faces: (m, 3) indices of points; counter-clockwise seen from the negative side once the points are
            read as x y z.
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
        along = np.moveaxis(inside, axis, 0)
        low, high = along[:-1], along[1:]
        cell_of = np.moveaxis(index, axis, 0)
        for goes_out, order in ((low & ~high, 1), (high & ~low, -1)):
            i, j, k = np.nonzero(goes_out)
            # The four cells around an edge that the surface cuts.
            around = [cell_of[i, j - dj, k - dk] for dj, dk in ((0, 0), (1, 0), (1, 1), (0, 1))]
            # The axes that remain after `moveaxis` are (y, x), (z, x), (z, y): the middle pair is mirrored.
            quads.append(np.stack(around[:: order * (1 if axis == 1 else -1)], axis=1))
    quads = np.concatenate(quads)
    corners = points[quads]
    # Each square is cut into two triangles along its shorter diagonal.
    one_diagonal = np.linalg.norm(corners[:, 0] - corners[:, 2], axis=1)
    other_diagonal = np.linalg.norm(corners[:, 1] - corners[:, 3], axis=1)
    shorter = (one_diagonal <= other_diagonal)[:, None]
    first = np.where(shorter, quads[:, [0, 1, 2]], quads[:, [0, 1, 3]])
    second = np.where(shorter, quads[:, [0, 2, 3]], quads[:, [1, 2, 3]])
    return points, np.concatenate([first, second])


def smooth(points: np.ndarray, faces: np.ndarray, rounds: int) -> np.ndarray:
    """Taubin's filter (1995), `rounds` times: each point moves towards the mean of its neighbours, then a
    little farther back, so that the volume stays."""
    from scipy import sparse

    if not len(points):
        return points
    rows, columns = faces[:, [0, 1, 2, 1, 2, 0]].ravel(), faces[:, [1, 2, 0, 0, 1, 2]].ravel()
    near = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(points),) * 2)
    near.data[:] = 1
    degree = np.asarray(near.sum(axis=1)).reshape(-1, 1)
    for _ in range(rounds):
        for step in TAUBIN_STEPS:
            points = points + step * (near @ points / degree - points)
    return points
