"""NNCF's post-training quantization, run by OpenVINO: what people would otherwise use there."""

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab.engines import Loaded, openvino_cpu, require

NAME = "nncf"
# NNCF reports its use over the network, from a forked process that may hang at the end of ours.
os.environ["NNCF_CI"] = "1"


def version() -> str:
    nncf, openvino = require("nncf", "openvino")
    return f"{nncf.__version__}, OpenVINO {openvino_cpu.version()}"


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` quantized by NNCF with all that it recommends, on OpenVINO."""
    return loaded(quantized(recommended, model, calibration, example))


def recommended(nncf, network, images, **how):
    """Return `network` quantized as NNCF does it by default."""
    return nncf.quantize(network, images, **how)


def quantized(quantize: Callable, model, calibration, example):
    """Return what `quantize(nncf, network, images, **how)` makes of `model`, an OpenVINO network.

    `calibration`: a sequence of (input [b, 3, S, S], labels [b]). `images`: a data set of NNCF that
    holds all its (image, label) pairs. `how`: what NNCF recommends for transformers and, for
    accuracy, full bias correction.
    """
    nncf, _ = require("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    network, _ = openvino_cpu.exported(model, example)
    pairs = [
        (image[None].contiguous().numpy(), label)
        for x, labels in calibration
        for image, label in zip(x, labels)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # of its progress bars
        return quantize(
            nncf,
            network,
            nncf.Dataset(pairs, lambda pair: pair[0]),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            fast_bias_correction=False,
            subset_size=len(pairs),
        )


def loaded(network) -> Loaded:
    """Return a network that NNCF quantized, with the size of OpenVINO's files of it."""
    openvino = require("openvino")[0]
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, Path(folder, "model.xml"), compress_to_fp16=False)
        size_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return openvino_cpu.loaded(network, size_bytes)
