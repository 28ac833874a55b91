"""MkDocs hook: check a folder with everything wrong in it, and show what the check says.

`<!-- check: text -->` on a page becomes the report, `images/check/findings.png` is its picture.
The folder is made when the site is built, so that the page cannot differ from the code.
"""

from __future__ import annotations

import io
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from PIL import Image

_MARK = "<!-- check: text -->"
_PICTURE = "images/check/findings.png"
_SOURCE = str(Path(__file__).parents[2] / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
mpl.use("Agg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the picture to the files of the site."""
    files.append(File.generated(config, _PICTURE, content=_example()[1]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by the report."""
    if _MARK not in markdown:
        return markdown
    return markdown.replace(_MARK, f"```text\n{_example()[0]}\n```")


@cache
def _example() -> tuple[str, bytes]:
    """Return the report as text and as picture."""
    import transferkit as tk

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures")
        make_bad_folder(root)
        report = tk.check_folder(root)
        figure = tk.show_findings(report, num_images=12)[0].figure
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=90)
        text = report.describe().replace(str(root), "pictures")
    return text, file.getvalue()


def make_bad_folder(root: Path) -> None:
    """Draw ants and bees, and spoil them."""
    from transferkit.data.drawn import draw_picture

    counts = {("train", "ants"): 10, ("train", "bees"): 4, ("val", "ants"): 2, ("val", "bees"): 2}
    seed = 0
    for (split, label), count in counts.items():
        for number in range(count):
            seed += 1
            path = root / split / label / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_picture(label, seed=seed).resize((250, 188)).save(path)
    ants, bees = root / "train" / "ants", root / "train" / "bees"
    (ants / "0.jpg").write_bytes((ants / "0.jpg").read_bytes()[:3000])
    (ants / "1.jpg").write_text("<html>not found</html>")
    (root / "val" / "ants" / "again.jpg").write_bytes((ants / "2.jpg").read_bytes())
    (bees / "ant.jpg").write_bytes((ants / "3.jpg").read_bytes())
    with Image.open(ants / "4.jpg") as image:
        image.resize((120, 90)).save(root / "val" / "ants" / "small.png")
    with Image.open(bees / "0.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(bees / "phone.jpg", exif=exif, quality=95)
        image.convert("RGBA").save(bees / "5.jpg", format="PNG")
    (bees / "notes.txt").write_text("five bees")
    (root / "val" / "wasps").mkdir()
