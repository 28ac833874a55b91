"""What `transferkit features` computes and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transferkit.artifacts import save_artifact
from transferkit.cli import main
from transferkit.models import BackboneSpec, build_model, register_backbone
from transferkit.models.features import Features
from transferkit.models.registry import _BACKBONES

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def _registered(tiny_spec: BackboneSpec) -> object:
    register_backbone("tiny", lambda: tiny_spec)
    yield
    _BACKBONES.remove("tiny")


@pytest.fixture
def compute(tiny_folder: Path) -> Run:
    def run(*words: str) -> int:
        return main(["features", str(tiny_folder / "train"), *words])

    return run


TINY = ("--backbone", "tiny", "--weights", "none")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_are_written(
    suffix: str, compute: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"found{suffix}"
    assert compute(*TINY, "--out", str(out)) == 0
    assert capsys.readouterr().out == f"Saved 16 features of each of 16 pictures in {out}\n"
    features = Features.load(out)
    assert features.values.shape == (16, 16)
    assert features.class_names == ("blue", "red")
    assert features.targets.tolist() == [0] * 8 + [1] * 8


def test_npz_is_for_anybody(compute: Run, tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    assert compute(*TINY, "--out", str(out)) == 0
    with np.load(out, allow_pickle=False) as arrays:
        assert all(not array.dtype.hasobject for array in arrays.values())


def test_the_backbone_of_an_artifact(
    compute: Run, tmp_path: Path, tiny_spec: BackboneSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(tiny_spec, 2, weights=None, seed=7)
    artifact = save_artifact(tmp_path / "m.safetensors", model, class_names=("a", "b"))
    out = tmp_path / "found.npz"
    assert compute("--artifact", str(artifact), "--out", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(out),
        "num_images": 16,
        "num_features": 16,
        "class_names": ["blue", "red"],
        "skipped": [],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name either --backbone or --artifact, which say what computes features."),
        (
            ("--backbone", "tiny", "--artifact", "x"),
            "Name either --backbone or --artifact, which say what computes features.",
        ),
        (
            ("--artifact", "x", "--weights", "none"),
            "--weights belong to --backbone; an artifact has its own.",
        ),
    ],
)
def test_words_that_do_not_fit_are_an_error(
    words: tuple[str, ...],
    message: str,
    compute: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compute(*words, "--out", str(tmp_path / "found.npz")) == 1
    assert capsys.readouterr().err == f"transferkit: error: {message}\n"
