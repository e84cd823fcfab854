"""ditforge: text-to-image diffusion transformers as ONNX and TensorRT engines, served by Triton."""

__version__ = "0.1.0"
