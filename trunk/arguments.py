"""Checks what public functions are given, before they do anything. A wrong argument becomes a UserError.

Python itself would raise TypeError, or convert what is not meant: a file called True, "3" as a number.
"""

import os
from collections.abc import Callable, Mapping
from errno import ENAMETOOLONG
from functools import wraps
from inspect import Parameter, Signature, signature
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, ParamSpec, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from ditforge.errors import UserError
from ditforge.install_hint import lacking
from ditforge.option import check_names, option

P = ParamSpec("P")
T = TypeVar("T")
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
LONGEST = 300  # characters of a value that are shown
# The type of pydantic's error → what the argument must be, and how one is written.
MUST = {
    "path": ("a path, as a string that is not empty or a pathlib.Path", '"PATH"'),
    "impossible_path": ("a path that this system can have", '"PATH"'),
    "lora": ("a list of paths, or of pairs of a path and a finite number", '[("FILE", 1.0)]'),
    "string_type": ("a string", '"NAME"'),
    "string_too_short": ("a string that is not empty", '"NAME"'),
    "string_unicode": ("text in UTF-8", '"NAME"'),
    "int_type": ("an integer", "NUMBER"),
    "float_type": ("a number", "NUMBER"),
    "finite_number": ("a finite number", "NUMBER"),
    "bool_type": ("True or False", "True"),
    "callable_type": ("a function", "FUNCTION"),
    "tuple_type": ("a string, or a list of strings", '"NAME"'),
    "sequence_str": ("a list", "[…]"),
    "is_instance_of": ("a list", "[…]"),
}
shown = Repr()
shown.maxstring = shown.maxother = LONGEST


def read_path(value: object) -> Path:
    """Return a path as pathlib has it. Raises pydantic's error for anything but a string or a PathLike of one."""
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or not text:
        raise PydanticCustomError("path", "not a path")
    try:
        os.lstat(text)
    except (OSError, ValueError) as error:  # ValueError: a null byte, or what is not text
        if getattr(error, "errno", ENAMETOOLONG) == ENAMETOOLONG:
            raise PydanticCustomError("impossible_path", "not a possible path") from None
    return Path(text)


def plain(value: object) -> object:
    """Return a number of another kind, such as NumPy's, as Python's int or float, and everything else unchanged."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def read_lora(value: object) -> tuple[Path, float]:
    """Return a LoRA as its path and its strength, which is 1 for a path alone. Raises pydantic's error otherwise."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, 1.0)
    try:
        path, strength = pair
        return read_path(path), TypeAdapter(Number).validate_python(strength, strict=True)
    except ValueError:  # pydantic's errors too
        raise PydanticCustomError("lora", "not a LoRA") from None


def listed(value: object) -> object:
    """Return a string as a tuple of one, a list as a tuple, and everything else unchanged."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


AnyPath = Annotated[str | os.PathLike[str], PlainValidator(read_path)]
FilePath = Annotated[Path, PlainValidator(read_path)]
Lora = Annotated[AnyPath | tuple[AnyPath, float], PlainValidator(read_lora)]
Name = Annotated[str, Field(min_length=1)]
Number = Annotated[float, BeforeValidator(plain), Field(allow_inf_nan=False)]
Variants = Annotated[tuple[Name, ...], BeforeValidator(listed)]
Whole = Annotated[int, BeforeValidator(plain)]


def bound(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public function raise UserError for arguments that do not fit its signature, instead of TypeError."""
    declared = signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bind(function, declared, args, kwargs)
        return function(*args, **kwargs)

    return call


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Make a public function raise UserError also for arguments of other types than those of its annotations.

    The annotations must be objects, not text. Each argument is converted as its annotation says; what `**options`
    takes is left to the function. A module of an extra that is not installed is a UserError as well.
    """
    declared = signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = bind(function, declared, args, kwargs)
        for name, value in given.arguments.items():
            parameter = declared.parameters[name]
            if parameter.kind in NAMED:
                given.arguments[name] = read(parameter.annotation, value, name)
        try:
            return function(*given.args, **given.kwargs)
        except ModuleNotFoundError as error:
            missing = lacking(error, function.__name__)
            if missing is None:
                raise
            raise missing from error

    return call


def bound_fields(record: type[T]) -> type[T]:
    """Make a dataclass raise UserError for arguments that are not its fields: `bound`, as a decorator of a class."""
    record.__init__ = bound(record.__init__)  # type: ignore[method-assign]
    return record


def check_takes(function: Callable[..., object], count: int, what: str, fix: str) -> None:
    """Raise UserError unless a user's function can be called with `count` arguments. `what` is what errors call it."""
    try:
        declared = signature(function)
    except ValueError:  # some functions written in C have no signature that can be read
        return
    try:
        declared.bind(*[None] * count)
    except TypeError as error:
        raise UserError(f"{what}{declared} cannot be called as one: {error}", fix) from None


def bind(function: Callable[..., object], declared: Signature, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments by name, as inspect does. Raises UserError if they do not fit."""
    kinds = [parameter.kind for parameter in declared.parameters.values()]
    if Parameter.VAR_KEYWORD not in kinds:
        check_names(kwargs, [name for name in declared.parameters if name != "self"])
    try:
        return declared.bind(*args, **kwargs)
    except TypeError as error:
        name = function.__qualname__.removesuffix(".__init__")
        taken = ", ".join(str(each.replace(annotation=Parameter.empty)) for each in declared.parameters.values())
        raise UserError(f"{name} cannot be called so: {error}", f"{name}({taken.removeprefix('self, ')})") from None


def read(kind: Any, value: object, name: str = "") -> Any:
    """Return `value` as `kind`, which pydantic knows, without conversions between strings, numbers and booleans.

    `name` is what errors call it. A TypedDict's errors have the names of its keys. Raises UserError otherwise.
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise refused(error.errors()[0], name) from None


def refused(error: ErrorDetails, name: str = "") -> UserError:
    """What an argument must be, and how one is written."""
    named = name or str(error["loc"][0])
    must, example = MUST.get(error["type"], (error["msg"].removeprefix("Input should be "), "…"))
    return UserError(f"{option(named)} must be {must}, got {shown.repr(error['input'])}", option(f"{named}={example}"))
