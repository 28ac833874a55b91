"""Exporting to a program of `torch.export`."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from transferkit._files import atomic_path
from transferkit.exporting.subject import Outputs, check_target, conversion_to, make_subject
from transferkit.models import Classifier
from transferkit.models.conversion import NUM_TRACED

METADATA_FILE = "transferkit.json"
"""The extra file of the program that holds the metadata."""


def export_program(
    source: Classifier | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    outputs: Outputs = "logits",
) -> Path:
    """Export a model to a `.pt2` file, which PyTorch runs without the code of the network.

    Before the file gets its name it is read again, and has to give what the model gives for
    pictures of noise, up to 0.0001 relative to the largest value. Its input is float32
    `(N, C, H, W)`, preprocessed, for any N; the extra file `transferkit.json` says how, in words
    and as JSON, and has the class names.

    Args:
        source: A classifier, which is left as it is, or the path of an artifact.
        path: Where to write, ending in `.pt2`; an existing file is replaced only by a good one.
        class_names: The names of the classes of a classifier; an artifact has its own.
        outputs: What it gives, float32 `(N, K)`: "logits", or their softmax as
            "probabilities".

    Returns:
        The path.

    Raises:
        ConfigError: An argument cannot work.
        ArtifactError: The source is no artifact that can be trusted.
        ExportError: The model cannot be converted, or gives other values after it.
        OutputError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> from transferkit.models import build_model
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> file = Path(tempfile.mkdtemp()) / "model.pt2"
        >>> export_program(model, file, class_names=["ants", "bees"]).name
        'model.pt2'
    """
    target = check_target(path, ".pt2")
    subject = make_subject(source, class_names, outputs)
    example = torch.zeros(NUM_TRACED, *subject.shape)
    written = io.BytesIO()
    with conversion_to("a program of `torch.export`"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About how PyTorch's own code has changed.
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(subject.network, (example,), dynamic_shapes=(batch,))
        metadata = json.dumps(subject.metadata, ensure_ascii=False)
        torch.export.save(program, written, extra_files={METADATA_FILE: metadata})
    with atomic_path(target) as temporary:
        temporary.write_bytes(written.getbuffer())
        with (
            conversion_to("a program of `torch.export`"),
            temporary.open("rb") as file,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # As above.
            subject.check(torch.export.load(file).module(), "a program of `torch.export`")
    return target
