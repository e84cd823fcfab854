"""What a client is told of its servers: defaults, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio
import pickle
import re
import subprocess
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_error, run_here
from proxy import make_certificates

from ditforge.client import TLS, AsyncClient, Client
from ditforge.client.option import TOKEN
from ditforge.client.options import GenerateOptions, Options
from ditforge.client.settings import ConnectionSettings, Settings, make_settings
from ditforge.credentials import read_token
from ditforge.errors import UserError


def test_defaults() -> None:
    settings = make_settings("localhost:8001")
    assert settings == ConnectionSettings()
    times = settings.timeout, settings.connect_timeout, settings.step_timeout, settings.retry_timeout
    assert times == (1800, 10, 300, 60)
    assert settings.metadata() == {}


def test_addresses() -> None:
    assert make_settings("a:1").urls == ("a:1",)
    assert make_settings(["a:1", "b:2"]).urls == ("a:1", "b:2")
    assert make_settings(("[::1]:8001",)).urls == ("[::1]:8001",)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ([], "no server"),
        (["a:1", "http://b:2"], "'http://b:2' is not HOST:PORT"),
        (["a:1", "b:2", "a:1"], "a:1 is named more than once"),
        ([1], "addresses are strings"),
    ],
)
def test_addresses_that_are_none(url: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Client(url)


@pytest.mark.parametrize(
    ("url", "problem", "meant"),
    [
        ("a", "the port is missing", ["a:8001"]),
        ("http://a:1", "written without http://", ["a:1"]),
        ("https://a/", "written without https://", ["a:8001"]),
        ("grpc://a:1/b", "written without grpc://", ["a:1"]),
        ("a:1/", "a path", ["a:1"]),
        ("a:1,b:2", "each address is given by itself", ["a:1", "b:2"]),
        ("a:1, b", "each address is given by itself", ["a:1", "b:8001"]),
        (" a:1\n", "white space around it", ["a:1"]),
        ("::1", "in brackets", ["[::1]:8001"]),
        ("[::1]", "in brackets", ["[::1]:8001"]),
        ("::1:8002", "in brackets", ["[::1]:8002"]),
        ("a:99999", "from 1 to 65535, got '99999'", ["a:8001"]),
        ("a:0", "from 1 to 65535, got '0'", ["a:8001"]),
        ("a:", "from 1 to 65535, got ''", ["a:8001"]),
        ("a b:1", "white space or a control character", None),
        ("a\nb:1", "white space or a control character", None),
        ("a\x1b[31m:1", "white space or a control character", None),
        ("a\0:1", "white space or a control character", None),
        ("\u202ea:1", "white space or a control character", None),
        ("unix:///tmp/socket", "Unix sockets are not supported", None),
        ("unix:socket", "Unix sockets are not supported", None),
        (":1", "the host is missing", None),
        ("", "the port is missing", None),
        ("me@a:1", "no name of a host", None),
        ("[::g]:1", "no name of a host", None),
        ("a:b:1", "no name of a host", None),
        ("http://" * 1000, "7000 characters", None),
    ],
)
def test_address_that_is_none_is_corrected(url: str, problem: str, meant: list[str] | None) -> None:
    with pytest.raises(UserError, match="is not HOST:PORT of a gRPC server: ") as caught:
        Client(url)
    assert problem in caught.value.problem
    assert str(caught.value).replace("\n", "").isprintable()
    addresses = ["localhost:8001"] if meant is None else meant
    assert re.findall(r'"(\S+)"', caught.value.fix) == addresses
    make_settings(addresses)


@pytest.mark.parametrize("name", ["timeout", "connect_timeout", "step_timeout", "retry_timeout", "keepalive_timeout"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "10", True, None, 1e9])
def test_seconds_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=f"^{name} must be (from 0 to|above 0 and at most) 604800 seconds, got "
    ) as caught:
        make_settings("a:1", **{name: value})
    assert caught.value.fix.startswith(f"{name}=")


def test_zero_seconds() -> None:
    assert make_settings("a:1", retry_timeout=0).retry_timeout == 0
    for name in ("timeout", "connect_timeout", "step_timeout", "keepalive"):
        with pytest.raises(UserError, match="above 0"):
            make_settings("a:1", **{name: 0})


def test_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="there is no option 'step_timout'") as caught:
        Client("a:1", step_timout=1)  # type: ignore[call-arg]
    assert caught.value.fix.startswith("step_timeout=…; ")

    async def connect() -> None:
        async with AsyncClient("a:1", toekn="x"):  # type: ignore[call-arg]
            pass

    with pytest.raises(UserError, match="there is no option 'toekn'"):
        asyncio.run(connect())


def test_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret.a-b_c==\n")
    assert read_token(file, TOKEN) == "s3cret.a-b_c=="
    settings = make_settings("a:1", token="s3cret")
    assert settings.metadata() == {"authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", "schlüssel".encode(), b"a\nb", b"\xff"])
def test_token_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(UserError, match="token") as caught:
        read_token(file, TOKEN)
    assert 'token="…"' in caught.value.fix
    text = content.decode(errors="replace").strip()
    assert not text or text not in str(caught.value)


def test_token_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the token in .*nowhere"):
        read_token(tmp_path / "nowhere", TOKEN)


def test_headers() -> None:
    given: dict[str, str | bytes] = {
        "x-team": "red team",
        "x_1.y": "",
        "trace-bin": b"\xff\0",
        "authorization": "Basic YTpi",
    }
    settings = make_settings("a:1", headers=given)
    assert settings.headers == settings.metadata() == given
    assert settings == make_settings("a:1", headers=dict(given)) != make_settings("a:1")
    assert "YTpi" not in repr(settings)
    assert hash(settings) == hash(replace(settings))
    given["x-team"] = "blue\n"  # which is not what the settings have
    assert settings.headers["x-team"] == "red team"


@pytest.mark.parametrize(
    ("headers", "problem", "fix"),
    [
        ({"X-Team": "s3cret"}, "lower-case letters.*, got 'X-Team'", 'headers={"x-team": "…"}'),
        ({"": "s3cret"}, "got ''", 'headers={"name": "value"}'),
        ({"a b": "s3cret"}, "got 'a b'", "headers={"),
        ({"ä": "s3cret"}, "got 'ä'", "headers={"),
        ({":path": "s3cret"}, "got ':path'", "headers={"),
        ({1: "s3cret"}, "got 1", "headers={"),
        ({"grpc-timeout": "s3cret"}, "grpc-timeout is sent by the client itself", "leave out grpc-timeout"),
        ({"user-agent": "s3cret"}, "user-agent is sent by the client itself", "leave out"),
        ({"ditforge-picture": "s3cret"}, "ditforge-picture is sent by the client itself", "leave out"),
        ({"a": "s3cret\n"}, "a has a value that is not visible ASCII", "name-bin"),
        ({"a": "s3crét"}, "a has a value that is not visible ASCII", "name-bin"),
        ({"a": " s3cret"}, "white space around its value", "headers={"),
        ({"a": b"s3cret"}, "the header a takes a string", "name-bin"),
        ({"a-bin": "s3cret"}, "the header a-bin takes bytes", "name-bin"),
        ([("a", "s3cret")], "headers is a mapping of names to values, got a list", "headers={"),
    ],
)
def test_headers_that_cannot_be_sent(headers: Any, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        make_settings("a:1", headers=headers)
    assert fix in caught.value.fix
    assert "s3c" not in str(caught.value)


def test_a_token_and_a_header_authorization() -> None:
    with pytest.raises(UserError, match="a token and a header authorization"):
        make_settings("a:1", token="a", headers={"authorization": "Basic YTpi"})


def test_ready_settings() -> None:
    assert deepcopy(make_settings("a:1")) == pickle.loads(pickle.dumps(make_settings("a:1"))) == make_settings("a:1")
    ready = make_settings(["a:1", "b:2"], timeout=5)
    assert make_settings(ready) is ready
    changed = make_settings(ready, token="a")
    assert (changed.urls, changed.timeout, changed.token) == (ready.urls, 5, "a")
    with pytest.raises(UserError, match="timeout must be"):
        make_settings(ready, timeout=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and keys, by openssl; encrypted.key is client.key with a password, der is no PEM."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    encrypt = ("openssl", "pkey", "-in", "client.key", "-aes128", "-passout", "pass:secret", "-out", "encrypted.key")
    subprocess.run(encrypt, cwd=folder, check=True, capture_output=True)
    (folder / "der").write_bytes(b"0\x82\x03")
    (folder / "damaged.pem").write_text((folder / "client.pem").read_text().replace("M", "N", 5))
    (folder / "damaged.key").write_text((folder / "client.key").read_text().replace("M", "N", 5))
    (folder / "both.pem").write_text((folder / "client.pem").read_text() + (folder / "client.key").read_text())
    return folder


def test_tls_files(files: Path) -> None:
    assert TLS().read("ca") is None
    tls = TLS(files / "ca.pem", str(files / "client.pem"), files / "client.key")
    assert tls.read("certificate") == (files / "client.pem").read_bytes().strip()
    assert replace(tls, ca=None).ca is None
    TLS(certificate=files / "both.pem", key=files / "both.pem")
    with pytest.raises(UserError, match="tls=TLS"):
        replace(ConnectionSettings(), tls=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "problem", "fixed"),
    [
        ({"ca": "der"}, r"ca \S*der should hold a certificate in PEM, and holds none", ["ca"]),
        ({"ca": "nowhere"}, r"cannot read the TLS ca \S*nowhere: No such file", ["ca"]),
        ({"ca": "ca.key"}, r"ca \S*ca\.key should hold a certificate in PEM, and holds a key", ["ca"]),
        ({"ca": "damaged.pem"}, r"ca \S*damaged\.pem is damaged", ["ca"]),
        ({"key": "client.key"}, "a TLS key, but no certificate", ["certificate"]),
        ({"certificate": "client.pem"}, "a TLS certificate, but no key", ["key"]),
        (
            {"certificate": "client.key", "key": "client.pem"},
            r"certificate \S*client\.key holds a key, and the TLS key \S*client\.pem a certificate",
            ["certificate", "key"],
        ),
        (
            {"certificate": "client.key", "key": "client.key"},
            r"certificate \S*client\.key should hold",
            ["certificate"],
        ),
        ({"certificate": "damaged.pem", "key": "client.key"}, r"certificate \S*damaged\.pem is dam", ["certificate"]),
        ({"certificate": "client.pem", "key": "client.pem"}, r"key \S*client\.pem should hold a pr", ["key"]),
        ({"certificate": "client.pem", "key": "damaged.key"}, r"key \S*damaged\.key cannot be used", ["key"]),
        (
            {"certificate": "client.pem", "key": "server.key"},
            r"key \S*server\.key does not belong to the certificate \S*client\.pem",
            ["certificate", "key"],
        ),
        ({"certificate": "client.pem", "key": "encrypted.key"}, r"key \S*encrypted\.key is encrypted", ["key"]),
    ],
)
def test_tls_files_that_cannot_be_used(files: Path, named: dict[str, str], problem: str, fixed: list[str]) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        TLS(**{name: files / file for name, file in named.items()})
    assert re.findall(r"\w+(?==\")", caught.value.fix) == fixed
    assert "tls=TLS(" in caught.value.fix  # as Python has it


def test_tls_has_no_other_files() -> None:
    with pytest.raises(UserError, match=r"no option 'cafile'\nfix: .*the options are ca, certificate, key"):
        TLS(cafile="ca.pem")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (
            ("--step-timeout", "0"),
            ("--step-timeout must be above 0 and at most 604800 seconds, got 0", "--step-timeout 300"),
        ),
        (("--timeout", "nan"), ("--timeout must be above 0", "got nan", "--timeout 1800")),
        (("--url", "a:1", "--url", "a:1"), ("a:1", "more than once")),
        (("--url", "a:1", "--url", "b"), ("'b' is not HOST:PORT",)),
        (("--token-file", "nowhere"), ("nowhere", "--token-file")),
        (("--tls-ca", "nowhere.pem"), ("nowhere.pem", "--tls-ca")),
        (("--tls-key", pytest.__file__), ("--tls-cert", "no certificate")),
        (("--keepalive", "0"), ("--keepalive must be", "got 0", "--keepalive 10")),
        (("--header", "x-team"), ("'x-team'", "NAME:VALUE", "--header name:value")),
        (("--header", "X-Team: a"), ("lower-case", "'X-Team'", "--header x-team:…")),
        (("--header", "a:1", "--header", "a:2"), ("header a", "twice")),
        (("--header", "a-bin:_"), ("a-bin", "base64")),
    ],
)
def test_command_line(
    arguments: tuple[str, ...],
    mentions: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert_error(run_here(["generate", "a", *arguments], monkeypatch, capfd), *mentions)


def test_help_says_what_each_setting_and_option_means() -> None:
    options = f"{GenerateOptions.__doc__}\n{Client.generate.__doc__}"
    for documented, known in ((Client.__doc__ or "", Settings), (options, Options)):
        lines = [line.strip() for line in documented.splitlines()]
        explained = {name for line in lines for name in re.match(r"([\w, ]*)", line.partition(" (")[0])[0].split(", ")}
        assert set(known.__annotations__) <= explained
    assert "callback: " in str(Client.generate.__doc__)
