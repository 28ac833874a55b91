from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from transferkit.artifacts import make_card, read_info, save_artifact
from transferkit.artifacts.texts import escape_markdown, quote_yaml, show
from transferkit.errors import ArtifactError
from transferkit.models import BackboneSpec, Classifier, build_model
from transferkit.training import EpochRecord, History

# Both come with MkDocs, which renders the documentation.
yaml = pytest.importorskip("yaml")
markdown = pytest.importorskip("markdown")

Forge = Callable[..., None]

HOSTILE = [
    "<script>alert(1)</script>", "**bold**", "a|b", "[x](https://evil.example)", "`code`",
    "# title", "---", "1. one", "&amp;", "@someone", "\u202egpj.exe", "\ud800", "![](x.png)",
    "https://evil.example", "$x$", "    indented", "{{ template }}", "\\", "'; --", "- list",
    "a\n\n# b", "\x1b[2J",
]  # fmt: skip


@pytest.fixture
def with_history(model: Classifier, tmp_path: Path) -> Path:
    history = History(
        [EpochRecord(1, 0.7, 0.5, 0.6, 0.8, 0.01, 2.0)],
        settings={"name": "probe", "seed": 3, "num_train": 1234, "num_val": 40},
        seconds=75.0,
    )
    return save_artifact(
        tmp_path / "full.safetensors",
        model,
        class_names=("ants", "bees"),
        history=history.to_dict(),
    )


def split(card: str) -> tuple[dict[str, object], str]:
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_card(with_history: Path) -> None:
    front, text = split(make_card(with_history))
    assert front == {
        "library_name": "transferkit",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": ["image-classification", "transfer-learning", "tiny"],
        "metrics": ["accuracy"],
    }
    assert re.findall("^#+ .*$", text, re.MULTILINE) == [
        "# full", "## Model details", "## Uses", "## Bias, risks and limitations",
        "## How to get started", "## Training", "## Evaluation", "## Technical specifications",
    ]  # fmt: skip
    info = read_info(with_history, verify=True)
    for line in (
        "| 0 | ants |",
        "| Accuracy | 0.8000 | 0.6524 to 0.8950 |",
        "| Loss | 0.6000 | not known |",
        "- Training pictures: 1,234",
        "- Validation pictures: 40",
        "- Epochs: 1, of which number 1 was the best",
        "- Recipe: probe",
        "- Seed: 3",
        "- Duration: 75 seconds",
        "- End: completed",
        f"- SHA-256 of the file: `{info.file_sha256}`",
        f"- Digest of the content: `{info.digest}`",
        "- What lies outside the centre crop of a picture is not seen.",
    ):
        assert f"\n{line}\n" in text
    assert text.count("**To be written by the author:**") == 7


def test_card_without_history(saved: Path) -> None:
    front, text = split(make_card(saved))
    assert "metrics" not in front
    assert "The artifact has no history of its training." in text
    assert "The artifact has no measure of how well the model does." in text
    assert "if there were any, is not known." in text


def test_card_of_little_history(saved: Path, forge: Forge) -> None:
    forge(saved, lambda data: data.update(history={"records": [{"epoch": 1, "val_accuracy": 1}]}))
    _, text = split(make_card(saved))
    assert "| Accuracy | 1.0000 | not known |\n| Loss | not finite | not known |" in text
    assert "Recipe" not in text


def test_card_says_the_licence_of_the_weights(saved: Path, forge: Forge) -> None:
    forge(saved, lambda data: data.update(weights_license="Apache-2.0"))
    assert "Training started from weights whose licence is given as: Apache\\-2\\.0." in make_card(
        saved
    )


def test_card_of_squashed_pictures(saved: Path, forge: Forge) -> None:
    forge(saved, lambda data: data["preprocess"].update(resize_mode="squash"))
    assert "- The picture's shape is not kept: it is resized to a square.\n" in make_card(saved)


def test_card_of_many_classes(tiny_spec: BackboneSpec, tmp_path: Path) -> None:
    model = build_model(tiny_spec, 203, weights=None)
    names = [f"c{index}" for index in range(203)]
    path = save_artifact(tmp_path / "m.safetensors", model, class_names=names)
    assert "| 199 | c199 |\n\nand 3 more, which the artifact names.\n" in make_card(path)


def test_hostile_texts_are_shown_as_they_are(saved: Path, forge: Forge) -> None:
    names = list(HOSTILE)
    forge(
        saved,
        lambda data: data.update(
            class_names=names,
            backbone='x"\\: [`</code>',
            weights_license="<b>[x](javascript:0)",
            versions={"<i>": "**"},
        ),
    )
    card = make_card(saved)
    front, text = split(card)
    assert front["tags"] == ["image-classification", "transfer-learning", 'x"\\: [`</code>']
    card.encode()  # Halves of characters are in no encoding.
    page = markdown.Markdown(extensions=["tables"]).convert(text)
    assert not re.search("<(script|a|img|em|i|b)[ >]", page)
    assert page.count("<tr>") == len(names) + 1
    cells = re.findall(r"<tr>\n<td>\d+</td>\n<td>(.*?)</td>\n", page)
    assert [html.unescape(each) for each in cells] == [show(each).strip() for each in names]
    assert not any("//" in each or "@" in each for each in cells)  # Nothing to make a link of.


def test_a_damaged_file_has_no_card(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="its content does not match its digest"):
        make_card(saved)


@pytest.mark.parametrize("text", [*HOSTILE, "a\x00b", "\x85", "\u2028", "🐝", "null", "yes", ""])
def test_texts_in_yaml(text: str) -> None:
    quoted = quote_yaml(text)
    assert "\n" not in quoted
    assert yaml.safe_load(f"a: {quoted}\nb: 1") == {"a": show(text), "b": 1}


def test_texts_on_a_terminal() -> None:
    assert show("Ämeise 蜂 🐝") == "Ämeise 蜂 🐝"
    assert show("\x1b]0;t\x07\r\n\u202e\ud800") == r"\x1b]0;t\x07\r\n\u202e\ud800"
    assert escape_markdown("a_b") == r"a\_b"
