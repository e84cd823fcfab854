"""The description of a model that a server carries and a client reads: versioned, so that they need not be of one age.

It rides in the parameters of the configuration of `dit`, as JSON: the fields of ditforge.model.Model, and beside them

minimum_client: the least CLIENT that can read it. A server raises it when it says something that a client must not
    leave out: a new meaning of a field that there was, or a new value that no older client knows.
written_by: the version of ditforge that wrote it, for people.

Fields that a client does not know are left out, on every level: a server of next year may say more than is known today.
Fields that a server does not send have defaults: a server of last year says less.
"""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel

from ditforge import __version__
from ditforge.model import Model

CLIENT = 1  # what this client can read


class ClientTooOld(ValueError):
    """A description asks for a newer client than this one."""


def write_served_model(model: Model, minimum_client: int = 1) -> str:
    """The description of a model, as JSON."""
    return json.dumps({**model.model_dump(mode="json"), "minimum_client": minimum_client, "written_by": __version__})


def read_served_model(text: str) -> Model:
    """The model in a description.

    Raises ClientTooOld where it asks for a newer client, and ValueError (pydantic's ValidationError among them) where
    it is no description, or lacks what no model can do without.
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
    """What of an object the record has fields for, on every level."""
    found = {}
    for name in record.model_fields.keys() & said.keys():
        inner = part_of(record.model_fields[name].annotation)
        value = said[name]
        found[name] = known(inner, value) if inner and isinstance(value, dict) else value
    return found


def part_of(annotation: Any) -> type[BaseModel] | None:
    """The record that a field holds, if it holds one, or may hold one."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
