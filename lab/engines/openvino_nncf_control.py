"""NNCF's accuracy-aware quantization.

Operations go back to float, those that matter most first, until hardly an image is lost.
"""

from lab.cli import BadInput
from lab.engines import Loaded, openvino_nncf

NAME = "nncf-control"
MAX_DROP = 0.001  # of the share of calibration images that are right
version = openvino_nncf.version


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` quantized in 8 bits or float, judged on the images that it calibrates on.

    BadInput for networks that are no classifiers.
    """
    _, labels = calibration[0]
    if labels.dim() != 1:
        raise BadInput(f"{NAME} judges classes of images, and this network gives none")

    def judge(compiled, shown) -> tuple[float, list[float]]:
        """Return the share of the images that are right, and for each a 1.0 if it is, else 0.0."""
        right = [float(compiled(image)[0].argmax() == label) for image, label in shown]
        return sum(right) / len(right), right

    def quantize(nncf, network, images, **how):
        return nncf.quantize_with_accuracy_control(
            network, images, images, judge, max_drop=MAX_DROP, **how
        )

    return openvino_nncf.loaded(openvino_nncf.quantized(quantize, model, calibration, example))
