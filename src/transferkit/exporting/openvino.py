"""Exporting to OpenVINO's intermediate representation."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transferkit._files import TEMPORARY_PREFIX, atomic_path
from transferkit.exporting.subject import (
    INPUT_NAME,
    Outputs,
    Subject,
    check_target,
    conversion_to,
    make_subject,
)
from transferkit.models import Classifier
from transferkit.models.openvino_engine import (
    compile_openvino,
    convert_to_openvino,
    import_openvino,
    read_openvino,
)

METADATA_KEY = "transferkit"
"""Where the metadata lies in the `rt_info` of the model."""


def export_openvino(
    source: Classifier | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    outputs: Outputs = "logits",
) -> Path:
    """Export a model to OpenVINO IR, a `.xml` file with a `.bin` file of weights beside it.

    Before the files get their names they are read again, and OpenVINO has to give in float32
    what PyTorch gives for pictures of noise, up to 0.0001 relative to the largest value. The
    input `images` is float32 `(batch, C, H, W)`, preprocessed, for any batch; `transferkit` in
    the `rt_info` says how, in words and as JSON, and has the class names. The weights are
    float32.

    Two files cannot be replaced at one moment. An old `.xml` goes first and the new one comes
    last: where the writing is stopped between, there is no model rather than a mixed one.

    Args:
        source: A classifier, which is left as it is, or the path of an artifact.
        path: Where to write, ending in `.xml`; existing files are replaced only by good ones.
        class_names: The names of the classes of a classifier; an artifact has its own.
        outputs: What it gives, float32 `(batch, K)`: "logits", or their softmax as
            "probabilities". It is also the output's name.

    Returns:
        The path of the `.xml` file.

    Raises:
        ConfigError: An argument cannot work.
        ArtifactError: The source is no artifact that can be trusted.
        ExportError: The model cannot be converted, or gives other values after it.
        OutputError: The files cannot be written.
        MissingDependencyError: OpenVINO is not installed.

    Example:
        >>> import tempfile
        >>> from transferkit.models import build_model
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> file = Path(tempfile.mkdtemp()) / "model.xml"
        >>> written = export_openvino(model, file, class_names=["ants", "bees"])
        >>> sorted(each.name for each in written.parent.iterdir())
        ['model.bin', 'model.xml']
    """
    openvino = import_openvino("`export_openvino`")
    target = check_target(path, ".xml")
    subject = make_subject(source, class_names, outputs)
    with conversion_to("OpenVINO"):
        model = convert_to_openvino(subject.network, subject.shape)
        model.inputs[0].get_tensor().set_names({INPUT_NAME})
        model.outputs[0].get_tensor().set_names({outputs})
        for key, value in subject.metadata.items():
            model.set_rt_info(value, [METADATA_KEY, key])
    weights = target.with_suffix(".bin")
    with atomic_path(target) as new_graph, atomic_path(weights) as new_weights:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=TEMPORARY_PREFIX) as name:
            folder = Path(name)
            with conversion_to("OpenVINO"):
                openvino.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
                _check_files(folder, subject)
            (folder / "model.xml").replace(new_graph)
            (folder / "model.bin").replace(new_weights)
        target.unlink(missing_ok=True)
    return target


def _check_files(folder: Path, subject: Subject) -> None:
    model = read_openvino(folder / "model.xml", folder / "model.bin")
    subject.check(compile_openvino(model), "OpenVINO")
