"""ONNX becomes an engine for one device, and engines are run.

`build` goes through a folder of ONNX graphs; each compiler is one file with the interface of `compiler`; `runtime`
loads what they made.
"""
