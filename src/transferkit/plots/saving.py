"""Writing a drawing to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from transferkit._files import atomic_path


def save_and_close(ax: Axes, path: Path) -> None:
    """Write the figure of an Axes to a file, all or nothing, and close it.

    Args:
        ax: The Axes.
        path: The file; its ending says the format.

    Raises:
        OutputError: The file cannot be written.
    """
    figure: Any = ax.figure
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)
