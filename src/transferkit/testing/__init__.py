"""Checks for plug-ins, and a maker of small picture folders for tests.

`check_backbone`, `check_scheduler` and `check_callback` hold a backbone, a scheduler or a callback
of yours to what the library relies on, and raise an error that names the first broken promise.
"""

from transferkit.testing.backbones import check_backbone
from transferkit.testing.callbacks import check_callback
from transferkit.testing.folders import make_image_folder
from transferkit.testing.schedulers import check_scheduler

__all__ = ["check_backbone", "check_callback", "check_scheduler", "make_image_folder"]
