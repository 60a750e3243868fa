"""NNCF's accuracy-aware quantization: operations go back to float, those that matter most first,
until hardly an image is lost."""

import contextlib
import io
import logging

from lab.engines import Loaded, openvino_cpu, openvino_nncf, require

NAME = "nncf-control"
MAX_DROP = 0.001  # of the share of calibration images that are right


def version() -> str:
    return openvino_nncf.version()


def load(model, recipe, calibration, example) -> Loaded:
    return openvino_nncf.loaded(quantized(model, calibration, example))


def quantized(model, calibration, example):
    """`model` quantized by NNCF in 8 bits or float, judged on the images that it calibrates on, a
    sequence of (input, labels)."""
    nncf, _ = require("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    network, _ = openvino_cpu.exported(model, example)
    pairs = [
        (image[None].contiguous().numpy(), int(label))
        for x, labels in calibration
        for image, label in zip(x, labels)
    ]
    images = nncf.Dataset(pairs, lambda pair: pair[0])

    def judge(compiled, shown) -> tuple[float, list[float]]:
        """The share of the images that are right, and which."""
        right = [float(compiled(image)[0].argmax() == label) for image, label in shown]
        return sum(right) / len(right), right

    with contextlib.redirect_stdout(io.StringIO()):  # of its progress bars
        return nncf.quantize_with_accuracy_control(
            network,
            images,
            images,
            judge,
            max_drop=MAX_DROP,
            **openvino_nncf.recommended(len(pairs)),
        )
