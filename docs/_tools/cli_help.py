"""MkDocs hook: put the command's own help texts where a page asks for them.

A page asks with `<!-- help: train -->`, or `<!-- help: -->` for the command without a
subcommand. So the reference cannot differ from what the command prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

_MARK = re.compile(r"<!-- help:\s*(\w*)\s*-->")
_ENVIRONMENT = {"COLUMNS": "80", "NO_COLOR": "1"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by the help text, as a code block."""
    return _MARK.sub(lambda match: f"```text\n{_help(match[1])}\n```", markdown)


def _help(command: str) -> str:
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    try:
        from transferkit.cli import make_parser
    finally:
        sys.path.pop(0)
    words = [command, "--help"] if command else ["--help"]
    output = io.StringIO()
    with (
        mock.patch.dict(os.environ, _ENVIRONMENT),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        make_parser().parse_args(words)
    return output.getvalue().rstrip()
