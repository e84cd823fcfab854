"""TLS and mutual TLS, which nginx ends before the server: by files, and what is said where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import assert_error, ditforge
from proxy import make_certificates, nginx

from ditforge.client import TLS, Client
from ditforge.errors import UserError
from ditforge.triton_repo.server import Server

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
                with pytest.raises(UserError, match="signed by nobody that is trusted here") as caught:
                    Client(url, tls=tls)
                assert "--tls-ca" in caught.value.fix
        with pytest.raises(UserError, match="certificate is for another name"):
            Client(url.replace("127.0.0.1", "localhost"), tls=TLS(ca))
        with pytest.raises(UserError) as caught:
            Client(url)
        assert "--tls" in caught.value.fix
    with nginx(tmp_path / "mutual", upstream, certificates=files, mutual=True) as url:
        with Client(url, tls=TLS(ca, *pair)) as client:
            assert client.generate("a", **SMALL).tobytes() == alone
        with pytest.raises(UserError) as caught:
            Client(url, tls=TLS(ca))
        assert "--tls-cert" in caught.value.fix
        with pytest.raises(UserError, match="the files are damaged, or no pair"):
            Client(url, tls=TLS(ca, pair[0], files / "server.key"))
        options = ("--tls-ca", ca, "--tls-cert", pair[0], "--tls-key", pair[1], "--seed", "0", "--out", "a.png")
        assert ditforge("generate", "a", "--url", url, *options, cwd=tmp_path).code == 0
        refused = ditforge("generate", "a", "--url", url, "--tls-ca", files / "other-ca.pem", cwd=tmp_path)
        assert_error(refused, url, "signed by nobody", "--tls-ca")
    with pytest.raises(UserError, match="it speaks no TLS"):
        Client(schnell_server.url, tls=TLS(ca))
