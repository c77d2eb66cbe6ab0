"""Images with all that is known of them as one record, and pictures read from files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from harmonize_lib.errors import HarmonizeError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Dataset:
    """Images with labels, in a fixed order.

    Attributes
    ----------
    images : Tensor
        (N, C, H, W) uint8, source pixels.
    labels : Tensor
        (N) int64, index into ``classes``.
    classes : tuple[str, ...]
        K class names.
    masks : Tensor | None
        (N, H, W) bool, the exact pixels of the labeled object; None where unknown.
    ids : tuple[str, ...]
        N names, unique.
    name : str
        What ``load_dataset`` was asked for.
    extras : dict[str, Tensor]
        What else is known per image, first axis N: for shapes-on-scenes ``object_labels``, ``scene_labels``,
        ``without_object``, ``moved_object``, ``moved_masks`` and ``boxes`` (N, 4: left, top, right, bottom;
        right and bottom exclusive).
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    masks: Tensor | None
    ids: tuple[str, ...]
    name: str
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Dataset:
        """Take a part of the set.

        Parameters
        ----------
        index : Tensor
            (n) int64 positions or (N) bool.

        Returns
        -------
        Dataset
            The chosen images with all that is known of them.
        """
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            masks=None if self.masks is None else self.masks[index],
            ids=tuple(self.ids[i] for i in index.tolist()),
            extras={name: value[index] for name, value in self.extras.items()},
        )


def read_image(path: Path, size: int | None = None) -> Tensor:
    """Read a picture of any mode as 8-bit RGB.

    Parameters
    ----------
    path : Path
        The file. Grayscale, RGBA (on white), CMYK, palette and 16-bit images are converted.
    size : int | None
        Shorter side scaled to ``size / 0.875`` (bicubic, antialiased), then a center crop of this side.

    Returns
    -------
    Tensor
        (3, H, W) uint8.

    Raises
    ------
    HarmonizeError
        The file is missing, truncated, no image, or has more pixels than Pillow's limit, 179 million.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise HarmonizeError(f"{str(path)[-80:]}: more than 179 million pixels: scale it down or remove it") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        line = f"{str(path)[-70:]}: not a readable image ({str(error)[:60]})"
        raise HarmonizeError(f"{line}: remove or replace the file") from error
    pixels = pil_to_tensor(image)
    if size is None:
        return pixels
    pixels = resize(pixels, round(size / 0.875), interpolation=3, antialias=True)
    return center_crop(pixels, [size, size])
