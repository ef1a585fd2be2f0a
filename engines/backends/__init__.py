"""What runs a tower: CUDA graphs, ONNX Runtime, TensorRT."""
