"""nginx before several servers, as one address of gRPC, with TLS where it is asked for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from replicas import lasting_port

CONFIG = """
daemon off;
worker_processes 1;
pid pid;
{user}
events {{}}
http {{
  access_log off;
  client_body_temp_path bodies; proxy_temp_path a; fastcgi_temp_path b; uwsgi_temp_path c; scgi_temp_path d;
  upstream replicas {{ {replicas} }}
  server {{
    listen 127.0.0.1:{port} http2 {ssl};
    client_max_body_size 0;
    grpc_read_timeout 300s;
    {tls}
    location / {{ grpc_pass grpc://replicas; }}
  }}
}}
"""
TLS = """
    ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
    ssl_client_certificate {folder}/ca.pem; ssl_verify_client {verify};
"""


@contextmanager
def nginx(folder: Path, urls: Sequence[str], certificates: Path | None = None, mutual: bool = False) -> Iterator[str]:
    """The address (HOST:PORT) of an nginx that passes calls on to `urls` in turn, with its files in `folder`."""
    folder.mkdir()
    command = shutil.which("nginx")
    if command is None:
        pytest.skip("apt install nginx")
    port = lasting_port()
    tls = TLS.format(folder=certificates, verify="on" if mutual else "off") if certificates else ""
    user = "user root;" if os.geteuid() == 0 else ""  # so that its worker can write into the tests' folder
    replicas = " ".join(f"server {url};" for url in urls)
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(user=user, replicas=replicas, port=port, ssl="ssl" if tls else "", tls=tls))
    log = folder / "error.log"
    running = subprocess.Popen([command, "-p", folder, "-c", config, "-e", log])
    try:
        until = time.monotonic() + 30
        while True:
            assert running.poll() is None and time.monotonic() < until, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(30)


def make_certificates(folder: Path) -> None:
    """Write into `folder` two authorities, ca.pem and other-ca.pem, and server.pem and client.pem, signed by ca.pem.

    The key to each NAME.pem is NAME.key. The server is 127.0.0.1.
    """

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other-ca"):
        openssl(*new, "-x509", "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    (folder / "client.ext").write_text("extendedKeyUsage=clientAuth\n")
    for name in ("server", "client"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
