"""MkDocs hook: show what a sweep of learning rates found.

`<!-- lr_find: text -->` on a page becomes the text of the result, `images/lr_find/probe.png` is its
picture. The losses are in `lr_find.json` beside this file, since the photographs are not here when
the site is built. What made them:

    transferkit train hymenoptera_data --backbone efficientnet_lite0 --lr-find --json
"""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_MARK = "<!-- lr_find: text -->"
_PICTURE = "images/lr_find/probe.png"
_LOSSES = Path(__file__).with_name("lr_find.json")
_SOURCE = str(Path(__file__).parents[2] / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
mpl.use("Agg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the picture to the files of the site."""
    files.append(File.generated(config, _PICTURE, content=_example()[1]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by the text."""
    if _MARK not in markdown:
        return markdown
    return markdown.replace(_MARK, f"```text\n{_example()[0]}\n```")


@cache
def _example() -> tuple[str, bytes]:
    """Return the result as text and as picture."""
    import matplotlib.pyplot as plt

    import transferkit as tk
    from transferkit.training.lr_find import make_lr_find

    data = json.loads(_LOSSES.read_text(encoding="utf-8"))
    # Found anew, so that the page cannot differ from the code.
    found = make_lr_find(data["phase"], data["lrs"], data["losses"], end=data["end"])
    figure: Any = tk.plot_lr_find(found).figure
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return str(found), file.getvalue()
