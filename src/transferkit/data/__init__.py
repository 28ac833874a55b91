"""Many pictures: folders, class names, splits, and the order in which they are seen.

Class indices come from the sorted class names of the training split and are pinned by name
in every other split. Order and augmentation are pure functions of (seed, epoch, index).
This room may import `images` and what lies below.
"""

from transferkit.data import ants_bees
from transferkit.data.check import check_folder
from transferkit.data.dataset import ImageDataset, ImageSplits, SkippedFile
from transferkit.data.folders import load_folder, load_folders
from transferkit.data.loader import ImageLoader
from transferkit.data.paths import PathArray
from transferkit.data.reading import Batch
from transferkit.data.report import DataReport, Finding
from transferkit.data.sampling import class_weights
from transferkit.data.splits import k_folds, split_dataset
from transferkit.data.tables import load_table
from transferkit.data.wrapping import wrap_dataset

__all__ = [
    "Batch",
    "DataReport",
    "Finding",
    "ImageDataset",
    "ImageLoader",
    "ImageSplits",
    "PathArray",
    "SkippedFile",
    "ants_bees",
    "check_folder",
    "class_weights",
    "k_folds",
    "load_folder",
    "load_folders",
    "load_table",
    "split_dataset",
    "wrap_dataset",
]
