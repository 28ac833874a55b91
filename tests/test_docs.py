import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import transferkit as tk

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REFERENCE = ROOT / "docs" / "reference"
ROOMS = sorted(name for name in tk.__all__ if isinstance(getattr(tk, name), ModuleType))

MIN_LITERAL = 15


def blocks(page: Path, opening: str) -> list[str]:
    """Return the contents of the code blocks of a page that begin with a line."""
    fence = rf"^( *)```{re.escape(opening)}\n(.*?)\n\1```$"
    return [text for _, text in re.findall(fence, page.read_text(), re.MULTILINE | re.DOTALL)]


@cache
def texts_of_the_code() -> list[re.Pattern[str]]:
    """Return the texts in the code as patterns, with anything in the place of values."""
    return [
        re.compile("".join(".*" if each is None else re.escape(each) for each in pieces), re.DOTALL)
        for path in (ROOT / "src").rglob("*.py")
        for pieces in _texts(ast.parse(path.read_text()))
        if sum(len(each or "") for each in pieces) >= MIN_LITERAL
    ]


def _texts(tree: ast.AST) -> Iterator[list[str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield [each.value if isinstance(each, ast.Constant) else None for each in node.values]  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_messages_on_the_pages_are_in_the_code(page: Path) -> None:
    patterns = texts_of_the_code()
    for message in blocks(page, " { .text .message }"):
        assert any(pattern.fullmatch(message) for pattern in patterns), message


def test_pages_have_messages() -> None:
    assert sum(len(blocks(page, " { .text .message }")) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_on_the_pages_is_python(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(re.sub("^    ", "", code, flags=re.MULTILINE) if code[0] == " " else code)


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name_of_a_room(room: str) -> None:
    module = importlib.import_module(f"transferkit.{room}")
    names = [name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)]
    page = (REFERENCE / f"{room}.md").read_text()
    assert [name for name in names if f"        - {name}\n" not in page] == []


def test_the_reference_lists_every_public_name_of_the_package() -> None:
    page = (REFERENCE / "index.md").read_text()
    names = [name for name in tk.__all__ if name not in (*ROOMS, "__version__")]
    assert [name for name in names if f"[`{name}`]" not in page] == []
    assert [name for name in ROOMS if f"`tk.{name}`" not in page] == []
