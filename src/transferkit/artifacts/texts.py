"""Texts from files, made safe for where they are shown: a terminal, Markdown, YAML."""

from __future__ import annotations

import json

_ESCAPED = frozenset("\\`*_{}[]()#+-.!|")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {
    each: f"&#{ord(each)};" for each in "~:/@$=^"
}
"""What no backslash escapes in every dialect, and some of them make links or formulas of."""


def show(text: str) -> str:
    r"""Return a text with whatever a terminal might obey, or no encoding has, as an escape.

    Example:
        >>> print(show("bee\x1b[2J"))
        bee\x1b[2J
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def escape_markdown(text: str) -> str:
    r"""Return a text that Markdown shows as it is: no markup, no HTML, no link.

    Example:
        >>> print(escape_markdown("a|b <i> x:y"))
        a\|b &lt;i&gt; x&#58;y
    """
    return "".join(
        _ENTITIES.get(each, f"\\{each}" if each in _ESCAPED else each) for each in show(text)
    )


def quote_yaml(text: str) -> str:
    r"""Return a text as a double-quoted scalar of YAML, on one line.

    Example:
        >>> print(quote_yaml('a: "b"\n'))
        "a: \"b\"\\n"
    """
    return json.dumps(show(text), ensure_ascii=False)
