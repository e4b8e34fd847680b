"""common/augment2d.py: what moves where, and that 0 means background before and after."""

import numpy as np

from common.augment2d import cut_square, random_square, rotate, vary_grey


def test_a_quarter_turn_is_exact():
    picture = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(rotate(picture, 90), np.rot90(picture))
    np.testing.assert_array_equal(rotate(picture, 0), picture)
    np.testing.assert_array_equal(rotate(picture[:, ::-1], 180), picture[::-1])


def test_background_moves_in():
    turned = rotate(np.full((20, 30, 3), 200, np.uint8), 30)
    assert turned.shape == (20, 30, 3) and not turned[0, 0].any() and (turned[10, 15] == 200).all()


def test_grey_values_by_hand():
    """Gamma 2 of 128 is 128^2 / 255 = 64.25; contrast 0.5 halves the distance from 76.5; 0 alone stays 0."""
    levels = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    assert vary_grey(levels, 1.0, 2.0)[0, [0, 128, 255], 0].tolist() == [0, 64, 255]
    assert vary_grey(levels, 0.5, 1.0)[0, [0, 1, 100, 255], 0].tolist() == [0, 39, 88, 166]
    assert vary_grey(levels, 2.0, 1.0)[0, [0, 20, 100, 255], 0].tolist() == [0, 1, 124, 255]
    assert vary_grey(levels, 1.0, 1.0, 0.1)[0, [0, 1, 100, 250], 0].tolist() == [0, 26, 126, 255]
    np.testing.assert_array_equal(vary_grey(levels, 1.0, 1.0), levels)


def test_a_crop_shows_what_its_box_says():
    """5 rows are cut to 4, at each of 2 places; 2 columns lie at each of 3 places, with 0 beside them."""
    picture = np.arange(1, 31, dtype=np.uint8).reshape(5, 2, 3)
    seen = set()

    def cut(picture: np.ndarray, seed: int, fill: int = 0) -> tuple[np.ndarray, list[int]]:
        source, target = random_square(picture.shape, 4, np.random.default_rng(seed))
        box = [end for place in target for end in (place.start, place.stop)]
        return cut_square(picture, 4, source, target, fill), box

    for seed in range(50):
        square, box = cut(picture, seed)
        assert square.shape == (4, 4, 3) and box[:2] == [0, 4] and box[3] - box[2] == 2
        first_row = (int(square[0, box[2], 0]) - 1) // 6
        np.testing.assert_array_equal(square[:, box[2] : box[3]], picture[first_row : first_row + 4])
        assert np.count_nonzero(square) == 24
        seen.add((first_row, box[2]))
    assert seen == {(row, column) for row in range(2) for column in range(3)}
    square, box = cut(picture[:4], 0)
    assert box[:2] == [0, 4] and np.count_nonzero(square) == 24
    labels, box = cut(picture[..., 0], 0, fill=255)  # the same place, and what is unknown around it
    assert labels.shape == (4, 4) and (labels == 255).sum() == 8 and box == cut(picture, 0)[1]
