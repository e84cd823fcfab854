"""The client against a real server: pictures, their parameters, batches, and many at once."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import FEW, calls, eventually, settled_calls
from pictures import LAST_BIT, largest_difference
from PIL import Image

from ditforge.client import SAMPLERS, AsyncClient, Client, GenerateOptions, Spacing, Step
from ditforge.client.picture_file import read_info, read_parameters, save_picture
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.triton_repo.server import Server

SMALL = {"height": 32, "width": 48}
PROMPTS = ["a large red circle", "", "blue square above green", "a"]


@pytest.fixture(scope="module")
def client(schnell_server: Server) -> Iterator[Client]:
    with Client(schnell_server.url) as client:
        yield client


def assert_same(a: Image.Image, b: Image.Image) -> None:
    assert largest_difference(a, b) <= LAST_BIT


def assert_different(a: Image.Image, b: Image.Image) -> None:
    assert largest_difference(a, b) > 8


def test_prompt_gives_a_picture_and_list_a_list(client: Client) -> None:
    image = client.generate("a", seed=0, **SMALL)
    assert (image.mode, image.size) == ("RGB", (48, 32))
    images = client.generate(["a"], seed=0, **SMALL)
    assert isinstance(images, list)
    assert_same(images[0], image)
    assert_different(client.generate("a", seed=1, **SMALL), image)
    assert_different(client.generate("a large red circle", seed=0, **SMALL), image)


def test_defaults_are_the_models(client: Client) -> None:
    image = client.generate("a", seed=0)
    assert image.size == (96, 96)
    assert read_info(image)["steps"] == client.model.default_steps == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_is_what_its_pictures_are_alone(client: Client, sampler: str) -> None:
    images = client.generate(PROMPTS, seed=3, steps=3, sampler=sampler, **SMALL)
    for i, prompt in enumerate(PROMPTS):
        assert_same(images[i], client.generate(prompt, seed=3 + i, steps=3, sampler=sampler, **SMALL))


def test_an_option_that_nobody_knows(client: Client) -> None:
    with pytest.raises(UserError, match=r"there is no option 'stepz'\nfix: +steps="):
        client.generate("a", stepz=3)  # type: ignore[call-overload]


def test_options_in_a_record_or_by_name(client: Client) -> None:
    options = GenerateOptions(seed=4, steps=2, **SMALL)
    image = client.generate("a", options)
    assert_same(client.generate("a", seed=4, steps=2, **SMALL), image)
    assert_same(client.generate("a", options, seed=5), client.generate("a", seed=5, steps=2, **SMALL))
    assert read_info(client.generate("a", options, steps=3))["steps"] == 3
    with pytest.raises(UserError, match="options are a dict"):
        client.generate("a", {"steps": 3})  # type: ignore[call-overload]


def test_a_seed_for_each_prompt(client: Client) -> None:
    images = client.generate(PROMPTS[:2], seed=[9, 2], steps=2, **SMALL)
    assert [read_info(image)["seed"] for image in images] == [9, 2]
    assert_same(client.generate(PROMPTS[1], seed=2, steps=2, **SMALL), images[1])
    with pytest.raises(UserError, match="2 prompts and 3 seeds"):
        client.generate(PROMPTS[:2], seed=[1, 2, 3])


def test_a_users_own_sampler_and_schedule(client: Client) -> None:
    """They see what ours see, and the picture says what they are called."""

    def backwards_looking(denoise, latents, sigmas, noise, callback=None):  # type: ignore[no-untyped-def]
        assert noise().shape == latents.shape
        for i in range(len(sigmas) - 1):
            latents = latents + (sigmas[i + 1] - sigmas[i]) * denoise(latents, sigmas[i])
        return latents

    image = client.generate("a", seed=1, steps=3, sampler=backwards_looking, **SMALL)
    assert read_info(image)["sampler"] == "backwards_looking"
    assert_same(client.generate("a", seed=1, steps=3, **SMALL), image)

    def halving(steps: int, spacing: Spacing) -> list[float]:
        return [*(0.5**i for i in range(steps)), 0]

    image = client.generate("a", seed=1, steps=3, schedule=halving, **SMALL)
    assert read_info(image)["schedule"] == "halving"
    given = client.generate("a", seed=1, sigmas=[1, 0.5, 0.25, 0], **SMALL)
    assert (read_info(given)["sigmas"], read_info(given)["steps"]) == ([1, 0.5, 0.25, 0], 3)
    assert_same(given, image)
    assert_different(given, client.generate("a", seed=1, steps=3, **SMALL))


@pytest.mark.parametrize("made", [None, np.zeros((1, 2)), np.full((1, 16, 4, 6), "a"), np.full((1, 16, 4, 6), np.nan)])
def test_a_sampler_that_returns_something_else(client: Client, made: object) -> None:
    with pytest.raises(DitforgeError, match="the sampler broken") as error:
        client.generate("a", sampler=broken(made), **SMALL)
    assert "return latents" in error.value.fix or error.value.fix == "look into the sampler broken"


def broken(made: object):  # type: ignore[no-untyped-def]
    def broken(denoise, latents, sigmas, noise, callback=None):  # type: ignore[no-untyped-def]
        return made

    return broken


def test_samplers_differ(client: Client) -> None:
    names = [name for name in SAMPLERS if name != "ddim"]  # which is euler, without eta
    pictures = [client.generate("a", seed=0, sampler=name, **SMALL) for name in names]
    pictures.append(client.generate("a", seed=0, sampler="ddim", eta=1, **SMALL))
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert_different(a, b)


def test_batch_larger_than_the_server_takes(client: Client, schnell_server: Server) -> None:
    before = settled_calls(schnell_server.url)
    prompts = [f"{word} circle" for word in ("red", "green", "blue")] * 3
    images = client.generate(prompts, seed=0, steps=2, **SMALL)
    assert settled_calls(schnell_server.url) - before == 2 * 2  # 8 and 1, in each of 2 steps
    for i in (0, 7, 8):
        assert_same(images[i], client.generate(prompts[i], seed=i, steps=2, **SMALL))


def test_parameters_come_with_the_picture(client: Client, tmp_path: Path) -> None:
    images = client.generate(["a", 'ein "großer" 圆 🔴\n'], seed=41, steps=2, sampler="heun", **SMALL)
    expected = {"prompt": 'ein "großer" 圆 🔴\n', "seed": 42, "steps": 2, "height": 32, "width": 48, "guidance": 0.0}
    expected |= {"sampler": "heun", "model": "random-schnell"}
    assert read_info(images[1]) == expected
    save_picture(images[1], tmp_path / "picture.png")
    assert read_parameters(tmp_path / "picture.png") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    with Image.open(tmp_path / "picture.png") as saved:
        assert saved.info["parameters"].startswith('ein "großer" 圆 🔴\n')
        assert "Steps: 2, Sampler: heun, CFG scale: 0.0, Seed: 42, Size: 48x32" in saved.info["parameters"]
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(images[1]))
    again = read_parameters(tmp_path / "picture.png")
    again.pop("model")
    again.pop("guidance")
    assert_same(client.generate(again.pop("prompt"), **again), images[1])


def test_random_seed_is_recorded(client: Client) -> None:
    first, second = client.generate("a", **SMALL), client.generate("a", **SMALL)
    assert read_info(first)["seed"] != read_info(second)["seed"]
    assert_same(client.generate("a", seed=read_info(first)["seed"], **SMALL), first)


@pytest.mark.parametrize("prompt", ["", " ", "円 ✓ שלום 🎨", "a\0b", "\n\t", "'\"\\{}%s"])
def test_any_prompt(client: Client, prompt: str) -> None:
    assert read_info(client.generate(prompt, steps=1, **SMALL))["prompt"] == prompt


def test_long_prompt_is_cut_with_one_warning(client: Client) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut, _ = client.generate(["red circle " * 2_900, "blue " * 100], seed=0, steps=2, **SMALL)
        same = client.generate("red circle " * 1_000, seed=0, steps=2, **SMALL)
        client.generate("a red circle", steps=1, **SMALL)
    assert [w.category for w in caught] == [DitforgeWarning] * 2  # one a call, none for the short prompt
    assert "clip reads 33 of 26102 tokens, t5 reads 40 of 5802 tokens" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert_same(cut, same)


def test_callback_is_called_once_a_step(client: Client) -> None:
    steps: list[Step] = []
    client.generate(["a", "b"], steps=5, callback=steps.append, sampler="heun", **SMALL)
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    assert [step.sigma for step in steps] == sorted((step.sigma for step in steps), reverse=True)
    assert {step.denoised.shape for step in steps} == {(2, 16, 4, 6)}


def test_error_in_a_callback_ends_the_loop(client: Client, schnell_server: Server) -> None:
    before = settled_calls(schnell_server.url)

    def fail(step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.generate("a", steps=500, callback=fail, **SMALL)
    client.generate("a", steps=1, **SMALL)  # and the connection can go on
    assert settled_calls(schnell_server.url) == before + 2


def test_bad_request_leaves_the_connection_usable(client: Client) -> None:
    with pytest.raises(UserError, match=r"steps must be .* got 0"):
        client.generate("a", steps=0)
    client.generate("a", steps=1, **SMALL)


def test_context_manager_closes(schnell_server: Server) -> None:
    with Client(schnell_server.url) as client:
        client.generate("a", steps=1, **SMALL)
    client.close()  # twice does no harm
    with pytest.raises(DitforgeError, match="closed"):
        client.generate("a", steps=1, **SMALL)


def test_async_gives_the_same_pictures(client: Client, schnell_server: Server) -> None:
    async def main() -> list[Image.Image]:
        async with AsyncClient(schnell_server.url) as concurrent:
            tasks = [concurrent.generate(prompt, seed=i, steps=6, **SMALL) for i, prompt in enumerate(PROMPTS * 2)]
            return await asyncio.gather(*tasks)

    images = asyncio.run(main())
    for i, prompt in enumerate(PROMPTS * 2):
        assert_same(images[i], client.generate(prompt, seed=i, steps=6, **SMALL))
        assert read_info(images[i])["seed"] == i


def test_async_takes_lists_and_callbacks(client: Client, schnell_server: Server) -> None:
    steps: list[int] = []

    async def main() -> list[Image.Image]:
        async with AsyncClient(schnell_server.url) as concurrent:
            options = {"seed": 9, "steps": 3, "callback": lambda step: steps.append(step.index), **SMALL}
            return await concurrent.generate(PROMPTS[:2], **options)

    images = asyncio.run(main())
    assert steps == [0, 1, 2]
    assert_same(images[1], client.generate(PROMPTS[1], seed=10, steps=3, **SMALL))


def test_async_errors(schnell_server: Server) -> None:
    async def ask(url: str, **options: int) -> None:
        async with AsyncClient(url) as concurrent:
            await concurrent.generate("a", **options)

    with pytest.raises(UserError, match="steps"):
        asyncio.run(ask(schnell_server.url, steps=0))
    with pytest.raises(UserError, match="HOST:PORT"):
        asyncio.run(ask("localhost"))


def test_cancelled_task_stops_at_once(schnell_server: Server) -> None:
    """At once is counted in steps, since seconds depend on the machine: of a thousand, hardly any more are made."""
    url = schnell_server.url

    async def main() -> tuple[int, int]:
        """How many steps were made until the wait ended, and how many in all."""
        async with AsyncClient(url) as concurrent:
            before = calls(url)
            task = asyncio.create_task(concurrent.generate("a", steps=1000, height=384, width=384))
            await asyncio.to_thread(eventually, lambda: calls(url) > before + 3)
            at_cancel = calls(url)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            waited = calls(url) - at_cancel
            for _ in range(3):  # meanwhile, a loop that went on would go on, until the connection is closed
                await concurrent.generate("a", steps=30, height=384, width=384)
            return waited, calls(url) - at_cancel - 3 * 30

    waited, more = asyncio.run(main())
    assert waited <= FEW
    assert more <= FEW
