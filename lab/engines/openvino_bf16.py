"""OpenVINO in BF16 where a network is not quantized, on CPUs that compute in it."""

from lab.engines import EngineMissing, Loaded, openvino_cpu, require

NAME = "openvino-bf16"
PRECISION = "bf16"


def version() -> str:
    openvino, *_ = require("openvino", "onnx", "onnxscript")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EngineMissing("this CPU does not compute in BF16")
    return openvino_cpu.version()


def load(model, recipe, calibration, example) -> Loaded:
    version()  # OpenVINO or the CPU may lack it
    network, size_bytes = openvino_cpu.exported(model, example)
    return openvino_cpu.loaded(network, size_bytes, precision=PRECISION)
