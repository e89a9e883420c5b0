"""Models as ONNX graphs and TensorRT engines, verified against the original."""
