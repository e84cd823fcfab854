"""The description of a model that a server has and a client reads. Client and server may be of different versions.

It is JSON in the parameters of the configuration of Triton's model `dit`. It has the fields of ditforge.model.Model and

minimum_client: the lowest level CLIENT that can read it. A server raises it for a change that a client must not ignore:
    a new meaning of an existing field, or a new value that older clients do not know.
written_by: the version of ditforge that wrote it, for people.

A client ignores fields that it does not know, on every level, because a newer server may send more. A field that a
server does not send gets its default, because an older server sends less.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel

from ditforge import __version__
from ditforge.model import Model

CLIENT = 1  # the level of this client: it reads descriptions with a minimum_client up to this


class ClientTooOld(ValueError):
    """A description asks for a newer client than this one."""


def write_served_model(model: Model, minimum_client: int = 1) -> str:
    """Write the description of a model, as JSON."""
    return json.dumps({**model.model_dump(mode="json"), "minimum_client": minimum_client, "written_by": __version__})


def read_served_model(text: str) -> Model:
    """Read the model in a description.

    Raises ClientTooOld if it asks for a newer client. Raises ValueError, of which pydantic's ValidationError is one, if
    the text is not a description, or lacks a field that has no default.
    """
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError(f"it is a {type(said).__name__}, not an object")
    asked, writer = said.get("minimum_client", 1), said.get("written_by")
    if isinstance(asked, int) and asked > CLIENT:
        written = f", written by ditforge {writer}" if isinstance(writer, str) else ""
        raise ClientTooOld(f"it asks for clients of level {asked}{written}, and this client has level {CLIENT}")
    return Model.model_validate_json(json.dumps(known(Model, said)))


def known(record: type[BaseModel], said: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a JSON object for which the record has fields, on every level."""
    found = {}
    for name in record.model_fields.keys() & said.keys():
        inner = part_of(record.model_fields[name].annotation)
        value = said[name]
        found[name] = known(inner, value) if inner and isinstance(value, dict) else value
    return found


def part_of(annotation: Any) -> type[BaseModel] | None:
    """The record that a field of this type holds or may hold, or None if it holds no record."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
