"""What goes wrong for users: each a clear error with a way out, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import random_flux
from command_line import (
    PATIENCE,
    Result,
    assert_error,
    calls,
    ditforge,
    eventually,
    popen,
    run_here,
    settled_calls,
    tree,
)
from google.protobuf import text_format
from PIL import Image
from transformers import T5Config, T5EncoderModel
from tritonclient.grpc import model_config_pb2 as pb

from ditforge.export import onnx_export
from ditforge.triton_repo.server import Server, start

LONG = ["--steps", "1000", "--height", "384", "--width", "384"]  # a run that nobody waits for
ECHO = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([]) for _ in requests]
"""


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Runs a command in the empty folder `tmp_path` and checks its error, and that it changed nothing there."""

    def run(*args: str | Path, mentions: tuple[str | Path, ...] = (), code: int = 2) -> None:
        before = tree(tmp_path)
        assert_error(ditforge(*args, cwd=tmp_path), *mentions, code=code)
        assert tree(tmp_path) == before

    return run


# generate: the request


@pytest.mark.parametrize(
    ("option", "value", "mentions"),
    [
        ("--height", "100", ("divisible by 16", "got 100", "--height 96")),
        ("--width", "1000", ("16 to 384", "got 1000", "--width 96")),
        ("--height", "0", ("got 0",)),
        ("--width", "-16", ("got -16",)),
        ("--steps", "0", ("1 to 1000", "got 0", "--steps")),
        ("--steps", "10000", ("1 to 1000", "got 10000", "--steps")),
        ("--steps", "2.5", ("--steps", "2.5", "--help")),
        ("--guidance", "nan", ("0 to 100", "got nan", "--guidance")),
        ("--guidance", "-inf", ("got -inf",)),
        ("--seed", "-1", ("got -1", "--seed")),
        ("--seed", str(2**64), (f"got {2**64}",)),
        ("--sampler", "eular", ("'eular'", "euler, euler_ancestral, heun", "--sampler euler")),
        ("--count", "0", ("got 0", "--count")),
        ("--count", "1000000000", ("1 to 1000",)),
    ],
)
def test_request(refused, schnell_server: Server, option: str, value: str, mentions: tuple[str, ...]) -> None:
    before = settled_calls(schnell_server.url)  # an earlier test's last step may be counted only now
    refused("generate", "a circle", "--url", schnell_server.url, option, value, mentions=mentions)
    assert calls(schnell_server.url) == before


def test_seeds_that_run_over(refused, schnell_server: Server) -> None:
    last = str(2**64 - 1)
    refused("generate", "a", "--url", schnell_server.url, "--seed", last, "--count", "2", mentions=("2^64 - 1",))


def test_prompt_that_is_no_text(schnell_server: Server, tmp_path: Path) -> None:
    prompt = os.fsdecode(b"\xff\xfe")
    assert_error(ditforge("generate", prompt, "--url", schnell_server.url, cwd=tmp_path), "UTF-8")


def test_empty_prompt(schnell_server: Server, tmp_path: Path) -> None:
    result = ditforge("generate", "", "--url", schnell_server.url, "--out", "picture.png", cwd=tmp_path)
    assert (result.code, result.out) == (0, "picture.png\n")
    assert os.listdir(tmp_path) == ["picture.png"]


def test_long_prompt_is_cut_with_one_warning(schnell_server: Server, tmp_path: Path) -> None:
    args = ("generate", "red circle " * 200, "--url", schnell_server.url, "--count", "2", "--out", "picture.png")
    result = ditforge(*args, cwd=tmp_path)
    assert result.code == 0
    said = [line for line in result.err.splitlines() if "warning" in line.lower()]
    assert said == [
        "warning: the prompt is too long and was cut: clip reads 33 of 1802 tokens, t5 reads 40 of 402 tokens"
    ]
    assert sorted(os.listdir(tmp_path)) == ["picture-0.png", "picture-1.png"]


# generate: the output path


def test_out_in_a_folder_that_cannot_be_made(refused, schnell_server: Server) -> None:
    refused(
        "generate", "a", "--url", schnell_server.url, "--out", "/proc/no/a.png", mentions=("/proc/no/a.png", "--out")
    )


@pytest.mark.parametrize("out", ["", "folder", "a", "a.gif", "/proc/a.png", "file.txt/a.png", "a" * 250 + ".png"])
def test_out_that_cannot_be_written(refused, schnell_server: Server, tmp_path: Path, out: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    before = calls(schnell_server.url)
    refused("generate", "a", "--url", schnell_server.url, "--out", out, mentions=(out, "--out"))
    assert calls(schnell_server.url) == before  # found out before anything was computed


# generate: the server


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8001", ":8001", "localhost:", "localhost:99999", "a:²"])
def test_url(refused, url: str) -> None:
    refused("generate", "a", "--url", url, mentions=(repr(url), "HOST:PORT", "--url ", ":8001"))


def test_no_server(refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
    refused("generate", "a", "--url", url, mentions=(url, "Connection refused", "ditforge serve"))
    refused("generate", "a", "--url", "no.such.host.invalid:8001", mentions=("no.such.host.invalid:8001", "--url"))


@pytest.mark.parametrize("answer", [b"\x00\xff, and so on\r\n" * 50, b"HTTP/1.1 400 Bad Request\r\n\r\n", None])
def test_server_that_is_none(refused, answer: bytes | None) -> None:
    """One that answers garbage, HTTP 1, or (None) takes the connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connections.append(listener.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    connections[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        refused(
            "generate", "a", "--url", url, mentions=(url, "ditforge serve") + ((" 10 s",) if answer is None else ())
        )
        listener.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


def test_grpc_server_that_is_not_triton(refused) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        refused("generate", "a", "--url", url, mentions=(f"{url} is not a Triton server", "ditforge serve"))
    finally:
        server.stop(None)


def write_model(repository: Path, name: str) -> None:
    config = pb.ModelConfig(name=name, backend="python")
    config.input.add(name="x", data_type=pb.TYPE_FP32, dims=[-1])
    config.output.add(name="y", data_type=pb.TYPE_FP32, dims=[-1])
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU)
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(ECHO)
    (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))


@pytest.mark.parametrize("names", [("other",), ("text_encoders", "dit", "vae_decoder")])
def test_triton_with_somebody_elses_models(
    refused, tmp_path_factory: pytest.TempPathFactory, names: tuple[str, ...]
) -> None:
    """Those of the second one happen to be called like ours."""
    repository = tmp_path_factory.mktemp("others")
    for name in names:
        write_model(repository, name)
    with start(repository, port=0) as server:
        words = {
            "other": f"{server.url} has no model text_encoders: it has other",
            "text_encoders": f"the model dit at {server.url} was not made by ditforge",
        }
        refused("generate", "a", "--url", server.url, mentions=(words[names[0]], "ditforge serve"))


def test_model_that_is_not_ready(refused, schnell) -> None:
    loaded = ("--model-control-mode=explicit", "--load-model=text_encoders", "--load-model=vae_decoder")
    with start(schnell.repository, port=0, extra_args=loaded) as server:
        mentions = ("dit", server.url, "not ready within 1 s", "wait", "--connect-timeout")
        refused("generate", "a", "--url", server.url, "--connect-timeout", "1", mentions=mentions, code=1)


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_server_that_ends_in_the_middle(schnell, tmp_path: Path, end: str) -> None:
    with start(schnell.repository, port=0, grace=1) as server:
        arguments = ("generate", "a", "--url", server.url, "--retry-timeout", "1", *LONG, "--out", "picture.png")
        running = popen(*arguments, cwd=tmp_path)
        try:
            eventually(lambda: calls(server.url) > 5)
            os.kill(server.pid, signal.SIGKILL if end == "killed" else signal.SIGTERM)
            out, err = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
        server.wait()
    said = (server.url, "during dit, step ", " of 1000", "tries in 1 s", "start it again", "--retry-timeout")
    assert_error(Result(running.returncode, out, err), *said, code=1)
    assert os.listdir(tmp_path) == []


# serve


def test_serve_on_a_port_in_use(refused, schnell, schnell_server: Server) -> None:
    port = str(schnell_server.ports.grpc)
    refused("serve", schnell.repository, "--port", port, mentions=(f"--port {port} is in use", "--port 0"))


def test_serve_what_is_no_repository(refused, schnell, random_schnell: Path, tmp_path: Path) -> None:
    engines, onnx, repository = schnell.engines, schnell.onnx, schnell.repository
    refused("serve", "nowhere", mentions=("nowhere is not a folder", "ditforge repo ENGINE_DIR"))
    refused("serve", engines, mentions=(f"{engines} holds engines", f"fix:   ditforge repo {engines} --out repo"))
    refused("serve", onnx, mentions=(f"{onnx} holds ONNX graphs", f"fix:   ditforge build {onnx} --out engines"))
    refused("serve", repository / "dit", mentions=("one model of", f"fix:   ditforge serve {repository}\n"))
    refused("serve", random_schnell, mentions=("is a checkpoint", f"fix:   ditforge up {random_schnell}"))
    file = tmp_path / "my model.safetensors"
    file.touch()
    refused("serve", file, mentions=("is a checkpoint", f"fix:   ditforge up '{file}'"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "repo").symlink_to(repository)
    refused("serve", "out", mentions=("out is not a model repository, but holds one, repo", "fix:   ditforge serve "))


def test_up_of_what_is_no_checkpoint(refused, schnell) -> None:
    refused("up", schnell.engines, mentions=("holds engines", f"fix:   ditforge repo {schnell.engines} --out repo"))
    refused("up", schnell.repository, mentions=("a model repository", f"fix:   ditforge serve {schnell.repository}"))


def test_up_asks_whether_it_can_be_served_before_it_exports(refused, random_schnell: Path) -> None:
    options = ("up", random_schnell, "--cache", "cache", "--metrics-port")
    refused(*options, "8001", mentions=("--port and --metrics-port", "both 8001"))
    refused(*options, "99999", mentions=("0 to 65535", "got 99999"))


# build, verify, repo


@pytest.fixture
def export(schnell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the export, to be damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "onnx"
    shutil.copytree(schnell.onnx, folder)
    return folder


def test_build_of_a_damaged_export(refused, export: Path) -> None:
    data = export / "vae_encoder.onnx.data"  # of the last one that is compiled
    whole = data.read_bytes()
    data.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    refused("build", export, "--out", "engines", mentions=(data, "SHA-256", "ditforge export"))
    data.write_bytes(whole[:-1])
    refused("build", export, "--out", "engines", mentions=(data, f"{len(whole) - 1} bytes", f"{len(whole)}"))
    data.unlink()
    refused("build", export, "--out", "engines", mentions=(data, "missing", "ditforge export"))


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ('{"format": 99}', ("format 99", "reads formats 1 and 2")),
        ('{"format": 1, "kind": "onnx"}', ("damaged: model: Field required",)),
        ("[]", ("damaged: it holds a list",)),
        ("", ("damaged: ",)),
        ("\0\1\2", ("damaged: ",)),
        ('{"format": 1, "kind"', ("damaged: ",)),
    ],
)
def test_manifest_that_is_none(refused, export: Path, content: str, mentions: tuple[str, ...]) -> None:
    (export / "manifest.json").write_text(content)
    for command in (("build", export, "--out", "engines"), ("inspect", export)):
        refused(*command, mentions=(export / "manifest.json", "make the folder again", *mentions))


def test_manifest_that_reaches_outside(refused, export: Path) -> None:
    text = (export / "manifest.json").read_text()
    (export / "manifest.json").write_text(text.replace("tokenizer/clip.json", "tokenizer/../../clip.json"))
    refused("build", export, "--out", "engines", mentions=("tokenizer/../../clip.json is outside",))


def test_bf16_on_a_cpu(refused, export: Path) -> None:
    described = json.loads((export / "manifest.json").read_text())
    described["components"]["dit"]["precision"] = "bf16"
    (export / "manifest.json").write_text(json.dumps(described))
    refused("build", export, "--gpu", "cpu", "--out", "engines", mentions=("dit", "bf16", "CPU", "--precision fp32"))


def test_unknown_device_and_compiler(refused, schnell) -> None:
    refused("build", schnell.onnx, "--gpu", "rtx9999", "--out", "engines", mentions=("rtx9999", "--gpu"))
    refused("build", schnell.onnx, "--compiler", "gcc", "--out", "engines", mentions=("gcc", "onnxruntime"))


def test_folder_of_another_kind(refused, schnell) -> None:
    refused("repo", schnell.onnx, "--out", "repo", mentions=(schnell.onnx, "ONNX graphs", "engines", "ditforge build"))
    refused("build", schnell.engines, "--out", "engines", mentions=(schnell.engines, "ONNX graphs", "ditforge export"))
    refused("repo", "nowhere", "--out", "repo", mentions=("nowhere", "ditforge build"))


@pytest.mark.parametrize("command", ["build", "repo"])
def test_out_keeps_what_others_made(refused, schnell, tmp_path: Path, command: str) -> None:
    source = schnell.onnx if command == "build" else schnell.engines
    mine, web, file = tmp_path / "mine", tmp_path / "web", tmp_path / "file"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "a web page"}')
    file.touch()
    for out, mention in ((mine, "thesis.txt"), (web, "manifest.json"), (file, "is a file"), (file / "x", "file/x")):
        refused(command, source, "--out", out, mentions=(mention, "choose another --out"))
    refused(command, source, "--out", "/proc/x", mentions=("/proc/x", "--out"))
    refused(command, source, "--out", "/proc", mentions=("/proc", "mount point", "--out"))


def test_out_keeps_another_stage(schnell, tmp_path: Path) -> None:
    shutil.copytree(schnell.onnx, tmp_path / "onnx")
    shutil.copytree(schnell.repository, tmp_path / "repo")
    (tmp_path / "repo" / "my_model").mkdir()
    before = tree(tmp_path)
    assert_error(ditforge("build", "onnx", "--out", "onnx", cwd=tmp_path), "onnx", "would be lost", "--out")
    other_repo = ("repo", schnell.engines, "--max-batch", "3", "--out", "repo")
    assert_error(ditforge(*other_repo, cwd=tmp_path), "my_model", "--out")
    assert tree(tmp_path) == before
    (tmp_path / "repo" / "my_model").rmdir()
    assert ditforge(*other_repo, cwd=tmp_path).code == 0  # its own work it replaces
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "repo"]


# inspect


def test_inspect_what_is_not_ours(refused, random_schnell: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    refused("inspect", "text.png", mentions=("text.png", "not a picture"))
    refused("inspect", "foreign.png", mentions=("foreign.png", "no parameters"))
    refused("inspect", "nowhere", mentions=("nowhere", "does not exist"))
    refused("inspect", tmp_path, mentions=(f"{tmp_path} is no checkpoint", "manifest.json"))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{12")
    refused("inspect", "broken.safetensors", mentions=("broken.safetensors (11 bytes)", "truncated or damaged"))


# export


@pytest.fixture
def checkpoint(random_schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the random checkpoint, to be damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
    shutil.copytree(random_schnell, folder)
    return folder


@pytest.fixture
def export_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Runs `ditforge export` in this process (importing PyTorch takes seconds); fails if a network gets traced."""

    def traced(*args: object) -> None:
        pytest.fail("found out only after tracing began")

    def run(checkpoint: Path, *mentions: str | Path) -> None:
        monkeypatch.setattr(onnx_export, "export_network", traced)
        arguments = ["export", str(checkpoint), "--out", str(tmp_path / "onnx")]
        assert_error(run_here(arguments, monkeypatch, capfd), *mentions)
        assert os.listdir(tmp_path) == []

    return run


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.mark.parametrize("file", FILES)
def test_checkpoint_with_a_bad_file(export_refused, checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    folder = checkpoint if path.parent == checkpoint else path.parent
    whole = path.read_bytes()
    path.unlink()
    if path.name != "tokenizer_config.json":  # tokenizer.json has all that is needed
        export_refused(checkpoint, folder)
    for content in (b"", whole[: len(whole) // 2], bytes(range(256)) * 16):
        path.write_bytes(content)
        export_refused(checkpoint, folder)


@pytest.mark.parametrize("folder", ["scheduler", "text_encoder", "tokenizer", "tokenizer_2", "transformer", "vae"])
def test_checkpoint_without_a_folder(export_refused, checkpoint: Path, folder: str) -> None:
    shutil.rmtree(checkpoint / folder)
    export_refused(checkpoint, checkpoint / folder)


@pytest.mark.parametrize(
    ("file", "changes", "mentions"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, ("StableDiffusionPipeline", "FluxPipeline")),
        ("model_index.json", {"_class_name": ["a"]}, ("FluxPipeline",)),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, ("EulerDiscreteScheduler",)),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, ("use_karras_sigmas",)),
        ("scheduler/scheduler_config.json", {"shift": "much"}, ("shift",)),
        ("transformer/config.json", {"num_attention_heads": 4}, ("[72, 256]", "[96, 256]", "copy the folder")),
        ("transformer/config.json", {"num_layers": 2}, ("lacks the tensor transformer_blocks.1.",)),
        ("transformer/config.json", {"axes_dims_rope": [4, 8]}, ("transformer/config.json",)),
        ("transformer/config.json", {"in_channels": 128}, ("[72, 64]", "[72, 128]")),
        ("text_encoder/config.json", {"hidden_size": 45}, ("[190, 48]", "[190, 45]")),
        ("text_encoder/config.json", {"hidden_size": "wide"}, ("hidden_size",)),
        ("text_encoder/config.json", {"max_position_embeddings": 10}, ("[33, 48]", "[10, 48]")),
        ("text_encoder_2/config.json", {"d_model": 64}, ("[115, 56]", "[115, 64]")),
        ("vae/config.json", {"block_out_channels": [8, 16, 16, 32]}, ("[24, ", "[32, ")),
        ("vae/config.json", {"norm_num_groups": 5}, ("vae/config.json", "5")),
        ("vae/config.json", {"sample_size": "large"}, ("default_size",)),
    ],
)
def test_configuration_of_another_model(
    export_refused, checkpoint: Path, file: str, changes: dict[str, object], mentions: tuple[str, ...]
) -> None:
    edit(checkpoint / file, **changes)
    export_refused(checkpoint, *mentions)


def test_parts_of_two_checkpoints(export_refused, checkpoint: Path) -> None:
    wider = T5Config.from_pretrained(checkpoint / "text_encoder_2", d_model=64)
    T5EncoderModel(wider).save_pretrained(checkpoint / "text_encoder_2")
    export_refused(checkpoint, "prompt_embeds", "64", "text_encoder_2", "56", "transformer", "one checkpoint")


def test_pickled_weights(export_refused, checkpoint: Path) -> None:
    for path in checkpoint.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    export_refused(checkpoint, "model.bin", "pickled", "model.safetensors")


def test_sharded_checkpoint_without_a_shard(export_refused, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sharded")
    random_flux.schnell().transformer.save_pretrained(folder / "transformer", max_shard_size="500KB")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(shards) > 2
    checkpoint = random_flux.save_schnell(folder)
    shutil.rmtree(checkpoint / "transformer")
    shutil.move(folder / "transformer", checkpoint / "transformer")
    shard = checkpoint / "transformer" / shards[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    export_refused(checkpoint, shard, "truncated")
    shard.unlink()
    export_refused(checkpoint, shard, "missing", "copy the folder again")
    (checkpoint / "transformer" / index.name).write_text("{}")
    export_refused(checkpoint, index.name, "damaged")


def test_export_of_what_is_no_checkpoint(refused, schnell) -> None:
    refused("export", "nowhere", "--out", "onnx", mentions=("nowhere", "not a folder"))
    held = f"{schnell.onnx} holds ONNX graphs, and not a checkpoint"
    refused("export", schnell.onnx, "--out", "onnx", mentions=(held, f"fix:   ditforge build {schnell.onnx}"))
    readme = Path(__file__).parents[2] / "README.md"
    for command in (("export", readme, "--out", "onnx"), ("up", readme), ("plan", readme)):
        refused(*command, mentions=(f"{readme} is not a checkpoint", "fix:   give one of these; ditforge inspect "))


def test_unknown_precision(refused, random_schnell: Path) -> None:
    refused("export", random_schnell, "--out", "onnx", "--precision", "int3", mentions=("int3", "fp32, fp16, bf16"))


def test_ended_in_the_middle_of_an_export(random_schnell: Path, tmp_path: Path) -> None:
    running = popen("export", random_schnell, "--out", "onnx", cwd=tmp_path)
    try:
        eventually(lambda: os.listdir(tmp_path))  # the temporary folder
        running.terminate()
        _, err = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []
