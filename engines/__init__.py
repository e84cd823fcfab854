"""ONNX becomes an engine for one device, and engines are run.

`build.py` goes through a folder of ONNX graphs. `compilers/` has one file for each compiler, `memory/` decides what is
in the GPU's memory when, and `runtime/` loads and runs what was compiled.
"""
