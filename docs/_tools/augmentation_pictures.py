"""MkDocs hook: draw the pictures of the augmentations, and say what they do in their own words.

A page shows `images/augmentation/tutorial.png` and its like, which are drawn when the site is
built, and asks with `<!-- augmentation: tutorial -->` for what `describe()` returns. So the
page cannot differ from the code. All views are of one drawn picture; a second one is mixed
with it.
"""

from __future__ import annotations

import io
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_FOLDER = "images/augmentation"
_MARK = re.compile(r"<!-- augmentation:\s*(\w+)\s*-->")
_SEEDS = {"bees": 2, "ants": 3}
_NUM_VIEWS = 7
_NUM_COLUMNS = 4
_DPI = 90

_SOURCE = str(Path(__file__).parents[2] / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
mpl.use("Agg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures to the files of the site."""
    for name, content in _pictures().items():
        files.append(File.generated(config, f"{_FOLDER}/{name}.png", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by the words."""
    return _MARK.sub(lambda match: f"> {_describe(match[1])}", markdown)


def _describe(name: str) -> str:
    from transferkit.images import (
        describe_augmentation,
        list_augmentations,
        make_batch_augmentation,
    )

    if name in list_augmentations():
        return describe_augmentation(name)
    return make_batch_augmentation(name, num_classes=2).describe()


@cache
def _pictures() -> dict[str, bytes]:
    """Return each picture by its name, as PNG."""
    from transferkit.images import list_augmentations, list_batch_augmentations

    pictures = {name: _draw_views(name) for name in list_augmentations() if name != "none"}
    mixes = [name for name in list_batch_augmentations() if "or" not in name]
    return pictures | {name: _draw_mixes(name) for name in mixes}


def _draw_views(name: str) -> bytes:
    """Draw one picture and views of it."""
    from transferkit.data.drawn import draw_picture
    from transferkit.images import Preprocess
    from transferkit.plots import show_augmentations

    axes = show_augmentations(
        draw_picture("bees", seed=_SEEDS["bees"]),
        name,
        preprocess=Preprocess(),
        num_images=_NUM_VIEWS,
        num_columns=_NUM_COLUMNS,
    )
    return _to_png(axes[0].figure)


def _draw_mixes(name: str) -> bytes:
    """Draw two pictures and mixes of them, with the shares."""
    import torch

    from transferkit.data.drawn import draw_picture
    from transferkit.images import Preprocess, make_batch_augmentation
    from transferkit.plots import image_grid

    preprocess = Preprocess()
    view = preprocess.eval()
    decoded = [preprocess.decode(draw_picture(kind, seed=seed)) for kind, seed in _SEEDS.items()]
    images, targets = torch.stack([view(pixels) for pixels in decoded]), torch.arange(2)
    mix = make_batch_augmentation(name, num_classes=2)
    cells, titles = list(images), list(_SEEDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(_NUM_VIEWS - 1):
            mixed, soft_targets = mix(images, targets)
            cells.append(mixed[0])
            titles.append(
                f"{soft_targets[0, 0]:.0%} {titles[0]}, {soft_targets[0, 1]:.0%} {titles[1]}"
            )
    axes = image_grid(cells, titles=titles, num_columns=_NUM_COLUMNS, preprocess=preprocess)
    return _to_png(axes[0].figure)


def _to_png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=_DPI)
    plt.close(figure)
    return output.getvalue()
