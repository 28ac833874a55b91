"""Mutants of pictures: pixels or an `ImageError`, soon, in little memory, and no crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_decode.py")
MAX_MIB = 1500
"""What a process may take: PyTorch itself takes a third of it."""


def fuzz(first: int, count: int) -> None:
    command = [sys.executable, str(SCRIPT), "--first", str(first), "--count", str(count)]
    child = subprocess.run(command, capture_output=True, timeout=600)
    assert child.returncode == 0, child.stderr.decode()[-3000:]
    found = json.loads(child.stdout)
    assert found["peak_mib"] < MAX_MIB, found
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == 2 * count
    assert any("decoded" in outcome for outcome in outcomes)
    assert any("refused" in outcome for outcome in outcomes)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux counts it")
def test_some_mutants() -> None:
    fuzz(0, 600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux counts it")
@pytest.mark.parametrize("first", range(0, 10_000, 500))
def test_ten_thousand_mutants(first: int) -> None:
    fuzz(first, 500)
