"""Steps of different users share a batch: each gets what it would have got alone."""

from __future__ import annotations

from queue import Queue

import numpy as np
import pytest
import tritonclient.grpc as triton
from command_line import PATIENCE, eventually
from tritonclient.utils import np_to_triton_dtype

from ditforge import manifest
from ditforge.client.connection import Connection
from ditforge.client.settings import make_settings
from ditforge.engines.verify import example

USERS = 16
ATTEMPTS = 5
LARGEST_BATCH = 8  # the repository's default


def encode(name: str, value: np.ndarray) -> triton.InferInput:
    """An input as Triton's client sends it; one number a sample as [B, 1]."""
    value = value[:, None] if value.ndim == 1 else value
    tensor = triton.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
    tensor.set_data_from_numpy(value)
    return tensor


def test_requests_of_several_users_run_as_one(schnell, schnell_server) -> None:
    component = manifest.read(schnell.onnx, "onnx").components["dit"]
    connection = Connection(make_settings(schnell_server.url))
    client = triton.InferenceServerClient(schnell_server.url)

    def examples(**sizes: int) -> dict[str, np.ndarray]:
        return {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}

    inputs = examples(batch=USERS, latent_height=8, latent_width=12)
    each = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(USERS)]

    def statistics():
        return client.get_inference_statistics("dit").model_stats[0]

    def counted(requests: int) -> None:
        """Until there are so many: Triton counts a request shortly after answering it."""
        eventually(lambda: statistics().inference_count >= requests)

    def run_together() -> tuple[dict[int, np.ndarray], int]:
        """The velocities of all users' requests, sent while large pictures keep the DiT busy; and its executions."""
        before = statistics()
        answers: Queue[tuple[int, triton.InferResult, Exception | None]] = Queue()
        for i, one in enumerate([large, *each], start=-1):
            client.async_infer(
                "dit",
                [encode(name, value) for name, value in one.items()],
                lambda result, error, i=i: answers.put((i, result, error)),
            )
        found: dict[int, np.ndarray] = {}
        for _ in range(1 + USERS):
            i, result, error = answers.get(timeout=PATIENCE)
            assert error is None
            found[i] = result.as_numpy("velocity")
        counted(before.inference_count + LARGEST_BATCH + USERS)
        return found, statistics().execution_count - before.execution_count

    earlier = statistics()
    alone = [connection.infer("dit", one)["velocity"] for one in each]
    counted(earlier.inference_count + USERS)
    largest = connection.model.max_size // connection.model.vae_factor
    large = examples(batch=LARGEST_BATCH, latent_height=largest, latent_width=largest)
    for _ in range(ATTEMPTS):  # on a busy machine, the large pictures may be done before the other requests are sent
        together, executions = run_together()
        for i in range(USERS):
            np.testing.assert_allclose(together[i], alone[i], rtol=0, atol=1e-4)
        if executions < 1 + USERS // 2:
            return
    pytest.fail("requests that waited did not share a batch")


def test_a_bad_request_is_answered_and_the_next_one_served(schnell, schnell_server) -> None:
    client = triton.InferenceServerClient(schnell_server.url)
    connection = Connection(make_settings(schnell_server.url))
    component = manifest.read(schnell.onnx, "onnx").components["dit"]
    sizes = {"batch": 1, "latent_height": 7, "latent_width": 12}  # no whole number of patches
    inputs = {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}
    with pytest.raises(triton.InferenceServerException, match=r"(?i)reshape|dimension|shape"):
        client.infer("dit", [encode(name, value) for name, value in inputs.items()])
    sizes["latent_height"] = 8
    inputs = {name: example(name, tensor, sizes, connection.model) for name, tensor in component.inputs.items()}
    assert connection.infer("dit", inputs)["velocity"].shape == (1, 16, 8, 12)
