"""Pictures of pictures, of augmentations, findings and predictions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from transferkit._checks import check_callable, check_integer
from transferkit._seeding import check_seed, seeded
from transferkit.data import Batch, DataReport, ImageDataset
from transferkit.errors import ConfigError, DataError, ImageError
from transferkit.images import Augmentation, ImageSource, Preprocess, decode_image
from transferkit.inference import Prediction, Predictor
from transferkit.models import Classifier
from transferkit.plots.axes import AxesArray

CELL_INCHES = 2.4
_MAX_OF_ONE_FINDING = 4


def imshow(
    image: ImageSource,
    *,
    title: str | None = None,
    preprocess: Preprocess | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one picture.

    Args:
        image: Path, bytes, PIL image, array uint8 `(H, W, 3)`, tensor uint8 `(3, H, W)`, or
            a float tensor `(3, H, W)`, or `(1, H, W)` for grey: normalised where
            `preprocess` is given, otherwise in [0, 1]. Floats are clipped to [0, 1].
        title: Text above it.
        preprocess: Undoes its normalisation.
        ax: Where to draw; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        ImageError: It cannot be read as a picture.
        ConfigError: A float tensor has another shape, or `preprocess` is given for pixels.

    Example:
        >>> import torch
        >>> ax = imshow(torch.zeros(3, 4, 6), title="black")
        >>> ax.get_title(), ax.images[0].get_array().shape
        ('black', (4, 6, 3))
    """
    pixels = _to_pixels(image, preprocess)
    if ax is None:
        _, ax = plt.subplots()
    ax.imshow(pixels.permute(1, 2, 0).numpy())
    ax.set_axis_off()
    if title is not None:
        # Class names are the user's own: a dollar sign in one is no formula.
        ax.set_title(title, parse_math=False)
    return ax


def _to_pixels(image: ImageSource, preprocess: Preprocess | None) -> Tensor:
    """Return what matplotlib draws: uint8, or float in [0, 1], `(3, H, W)` on the CPU."""
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ConfigError(
                f"A float picture should be a tensor (3, H, W), or (1, H, W) for grey, found "
                f"{tuple(image.shape)}. Of other channels choose one or three, and put them first."
            )
        image = image.detach()
        image = image.float().clamp(0, 1) if preprocess is None else preprocess.denormalize(image)
        return image.expand(3, -1, -1).cpu()
    if preprocess is not None:
        raise ConfigError(
            "`preprocess` undoes the normalisation of a float tensor; this picture is not "
            "normalised. Leave it out."
        )
    return decode_image(image).cpu()


def image_grid(
    images: Sequence[ImageSource] | Tensor,
    *,
    titles: Sequence[str] | None = None,
    num_columns: int = 4,
    preprocess: Preprocess | None = None,
) -> AxesArray:
    """Draw pictures in a grid, in reading order.

    Args:
        images: What `imshow` takes, or one tensor `(N, 3, H, W)`.
        titles: A text for each.
        num_columns: Columns of the grid, at least 1.
        preprocess: Undoes the normalisation of float tensors.

    Returns:
        The N Axes, in order.

    Raises:
        ConfigError: There are no pictures, or not as many titles as pictures.
    """
    if not len(images):
        raise ConfigError("A grid needs at least one picture, found none.")
    if titles is not None and len(titles) != len(images):
        raise ConfigError(f"Found {len(images)} pictures and {len(titles)} titles.")
    if num_columns < 1:
        raise ConfigError(f"`num_columns` should be at least 1, found {num_columns}.")
    cells = _make_grid(len(images), num_columns)
    for place, (ax, image) in enumerate(zip(cells, images, strict=True)):
        title = titles[place] if titles is not None else None
        imshow(image, title=title, preprocess=preprocess, ax=ax)
    return cells


def _make_grid(num_cells: int, num_columns: int) -> AxesArray:
    """Return so many Axes of a new figure, in reading order."""
    columns = min(num_columns, num_cells)
    rows = -(-num_cells // columns)
    _, axes = plt.subplots(
        rows,
        columns,
        figsize=(CELL_INCHES * columns, CELL_INCHES * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[num_cells:]:
        ax.remove()
    cells: AxesArray = axes.flatten()[:num_cells]
    return cells


def show_batch(
    batch: Batch,
    *,
    class_names: Sequence[str],
    preprocess: Preprocess,
    num_images: int = 16,
    num_columns: int = 4,
) -> AxesArray:
    """Draw a batch as the network sees it, with the class names above.

    Args:
        batch: Images float32 `(N, 3, H, W)`, normalised, with targets `(N,)`.
        class_names: The names of the classes, by index.
        preprocess: Undoes the normalisation.
        num_images: Draw the first so many at most.
        num_columns: Columns of the grid.

    Returns:
        The Axes, in order.
    """
    titles = [class_names[target] for target in batch.targets[:num_images].tolist()]
    return image_grid(
        batch.images[:num_images], titles=titles, num_columns=num_columns, preprocess=preprocess
    )


def show_augmentations(
    image: ImageSource,
    augmentation: str | Augmentation = "tutorial",
    *,
    preprocess: Preprocess,
    num_images: int = 8,
    num_columns: int = 3,
    seed: int = 0,
) -> AxesArray:
    """Draw one picture, and views of it under an augmentation.

    The views are what the network sees of the first picture of a data set in the first
    epochs of a training with this seed.

    Args:
        image: What `Preprocess.decode` takes, of 3 channels or 1.
        augmentation: A preset's name (`transferkit.images.list_augmentations()`), or any
            callable from uint8 `(C, H, W)` to uint8 `(C, crop_size, crop_size)`.
        preprocess: Decodes the picture and says the size of the views.
        num_images: Number of views, at least 1.
        num_columns: Columns of the grid, at least 1.
        seed: Rules the views. The caller's random state is left alone.

    Returns:
        The Axes: the upright picture, then the views.

    Raises:
        UnknownNameError: No preset has this name.
        ConfigError: Another value cannot work.
        ImageError: It cannot be read as a picture.

    Example:
        >>> import torch
        >>> image = torch.zeros(3, 30, 40, dtype=torch.uint8)
        >>> axes = show_augmentations(image, preprocess=Preprocess(), num_images=2)
        >>> [ax.get_title() for ax in axes]
        ['original', 'epoch 1', 'epoch 2']
    """
    if not isinstance(augmentation, str):
        check_callable("augmentation", augmentation, "a preset's name or a callable")
    num_images = check_integer("num_images", num_images, minimum=1)
    seed = check_seed(seed)
    if preprocess.num_channels not in (1, 3):
        raise ConfigError(
            f"Pictures of 3 channels or 1 can be drawn, found a preprocessing of "
            f"{preprocess.num_channels} channels."
        )
    # The loader's layout in memory, so that the views are the loader's to the bit.
    pixels = preprocess.decode(image).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    view = preprocess.train(augmentation)
    pictures = [pixels.expand(3, -1, -1)]
    epochs = range(1, num_images + 1)  # A training counts them from 1.
    for epoch in epochs:
        with seeded(seed, epoch, 0):
            pictures.append(preprocess.denormalize(view(pixels)))
    titles = ["original", *(f"epoch {epoch}" for epoch in epochs)]
    return image_grid(pictures, titles=titles, num_columns=num_columns)


def show_findings(report: DataReport, *, num_images: int = 12, num_columns: int = 4) -> AxesArray:
    """Draw the files that a check of a folder found fault with, the worst first.

    A file that cannot be read is a grey cell with the reason. Pictures that are there twice
    stand beside each other.

    Args:
        report: What `check_folder` returned.
        num_images: How many files to draw at the most, at least 1.
        num_columns: Columns of the grid, at least 1.

    Returns:
        The Axes, in order, titled with what was found and where.

    Raises:
        DataError: No finding is about a file.
        ConfigError: A number is out of range.
    """
    num_images = check_integer("num_images", num_images, minimum=1)
    num_columns = check_integer("num_columns", num_columns, minimum=1)
    shown = [
        (finding, path)
        for finding in report.findings
        for path in finding.paths[:_MAX_OF_ONE_FINDING]
        if path.is_file()
    ][:num_images]
    if not shown:
        raise DataError("There is nothing to show: no finding is about a file.")
    cells = _make_grid(len(shown), num_columns)
    for ax, (finding, path) in zip(cells, shown, strict=True):
        place = path.relative_to(report.root) if path.is_relative_to(report.root) else path
        try:
            imshow(path, ax=ax)
        except ImageError as error:
            reason = str(error).removeprefix(f"Cannot read the picture `{path}`: ")
            ax.set_axis_off()
            ax.imshow([[[0.85, 0.85, 0.85]]], extent=(0, 1, 0, 1), aspect="auto")
            words = "\n".join(textwrap.wrap(reason, 24))
            ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=7, parse_math=False)
        color = {"error": "firebrick", "warning": "darkorange"}.get(finding.severity, "black")
        title = "\n".join([finding.kind, *textwrap.wrap(str(place), 30)[-2:]])
        ax.set_title(title, fontsize=7, color=color, parse_math=False)
    return cells


def show_predictions(
    model: Classifier | Predictor,
    dataset: ImageDataset,
    *,
    num_images: int = 6,
    num_columns: int = 3,
    seed: int = 0,
) -> AxesArray:
    """Draw pictures of a split with what the model predicts: `predicted: ants`.

    A wrong prediction has a red title that names the true class too. The model's mode is
    afterwards what it was.

    Args:
        model: The classifier, on any device, or a predictor.
        dataset: The pictures, usually `data.val`.
        num_images: How many to draw, at least 1; all where there are fewer.
        num_columns: Columns of the grid.
        seed: Rules which ones are drawn.

    Returns:
        The Axes, in order.

    Raises:
        DataError: The data set is empty.
        ImageError: A picture cannot be read.
    """
    if not len(dataset):
        raise DataError("There are no pictures to show: the data set is empty.")
    if isinstance(model, Classifier):
        device = next(model.parameters()).device
        model = Predictor(model, class_names=dataset.class_names, device=device)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(dataset), size=min(num_images, len(dataset)), replace=False)
    pictures = [dataset.images[index] for index in chosen.tolist()]
    predictions = list(model.predict_many(pictures))
    cells = image_grid(pictures, num_columns=num_columns)
    for ax, index, prediction in zip(cells, chosen, predictions, strict=True):
        truth = dataset.class_names[dataset.targets[index]]
        right = prediction.label == truth
        ax.set_title(
            f"predicted: {prediction.label}" + ("" if right else f"\n(is {truth})"),
            color="black" if right else "firebrick",
            parse_math=False,
        )
    return cells


def show_prediction(image: ImageSource, prediction: Prediction, *, ax: Axes | None = None) -> Axes:
    """Draw one picture with its predicted class and probability above.

    Args:
        image: What `Predictor.predict` was given.
        prediction: What it returned.
        ax: Where to draw; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        ImageError: It cannot be read as a picture.
    """
    title = f"predicted: {prediction.label} ({prediction.probability:.1%})"
    return imshow(image, title=title, ax=ax)
