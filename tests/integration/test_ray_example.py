"""The example with Ray Data, on a Ray of its own on this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transferkit.artifacts import save_artifact
from transferkit.errors import MissingDependencyError
from transferkit.inference import Prediction, Predictor
from transferkit.models import build_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_with_ray.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *map(str, words)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_USAGE_STATS_ENABLED": "0",  # It would tell its makers over the network.
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.slow
def test_ray_gives_what_the_predictor_gives(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason='the example needs pip install "transferkit[ray]"')
    parquet = pytest.importorskip("pyarrow.parquet")
    model = build_model("squeezenet1_1", 2, weights=None)
    artifact = save_artifact(tmp_path / "m.safetensors", model, class_names=("blue", "red"))
    broken = tiny_folder / "val" / "red" / "broken.png"
    broken.write_bytes(b"no picture")
    (tiny_folder / "notes.txt").write_text("no picture either")
    out = tmp_path / "labels"
    words = (artifact, tiny_folder, "--out", out, "--batch-size", "8", "--actors", "2")
    result = run(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"The labels are in {out}"
    rows = {Path(row["path"]): row for row in parquet.read_table(out).to_pylist()}
    predictor = Predictor.load(artifact, device="cpu")
    expected = list(predictor.predict_many(tiny_folder, on_error="record"))
    assert len(expected) == 25
    assert len(rows) == parquet.read_table(out).num_rows == 25
    for each in expected:
        assert each.path is not None
        row = rows[each.path]
        if isinstance(each, Prediction):
            assert (row["label"], row["error"]) == (each.label, None)
            assert row["probability"] == pytest.approx(each.probability, abs=1e-5)
        else:
            assert each.path == broken
            assert row["label"] is None
            assert "it is not a JPEG" in row["error"]
    again = run(*words)
    assert again.returncode != 0
    assert parquet.read_table(out).num_rows == 25


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    spec: Any = importlib.util.spec_from_file_location("ray_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    message = (
        r'^This example needs `ray`, which is not installed: pip install "transferkit\[ray\]"$'
    )
    with pytest.raises(MissingDependencyError, match=message):
        module.main(["m.safetensors", "pictures", "--out", "labels"])
