"""Draws the picture on top of README.md and of the front page, from what two tutorials find.

python docs/overview.py

It writes ``docs/_static/overview.png``, in about a minute, and needs the extra ``docs``.
"""

import runpy
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")  # before the tutorials draw

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

DOCS = Path(__file__).parent
OUT = DOCS / "_static" / "overview.png"


def show(axes: Axes, image: Tensor, title: str) -> None:
    """Draws an image of shape (C, H, W)."""
    axes.imshow(image.clamp(0, 1).movedim(0, -1), cmap="gray")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def mosaic(tiles: Tensor) -> Tensor:
    """Nine images of one channel as one, three by three."""
    rows = tiles[:9].squeeze(1).unflatten(0, (3, 3))
    return torch.cat(torch.cat(list(rows.movedim(1, 0)), dim=2).unbind(0), dim=0)[None]


def main() -> None:
    """Runs the tutorials and draws."""
    torch.set_num_threads(1)
    memory = runpy.run_path(str(DOCS / "tutorials" / "2_memory.py"))
    decode = runpy.run_path(str(DOCS / "tutorials" / "3_decode.py"))

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    photo, features, decoded, plot = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    show(photo, decode["photo"][0], "an image")
    show(features, mosaic(decode["tiles"]), "9 of its 192 features")
    show(decoded, decode["photo_decoded"][0], "decoded from all 192")
    plot.plot(memory["depths"], memory["stored"], "o-", color="tab:orange", label="stored")
    plot.plot(memory["depths"], memory["rebuilt"], "o-", color="tab:blue", label="rebuilt")
    plot.set_title("MiB of activations against depth", fontsize=10)
    plot.set_xticks([2, 16, 32, 64], ["2", "16", "32", "64 blocks"])
    plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)

    figure.savefig(OUT, dpi=130)
    with Image.open(OUT) as image:
        image.convert("RGB").quantize(128).save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
