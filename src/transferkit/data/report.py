"""What a check of a folder found: plain data, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_NUM_LISTED = 4


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        kind: What it is, in a word or two: "broken", "leak", "tiny class" and so on.
        severity: "error" where training would stop or be wrong, "warning" where the result
            may be worse or look better than it is, "note" for what is worth knowing.
        message: What it is about, in words.
        paths: The files that it is about.
    """

    kind: str
    severity: Severity
    message: str
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What a check found.

    Args:
        root: The folder.
        counts: The number of candidates in each class of each split, broken ones included.
        num_broken: How many of them cannot be read.
        widths: The smallest, the median and the largest width in pixels; empty without
            pictures.
        heights: Likewise the heights.
        findings: What was found, errors first.
    """

    root: Path
    counts: dict[str, dict[str, int]]
    num_broken: int
    widths: tuple[int, ...]
    heights: tuple[int, ...]
    findings: tuple[Finding, ...]

    @property
    def num_images(self) -> int:
        """The number of candidates in all splits."""
        return sum(sum(classes.values()) for classes in self.counts.values())

    def count(self, severity: Severity) -> int:
        """Return how many findings there are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        """Whether training would stop or be wrong."""
        return self.count("error") > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data, paths as texts."""
        data = asdict(self)
        data["root"] = str(self.root)
        data["widths"], data["heights"] = list(self.widths), list(self.heights)
        data["findings"] = [
            {**asdict(each), "paths": [str(path) for path in each.paths]} for each in self.findings
        ]
        return data

    def to_json(self) -> str:
        """Return the report as JSON text. Names that are no UTF-8 stand escaped."""
        return json.dumps(self.to_dict(), indent=2)

    def describe(self) -> str:
        """Return the report as a text of some lines, with a few paths for each finding."""
        lines = [f"{self.root}: {self.num_images} pictures, {self.num_broken} of them broken"]
        for split, classes in self.counts.items():
            listed = ", ".join(f"{count} {name}" for name, count in classes.items())
            lines.append(f"  {split}: {sum(classes.values())} ({listed or 'no classes'})")
        for name, values in (("width", self.widths), ("height", self.heights)):
            if values:
                low, middle, high = values
                lines.append(f"  {name}: {low} to {high} pixels, median {middle}")
        for finding in self.findings:
            lines.append(f"{finding.severity}: {finding.message}")
            lines += [f"    {path}" for path in self._listed(finding.paths)]
        lines.append(self._verdict())
        return "\n".join(lines)

    def _listed(self, paths: Sequence[Path]) -> list[str]:
        shown = [
            str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)
            for path in paths[:_NUM_LISTED]
        ]
        more = len(paths) - len(shown)
        return [*shown, f"and {more} more"] if more else shown

    def _verdict(self) -> str:
        parts = []
        for severity in SEVERITIES:
            number = self.count(severity)
            parts.append(f"{number} {severity}{'s' * (number != 1)}")
        return ", ".join(parts)
