"""Who is let in: TLS, certificates of clients, tokens, and addresses other than loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from command_line import assert_error, ditforge
from hostile import said
from python_models import ADD_ONE, write_models
from tritonclient.grpc import service_pb2 as pb, service_pb2_grpc

from ditforge.errors import UserError
from ditforge.triton_repo.server import start

ASK = pb.ModelMetadataRequest(name="add")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("access") / "repo", add=ADD_ONE)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates as openssl(1) makes them: an authority, the server's for localhost, a client's; and a token."""
    folder = tmp_path_factory.mktemp("keys")

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    new = "-newkey rsa:2048 -nodes"
    openssl(f"req -x509 {new} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(f"req {new} -keyout {name}.key -out {name}.csr -subj /CN={name}")
        signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names"
        openssl(f"x509 -req -in {name}.csr {signed} -out {name}.pem")
    openssl("pkey -in server.key -aes128 -passout pass:secret -out encrypted.key")
    (folder / "token").write_text("a secret\n")
    return folder


def ask(url: str, credentials: grpc.ChannelCredentials | None, token: str = "", method: str = "ModelMetadata") -> Any:
    """Ask a server something with these credentials."""
    channel = grpc.insecure_channel(url) if credentials is None else grpc.secure_channel(url, credentials)
    metadata = [("authorization", token)] if token else []
    with channel:
        asked = ASK if method == "ModelMetadata" else pb.ServerReadyRequest()
        return getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), method)(asked, timeout=20, metadata=metadata)


def test_tls_and_a_token(repository: Path, keys: Path) -> None:
    tls = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
    files = {"tls_cert": keys / "server.pem", "tls_key": keys / "server.key", "token_file": keys / "token"}
    with start(repository, port=0, **files) as server:  # type: ignore[arg-type]
        assert ask(server.url, tls, "Bearer a secret").name == "add"
        for token in ("", "Bearer another", "a secret", "Bearer a secret "):
            with pytest.raises(grpc.RpcError) as caught:
                ask(server.url, tls, token)
            assert "this server wants a token" in said(caught.value, "UNAUTHENTICATED")
        assert ask(server.url, tls, method="ServerReady").ready  # load balancers have no token
        for stranger in (None, grpc.ssl_channel_credentials()):  # in clear text; with the public authorities
            with pytest.raises(grpc.RpcError):
                ask(server.url, stranger, "Bearer a secret")


def test_clients_with_certificates(repository: Path, keys: Path) -> None:
    ca, key, cert = ((keys / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
    files = {"tls_cert": keys / "server.pem", "tls_key": keys / "server.key", "tls_client_ca": keys / "ca.pem"}
    with start(repository, port=0, host="0.0.0.0", **files) as server:  # type: ignore[arg-type]
        assert ask(server.url, grpc.ssl_channel_credentials(ca, key, cert)).name == "add"
        with pytest.raises(grpc.RpcError):
            ask(server.url, grpc.ssl_channel_credentials(ca))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "anyone who reaches 0.0.0.0 could use this server(.|\n)*--insecure"),
        ({"host": "0.0.0.0", "token_file": "token"}, "anyone who reaches 0.0.0.0 could use"),  # it would be overheard
        ({"tls_cert": "server.pem"}, "a certificate and its key go together"),
        ({"tls_client_ca": "ca.pem"}, "over TLS only"),
        ({"token_file": "token", "http_port": 0}, "neither TLS nor tokens"),
        ({"token_file": "nothing"}, "cannot read .*nothing: No such file"),
        ({"token_file": "names", "tls_cert": "names", "tls_key": "names"}, "names is no certificate in PEM, or"),
        ({"tls_cert": "server.pem", "tls_key": "encrypted.key"}, "is encrypted(.|\n)*openssl pkey -in"),
        ({"tls_cert": "server.pem", "tls_key": "client.key"}, "client.key is not its key: KEY_VALUES_MISMATCH"),
        ({"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "names"}, "holds no certificate in PEM"),
        ({"port": -1}, "port=-1"),
        ({"grace": float("nan")}, "grace=nan"),
        ({"prot": 8001}, "prot=8001(.|\n)*options: repo, host, port"),
    ],
)
def test_options_that_cannot_be(repository: Path, keys: Path, options: dict[str, Any], words: str) -> None:
    options = {k: keys / v if isinstance(v, str) and k != "host" else v for k, v in options.items()}
    with pytest.raises(UserError, match=words):
        start(repository, **{"port": 0, **options})


def test_the_command_line_says_so(repository: Path, tmp_path: Path) -> None:
    result = ditforge("serve", repository, "--host", "0.0.0.0", "--port", "0", cwd=tmp_path)
    assert_error(result, "anyone who reaches 0.0.0.0", "--tls-cert FILE", "--insecure")
