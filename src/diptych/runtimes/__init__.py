"""Run the networks of a model, whichever way: PyTorch modules or ONNX files."""
