"""Exporting: a trained model in the formats of other programs.

This room may import `artifacts`, `models`, `images` and what lies below. Prediction and training
do not know it.
"""

from transferkit.exporting.onnx import export_onnx
from transferkit.exporting.openvino import export_openvino
from transferkit.exporting.program import export_program
from transferkit.exporting.subject import Outputs

__all__ = ["Outputs", "export_onnx", "export_openvino", "export_program"]
