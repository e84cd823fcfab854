"""Ctrl-C while modules are imported, which takes longer than many a command."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import HEED_INTERRUPTS

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
