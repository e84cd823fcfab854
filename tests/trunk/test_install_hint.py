"""The hints that say how to install a part of ditforge: each is a command that pip takes."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ditforge import install_hint

ROOT = Path(__file__).parents[2]
METADATA = "Metadata-Version: 2.1\nName: small\nVersion: 1\nProvides-Extra: export\n"
Came = Callable[[object], None]


@pytest.fixture
def came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Came:
    """Make as if pip had noted this of where ditforge came from; None: nothing."""

    def note(noted: object) -> None:
        folder = tmp_path / "ditforge-0.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ditforge\nVersion: 0.1.0\n")
        if noted is not None:
            (folder / "direct_url.json").write_text(json.dumps(noted))
        found = importlib.metadata.PathDistribution(folder)
        monkeypatch.setattr(install_hint, "distributions", lambda name: [found])

    return note


def test_a_checkout_is_named(came_from: Came, tmp_path: Path) -> None:
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    came_from({"url": checkout.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(install_hint.install("export"))[-3:] == ["install", "-e", f"{checkout}[export]"]


def test_a_copy_of_a_checkout(came_from: Came, tmp_path: Path) -> None:
    came_from({"url": tmp_path.as_uri(), "dir_info": {}})
    assert shlex.split(install_hint.install("serve"))[-2:] == ["install", f"{tmp_path}[serve]"]


@pytest.mark.parametrize("noted", [None, {"url": "file:///nowhere/ditforge"}, {"url": "https://example.org/d.whl"}])
def test_where_the_checkout_is_not_known(came_from: Came, noted: object) -> None:
    came_from(noted)
    assert install_hint.install("client").endswith(" install '.[client]'   in a checkout of ditforge")


def test_pip_is_the_one_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = shlex.split(install_hint.pip())
    assert command == [sys.executable, "-m", "pip"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert install_hint.pip() == "pip"


def test_pip_takes_the_command(came_from: Came, tmp_path: Path) -> None:
    """With a small wheel in place of ditforge's, in a folder whose name a shell would split."""
    wheel = tmp_path / "two words" / "small-1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small.py", "")
        archive.writestr("small-1.dist-info/METADATA", METADATA)
        archive.writestr("small-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("small-1.dist-info/RECORD", "")
    came_from({"url": wheel.as_uri(), "archive_info": {}})
    install = shlex.split(install_hint.install("export"))
    arguments = install[install.index("install") :]
    apart = ["--no-index", "--no-deps", "--target", str(tmp_path / "target"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *apart], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target" / "small.py").is_file()
    assert "extra" not in done.stderr  # pip warns of an extra that there is not


def test_no_message_names_an_index_that_does_not_have_it() -> None:
    """ditforge is on no index: every hint is made by this one function."""
    rooms = [init.parent for init in ROOT.glob("*/__init__.py")]
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for room in rooms
        for file in room.rglob("*.py")
        if file.name != "install_hint.py"
        for line in file.read_text().splitlines()
        if re.search(r"pip install.*ditforge\[", line)
    ]
    assert found == []


def test_extras_that_hints_name_are_there() -> None:
    known = importlib.metadata.metadata("ditforge").get_all("Provides-Extra") or []
    named = {
        extra
        for room in (init.parent for init in ROOT.glob("*/__init__.py"))
        for file in room.rglob("*.py")
        for extra in re.findall(r"install_hint\.(?:install|upgrade)\(\"([a-z-]+)\"\)", file.read_text())
    }
    assert named
    assert named <= set(known)
