"""A network becomes an ONNX graph: traced without weights, and written with weights that stream into it."""
