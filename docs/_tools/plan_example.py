"""MkDocs hook: plan a fit, and show what the plan says.

`<!-- plan: text -->` on a page becomes the plan, `images/plan/gradual.png` is its picture. Both are
made when the site is built, so that the page cannot differ from the code. A plan that measures
nothing reads no picture, so that the names of the photographs of ants and bees are enough.
"""

from __future__ import annotations

import io
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_MARK = "<!-- plan: text -->"
_PICTURE = "images/plan/gradual.png"
_NUM_TRAIN = {"ants": 123, "bees": 121}
_NUM_VAL = {"ants": 70, "bees": 83}
_SOURCE = str(Path(__file__).parents[2] / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
mpl.use("Agg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the picture to the files of the site."""
    files.append(File.generated(config, _PICTURE, content=_example()[1]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by the plan."""
    if _MARK not in markdown:
        return markdown
    return markdown.replace(_MARK, f"```text\n{_example()[0]}\n```")


@cache
def _example() -> tuple[str, bytes]:
    """Return the plan as text and as picture."""
    import matplotlib.pyplot as plt

    import transferkit as tk

    data = tk.ImageSplits(
        train=_name_pictures("train", _NUM_TRAIN), val=_name_pictures("val", _NUM_VAL)
    )
    model = tk.build_model("resnet18", data.num_classes, weights=None)
    trainer = tk.Trainer(model, data, recipe="gradual", device="cpu", verbose=False)
    plan = trainer.plan(measure=False, verbose=False)
    figure: Any = tk.plot_plan(plan).figure
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return str(plan), file.getvalue()


def _name_pictures(split: str, counts: dict[str, int]) -> Any:
    """Return a data set of pictures that are not there."""
    import transferkit as tk

    pairs = [
        (Path(split, label, f"{number}.jpg"), target)
        for target, (label, count) in enumerate(counts.items())
        for number in range(count)
    ]
    paths, targets = zip(*pairs, strict=True)
    return tk.ImageDataset(paths, targets, class_names=list(counts))
