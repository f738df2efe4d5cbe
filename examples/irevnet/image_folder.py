"""Images in a folder per class, read and cropped by the workers of a DataLoader.

Nothing but Pillow is needed: torchvision would replace a CPU build of torch by its own.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from runs import RunError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
Sample = tuple[Tensor, int]
Key = tuple[int, int | None]  # index of an image, seed of its augmentation


def find_classes(folder: Path) -> list[str]:
    """The names of the folders in ``folder``, sorted."""
    layout = "--data takes a folder with train/<class>/<image> and val/<class>/<image>"
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}: {layout}.")
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise RunError(f"there is no class folder in {folder}: {layout}.")
    return classes


def _find_images(folder: Path) -> list[bytes]:
    with os.scandir(folder) as entries:
        found = sorted(e.path for e in entries if e.name.lower().endswith(SUFFIXES))
    if not found:
        raise RunError(
            f"there is no image in {folder}: fill or remove it. Images end in "
            f"{', '.join(SUFFIXES)}."
        )
    return [os.fsencode(path) for path in found]


class ImageFolder(Dataset[Sample | RunError]):
    """The images of ``folder/<class>/``, each an uint8 square with its class's number.

    An item is asked for by an index and a seed: with a seed the image is augmented by a random
    resized crop and a flip, the same for the same seed in whichever worker; with None it is
    resized and cropped in the centre. An unreadable image is returned as the error, which
    :class:`FolderBatches` raises: raised in a worker it would come back as a traceback.

    Args:
        folder: Holds the class folders.
        classes: Their names; the position of a name is the label.
        size: Side of the squares in pixels.
        resize: Side in pixels that the shorter side gets before the central crop.
        grey: Whether the images get one channel instead of three.
        flip: Whether augmentation mirrors every other image.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        *,
        size: int,
        resize: int,
        grey: bool = False,
        flip: bool = True,
    ) -> None:
        strangers = sorted(set(find_classes(folder)) - set(classes))
        if strangers:
            raise RunError(f"{folder} has the class {strangers[0]!r}, which is not trained on.")
        present = [name for name in classes if (folder / name).is_dir()]
        images = {classes.index(name): _find_images(folder / name) for name in present}
        # Arrays, since workers that merely look at a million strings come to own a copy of each.
        self.paths = np.array([path for paths in images.values() for path in paths])
        self.labels = np.repeat(list(images), [len(paths) for paths in images.values()])
        self.size = size
        self.resize = resize
        self.mode = "L" if grey else "RGB"
        self.flip = flip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Sample | RunError:
        index, seed = key
        path = os.fsdecode(self.paths[index])
        try:
            image = read_image(path, self.mode)
        except RunError as error:
            return error
        if seed is None:
            image = centre_crop(image, self.size, self.resize)
        else:
            image = augmented(image, self.size, random.Random(seed), flip=self.flip)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, -1)
        return pixels.permute(2, 0, 1), int(self.labels[index])


def read_image(path: str, mode: str) -> Image.Image:
    """Decodes an image file as ``"RGB"`` or ``"L"``, or names the file that cannot be read."""
    try:
        with Image.open(path) as image:
            if "transparency" in image.info:  # a palette's, of which convert would warn
                return image.convert("RGBA").convert(mode)
            return image.convert(mode)
    except Exception as error:  # Pillow's decoders raise anything from OSError to SyntaxError
        raise RunError(f"cannot read the image {path}: {error}") from error


def augmented(image: Image.Image, size: int, rng: random.Random, *, flip: bool) -> Image.Image:
    """A random resized crop: 8 to 100 % of the area, sides of 3:4 to 4:3; half of them mirrored."""
    image = image.crop(_random_box(image.size, rng)).resize((size, size), Image.Resampling.BILINEAR)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _random_box(image_size: tuple[int, int], rng: random.Random) -> tuple[int, int, int, int]:
    width, height = image_size
    # Ten trials, then all of the image that has an allowed ratio: as torchvision does.
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return _central_box(
        image_size, min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    )


def _central_box(image_size: tuple[int, int], w: int, h: int) -> tuple[int, int, int, int]:
    left, top = round((image_size[0] - w) / 2), round((image_size[1] - h) / 2)
    return left, top, left + w, top + h


def centre_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Makes the shorter side ``resize`` pixels long and crops a central square of ``size``."""
    shorter = min(image.size)
    width, height = (resize * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop(_central_box(image.size, size, size))


class _Shuffled(Sampler[Key]):
    """Every image once, in random order, with a seed each; drawn from torch's generator."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        order = torch.randperm(self.length).tolist()
        seeds = torch.randint(2**62, (self.length,)).tolist()
        return iter(list(zip(order, seeds, strict=True)))


def _collate(samples: list[Sample | RunError]) -> list[Tensor] | RunError:
    error = next((sample for sample in samples if isinstance(sample, RunError)), None)
    return error or default_collate(samples)


class FolderBatches:
    """Batches of an :class:`ImageFolder` on the device, as uint8.

    Args:
        images: The images.
        batch_size: Images in a batch.
        train: Whether the images are shuffled and augmented and an incomplete last batch is left
            out, or all are given in their order.
        workers: Processes that read and crop; 0 does so in this one.
        device: Where the batches go.
    """

    def __init__(
        self,
        images: ImageFolder,
        batch_size: int,
        *,
        train: bool,
        workers: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.images = len(images)
        self.loader = DataLoader(
            images,
            batch_size,
            sampler=_Shuffled(len(images)) if train else [(i, None) for i in range(len(images))],
            num_workers=workers,
            collate_fn=_collate,
            drop_last=train,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            # Its own, or a resumed run, which starts its workers anew, would draw other numbers.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, RunError):
                raise batch
            images, labels = batch
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
