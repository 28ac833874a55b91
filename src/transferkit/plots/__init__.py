"""Pictures of pictures, of predictions, histories and plans; the one room with matplotlib.

Every function takes and returns matplotlib Axes, changes nothing that it is given, never
calls `show()`, and works without a screen. This room may import all others but `cli`.
"""

from transferkit.plots.axes import AxesArray
from transferkit.plots.curves import plot_history, plot_lr_find, plot_plan
from transferkit.plots.pictures import (
    image_grid,
    imshow,
    show_augmentations,
    show_batch,
    show_findings,
    show_prediction,
    show_predictions,
)

__all__ = [
    "AxesArray",
    "image_grid",
    "imshow",
    "plot_history",
    "plot_lr_find",
    "plot_plan",
    "show_augmentations",
    "show_batch",
    "show_findings",
    "show_prediction",
    "show_predictions",
]
