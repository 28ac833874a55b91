"""The artifact: one safetensors file that holds all that prediction needs.

Training writes it and inference reads it, and neither knows the other: here is where they
meet. This room may import `models`, `images` and what lies below.
"""

from transferkit.artifacts.artifact import Artifact, load_artifact, save_artifact
from transferkit.artifacts.format import FORMAT_VERSION

__all__ = ["FORMAT_VERSION", "Artifact", "load_artifact", "save_artifact"]
