"""What others do: the published rows, and peers."""

from ptq.formats import Float16, PercentileUniform
from ptq.recipe import Recipe, Rule
from ptq.recipes.mobilevit import _CALIBRATED

# The four rows of the CIFAR-10 re-implementation, by its own protocol.
PROTOCOL = (
    Recipe("fp32"),
    Recipe("fp16", rules=(Rule(".*", Float16()),)),
    Recipe("int8-fx", peer="torch-fx", calibration_images=32 * 128),
    Recipe("int4-percentile", rules=(Rule(".*", PercentileUniform(), min_ndim=2),)),
)


# What people would otherwise use, by its own methods, on the same calibration images.
PEERS = (
    Recipe("int8-nncf", peer="nncf", **_CALIBRATED),
    Recipe("int8-ort", peer="ort-static", **_CALIBRATED),
    Recipe("int8-pt2e", peer="torch-pt2e", **_CALIBRATED),
)
