"""Ctrl-C while modules are imported, which takes longer than many a command."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import HEED_INTERRUPTS, PATIENCE

INTERRUPT = """
import signal, sys
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
from ditforge.__main__ import main
sys.argv = ["ditforge", "gpus"]
main()
"""
AS_NATIVE_CODE_DOES = INTERRUPT.replace(
    "            signal.raise_signal(signal.SIGINT)",
    """            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise {error}("it failed to import") from None""",
)


@pytest.mark.parametrize(
    ("program", "module"),
    [
        (INTERRUPT, "ditforge.cli"),
        (INTERRUPT, "ditforge.engines.gpus"),
        (AS_NATIVE_CODE_DOES.replace("{error}", "ImportError"), "ditforge.engines.gpus"),
        (AS_NATIVE_CODE_DOES.replace("{error}", "SystemError"), "ditforge.engines.gpus"),
    ],
)
def test_ctrl_c_while_modules_are_imported(program: str, module: str) -> None:
    ended = subprocess.run(
        [*HEED_INTERRUPTS, sys.executable, "-c", program.format(module=module)], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


# The server that is asked never answers, so that the command lasts until the interrupt arrives.
AT_A_MOMENT = """
import signal, socket, sys
from importlib.machinery import ExtensionFileLoader
def is_native(frame):
    own = frame.f_locals.get("self") if frame else None
    return isinstance(own, ExtensionFileLoader) or bool(frame) and is_native(frame.f_back)
class Interrupt:
    left = {left}
    def find_spec(name, path=None, target=None):
        Interrupt.left -= not {native} or is_native(sys._getframe())
        if Interrupt.left == 0:
            signal.raise_signal(signal.SIGINT)
from ditforge.__main__ import main
sys.meta_path.insert(0, Interrupt)
silent = socket.create_server(("127.0.0.1", 0))
sys.argv = ["ditforge", "generate", "a", "--url", f"127.0.0.1:{{silent.getsockname()[1]}}", "--connect-timeout", "600"]
main()
"""


@pytest.mark.parametrize(
    ("left", "native"), [(1, False), (2, False), (10, False), (50, False), (150, False), (1, True), (3, True)]
)
def test_ctrl_c_at_the_import_of_that_number(left: int, native: bool, tmp_path: Path) -> None:
    """Also of a module that native code imports, which would not pass the interrupt on."""
    command = [*HEED_INTERRUPTS, sys.executable, "-c", AT_A_MOMENT.format(left=left, native=native)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


WHILE_TYPER_READS_THE_COMMANDS = """
import signal, sys, typer.main
typer.main.get_params_from_function = lambda *args: signal.raise_signal(signal.SIGINT)
from ditforge.__main__ import main
sys.argv = ["ditforge", "gpus"]
main()
"""
AT_THE_END = """
import atexit, signal, sys
atexit.register(signal.raise_signal, signal.SIGINT)
from ditforge.__main__ import main
sys.argv = ["ditforge", "--version"]
main()
"""


def test_ctrl_c_before_and_after_the_command() -> None:
    for program, code, said in ((WHILE_TYPER_READS_THE_COMMANDS, 130, "interrupted\n"), (AT_THE_END, 0, "")):
        ended = subprocess.run([*HEED_INTERRUPTS, sys.executable, "-c", program], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (code, said)


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3])
def test_ctrl_c_after_a_while(delay: float) -> None:
    """However far the command is by then: it may also have ended well."""
    program = """
import sys
from ditforge import interrupt
from ditforge.__main__ import main
heed = interrupt.heed
def heed_and_say():
    heed()
    print(flush=True)
interrupt.heed = heed_and_say
sys.argv = ["ditforge", "gpus"]
main()
"""
    with subprocess.Popen(
        [*HEED_INTERRUPTS, sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        command.stdout.readline()
        time.sleep(delay)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate()
    assert (command.returncode, said) in ((130, "interrupted\n"), (130, ""), (0, ""))
