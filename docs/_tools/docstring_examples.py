"""Griffe extension: read two sections of our docstrings as what they are.

The parser of Google style knows `Examples:` alone; an `Example:` would become a note whose
`>>>` lines are shown as quotations. And it does not know that the fields of a named tuple
are its arguments.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)
_ARGS = re.compile(r"^Args:$", flags=re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Rename the sections before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename them in the docstring of one object."""
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub("Examples:", obj.docstring.value)
        if isinstance(obj, griffe.Class) and any(str(base) == "NamedTuple" for base in obj.bases):
            text = _ARGS.sub("Attributes:", text)
        obj.docstring.value = text
