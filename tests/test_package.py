"""The package as a whole: its public names, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import transferkit

HEAVY = (
    "torch",
    "torchvision",
    "matplotlib",
    "timm",
    "openvino",
    "onnx",
    "onnxruntime",
    "numpy",
    "PIL",
)


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after running `code`."""
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", transferkit.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(transferkit, name)
    assert name == "__version__" or value.__doc__


def test_dir_lists_the_public_names() -> None:
    assert dir(transferkit) == sorted(transferkit.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module `transferkit` has no attribute `fit`$"):
        _ = transferkit.fit


def test_version_is_the_installed_one() -> None:
    assert transferkit.__version__ == version("transferkit")


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import transferkit").intersection(HEAVY)


def test_help_imports_nothing_heavy() -> None:
    code = "from transferkit.cli import make_parser\nmake_parser().format_help()"
    assert not modules_after(code).intersection(HEAVY)


def test_training_needs_no_plotting_and_no_extras() -> None:
    loaded = modules_after("import transferkit\ntransferkit.Trainer, transferkit.Predictor")
    assert not loaded.intersection({"matplotlib", "timm", "openvino", "onnx", "onnxruntime"})
