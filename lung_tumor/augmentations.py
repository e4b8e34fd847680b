"""Random changes of a training slice and its mask, with albumentations 2.0.8 (imported on use)."""

import os
import random

import numpy as np


class Augmentation:
    """(image uint8 (h, w), mask uint8 (h, w), seed) -> the same, changed; equal seeds give equal results.

    What moves in from outside repeats the edge, in image and mask, as in `fill_around`; masks take the
    nearest value.

    Args:
        horizontal_flip, vertical_flip: probabilities. A vertical flip is anatomically wrong, hence 0.
        rotation_limit: degrees to either side; shift by 10 % and scale by 15 % come with it.
        elastic: probability of the elastic and of the grid distortion each.
        brightness_contrast: strength, as a share of the range.
    """

    def __init__(
        self,
        horizontal_flip: float = 0.5,
        rotation_limit: float = 15.0,
        elastic: float = 0.3,
        brightness_contrast: float = 0.15,
        vertical_flip: float = 0.0,
    ) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks a server at import
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)  # parallelism comes from the workers
        self.transform = A.Compose(
            [
                A.HorizontalFlip(p=horizontal_flip),
                A.VerticalFlip(p=vertical_flip),
                A.Affine(
                    translate_percent=(-0.1, 0.1),
                    scale=(0.85, 1.15),
                    rotate=(-rotation_limit, rotation_limit),
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    border_mode=cv2.BORDER_REPLICATE,
                    p=0.5,
                ),
                A.ElasticTransform(
                    alpha=50,
                    sigma=10,
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    border_mode=cv2.BORDER_REPLICATE,
                    p=elastic,
                ),
                A.GridDistortion(
                    num_steps=5,
                    distort_limit=0.2,
                    interpolation=cv2.INTER_LINEAR,
                    mask_interpolation=cv2.INTER_NEAREST,
                    border_mode=cv2.BORDER_REPLICATE,
                    p=elastic,
                ),
                A.RandomBrightnessContrast(
                    brightness_limit=brightness_contrast, contrast_limit=brightness_contrast, p=0.3
                ),
                A.GaussNoise(std_range=(0.01, 0.02), p=0.2),
                # Erased tumour stays positive in the mask: keep this rare.
                A.CoarseDropout(
                    num_holes_range=(1, 4),
                    hole_height_range=(0.03, 0.06),
                    hole_width_range=(0.03, 0.06),
                    fill=0,
                    p=0.1,
                ),
            ]
        )

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        # Not Compose.set_random_seed: it gives every transform the same seed, so that all of them draw the
        # same numbers and either all or none is applied.
        generator, py_random = np.random.default_rng(seed), random.Random(seed)
        for transform in self.transform.transforms:
            transform.set_random_state(generator, py_random)
        changed = self.transform(image=image, mask=mask)
        return changed["image"], changed["mask"]
