"""Models as ONNX graphs and TensorRT engines: written, proven equal, and run."""
