"""What ONNX Runtime's compiler says where its native code cannot write."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ditforge import manifest
from ditforge.engines.compilers import Job, onnxruntime
from ditforge.engines.gpus import Target
from ditforge.manifest import Component


def test_a_limit_of_file_sizes_is_not_the_compilers_fault(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((200, 200), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 200]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    file = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    files = {file.name: manifest.describe(file)}
    component = Component(files=files, precision="fp32", reason="", inputs={}, outputs={})
    (tmp_path / "out").mkdir()
    job = Job("g", component, file, tmp_path / "out" / "g", Target("cpu"), [], lambda *step: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            onnxruntime.compile(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert onnxruntime.compile(job)
