"""Model cards: what an artifact says of itself as Markdown, and what only its author can say."""

from __future__ import annotations

import os

from transferkit.artifacts.fit_summary import FitSummary
from transferkit.artifacts.info import ArtifactInfo, describe_head, read_info
from transferkit.artifacts.texts import escape_markdown, quote_yaml

_MAX_NAMES = 200
_TO_WRITE = "**To be written by the author:**"


def make_card(path: str | os.PathLike[str]) -> str:
    """Make a model card in Markdown, with front matter in YAML as model hubs read it.

    All that the file says is in it. What no file can say, such as what the model is meant for, is
    marked "To be written by the author". The file is read whole and compared with its digest;
    texts in it, such as the names of classes, are escaped.

    Args:
        path: The artifact.

    Returns:
        The card.

    Raises:
        ArtifactError: The file is no artifact, is damaged or too new.

    Example:
        >>> import tempfile
        >>> from transferkit.artifacts import save_artifact
        >>> from transferkit.models import build_model
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> path = save_artifact(tempfile.mkdtemp() + "/m.safetensors", model,
        ...                      class_names=["ants", "bees"])
        >>> make_card(path).splitlines()[:3]
        ['---', 'library_name: transferkit', 'pipeline_tag: image-classification']

    References:
        Mitchell et al., Model Cards for Model Reporting, 2019,
        https://arxiv.org/abs/1810.03993; the sections are those of
        https://huggingface.co/docs/hub/model-card-annotated
    """
    info = read_info(path, verify=True)
    sections = (
        _front_matter(info),
        _details(info),
        _uses(),
        _limitations(info),
        _how_to_start(info),
        _training(info),
        _evaluation(info.fit),
        _specifications(info),
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(info: ArtifactInfo) -> str:
    lines = [
        "---",
        "library_name: transferkit",
        "pipeline_tag: image-classification",
        "license: unknown",
        "tags:",
        "- image-classification",
        "- transfer-learning",
        f"- {quote_yaml(info.backbone)}",
    ]
    if info.fit is not None:
        lines += ["metrics:", "- accuracy"]
    return "\n".join([*lines, "---"])


def _details(info: ArtifactInfo) -> str:
    terms = (
        f"Training started from weights whose licence is given as: "
        f"{escape_markdown(info.weights_license)}."
        if info.weights_license
        else "The licence of the weights that training started from, if there were any, is not "
        "known."
    )
    return f"""# {escape_markdown(info.path.stem)}

{_TO_WRITE} one sentence on what the model is.

## Model details

A classifier of images into {len(info.class_names):,} classes: the backbone
`{_code(info.backbone)}` and a head ({describe_head(info.head)}), with {info.num_values:,} numbers.

- **Developed by:** {_TO_WRITE} who made it, and whom to ask.
- **Licence:** {_TO_WRITE} the licence of this model, for `license` in the front matter, too.
  {terms}

{_list_classes(info.class_names)}"""


def _list_classes(names: tuple[str, ...]) -> str:
    rows = [
        f"| {index} | {escape_markdown(name)} |" for index, name in enumerate(names[:_MAX_NAMES])
    ]
    table = "\n".join(["| Index | Class |", "|---|---|", *rows])
    rest = len(names) - _MAX_NAMES
    return table + (f"\n\nand {rest:,} more, which the artifact names." if rest > 0 else "")


def _uses() -> str:
    return f"""## Uses

{_TO_WRITE} what the model is meant for, who is to use it, and what it must not be used for."""


def _limitations(info: ArtifactInfo) -> str:
    lines = [
        "- Every picture is given one of the classes, also one that shows none of them.",
        "- The probabilities were not compared with how often the model is right.",
        "- How well it does on each class, on groups of people or things within them, and on "
        "pictures from other sources than those of training, is not known.",
        "- The picture's shape is not kept: it is resized to a square."
        if info.preprocess.resize_mode == "squash"
        else "- What lies outside the centre crop of a picture is not seen.",
    ]
    return "\n".join(["## Bias, risks and limitations", "", *lines, "", _more_limitations()])


def _more_limitations() -> str:
    return f"{_TO_WRITE} what else is known to go wrong, and whom it would harm."


def _how_to_start(info: ArtifactInfo) -> str:
    return f"""## How to get started

```python
import transferkit as tk

predictor = tk.Predictor.load("model.safetensors")  # SHA-256 {info.file_sha256}
print(predictor.predict("picture.jpg").label)
```"""


def _training(info: ArtifactInfo) -> str:
    fit = info.fit
    facts = ["The artifact has no history of its training."]
    if fit is not None:
        known = {
            "Training pictures": None if fit.num_train is None else f"{fit.num_train:,}",
            "Validation pictures": None if fit.num_val is None else f"{fit.num_val:,}",
            "Epochs": f"{fit.num_epochs:,}, of which number {fit.best_epoch:,} was the best",
            "Recipe": None if fit.recipe is None else escape_markdown(fit.recipe),
            "Seed": None if fit.seed is None else str(fit.seed),
            "Duration": None if fit.seconds is None else f"{fit.seconds:,.0f} seconds",
            "End": None if fit.status is None else escape_markdown(fit.status),
        }
        facts = [f"- {name}: {value}" for name, value in known.items() if value is not None]
    preprocess = info.preprocess
    return "\n".join(
        [
            "## Training",
            "",
            f"{_TO_WRITE} what the pictures are, where they come from, who labelled them, and by "
            f"what right they were used.",
            "",
            *facts,
            "",
            f"Pictures are read with {preprocess.num_channels} channels and become images so: "
            f"{preprocess.describe()}.",
        ]
    )


def _evaluation(fit: FitSummary | None) -> str:
    if fit is None:
        return "## Evaluation\n\nThe artifact has no measure of how well the model does."
    interval = fit.accuracy_interval
    within = "not known" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
    loss = "not finite" if fit.val_loss is None else f"{fit.val_loss:.4f}"
    return f"""## Evaluation

| Metric on the validation pictures | Value | 95 % interval |
|---|---|---|
| Accuracy | {fit.val_accuracy:.4f} | {within} |
| Loss | {loss} | not known |

The values are those of the best epoch, which was chosen by the same pictures: on others they
are likely to be worse. The interval (Wilson) is for the number of pictures
alone: it knows neither that choice nor what another seed would give.

{_TO_WRITE} results on test pictures that no choice was made by."""


def _specifications(info: ArtifactInfo) -> str:
    versions = ", ".join(
        f"{escape_markdown(name)} {escape_markdown(each)}"
        for name, each in sorted(info.versions.items())
    )
    stages = ", ".join(info.stages) if info.stages else "none"
    return f"""## Technical specifications

- File: {info.num_bytes:,} bytes, transferkit artifact of format version {info.format_version},
  safetensors, which loads without running code
- SHA-256 of the file: `{info.file_sha256}`
- Digest of the content: `{_code(info.digest)}`
- Stages of the self-test: {stages}
- Written by: {versions}"""


def _code(text: str) -> str:
    """Return a text for code in a line, where nothing can be escaped."""
    return "".join(each if each.isprintable() and each != "`" else "\ufffd" for each in text)
