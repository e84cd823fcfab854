"""Servers that answer something else than they were asked: found out at once, named, and never believed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from front import Call, Front, front

from ditforge.client import Client
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.triton_repo.server import Server

SMALL = {"height": 32, "width": 48, "seed": 0}  # 4 steps
OUTPUTS = {"text_encoders": "prompt_embeds", "dit": "velocity", "vae_decoder": "image"}

Change = Callable[[Any], bytes | None]


@pytest.fixture
def between(schnell_server: Server) -> Iterator[Front]:
    with front(schnell_server.url) as passes:
        yield passes


def no_output(answer: Any) -> None:
    del answer.outputs[0]
    del answer.raw_output_contents[0]


def other_name(answer: Any) -> None:
    answer.outputs[0].name += "\x1b[31m"


def another_output(answer: Any) -> None:
    answer.outputs.add(name="more", datatype="FP32", shape=[1])
    answer.raw_output_contents.append(bytes(4))


def twice_the_same(answer: Any) -> None:
    answer.outputs.append(answer.outputs[0])
    answer.raw_output_contents.append(answer.raw_output_contents[0])


def other_dtype(answer: Any) -> None:
    answer.outputs[0].datatype = "INT64"


def no_dtype(answer: Any) -> None:
    answer.outputs[0].datatype = "\x1b[31m"


def other_order(answer: Any) -> None:
    answer.outputs[0].shape[1:] = reversed(answer.outputs[0].shape[1:])


def flat(answer: Any) -> None:
    answer.outputs[0].shape[:] = [len(answer.raw_output_contents[0]) // 4]


def negative(answer: Any) -> None:
    answer.outputs[0].shape[0] *= -1


def larger_batch(answer: Any) -> None:
    answer.outputs[0].shape[0] *= 2
    answer.raw_output_contents[0] *= 2


def smaller(answer: Any) -> None:
    size = answer.outputs[0].shape[1]
    answer.outputs[0].shape[1] = size // 2
    answer.raw_output_contents[0] = answer.raw_output_contents[0][: len(answer.raw_output_contents[0]) // size]


def huge(answer: Any) -> None:
    answer.outputs[0].shape[:] = [1 << 62] * 4


def no_contents(answer: Any) -> None:
    del answer.raw_output_contents[-1]


def more_contents(answer: Any) -> None:
    answer.raw_output_contents.append(b"")


def fewer_bytes(answer: Any) -> None:
    answer.raw_output_contents[0] = answer.raw_output_contents[0][:-1]


def more_bytes(answer: Any) -> None:
    answer.raw_output_contents[0] += bytes(4)


def no_message(answer: Any) -> bytes:
    return b"\xff" * 10


def cut(answer: Any) -> bytes:
    return answer.SerializeToString()[:-10]


def many_parts(answer: Any) -> bytes:
    return b"\x2a\x00" * 3_000_000  # outputs of nothing at all: 6 MB here, much more once read


LIES: list[Change] = [no_output, other_name, another_output, twice_the_same, other_dtype, no_dtype, other_order, flat]
LIES += [negative, larger_batch, smaller, huge, no_contents, more_contents, fewer_bytes, more_bytes, no_message, cut]
LIES += [many_parts]


def lie(model: str, change: Change) -> Callable[[Call, Any], bytes | None]:
    return lambda call, answer: change(answer) if call.model == model else None


@pytest.mark.parametrize("change", LIES, ids=lambda change: change.__name__)
def test_wrong_answer(between: Front, change: Change) -> None:
    with Client(between.url) as client:
        for model, output in OUTPUTS.items():
            between.calls.clear()
            between.change = lie(model, change)
            with pytest.raises(DitforgeError) as caught:
                client.generate("a", steps=1, **SMALL)
            problem = caught.value.problem
            assert problem.startswith(f"the server at {between.url} gave a wrong answer to {model}")
            assert problem.isprintable() and len(problem) < 500
            assert change in (no_message, cut) or output in problem
            assert not isinstance(caught.value, UserError)
            assert [call.model for call in between.calls].count(model) == 1  # it is not asked again
        between.change = lambda call, answer: None
        client.generate("a", steps=1, **SMALL)  # and the client can go on


def test_what_was_expected_and_what_came(between: Front) -> None:
    between.change = lie("vae_decoder", smaller)
    with Client(between.url) as client, pytest.raises(DitforgeError) as caught:
        client.generate(["a", "b"], **SMALL)
    assert "image: expected UINT8 [2, 32, 48, 3], got 'UINT8' [2, 16, 48, 3]" in caught.value.problem


def test_others_make_the_picture(between: Front, schnell_server: Server) -> None:
    with Client(schnell_server.url) as client:
        alone = client.generate("a", **SMALL).tobytes()
    between.change = lie("dit", other_order)
    with warnings.catch_warnings(record=True) as caught, Client([between.url, schnell_server.url]) as client:
        warnings.simplefilter("always")
        assert client.generate("a", **SMALL).tobytes() == alone
    assert [call.model for call in between.calls] == ["text_encoders", "dit"]
    (said,) = [warning for warning in caught if warning.category is DitforgeWarning]
    left_out = f"{between.url} is left out: the server at {between.url} gave a wrong answer to dit, step 1 of 4: "
    assert str(said.message).startswith(left_out)
    assert said.filename == __file__


def test_all_are_wrong(between: Front, schnell_server: Server) -> None:
    between.change = lie("dit", other_order)
    with front(schnell_server.url) as another:
        another.change = lie("dit", no_message)
        with (
            Client([between.url, another.url]) as client,
            pytest.warns(DitforgeWarning),
            pytest.raises(DitforgeError, match="no server is left for the picture") as caught,
        ):
            client.generate("a", **SMALL)
    assert all(url in caught.value.problem for url in (between.url, another.url))


# what a server says of its model


def described(**changes: Any) -> Callable[[Any], None]:
    """Changes fields of the model, by their names with __ between the levels."""

    def configure(config: Any) -> None:
        model = json.loads(config.parameters["ditforge_model"].string_value)
        for path, value in changes.items():
            *levels, name = path.split("__")
            inner = model
            for level in levels:
                inner = inner[level]
            inner[name] = value
        config.parameters["ditforge_model"].string_value = json.dumps(model)

    return configure


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("latent_channels", 0),
        ("latent_channels", -16),
        ("vae_factor", 0),
        ("vae_factor", 1 << 40),
        ("size_multiple", 0),
        ("size_multiple", 13),
        ("default_size", -1),
        ("max_size", 1 << 60),
        ("min_size", 0),
        ("sizes", [[0, 64]]),
        ("default_steps", 0),
        ("default_steps", 1 << 40),
        ("default_guidance", float("nan")),
        ("default_guidance", float("inf")),
        ("schedule__kind", "\x1b[31m"),
        ("schedule__shift", float("nan")),
        ("schedule__shift", 0),
        ("schedule__sigma_min", 2),
        ("schedule__base_tokens", 4096),
        ("schedule__patch_size", 0),
        ("max_tokens", {"clip": -1, "t5": 40}),
        ("vae_tile", 0),
        ("skip_layers", {"blocks": 2, "layers": [2], "scale": 1, "start": 0, "stop": 1}),
        ("skip_layers", {"blocks": 1 << 40, "layers": [], "scale": 1, "start": 0, "stop": 1}),
        ("name", "a" * 10_000),
        ("name", "name\x1b[31m"),
        ("max_tokens", {"max_tokens\n": 77, "t5": 40}),
    ],
)
def test_description_that_is_nonsense(between: Front, path: str, value: object) -> None:
    between.configure = described(**{path: value})
    with pytest.raises(UserError) as caught:
        Client(between.url)
    problem = caught.value.problem
    assert problem.startswith(f"the server at {between.url} describes its model in a way this client does not read: ")
    assert path.partition("__")[2] or path in problem
    assert problem.isprintable() and len(problem) < 700


def test_description_of_another_version(between: Front) -> None:
    """The error says which side is the older one."""
    between.configure = described(minimum_client=2, written_by="7.0")
    with pytest.raises(UserError, match=r"level 2, written by ditforge 7.0, .* level 1\nfix:   .* newer checkout"):
        Client(between.url)

    def without_vae_factor(config: Any) -> None:
        model = json.loads(config.parameters["ditforge_model"].string_value)
        del model["vae_factor"]
        config.parameters["ditforge_model"].string_value = json.dumps(model)

    between.configure = without_vae_factor
    with pytest.raises(UserError, match=r"; the server's repository is older than this client\n.*repository again"):
        Client(between.url)


def test_description_with_more_in_it_than_is_known(between: Front) -> None:
    """A server of next year, which says more, and does not say that it matters: the picture is the same."""
    options: dict[str, Any] = {"seed": 0, "height": 32, "width": 48, "steps": 2}
    with Client(between.url) as client:
        expected = np.asarray(client.generate("a red circle", **options))
    between.configure = described(unheard_of={"a": 1}, schedule__unheard_of=[1], written_by="7.0")
    with Client(between.url) as client:
        assert np.array_equal(np.asarray(client.generate("a red circle", **options)), expected)


def test_schedule_without_noise_levels(between: Front) -> None:
    between.configure = described(schedule__kind="dynamic", schedule__base_tokens=1, schedule__max_tokens=2)
    with pytest.raises(UserError, match=f"{between.url} describes .* no noise levels"):
        Client(between.url)


def test_dit_that_takes_no_embeddings(between: Front) -> None:
    def configure(config: Any) -> None:
        for tensor in config.input:
            if tensor.name == "pooled_embeds":
                tensor.dims[0] = -1

    between.configure = configure
    with pytest.raises(UserError, match=f"{between.url} describes .* no input pooled_embeds of fixed size"):
        Client(between.url)


def test_description_that_is_too_large(between: Front) -> None:
    between.configure = described(name="a" * (5 << 20))
    with pytest.raises(UserError, match=f"{between.url} was asked, or what it answered, is too large: .*larger than"):
        Client(between.url)


def test_token_that_is_too_large(schnell_server: Server) -> None:
    with pytest.raises(UserError, match=f"{schnell_server.url} was asked, .*, is too large: .*metadata size exceeds"):
        Client(schnell_server.url, token="x" * 100_000)
