"""TensorRT on an NVIDIA GPU, from the QDQ ONNX file that ptq.export writes.

For TensorRT 10 and 11. What has no codes is computed in FP32.
"""

import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from lab.engines import EngineMissing, Loaded, require
from lab.engines.measure import CPU_BATCH

NAME = "tensorrt"


def version() -> str:
    return f"{_tensorrt().__version__} on {torch.cuda.get_device_name()}"


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` exported and built into an engine for up to CPU_BATCH images at a time.

    EngineMissing if TensorRT or the GPU is missing, or if TensorRT does not take the formats.
    """
    trt = _tensorrt()
    from ptq.export import tensorrt_fault, to_onnx

    if fault := tensorrt_fault(model):
        raise EngineMissing(f"{fault}: recipe w8a8-tensorrt has what TensorRT takes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        to_onnx(model, example, path)
        plan = built(path, example.shape[1:])
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context, alone = engine.create_execution_context(), threading.Lock()

    def run(x: Tensor) -> Tensor:
        """Return the logits of `x`, both on the CPU.

        Copies to the GPU and back are a part of the time.
        """
        with alone:  # a context computes one batch at a time
            images = x.contiguous().cuda()
            context.set_input_shape("images", tuple(images.shape))
            logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
            for name, tensor in (("images", images), ("logits", logits)):
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT did not run the engine")
            return logits.cpu()

    return Loaded(run, size_bytes=len(plan))


def built(path: Path, shape) -> bytes:
    """Return the engine that TensorRT builds from an ONNX file for images of `shape`, (3, S, S).

    It takes 1 to CPU_BATCH images and is tuned for one. ValueError if TensorRT refuses the file.
    """
    trt = _tensorrt()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # Types are those of the file. TensorRT 11 always does this, 10 where it is asked to.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ValueError(f"TensorRT does not take {path}: {parser.get_error(0).desc()}")
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    profile.set_shape("images", *((batch, *shape) for batch in (1, 1, CPU_BATCH)))
    config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)  # FP32 has all its digits, as in the simulation
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT builds no engine from {path}")
    return bytes(plan)


def _tensorrt():
    """Return the package; EngineMissing without it or without a GPU."""
    if not torch.cuda.is_available():
        raise EngineMissing("TensorRT needs an NVIDIA GPU, and torch sees none")
    return require("tensorrt", "onnx", "onnxscript")[0]
