"""What an artifact says of itself, read from its header: no tensor, no network, no registry."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transferkit.artifacts.fit_summary import FitSummary, summarize_fit
from transferkit.artifacts.format import ARTIFACT, read_file, read_metadata
from transferkit.artifacts.schema import check_data, check_image_size, explained, parse_head
from transferkit.artifacts.self_test import name_stages
from transferkit.artifacts.texts import show
from transferkit.images import Preprocess
from transferkit.models import HeadSpec

_MAX_NAMES = 20
_CHUNK = 2**20


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artifact says of itself.

    Args:
        path: The file.
        num_bytes: Its size.
        format_version: The version of its format.
        digest: The SHA-256 over tensors and metadata that is written in it.
        file_sha256: The SHA-256 of the file, where it was verified.
        verified: Whether the content was compared with the digest.
        backbone: The name of the backbone.
        head: The description of the head.
        num_values: The numbers in the model's tensors, buffers such as statistics included.
        num_tensors: The model's tensors.
        class_names: The names of the classes, by index.
        preprocess: How pictures become images for the model.
        weights_license: The licence of the weights that training started from, as far as it is
            known; None where it is not.
        fit: The fit in a few numbers; None where the file has no history.
        stages: The stages of the self-test.
        versions: The versions of the libraries that wrote it.
    """

    path: Path
    num_bytes: int
    format_version: int
    digest: str
    file_sha256: str | None
    verified: bool
    backbone: str
    head: HeadSpec
    num_values: int
    num_tensors: int
    class_names: tuple[str, ...]
    preprocess: Preprocess
    weights_license: str | None
    fit: FitSummary | None
    stages: tuple[str, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON data."""
        data = asdict(self) | {
            "path": str(self.path),
            "head": self.head.to_dict(),
            "preprocess": self.preprocess.to_dict() | {"in_words": self.preprocess.describe()},
            "class_names": list(self.class_names),
            "stages": list(self.stages),
        }
        if self.fit is not None:
            interval = self.fit.accuracy_interval
            data["fit"]["accuracy_interval"] = None if interval is None else list(interval)
        return data

    def describe(self) -> str:
        """Return all of it in words, a line for each subject."""
        names = ", ".join(map(show, self.class_names[:_MAX_NAMES]))
        rest = len(self.class_names) - _MAX_NAMES
        lines = {
            "classes": f"{len(self.class_names)}: {names}"
            + (f" and {rest} more" if rest > 0 else ""),
            "backbone": show(self.backbone),
            "head": describe_head(self.head),
            "pictures": f"{self.preprocess.num_channels} channels, {self.preprocess.describe()}",
            "fit": describe_fit(self.fit),
            "size": f"{self.num_bytes:,} bytes, {self.num_values:,} numbers in "
            f"{self.num_tensors:,} tensors of the model",
            "format": f"version {self.format_version}, self-test of {', '.join(self.stages)}"
            if self.stages
            else f"version {self.format_version}, no self-test",
            "digest": f"{show(self.digest)} "
            + ("(the content agrees)" if self.verified else "(not verified)"),
            "weights": f"licence of those that training started from: {show(self.weights_license)}"
            if self.weights_license
            else "the licence of those that training started from is not known",
            "written by": ", ".join(
                f"{show(name)} {show(each)}" for name, each in sorted(self.versions.items())
            ),
        }
        if self.file_sha256 is not None:
            lines["SHA-256"] = f"{self.file_sha256} (of the file)"
        return "\n".join(
            [f"{show(str(self.path))}", *(f"  {name:<11} {line}" for name, line in lines.items())]
        )


def read_info(path: str | os.PathLike[str], *, verify: bool = False) -> ArtifactInfo:
    """Read what an artifact says of itself.

    Only the header is read, so that a large file takes no longer than a small one, and neither the
    backbone nor its packages need to be here.

    Args:
        path: The file.
        verify: Read all of the file, and compare its content with its digest.

    Returns:
        What it says.

    Raises:
        ArtifactError: The file is no artifact, is damaged or too new.

    Example:
        >>> import tempfile
        >>> from transferkit.artifacts import save_artifact
        >>> from transferkit.models import build_model
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> path = save_artifact(tempfile.mkdtemp() + "/m.safetensors", model,
        ...                      class_names=["ants", "bees"])
        >>> read_info(path).num_values
        723522
    """
    if verify:
        read_file(path)
    header, data = read_metadata(path)
    with explained(path):
        check_data(data)
        preprocess = Preprocess.from_dict(data["preprocess"])
        check_image_size(preprocess)
        head = parse_head(data)
    model = [each for name, each in header.tensors.items() if name.startswith("model.")]
    return ArtifactInfo(
        path=Path(path),
        num_bytes=header.num_bytes,
        format_version=data["format_version"],
        digest=header.metadata[ARTIFACT.digest_key],
        file_sha256=_hash_file(Path(path)) if verify else None,
        verified=verify,
        backbone=data["backbone"],
        head=head,
        num_values=sum(each.numel for each in model),
        num_tensors=len(model),
        class_names=tuple(data["class_names"]),
        preprocess=preprocess,
        weights_license=data.get("weights_license"),
        fit=summarize_fit(data["history"]),
        stages=name_stages(header.tensors.keys()),
        versions=data["versions"],
    )


def describe_head(head: HeadSpec) -> str:
    """Return the description of a head in words."""
    words = {"linear": "linear", "cosine": "cosine", "mlp": "MLP"}[head.kind]
    if head.hidden:
        words += f", hidden layers of {', '.join(f'{width:,}' for width in head.hidden)}"
    return words + (f", dropout {head.dropout:g}" if head.dropout else "")


def describe_fit(fit: FitSummary | None) -> str:
    """Return the summary of a fit in words."""
    if fit is None:
        return "no history"
    parts = [
        f"best epoch {fit.best_epoch} of {fit.num_epochs}: validation accuracy "
        f"{fit.val_accuracy:.4f}" + _describe_interval(fit)
    ]
    if fit.val_loss is not None:
        parts.append(f"loss {fit.val_loss:.4f}")
    if fit.num_train is not None:
        parts.append(f"{fit.num_train:,} training pictures")
    if fit.recipe is not None:
        parts.append(f"recipe {show(fit.recipe)}")
    if fit.seed is not None:
        parts.append(f"seed {fit.seed}")
    if fit.status is not None and fit.seconds is not None:
        minutes, seconds = divmod(fit.seconds, 60)
        parts.append(f"{show(fit.status)} after {minutes:.0f} min {seconds:.0f} s")
    return ", ".join(parts)


def _describe_interval(fit: FitSummary) -> str:
    if fit.accuracy_interval is None:
        return ""
    low, high = fit.accuracy_interval
    return f" (95 % interval {low:.4f} to {high:.4f}, {fit.num_val:,} pictures)"


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
