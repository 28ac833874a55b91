"""`transferkit info` and `transferkit card`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transferkit.artifacts import make_card, read_info, save_artifact
from transferkit.cli import main
from transferkit.models import BackboneSpec, build_model


@pytest.fixture
def artifact(tiny_spec: BackboneSpec, tmp_path: Path) -> Path:
    model = build_model(tiny_spec, 2, weights=None)
    return save_artifact(tmp_path / "model.safetensors", model, class_names=("ants", "bees"))


def test_info(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(artifact)]) == 0
    assert capsys.readouterr().out == read_info(artifact).describe() + "\n"
    assert main(["info", str(artifact), "--verify"]) == 0
    assert capsys.readouterr().out == read_info(artifact, verify=True).describe() + "\n"


def test_info_as_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_info(artifact).to_dict()


def test_card(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(artifact)]) == 0
    assert capsys.readouterr().out == make_card(artifact)
    out = tmp_path / "README.md"
    assert main(["card", str(artifact), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"Saved {out}\n"
    assert out.read_text() == make_card(artifact)


def test_the_card_does_not_replace_its_artifact(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = artifact.read_bytes()
    assert main(["card", str(artifact), "--out", str(artifact)]) == 1
    assert capsys.readouterr().err == (
        f"transferkit: error: --out names the artifact itself, `{artifact}`.\n"
    )
    assert artifact.read_bytes() == content


@pytest.mark.parametrize("command", ["info", "card"])
def test_a_file_that_is_no_artifact(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04and more of it")
    assert main([command, str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"transferkit: error: Cannot read the artifact `{path}`: it is a pickle or PyTorch file, "
        f"which could run code and is never opened (its header would have 2334111869842967376 "
        f"bytes, at most 16777216 are read).\n"
    )


def test_a_card_that_cannot_be_written(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "README.md"
    assert main(["card", str(artifact), "--out", str(out)]) == 1
    assert capsys.readouterr().err == (
        f"transferkit: error: Cannot write `{out}`: the folder `{out.parent}` does not exist. "
        f"Create it first.\n"
    )
