"""The features of pictures: computed in one pass, without training."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import Self

from transferkit._allocator import buffers_kept
from transferkit._checks import check_integer, check_path, check_type
from transferkit._device import has_streams
from transferkit.data import ImageDataset, ImageLoader, SkippedFile, load_folder
from transferkit.data.folders import find_images
from transferkit.data.loader import DEFAULT_MAX_SKIPPED, OnError, num_cores, resolve_num_workers
from transferkit.data.prefetch import prefetch, to_images
from transferkit.data.scan import is_folder_there, subfolder_names
from transferkit.errors import ConfigError, DataError
from transferkit.images import decode_image
from transferkit.models.classifier import Classifier
from transferkit.models.engines import (
    Engine,
    EngineName,
    Precision,
    choose_batch_size,
    make_engine,
)
from transferkit.models.feature_files import damaged, read_arrays, write_arrays
from transferkit.models.modes import evaluating
from transferkit.models.splitting import Split

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class Features:
    """Hold the features of pictures, with what the pictures are.

    Args:
        values: float32 `(N, D)`, on the CPU.
        targets: int64 `(N,)`, the class indices; -1 where pictures have no labels.
        paths: The path of each picture; for one that is no file its place, such as "item 17".
        class_names: The names of the classes, by index; none where pictures have no labels.
        skipped: The pictures that could not be read, which have no row.

    Example:
        >>> features = Features(torch.ones(1, 2), torch.tensor([0]), ("ant.jpg",), ("ants",))
        >>> features
        Features(1 pictures, 2 features each, 1 classes)
    """

    values: Tensor
    targets: Tensor
    paths: tuple[str, ...]
    class_names: tuple[str, ...]
    skipped: tuple[SkippedFile, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return (
            f"Features({len(self)} pictures, {self.values.shape[1]} features each, "
            f"{len(self.class_names)} classes)"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one file, all or nothing.

        Other programs find the arrays `features` and `targets` in it, and the texts `paths`,
        `class_names`, `skipped_paths` and `skipped_reasons`: as arrays of text in `.npz`, as
        JSON in the metadata `transferkit` of `.safetensors`.

        Args:
            path: Where to write; its suffix says in which format, `.npz` or `.safetensors`.

        Returns:
            The path.

        Raises:
            ConfigError: The suffix is another.
            OutputError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> features = Features(torch.ones(1, 2), torch.tensor([0]), ("ant.jpg",), ("ants",))
            >>> path = features.save(Path(tempfile.mkdtemp(), "ants.npz"))
            >>> Features.load(path).paths
            ('ant.jpg',)
        """
        return write_arrays(
            path,
            {"features": self.values, "targets": self.targets},
            {
                "paths": self.paths,
                "class_names": self.class_names,
                "skipped_paths": [str(each.path) for each in self.skipped],
                "skipped_reasons": [each.reason for each in self.skipped],
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Nothing in the file is executed, whatever it is.

        Args:
            path: The file, `.npz` or `.safetensors`.

        Returns:
            The features.

        Raises:
            ConfigError: The suffix is another.
            DataError: There is no such file, or it holds something else.
        """
        tensors, texts = read_arrays(
            path,
            ("features", "targets"),
            ("paths", "class_names", "skipped_paths", "skipped_reasons"),
        )
        skipped = zip(texts["skipped_paths"], texts["skipped_reasons"], strict=False)
        features = cls(
            values=tensors["features"],
            targets=tensors["targets"],
            paths=texts["paths"],
            class_names=texts["class_names"],
            skipped=tuple(SkippedFile(Path(name), reason) for name, reason in skipped),
        )
        reason = features._find_fault()
        if reason is not None:
            raise damaged(path, reason)
        return features

    def _find_fault(self) -> str | None:
        """Say in words what does not fit together; None where everything does."""
        values, targets, count = self.values, self.targets, len(self.paths)
        if values.dtype != torch.float32 or values.dim() != 2 or len(values) != count:
            return f"its features are {values.dtype} {tuple(values.shape)} for {count} paths"
        if targets.dtype != torch.int64 or targets.shape != (count,):
            return f"its targets are {targets.dtype} {tuple(targets.shape)} for {count} paths"
        if count and not NO_LABEL <= int(targets.min()) <= int(targets.max()) < len(
            self.class_names
        ):
            return f"its targets do not fit {len(self.class_names)} class names"
        return None


def compute_features(
    model: Classifier,
    loader: ImageLoader,
    *,
    engine: EngineName = "pytorch",
    precision: Precision = "float32",
    verbose: bool = False,
) -> Features:
    """Compute the features of a loader's pictures in one pass, each picture once.

    Args:
        model: The model; in eval mode for the pass, afterwards in the mode it was in.
        loader: The loader of the pictures; its workers end with the pass.
        engine: What computes them: "pytorch", or "openvino" or "onnxruntime" where the extra
            `openvino` or `onnx` is installed.
        precision: "float32", or "bfloat16" where the processor has it.
        verbose: Show a progress bar.

    Returns:
        The features, in the data set's order whatever the loader's. A picture that
        `on_error="skip"` leaves out has no row.

    Raises:
        ConfigError: There is no such engine or precision, or not on this device.
        MissingDependencyError: OpenVINO or ONNX Runtime is not installed.
        BackboneError: The backbone gives something of another shape than it should.
        ImageError: A picture cannot be read.
        DataError: None can be read, or more were skipped than the loader allows.

    Example:
        >>> import tempfile
        >>> from transferkit.models import build_model
        >>> from transferkit.testing import make_image_folder
        >>> model = build_model("resnet18", 2, weights=None)
        >>> data = load_folder(make_image_folder(tempfile.mkdtemp(), num_train=1) / "train")
        >>> compute_features(model, ImageLoader(data, model.preprocess.eval()))
        Features(2 pictures, 512 features each, 2 classes)
    """
    return _compute(model, loader, _make_engine(model, engine, precision), verbose=verbose)


def extract_features(
    model: Classifier,
    data: ImageDataset | str | os.PathLike[str],
    *,
    engine: EngineName = "pytorch",
    precision: Precision = "float32",
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = "auto",
    on_error: OnError = "raise",
    max_skipped: float = DEFAULT_MAX_SKIPPED,
    verbose: bool = True,
) -> Features:
    """Compute the features of pictures, preprocessed as for evaluation.

    Args:
        model: The model; in eval mode for the pass, afterwards in the mode it was in.
        data: The pictures; or a folder, whose subfolders are the classes where it has two or
            more, and whose pictures have no labels where it has fewer.
        engine: What computes them: "pytorch", or "openvino" or "onnxruntime" where the extra
            `openvino` or `onnx` is installed.
        precision: "float32", or "bfloat16" where the processor has it.
        batch_size: Pictures in a batch; "auto" takes the size that is fastest on this
            machine where there are many pictures, else 32, 8 in OpenVINO or 16 in
            ONNX Runtime.
        num_workers: Threads or processes that read pictures; 0 reads in the calling thread,
            "auto" takes one where the CPU computes features, and up to 4 beside a GPU.
        on_error: "raise" ends at a picture that cannot be read, "skip" leaves it out.
        max_skipped: The share of pictures, in [0, 1], beyond which skipping is an error.
        verbose: Show a progress bar.

    Returns:
        The features, in the data set's order, for a folder sorted by path within a class.

    Raises:
        ConfigError: A value cannot work.
        MissingDependencyError: OpenVINO or ONNX Runtime is not installed.
        BackboneError: The backbone gives something of another shape than it should.
        DataError: The folder is missing or holds no pictures, or too many were skipped.
        ImageError: A picture cannot be read.

    Example:
        >>> import tempfile
        >>> from transferkit.models import build_model
        >>> from transferkit.testing import make_image_folder
        >>> model = build_model("resnet18", 2, weights=None)
        >>> folder = make_image_folder(tempfile.mkdtemp(), num_train=1) / "train"
        >>> extract_features(model, folder, verbose=False).class_names
        ('blue', 'red')
    """
    _check_batch_size(batch_size)
    dataset, is_labelled = _find_pictures(data)
    if dataset.decode is decode_image:
        dataset = dataset.with_decode(model.preprocess.decode)
    device = next(model.parameters()).device
    workers = resolve_num_workers(num_workers, num_images=len(dataset))
    if num_workers == "auto" and device.type == "cpu":
        # The network has all cores busy, but for the gaps between its layers: one fills them.
        workers = min(1, workers, num_cores() - 1)
    runner = _make_engine(model, engine, precision)
    if batch_size == "auto":
        size = model.preprocess.crop_size
        shape = (model.preprocess.num_channels, size, size)
        with buffers_kept():  # As in the pass itself.
            batch_size = choose_batch_size(runner, shape, num_images=len(dataset), device=device)
    loader = ImageLoader(
        dataset,
        model.preprocess.eval(normalize=device.type == "cpu"),
        batch_size=batch_size,
        num_workers=workers,
        on_error=on_error,
        max_skipped=max_skipped,
        pin_memory=has_streams(device),
    )
    features = _compute(model, loader, runner, verbose=verbose)
    if is_labelled:
        return features
    return replace(features, targets=torch.full_like(features.targets, NO_LABEL), class_names=())


def _check_batch_size(batch_size: object) -> None:
    if batch_size != "auto":
        try:
            check_integer("batch_size", batch_size, minimum=1)
        except ConfigError:
            raise ConfigError(
                f'`batch_size` should be "auto" or an integer of at least 1, found {batch_size!r}.'
            ) from None


def _find_pictures(data: ImageDataset | str | os.PathLike[str]) -> tuple[ImageDataset, bool]:
    """Return the pictures, and whether they have labels."""
    words = "an ImageDataset, or the path of a folder with pictures"
    check_type("data", data, (ImageDataset, str, os.PathLike), words)
    if isinstance(data, ImageDataset):
        if not len(data):
            raise DataError("The data set has no pictures.")
        return data, True
    folder = check_path("data", data)
    if is_folder_there(folder) and len(subfolder_names(folder)) > 1:
        return load_folder(folder), True
    paths = find_images(folder)
    return ImageDataset(paths, [0] * len(paths), class_names=[folder.name]), False


def _make_engine(model: Classifier, engine: EngineName, precision: Precision) -> Engine:
    device = next(model.parameters()).device
    return make_engine(model.backbone, engine=engine, precision=precision, device=device)


def _compute(model: Classifier, loader: ImageLoader, engine: Engine, *, verbose: bool) -> Features:
    dataset, device = loader.dataset, next(model.parameters()).device
    values = torch.empty(len(dataset), model.num_features)
    has_row = torch.zeros(len(dataset), dtype=torch.bool)
    whole = Split(model.backbone, nn.Identity(), len(model.stages))
    bar = tqdm(
        total=len(dataset),
        desc="features",
        unit="image",
        leave=False,
        disable=None if verbose else True,
    )
    try:
        with bar, evaluating(model), buffers_kept():
            loaded = prefetch(loader.numbered_batches(), device)
            for _, batch in to_images(loaded, model.preprocess):
                rows = model.features_from(engine(batch.images), whole)  # Checks their shape.
                values[batch.indices] = rows.cpu()
                has_row[batch.indices] = True
                bar.update(len(rows))
    finally:
        loader.close()
    places = has_row.nonzero().flatten()
    if not len(places):
        raise DataError("No picture can be read.")
    return Features(
        values=values[places],
        targets=torch.from_numpy(dataset.targets)[places],
        paths=tuple(dataset.name_of(place) for place in places.tolist()),
        class_names=dataset.class_names,
        skipped=loader.skipped,
    )
