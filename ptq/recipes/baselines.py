"""What others do: the four published rows by their own protocol, and engines that quantize."""

from ptq.recipe import Recipe
from ptq.recipes.mobilevit import CALIBRATED

# The rows of the CIFAR-10 re-implementation that this project follows.
PROTOCOL = (
    Recipe("fp32", "FP32"),
    Recipe("fp16", "FP16 weights", peer="published"),
    Recipe("int8-fx", "INT8, torch FX", peer="torch-fx", calibration_images=32 * 128),
    Recipe("int4-percentile", "INT4 weights, 1-99 percentile", peer="published"),
)

# What people would otherwise use, by its own methods, on the same calibration images.
PEERS = (
    Recipe("int8-nncf", "INT8, NNCF", peer="nncf", **CALIBRATED),
    Recipe("int8-nncf-control", "INT8, NNCF, accuracy-aware", peer="nncf-control", **CALIBRATED),
    Recipe("int8-ort", "INT8, ONNX Runtime static", peer="ort-static", **CALIBRATED),
    Recipe("int8-pt2e", "INT8, torchao PT2E", peer="torch-pt2e", **CALIBRATED),
)
