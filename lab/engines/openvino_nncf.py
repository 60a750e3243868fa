"""NNCF's post-training quantization, run by OpenVINO: what people would otherwise use there."""

import contextlib
import io
import logging
import os
import tempfile
from pathlib import Path

from lab.engines import Loaded, openvino_cpu, require

NAME = "nncf"
# NNCF reports its use over the network, from a forked process that may hang at the end of ours.
os.environ["NNCF_CI"] = "1"


def version() -> str:
    nncf, openvino = require("nncf", "openvino")
    return f"{nncf.__version__}, OpenVINO {openvino_cpu.version()}"


def load(model, recipe, calibration, example) -> Loaded:
    return loaded(quantized(model, calibration, example))


def loaded(network) -> Loaded:
    """A network that NNCF quantized, with the size of OpenVINO's files of it."""
    openvino = require("openvino")[0]
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(network, Path(folder, "model.xml"), compress_to_fp16=False)
        size_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    return openvino_cpu.loaded(network, size_bytes)


def quantized(model, calibration, example):
    """`model` quantized by NNCF with `recommended`, on every image of `calibration`, a sequence of
    (input, labels)."""
    nncf, _ = require("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    network, _ = openvino_cpu.exported(model, example)
    images = [image[None].contiguous().numpy() for x, _ in calibration for image in x]
    with contextlib.redirect_stdout(io.StringIO()):  # of its progress bars
        return nncf.quantize(network, nncf.Dataset(images), **recommended(len(images)))


def recommended(n_images: int) -> dict:
    """What NNCF recommends for transformers and for accuracy, full bias correction included."""
    nncf = require("nncf")[0]
    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": nncf.ModelType.TRANSFORMER,
        "fast_bias_correction": False,
        "subset_size": n_images,
    }
