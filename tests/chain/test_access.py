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
    openssl("x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days -1 -out expired.pem")
    (folder / "token").write_text("a-secret\n")
    (folder / "words").write_text("a secret")
    (folder / "umlaut").write_text("geheimnü")
    (folder / "lines").write_text("one\ntwo\n")
    (folder / "damaged.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
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
        assert ask(server.url, tls, "Bearer a-secret").name == "add"
        for token in ("", "Bearer another", "a-secret", "Bearer a-secret "):
            with pytest.raises(grpc.RpcError) as caught:
                ask(server.url, tls, token)
            assert "this server wants a token" in said(caught.value, "UNAUTHENTICATED")
        assert ask(server.url, tls, method="ServerReady").ready  # load balancers have no token
        for stranger in (None, grpc.ssl_channel_credentials()):  # in clear text; with the public authorities
            with pytest.raises(grpc.RpcError):
                ask(server.url, stranger, "Bearer a-secret")


def test_clients_with_certificates(repository: Path, keys: Path) -> None:
    ca, key, cert = ((keys / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))
    files = {"tls_cert": keys / "server.pem", "tls_key": keys / "server.key", "tls_client_ca": keys / "ca.pem"}
    with start(repository, port=0, host="0.0.0.0", **files) as server:  # type: ignore[arg-type]
        assert ask(server.url, grpc.ssl_channel_credentials(ca, key, cert)).name == "add"
        with pytest.raises(grpc.RpcError):
            ask(server.url, grpc.ssl_channel_credentials(ca))


def test_ports_of_zero_do_not_clash(repository: Path) -> None:
    with start(repository, port=0, http_port=0, metrics_port=0) as server:
        assert len({server.ports.grpc, server.ports.http, server.ports.metrics}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "anyone who reaches 0.0.0.0 could use this server(.|\n)*insecure=True"),
        ({"host": "0.0.0.0", "token_file": "token"}, "anyone who reaches 0.0.0.0 could use"),  # it would be overheard
        ({"tls_cert": "server.pem"}, 'there is a TLS certificate, but no key(.|\n)*tls_key="FILE"'),
        ({"tls_key": "server.key"}, 'there is a TLS key, but no certificate(.|\n)*tls_cert="FILE"'),
        ({"tls_client_ca": "ca.pem"}, "over TLS only"),
        ({"token_file": "token", "http_port": 0}, "neither TLS nor tokens"),
        ({"token_file": "nothing"}, "cannot read .*nothing: No such file"),
        (
            {"token_file": "words"},
            'the token in .*words is not one word of visible ASCII(.|\n)*openssl rand(.|\n)*token_file="FILE"',
        ),
        ({"token_file": "umlaut"}, "the token in .*umlaut is not one word of visible ASCII"),
        ({"token_file": "lines"}, "the token in .*lines is not one word of visible ASCII"),
        (
            {"tls_cert": "server.key", "tls_key": "server.pem"},
            r"the TLS certificate .*server.key holds a key, and the TLS key .*server.pem a certificate\n"
            r"fix: .*tls_cert=\"\S*server.pem\", tls_key=\"\S*server.key\"",
        ),
        (
            {"tls_cert": "client.key", "tls_key": "server.key"},
            "client.key should hold a certificate .*, and holds a key",
        ),
        (
            {"tls_cert": "server.pem", "tls_key": "client.pem"},
            "client.pem should hold a private key .* a certificate\n",
        ),
        ({"tls_cert": "names", "tls_key": "names"}, "names should hold a certificate in PEM, and holds none"),
        ({"tls_cert": "damaged.pem", "tls_key": "server.key"}, "the TLS certificate .*damaged.pem is damaged: "),
        ({"tls_cert": "expired.pem", "tls_key": "server.key"}, "expired.pem cannot be used: certificate has expired"),
        ({"tls_cert": "server.pem", "tls_key": "encrypted.key"}, "is encrypted(.|\n)*openssl pkey -in"),
        (
            {"tls_cert": "server.pem", "tls_key": "client.key"},
            "client.key does not belong to the certificate .*server.pem",
        ),
        (
            {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "names"},
            "names should hold a certificate",
        ),
        (
            {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.key"},
            "ca.key should .* holds a key",
        ),
        ({"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "damaged.pem"}, "damaged.pem is damaged"),
        ({"port": -1}, r"port must be an integer from 0 to 65535, .*, got -1\nfix: .*port=8001"),
        ({"http_port": 99999}, r"http_port .* from 0 to 65535, .*, got 99999\nfix: .*http_port=8000"),
        ({"metrics_port": 1 << 16}, r"metrics_port .* from 0 to 65535, .*, got 65536\nfix: .*metrics_port=8002"),
        ({"port": 9001, "http_port": 9001}, "port and http_port are both 9001\nfix: .*http_port=9002"),
        ({"port": 9001, "metrics_port": 9001}, "port and metrics_port are both 9001\nfix: .*metrics_port=9002"),
        ({"http_port": 65535, "metrics_port": 65535}, "http_port and metrics_port are both 65535\nfix: .*=65534"),
        ({"grace": float("nan")}, "grace .* from 0 to 604800 seconds, got nan\nfix: .*grace=30"),
        ({"grace": 1e300}, "grace .* from 0 to 604800 seconds, got 1e"),
        (
            {"timeout": -1},
            r"timeout .* above 0 and up to 604800 seconds, got -1\nfix: .*timeout=600",
        ),
        ({"shm_bytes": 0}, "shm_bytes must be greater than 0, got 0"),
        ({"prot": 8001}, "there is no option 'prot'\nfix: .*port=…; the options are host, port, "),
    ],
)
def test_options_that_cannot_be(repository: Path, keys: Path, options: dict[str, Any], words: str) -> None:
    options = {k: keys / v if isinstance(v, str) and k != "host" else v for k, v in options.items()}
    with pytest.raises(UserError, match=words):
        start(repository, **{"port": 0, **options})


def test_the_command_line_says_so(repository: Path, tmp_path: Path) -> None:
    result = ditforge("serve", repository, "--host", "0.0.0.0", "--port", "0", cwd=tmp_path)
    assert_error(result, "anyone who reaches 0.0.0.0", "--tls-cert FILE", "--insecure")
