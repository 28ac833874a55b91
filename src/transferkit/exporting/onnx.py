"""Exporting to ONNX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transferkit._files import atomic_path
from transferkit.exporting.subject import Outputs, check_target, conversion_to, make_subject
from transferkit.models import Classifier
from transferkit.models.onnx_engine import convert_to_onnx, import_onnx, open_onnx


def export_onnx(
    source: Classifier | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    outputs: Outputs = "logits",
) -> Path:
    """Export a model to one ONNX file that takes any number of images at once.

    Before the file gets its name it is read again, and ONNX Runtime has to give what PyTorch
    gives for pictures of noise, up to 0.0001 relative to the largest value. The input `images`
    is float32 `(batch, C, H, W)`, preprocessed; the metadata says how, in words and as JSON, and
    has the class names. The operators are those of ONNX's opset 18, which ONNX Runtime knows
    from version 1.14 on.

    Args:
        source: A classifier, which is left as it is, or the path of an artifact.
        path: Where to write, ending in `.onnx`; an existing file is replaced only by a good one.
        class_names: The names of the classes of a classifier; an artifact has its own.
        outputs: What it gives, float32 `(batch, K)`: "logits", or their softmax as
            "probabilities". It is also the output's name.

    Returns:
        The path.

    Raises:
        ConfigError: An argument cannot work.
        ArtifactError: The source is no artifact that can be trusted.
        ExportError: The model cannot be converted, or gives other values after it.
        OutputError: The file cannot be written.
        MissingDependencyError: ONNX or ONNX Runtime is not installed.

    Example:
        >>> import tempfile
        >>> from transferkit.models import build_model
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> file = Path(tempfile.mkdtemp()) / "model.onnx"
        >>> export_onnx(model, file, class_names=["ants", "bees"]).name
        'model.onnx'
    """
    onnx, _ = import_onnx("`export_onnx`")
    target = check_target(path, ".onnx")
    subject = make_subject(source, class_names, outputs)
    with conversion_to("ONNX"):
        converted = convert_to_onnx(subject.network, subject.shape, output_name=outputs)
        model = onnx.load_model_from_string(converted)
        onnx.helper.set_model_props(model, subject.metadata)
    with atomic_path(target) as temporary:
        temporary.write_bytes(model.SerializeToString())
        with conversion_to("ONNX"):
            run = open_onnx(str(temporary))
            subject.check(run, "ONNX Runtime")
    return target
