"""Steps of different users share a batch: each gets what it would have got alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton

from ditforge import manifest
from ditforge.client.connection import Connection, encode
from ditforge.engines.verify import example

USERS = 16


def test_requests_of_several_users_run_as_one(schnell, schnell_server) -> None:
    component = manifest.read(schnell.onnx, "onnx").components["dit"]
    connection = Connection(schnell_server.url)
    sizes = {"batch": USERS, "latent_height": 8, "latent_width": 12}
    inputs = {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}
    each = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(USERS)]
    alone = [connection.infer("dit", one)["velocity"] for one in each]

    statistics = triton.InferenceServerClient(schnell_server.url)
    before = statistics.get_inference_statistics("dit").model_stats[0]
    with ThreadPoolExecutor(USERS) as users:
        together = list(users.map(lambda one: connection.infer("dit", one)["velocity"], each))
    after = statistics.get_inference_statistics("dit").model_stats[0]

    for i in range(USERS):
        np.testing.assert_allclose(together[i], alone[i], rtol=0, atol=1e-4)
    assert after.inference_count - before.inference_count == USERS
    assert after.execution_count - before.execution_count < USERS, "no two requests shared a batch"


def test_a_bad_request_is_answered_and_the_next_one_served(schnell, schnell_server) -> None:
    client = triton.InferenceServerClient(schnell_server.url)
    connection = Connection(schnell_server.url)
    component = manifest.read(schnell.onnx, "onnx").components["dit"]
    sizes = {"batch": 1, "latent_height": 7, "latent_width": 12}  # no whole number of patches
    inputs = {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}
    with pytest.raises(triton.InferenceServerException, match=r"(?i)reshape|dimension|shape"):
        client.infer("dit", [encode(name, value) for name, value in inputs.items()])
    sizes["latent_height"] = 8
    inputs = {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}
    assert connection.infer("dit", inputs)["velocity"].shape == (1, 16, 8, 12)
