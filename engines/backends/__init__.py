"""The runtimes of towers: CUDA graphs, ONNX Runtime, TensorRT."""
