"""The self-test: what a model gave for tiny inputs when it was saved, stage by stage.

The bytes of a file may be right and its results wrong, since other libraries decode, resize or
compute otherwise. Each stage starts from stored data, so that a drift of one is not taken for a
drift of the next.
"""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from transferkit.errors import ArtifactError, ArtifactWarning, ConfigError
from transferkit.images import Preprocess
from transferkit.models import Classifier
from transferkit.models.modes import evaluating

SELF_TEST_TOLERANCE = 1e-3
"""Largest difference of a self-test's logits, absolute and relative to the largest logit."""

LEVEL_TOLERANCE = 2.0
"""Largest difference of decoded and of preprocessed pixels, in levels of 256."""

FATAL_FACTOR = 100
"""Logits that differ by more than so many tolerances are an error, not a drift."""

_SEED = 0
_SIZE = (48, 40)
_COUNT = 2
_GRID = 32
_JPEG_QUALITY = 90
_PREFIX = "self_test."
_IMAGES, _LOGITS = "self_test.images", "self_test.logits"
_PREPROCESSED, _MODEL_LOGITS = "self_test.preprocessed", "self_test.model_logits"
_ENCODED = ("jpeg", "png")


class _Drift(NamedTuple):
    """How far one stage is from what it was.

    Args:
        stage: "decode", "preprocess", "model", or "preprocess and model".
        difference: The largest difference.
        limit: The largest that is no drift.
        words: What is compared, for the message.
        is_fatal: Whether the results are of no use.
    """

    stage: str
    difference: float
    limit: float
    words: str
    is_fatal: bool

    @property
    def is_beyond(self) -> bool:
        return not (math.isfinite(self.difference) and self.difference <= self.limit)


def make_self_test(model: Classifier) -> dict[str, Tensor]:
    """Make the tensors of a self-test.

    Args:
        model: The model; its mode and weights are left as they are.

    Returns:
        Names that begin with `self_test.` to tensors on the CPU.

    Raises:
        ConfigError: The model's logits are not finite.
    """
    preprocess = model.preprocess
    images = _make_images(preprocess.num_channels)
    batch = _preprocess(preprocess, images)
    logits = _run(model, batch)
    model_logits = _run(model, _stretch(preprocess, images))
    if not bool(torch.isfinite(logits).all() and torch.isfinite(model_logits).all()):
        raise ConfigError(
            "The model's logits are not finite (NaN or infinite): its weights are broken, and "
            "an artifact of it would be of no use. Train again, perhaps with a smaller `lr`."
        )
    tensors = {
        _IMAGES: images,
        _PREPROCESSED: _sample(batch),
        _MODEL_LOGITS: model_logits,
        _LOGITS: logits,
    }
    if preprocess.num_channels in (1, 3):  # Other pictures come as arrays, with nothing to decode.
        for kind, image in zip(_ENCODED, _make_images(3), strict=True):
            encoded = _encode(image, kind)
            tensors[f"{_PREFIX}{kind}"] = encoded
            tensors[f"{_PREFIX}{kind}_pixels"] = _decode(preprocess, encoded, image[0].numel())
    return tensors


def run_self_test(
    path: str | os.PathLike[str],
    model: Classifier,
    tensors: Mapping[str, Tensor],
    *,
    strict: bool,
) -> None:
    """Compare what the stages give now with what they gave.

    Args:
        path: The artifact's file, for the messages.
        model: The model that was built from it.
        tensors: All tensors of the file.
        strict: Whether a drift is an error.

    Raises:
        ArtifactError: The file has no self-test, it cannot be run, or the results are of no use;
            with `strict` also where a stage has drifted.
    """
    check_self_test(path, model, tensors)
    try:
        drifts = [each for each in _measure(model, tensors) if each.is_beyond]
    except (MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"The self-test of the artifact `{path}` cannot be run "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})."
        ) from error
    if not drifts:
        return
    stages = "; ".join(
        f"{each.stage}: {each.words} differ by {each.difference:.3g}, allowed are {each.limit:.3g}"
        for each in drifts
    )
    remedy = (
        "The installed libraries compute something else; compare their versions, or pass "
        "`self_test=False` to load it all the same."
    )
    message = (
        f"The artifact `{path}` does not give what it gave when it was saved ({stages}). {remedy}"
    )
    if strict or any(each.is_fatal for each in drifts):
        raise ArtifactError(message)
    warnings.warn(message, ArtifactWarning, stacklevel=3)


def name_stages(names: Collection[str]) -> tuple[str, ...]:
    """Return the stages that the self-test of a file has.

    Args:
        names: The names of all its tensors.

    Returns:
        The stages in their order, none where there is no self-test.

    Example:
        >>> name_stages({"self_test.images", "self_test.logits"})
        ('preprocess and model',)
    """
    if _IMAGES not in names or _LOGITS not in names:
        return ()
    if _PREPROCESSED not in names:
        return ("preprocess and model",)
    decodes = any(f"{_PREFIX}{kind}" in names for kind in _ENCODED)
    return (*(("decode",) if decodes else ()), "preprocess", "model")


def check_self_test(
    path: str | os.PathLike[str], model: Classifier, tensors: Mapping[str, Tensor]
) -> None:
    """Check that the tensors of a self-test have the sizes that they should.

    Args:
        path: The artifact's file, for the messages.
        model: The model that was built from it.
        tensors: All tensors of the file.

    Raises:
        ArtifactError: They have others, or there is no self-test.
    """
    if _IMAGES not in tensors or _LOGITS not in tensors:
        raise ArtifactError(f"The artifact `{path}` has no self-test. Save it anew.")
    channels, side = model.preprocess.num_channels, min(_GRID, model.preprocess.crop_size)
    logits = (torch.float32, (_COUNT, model.num_classes))
    expected = {_IMAGES: (torch.uint8, (_COUNT, channels, *_SIZE)), _LOGITS: logits}
    if _PREPROCESSED in tensors or _MODEL_LOGITS in tensors:
        expected[_PREPROCESSED] = (torch.float32, (_COUNT, channels, side, side))
        expected[_MODEL_LOGITS] = logits
    for kind in _ENCODED:
        if f"{_PREFIX}{kind}" in tensors:
            expected[f"{_PREFIX}{kind}_pixels"] = (torch.uint8, (channels, *_SIZE))
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            words = "is missing" if found is None else f"is {found.dtype} {tuple(found.shape)}"
            raise ArtifactError(
                f"The artifact `{path}` is inconsistent: `{name}` of its self-test {words}, "
                f"expected {dtype} {shape}."
            )


def _measure(model: Classifier, tensors: Mapping[str, Tensor]) -> list[_Drift]:
    preprocess, images = model.preprocess, tensors[_IMAGES]
    batch = _preprocess(preprocess, images)
    # Alone in files from before there were stages, else what a drift before it makes of logits.
    whole = _compare_logits("preprocess and model", _run(model, batch), tensors[_LOGITS])
    if _PREPROCESSED not in tensors:
        return [whole]
    std = torch.tensor(preprocess.std).view(-1, 1, 1)
    difference = ((_sample(batch) - tensors[_PREPROCESSED]) * std * 255).abs().max().item()
    words = "the levels of resized pixels"
    kernels = _run(model, _stretch(preprocess, images))
    return [
        *_measure_decoding(preprocess, tensors),
        _Drift("preprocess", difference, LEVEL_TOLERANCE, words, is_fatal=False),
        _compare_logits("model", kernels, tensors[_MODEL_LOGITS]),
        whole,
    ]


def _measure_decoding(preprocess: Preprocess, tensors: Mapping[str, Tensor]) -> list[_Drift]:
    drifts = []
    for kind in _ENCODED:
        if f"{_PREFIX}{kind}" not in tensors:
            continue
        expected = tensors[f"{_PREFIX}{kind}_pixels"]
        found = _decode(preprocess, tensors[f"{_PREFIX}{kind}"], expected[0].numel())
        if found.shape != expected.shape:
            raise ValueError(f"the {kind.upper()} picture has the shape {tuple(found.shape)}")
        difference = (found.int() - expected.int()).abs().max().item()
        words = f"the levels of pixels from a {kind.upper()} file"
        drifts.append(_Drift("decode", difference, LEVEL_TOLERANCE, words, is_fatal=False))
    return drifts


def _compare_logits(stage: str, found: Tensor, expected: Tensor) -> _Drift:
    if found.shape != expected.shape:
        raise ValueError(f"the model gives logits of the shape {tuple(found.shape)}")
    difference = (found - expected).abs().max().item()
    limit = SELF_TEST_TOLERANCE * max(1.0, expected.abs().max().item())
    is_fatal = not (math.isfinite(difference) and difference <= FATAL_FACTOR * limit)
    return _Drift(stage, difference, limit, "the logits", is_fatal)


def _make_images(num_channels: int) -> Tensor:
    """Return two tiny pictures of smooth noise, uint8 `(2, num_channels, 48, 40)`."""
    generator = torch.Generator().manual_seed(_SEED)
    coarse = torch.rand((_COUNT, num_channels, 6, 5), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=_SIZE, mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def _encode(image: Tensor, kind: str) -> Tensor:
    """Return the bytes of a picture file as uint8 `(length,)`."""
    file = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    options = {"quality": _JPEG_QUALITY} if kind == "jpeg" else {}
    picture.save(file, format=kind, **options)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _decode(preprocess: Preprocess, encoded: Tensor, max_pixels: int) -> Tensor:
    """Return the pixels of a picture file; of none that is larger than it should be."""
    limited = Preprocess.from_dict({**preprocess.to_dict(), "max_pixels": max_pixels})
    return limited.decode(encoded.contiguous().numpy().tobytes()).contiguous()


def _preprocess(preprocess: Preprocess, images: Tensor) -> Tensor:
    transform = preprocess.eval()
    return torch.stack([transform(image) for image in images])


def _stretch(preprocess: Preprocess, images: Tensor) -> Tensor:
    """Make inputs of the model without resizing, which is another stage.

    Rows and columns are repeated: that is the same to the bit everywhere.
    """
    rows, columns = (
        torch.arange(preprocess.crop_size) * size // preprocess.crop_size for size in _SIZE
    )
    return preprocess.normalize(images[:, :, rows][..., columns])


def _sample(batch: Tensor) -> Tensor:
    """Return pixels from all over the images, at most 32 x 32 of each, corners included."""
    size = batch.shape[-1]
    count = min(_GRID, size)
    places = torch.arange(count) * (size - 1) // max(1, count - 1)
    return batch[:, :, places][..., places].contiguous()


def _run(model: Classifier, batch: Tensor) -> Tensor:
    """Run the model on the CPU, as loading will.

    An accelerator rounds otherwise (TF32 convolutions differ in the third digit), and the
    tolerance is for other versions of the same arithmetic.
    """
    if next(model.parameters()).device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(batch)
    return logits.float()
