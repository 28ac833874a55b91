"""The artifact: one safetensors file that holds all that prediction needs.

Training writes it and inference reads it, and neither knows the other: here is where they
meet. This room may import `models`, `images` and what lies below.
"""

from transferkit.artifacts.artifact import Artifact, load_artifact, save_artifact
from transferkit.artifacts.card import make_card
from transferkit.artifacts.fit_summary import FitSummary
from transferkit.artifacts.format import FORMAT_VERSION
from transferkit.artifacts.info import ArtifactInfo, read_info

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "ArtifactInfo",
    "FitSummary",
    "load_artifact",
    "make_card",
    "read_info",
    "save_artifact",
]
