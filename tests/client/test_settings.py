"""What a client is told of its servers: defaults, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_error, run_here

from ditforge.client import TLS, AsyncClient, Client
from ditforge.client.settings import ConnectionSettings, make_settings, read_token
from ditforge.errors import UserError

PEM = "-----BEGIN CERTIFICATE-----\n"


def test_defaults() -> None:
    settings = make_settings("localhost:8001")
    assert settings == ConnectionSettings()
    times = settings.timeout, settings.connect_timeout, settings.step_timeout, settings.retry_timeout
    assert times == (1800, 10, 300, 60)
    assert settings.headers() == {}


def test_addresses() -> None:
    assert make_settings("a:1").urls == ("a:1",)
    assert make_settings(["a:1", "b:2"]).urls == ("a:1", "b:2")
    assert make_settings(("[::1]:8001",)).urls == ("[::1]:8001",)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ([], "no server"),
        ("a", "'a' is not HOST:PORT"),
        (["a:1", "http://b:2"], "'http://b:2' is not HOST:PORT"),
        (["a:1", "b:2", "a:1"], "a:1 is named more than once"),
        ([1], "addresses are strings"),
    ],
)
def test_addresses_that_are_none(url: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Client(url)


@pytest.mark.parametrize("name", ["timeout", "connect_timeout", "step_timeout", "retry_timeout", "keepalive_timeout"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "10", True, None, 1e9])
def test_seconds_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name} must be from .* seconds, got ") as caught:
        make_settings("a:1", **{name: value})
    assert caught.value.fix.startswith(f"--{name.replace('_', '-')} ")


def test_zero_seconds() -> None:
    assert make_settings("a:1", retry_timeout=0).retry_timeout == 0
    for name in ("timeout", "connect_timeout", "step_timeout", "keepalive"):
        with pytest.raises(UserError, match="above 0"):
            make_settings("a:1", **{name: 0})


def test_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="there is no setting 'step_timout'") as caught:
        Client("a:1", step_timout=1)  # type: ignore[call-arg]
    assert caught.value.fix == "step_timeout=…"

    async def connect() -> None:
        async with AsyncClient("a:1", toekn="x"):  # type: ignore[call-arg]
            pass

    with pytest.raises(UserError, match="there is no setting 'toekn'"):
        asyncio.run(connect())


def test_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret.a-b_c==\n")
    assert read_token(file) == "s3cret.a-b_c=="
    assert read_token(None) is None
    settings = make_settings("a:1", token="s3cret")
    assert settings.headers() == {"authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", "schlüssel".encode(), b"a\nb", b"\xff"])
def test_token_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(UserError, match="token") as caught:
        read_token(file)
    assert "--token-file" in caught.value.fix
    text = content.decode(errors="replace").strip()
    assert not text or text not in str(caught.value)


def test_token_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the token in .*nowhere"):
        read_token(tmp_path / "nowhere")


def test_tls_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    good.write_text(PEM)
    bad.write_bytes(b"0\x82\x03")
    assert TLS().read("ca") is None
    assert TLS(good, str(good), good).read("certificate") == PEM.encode()
    with pytest.raises(UserError, match=r"ca .*bad\.pem is not in PEM"):
        TLS(ca=bad)
    with pytest.raises(UserError, match=r"cannot read the TLS key .*nowhere: No such file"):
        TLS(certificate=good, key=tmp_path / "nowhere")
    with pytest.raises(UserError, match="a TLS key, but no certificate"):
        TLS(key=good)
    with pytest.raises(UserError, match="a TLS certificate, but no key"):
        TLS(certificate=good)
    with pytest.raises(UserError, match="tls=TLS"):
        replace(ConnectionSettings(), tls=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--step-timeout", "0"), ("step_timeout", "got 0", "--step-timeout 300")),
        (("--timeout", "nan"), ("timeout", "got nan", "--timeout 1800")),
        (("--url", "a:1", "--url", "a:1"), ("a:1", "more than once")),
        (("--url", "a:1", "--url", "b"), ("'b' is not HOST:PORT",)),
        (("--token-file", "nowhere"), ("nowhere", "--token-file")),
        (("--tls-ca", "nowhere.pem"), ("nowhere.pem", "--tls-ca")),
        (("--tls-key", pytest.__file__), ("--tls-key", "not in PEM")),
    ],
)
def test_command_line(
    arguments: tuple[str, ...],
    mentions: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert_error(run_here(["generate", "a", *arguments], monkeypatch, capfd), *mentions)
