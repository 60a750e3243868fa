"""ONNX Runtime's own static quantization: what people would otherwise use there."""

import logging
import tempfile
from pathlib import Path

from lab.engines import Loaded, onnx_runtime, require
from lab.machine import has_vnni

NAME = "ort-static"
PRODUCTS = ("Conv", "MatMul", "Gemm")  # operators to quantize
version = onnx_runtime.version


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` quantized by ONNX Runtime as its guide recommends for x86.

    That is: QDQ, a prepared graph, INT8 weights per channel, of 7 bits on CPUs without VNNI, and
    UINT8 activations, from their extremes over every image of `calibration`.
    """
    require("onnxruntime", "onnx", "onnxscript")
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from ptq.export import to_onnx

    class Reader(CalibrationDataReader):
        inputs = ({"images": x.contiguous().numpy()} for x, _ in calibration)

        def get_next(self):
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory() as folder:
        written, prepared, quantized = (Path(folder, f"{i}.onnx") for i in range(3))
        to_onnx(model, example, written)
        logging.disable(logging.WARNING)  # it warns of what it was told to do
        try:
            quant_pre_process(written, prepared)
            quantize_static(
                prepared,
                quantized,
                Reader(),
                op_types_to_quantize=PRODUCTS,
                per_channel=True,
                reduce_range=not has_vnni(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx_runtime.loaded(quantized)
