"""The operators made known to PyTorch, ONNX, TensorRT and compilers, from the registry."""
