"""TLS and mutual TLS, which nginx ends before the server: by files, and what is said where they are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from both_clients import InLoop, connections
from command_line import PATIENCE, assert_error, ditforge, eventually
from proxy import make_certificates, nginx
from python_models import ADD_ONE, write_models

from ditforge.client import TLS, Client, ConnectionSettings
from ditforge.client.blocking import Blocking
from ditforge.client.transport import Channel
from ditforge.errors import UserError
from ditforge.triton_repo.server import Server, start

SMALL = {"height": 32, "width": 48, "seed": 0}


def test_tls(schnell_server: Server, tmp_path: Path) -> None:
    files = tmp_path / "tls"
    files.mkdir()
    make_certificates(files)
    ca, pair = files / "ca.pem", (files / "client.pem", files / "client.key")
    upstream = [schnell_server.url]
    with Client(schnell_server.url) as client:
        alone = client.generate("a", **SMALL).tobytes()
    with nginx(tmp_path / "tls-only", upstream, certificates=files) as url:
        with Client(url, tls=TLS(ca)) as client:
            assert client.generate("a", **SMALL).tobytes() == alone
            for tls in (TLS(files / "other-ca.pem"), TLS()):  # while the first one's channel is open
                trusted = "the certificates in .*other-ca.pem" if tls.ca else "the public authorities that gRPC brings"
                unknown = f"signed by nobody that is trusted here .{trusted}.: unable to get local issuer certificate$"
                with pytest.raises(UserError) as caught:
                    Client(url, tls=tls)
                assert re.search(unknown, caught.value.problem)
                assert "tls=TLS(ca=" in caught.value.fix
        with pytest.raises(UserError, match="certificate is for another name"):
            Client(url.replace("127.0.0.1", "localhost"), tls=TLS(ca))
        with pytest.raises(UserError, match=f"{url} wants an encrypted connection, and this one is not") as caught:
            Client(url)
        assert "tls=TLS()" in caught.value.fix
    with nginx(tmp_path / "mutual", upstream, certificates=files, mutual=True) as url:
        with Client(url, tls=TLS(ca, *pair)) as client:
            assert client.generate("a", **SMALL).tobytes() == alone
        with pytest.raises(UserError, match=r"wants a certificate of the client .*, and was shown none") as caught:
            Client(url, tls=TLS(ca))
        assert "tls=TLS(certificate=" in caught.value.fix
        options = ("--tls-ca", ca, "--tls-cert", pair[0], "--tls-key", pair[1], "--seed", "0", "--out", "a.png")
        assert ditforge("generate", "a", "--url", url, *options, cwd=tmp_path).code == 0
        refused = ditforge("generate", "a", "--url", url, "--tls-ca", files / "other-ca.pem", cwd=tmp_path)
        assert_error(refused, url, "signed by nobody", "--tls-ca")
    with pytest.raises(UserError, match="it speaks no TLS"):
        Client(schnell_server.url, tls=TLS(ca))


# ditforge's own servers, which end a connection without a word where TLS is not agreed on


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    (folder / "token").write_text("s3cret")
    return folder


@pytest.fixture(scope="module")
def serve(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server of some model, with files by the names of the server's options."""
    repository = write_models(tmp_path_factory.mktemp("tls") / "repo", add=ADD_ONE)
    servers: list[Server] = []

    def begin(**options: str) -> Server:
        certificate = {"tls_cert": files / "server.pem", "tls_key": files / "server.key"}
        others = {name: files / file for name, file in options.items()}
        servers.append(start(repository, port=0, **certificate, **others))  # type: ignore[arg-type]
        return servers[-1]

    yield begin
    for server in servers:
        server.stop(grace=0)


def refusal(url: str, **settings: Any) -> UserError:
    """What Client says, and AsyncClient too."""
    with pytest.raises(UserError) as caught:
        Client(url, **settings)
    with pytest.raises(UserError) as the_same:
        InLoop(url, **settings)
    assert str(caught.value) == str(the_same.value)
    assert len(caught.value.problem.splitlines()) == 1
    return caught.value


def test_server_with_tls_and_a_token(serve: Callable[..., Server], files: Path) -> None:
    url, tls = serve(token_file="token").url, TLS(files / "ca.pem")
    plain = refusal(url, token="s3cret")
    assert plain.problem == f"{url} wants an encrypted connection, and this one is not"
    assert "tls=TLS()" in plain.fix
    without = refusal(url, tls=tls)
    assert without.problem == f"the server at {url} wants a token, and none was sent"
    another = refusal(url, tls=tls, token="s3kret")
    assert another.problem == f"the server at {url} refused this token"
    for error in (without, another):
        assert 'token="…"' in error.fix
    assert "has no model text_encoders: it has add" in refusal(url, tls=tls, token="s3cret").problem  # let in


def test_server_with_clients_certificates(serve: Callable[..., Server], files: Path) -> None:
    url, ca = serve(tls_client_ca="ca.pem").url, files / "ca.pem"
    plain = refusal(url)
    assert plain.problem == f"{url} wants an encrypted connection, and a certificate of the client (mutual TLS)"
    assert re.findall(r"\w+(?==\")", plain.fix) == ["ca", "certificate", "key"]
    without = refusal(url, tls=TLS(ca))
    assert without.problem == f"{url} wants a certificate of the client (mutual TLS), and was shown none"
    assert re.findall(r"\w+(?==\")", without.fix) == ["certificate", "key"]
    stranger = refusal(url, tls=TLS(ca, files / "other-ca.pem", files / "other-ca.key"))
    assert re.match(f"{url} does not accept the certificate that it was shown, .*other-ca.pem$", stranger.problem)
    let_in = refusal(url, tls=TLS(ca, files / "client.pem", files / "client.key"))
    assert "has no model text_encoders: it has add" in let_in.problem


def test_clients_of_the_same_settings_share_encrypted_connections(serve: Callable[..., Server], files: Path) -> None:
    server = serve(token_file="token")
    settings = ConnectionSettings((server.url,), tls=TLS(files / "ca.pem"), token="s3cret")
    channels: list[Channel] = []
    for used, count in ((settings, 1), (settings, 1), (replace(settings), 2)):
        channels.append(Blocking().open(server.url, used))
        pending = channels[-1].begin("ServerLive", b"", PATIENCE, used.metadata())
        assert pending.wait(PATIENCE) and pending.result()
        assert connections(server.url) == count
    for channel in channels[1:]:
        channel.close()
    eventually(lambda: connections(server.url) == 1)
    channels[0].close()
    eventually(lambda: connections(server.url) == 0)


def test_tls_at_a_server_without(schnell_server: Server) -> None:
    error = refusal(schnell_server.url, tls=TLS())
    assert error.problem == f"no encrypted connection to {schnell_server.url}: it speaks no TLS"
    assert "tls=None" in error.fix
