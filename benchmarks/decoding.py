"""How many photographs a second one process decodes, crops, mirrors and changes in colour.

    python benchmarks/decoding.py --data DIR

where ``DIR`` holds ``train/<class>/<image>`` and ``val/<class>/<image>``. Time is that of one
processor core, the files having been read before. The workers of a training share nothing: on as
many cores they prepare about as many times the images.

On two cores of an Intel Xeon, beside much other work, 250 photographs of ImageNet, 467x395 pixels
on average: 517 decoded (498 to 530), 337 cropped for training (328 to 347), 171 if their colours
are changed as well (171 to 174), 272 for a test (266 to 277); medians and ranges of five rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/irevnet"))

from experiment.settings import Config, recipe
from images.batches import Key, Squares
from images.dataset import Images
from images.readers import read_folder

Task = Callable[[Sequence[Key]], object]


def speeds(task: Task, keys: Sequence[Key], rounds: int) -> list[float]:
    """Images in a second of this process's time, in each round."""
    task(keys)  # so that the files are at hand
    return [_speed(task, keys) for _ in range(rounds)]


def _speed(task: Task, keys: Sequence[Key]) -> float:
    began = time.process_time()
    task(keys)
    return len(keys) / (time.process_time() - began)


def decode(images: Images, keys: Sequence[Key]) -> None:
    """Reads the images without cropping them."""
    for index, _ in keys:
        images.read(index, "RGB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with these flags, or the command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--images", type=int, default=500, help="at most so many")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is shown")
    flags = parser.parse_args(arguments)

    images = read_folder(flags.data, "train")
    indices = range(min(flags.images, len(images)))
    in_order: list[Key] = [(index, None) for index in indices]
    augmented: list[Key] = [(index, str(index)) for index in indices]
    squares, coloured = (Squares(images, config) for config in (Config(), recipe("b")))
    tasks = {
        "decoded": (lambda keys: decode(images, keys), in_order),
        "cropped for training": (squares.__getitems__, augmented),
        "and changed in colour": (coloured.__getitems__, augmented),
        "cropped for a test": (squares.__getitems__, in_order),
    }
    print(f"Images per second and core, {len(indices)} images:")
    for name, (task, keys) in tasks.items():
        found = speeds(task, keys, flags.rounds)
        print(f"{name:>22}{statistics.median(found):6.0f}  ({min(found):.0f} to {max(found):.0f})")


if __name__ == "__main__":
    main()
