"""What a bulk prediction did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class BulkReport:
    """What a bulk prediction did. The four counts in the middle add up to `num_images`.

    Args:
        path: The file with the results.
        num_images: The pictures that were given.
        num_predicted: Those that went through the network in this run.
        num_duplicates: Those that took the prediction of a picture with the same bytes.
        num_resumed: Those that an earlier run had done.
        num_failed: Those that could not be read.
        seconds: How long this run took.
        engine: What ran the network.
    """

    path: Path
    num_images: int = 0
    num_predicted: int = 0
    num_duplicates: int = 0
    num_resumed: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    engine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return {**asdict(self), "path": str(self.path)}
