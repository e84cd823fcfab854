"""A network becomes an ONNX graph: it is traced without weights, and weights are read one by one as it is written."""
