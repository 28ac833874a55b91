"""transferkit: transfer learning for image classification on PyTorch.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transferkit import (
        artifacts,
        data,
        errors,
        evaluation,
        exporting,
        images,
        inference,
        models,
        plots,
        testing,
        training,
    )
    from transferkit.artifacts import load_artifact, make_card, read_info, save_artifact
    from transferkit.data import (
        Batch,
        ImageDataset,
        ImageLoader,
        ImageSplits,
        check_folder,
        class_weights,
        k_folds,
        load_folder,
        load_folders,
        load_table,
        split_dataset,
        wrap_dataset,
    )
    from transferkit.errors import TransferkitError
    from transferkit.exporting import export_onnx, export_openvino, export_program
    from transferkit.images import Preprocess, decode_image
    from transferkit.inference import (
        Prediction,
        Predictor,
        predict_to_file,
        predictions_to_dataframe,
    )
    from transferkit.models import (
        BackboneSpec,
        Classifier,
        FreezePlan,
        HeadSpec,
        build_model,
        get_backbone,
        import_model,
        list_backbones,
        register_backbone,
    )
    from transferkit.plots import (
        image_grid,
        imshow,
        plot_history,
        plot_lr_find,
        plot_plan,
        show_augmentations,
        show_batch,
        show_findings,
        show_prediction,
        show_predictions,
    )
    from transferkit.training import (
        EMA,
        SWA,
        Callback,
        Checkpoints,
        CSVLog,
        EarlyStopping,
        FeatureCache,
        History,
        JSONLog,
        Phase,
        Recipe,
        SaveBest,
        TensorBoardLog,
        TimeBudget,
        Trainer,
        list_schedulers,
        register_scheduler,
    )

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SWA",
    "BackboneSpec",
    "Batch",
    "CSVLog",
    "Callback",
    "Checkpoints",
    "Classifier",
    "EarlyStopping",
    "FeatureCache",
    "FreezePlan",
    "HeadSpec",
    "History",
    "ImageDataset",
    "ImageLoader",
    "ImageSplits",
    "JSONLog",
    "Phase",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "SaveBest",
    "TensorBoardLog",
    "TimeBudget",
    "Trainer",
    "TransferkitError",
    "__version__",
    "artifacts",
    "build_model",
    "check_folder",
    "class_weights",
    "data",
    "decode_image",
    "errors",
    "evaluation",
    "export_onnx",
    "export_openvino",
    "export_program",
    "exporting",
    "get_backbone",
    "image_grid",
    "images",
    "import_model",
    "imshow",
    "inference",
    "k_folds",
    "list_backbones",
    "list_schedulers",
    "load_artifact",
    "load_folder",
    "load_folders",
    "load_table",
    "make_card",
    "models",
    "plot_history",
    "plot_lr_find",
    "plot_plan",
    "plots",
    "predict_to_file",
    "predictions_to_dataframe",
    "read_info",
    "register_backbone",
    "register_scheduler",
    "save_artifact",
    "show_augmentations",
    "show_batch",
    "show_findings",
    "show_prediction",
    "show_predictions",
    "split_dataset",
    "testing",
    "training",
    "wrap_dataset",
]

_ROOMS = (
    "artifacts",
    "data",
    "errors",
    "evaluation",
    "exporting",
    "images",
    "inference",
    "models",
    "plots",
    "testing",
    "training",
)
_HOMES = {
    "artifacts": ("load_artifact", "make_card", "read_info", "save_artifact"),
    "data": (
        "Batch",
        "ImageDataset",
        "ImageLoader",
        "ImageSplits",
        "check_folder",
        "class_weights",
        "k_folds",
        "load_folder",
        "load_folders",
        "load_table",
        "split_dataset",
        "wrap_dataset",
    ),
    "errors": ("TransferkitError",),
    "exporting": ("export_onnx", "export_openvino", "export_program"),
    "images": ("Preprocess", "decode_image"),
    "inference": ("Prediction", "Predictor", "predict_to_file", "predictions_to_dataframe"),
    "models": (
        "BackboneSpec",
        "Classifier",
        "FreezePlan",
        "HeadSpec",
        "build_model",
        "get_backbone",
        "import_model",
        "list_backbones",
        "register_backbone",
    ),
    "plots": (
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
    ),
    "training": (
        "EMA",
        "SWA",
        "CSVLog",
        "Callback",
        "Checkpoints",
        "EarlyStopping",
        "FeatureCache",
        "History",
        "JSONLog",
        "Phase",
        "Recipe",
        "SaveBest",
        "TensorBoardLog",
        "TimeBudget",
        "Trainer",
        "list_schedulers",
        "register_scheduler",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"transferkit.{name}")
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"transferkit.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module `transferkit` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
