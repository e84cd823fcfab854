"""Chooses the compiler for a target, from what each compiler declares."""

from __future__ import annotations

from collections.abc import Sequence

from ditforge.engines import gpus
from ditforge.engines.compilers import Compiler, compilers, find_compiler
from ditforge.engines.gpus import CPU, Target
from ditforge.errors import UserError
from ditforge.manifest import Component
from ditforge.option import command, setting
from ditforge.placement import Placement


def devices(target: Target) -> tuple[str, ...]:
    """The devices of a target, in the words of compilers' declarations: compute capabilities, or "cpu"."""
    return target.capabilities or (CPU,)


def able(device: str) -> list[str]:
    """The names of the compilers whose engines run on a device; the first is the default."""
    return [compiler.name for compiler in able_for((device,))]


def able_for(wanted: Sequence[str]) -> list[Compiler]:
    """The compilers whose engines run on all of these devices; the first is the default."""
    found = [compiler for compiler in compilers() if all(device in compiler.executes for device in wanted)]
    return sorted(found, key=lambda compiler: not all(device in compiler.first_on for device in wanted))


def default_compiler(target: Target) -> str:
    """The compiler to take where the user names none. Raises UserError if one does not do for all of a target."""
    for compiler in able_for(devices(target)):
        return compiler.name
    raise UserError(f"no compiler makes one engine for {target}", "build for each of them, into folders of their own")


def choose(target: Target) -> tuple[str, str]:
    """The compiler to take here where the user names none, and why those before it are not taken: empty if it is first.

    That is the first that is installed and can compile on this machine. If none is, it is the first of all, whose own
    error says what to install. Raises UserError if none does for all of a target.
    """
    passed_over: list[str] = []
    for compiler in able_for(devices(target)):
        why = why_not_here(compiler, target)
        if not why:
            return compiler.name, "; ".join(passed_over)
        passed_over.append(why)
    return default_compiler(target), ""


def why_not_here(compiler: Compiler, target: Target) -> str:
    """The reason why a compiler cannot compile for a target on this machine; empty if it can."""
    try:
        compiler.version()
        if compiler.compiles_on == "the target":
            here = gpus.local_target()
            if here.capabilities != target.capabilities:
                return f"{compiler.name} compiles on the GPU itself, and this machine's is {here}"
    except UserError as error:
        return f"{compiler.name}: {error.problem}"
    return ""


def made_by(placement: Placement, compiler: Compiler, target: Target) -> tuple[Compiler, Target]:
    """The compiler and the target of one engine: those of the build, or the CPU's for a network that is left to it."""
    if placement.device == CPU and target.capabilities:
        cpu = Target(CPU)
        return find_compiler(default_compiler(cpu)), cpu
    return compiler, target


def check_compiler(name: str, target: Target) -> None:
    """Raise UserError, with what is possible, if engines of the compiler do not run on every device of the target."""
    compiler = find_compiler(name)
    for device in devices(target):
        if device in compiler.executes:
            continue
        others = able(device)
        if device == CPU:
            raise UserError(
                f"{name} compiles for GPUs, not for the CPU",
                f"{setting('compiler', others[0])}, or {setting('gpu', 'rtx4090')}",
            )
        if set(compiler.executes) == {CPU}:
            problem = f"{name} compiles for the CPU, not for {target}"
            raise UserError(problem, f"{setting('compiler', default_compiler(target))}, or {setting('gpu', 'cpu')}")
        called = f" ({target.name})" if target.name != str(target) else ""
        problem = f"engines of {name} do not run on {device}{called}"
        if not others:
            raise UserError(problem, "no compiler that is installed makes engines for it")
        there = " on that machine" if find_compiler(others[0]).compiles_on == "the target" else ""
        raise UserError(problem, f"use {setting('compiler', others[0])}{there}")


def check_component(compiler: Compiler, name: str, component: Component, target: Target) -> None:
    """Raise UserError, with what is possible, if the component cannot be compiled for the target, or cannot run there.

    Either the GPU or the compiler may lack the number format.
    """
    check_compiler(compiler.name, target)
    gpus.check_precision(name, component.precision, component.dtype, target)
    for device in devices(target):
        formats = compiler.executes[device]
        for lacking in (component.precision, component.dtype):
            if lacking in formats or lacking not in gpus.SINCE:
                continue
            there = "the CPU" if device == CPU else device
            problem = f"{name} is in {lacking}, which {compiler.name} does not execute on {there}"
            raise UserError(problem, instead(component, formats))
    compiler.check(name, component, target)


def instead(component: Component, formats: object) -> str:
    """The command that exports in the nearest number formats that the compiler executes."""
    known = [precision for precision in gpus.SINCE if precision in formats]  # type: ignore[operator]
    plain = [precision for precision in known if precision in ("fp32", "fp16", "bf16")]
    if component.precision in known and component.precision not in plain:
        return command("ditforge export CHECKPOINT --precision {} --activations {}", component.precision, plain[0])
    eight_bit = [precision for precision in known if precision not in plain]
    if "fp32" in plain or not eight_bit:
        others = " or ".join([*plain[1:], *eight_bit])
        return f"{command('ditforge export CHECKPOINT --precision {}', plain[0])}   (or {others})"
    form = "ditforge export CHECKPOINT --precision {} --activations {}   (or {})"
    return command(form, eight_bit[-1], plain[0], plain[0])
