"""Ends a call without an answer: with a status and a message, which reveals nothing about the server's files."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import NoReturn

import grpc

LONGEST_MESSAGE = 1000  # characters of an error; gRPC loses those that are too long
PATH = re.compile(r"(?<![\w.])/(?:[^\s/:'\",;()]+/)+[^\s:'\",;()]*")
Status = grpc.StatusCode


class Refused(Exception):
    """A request that is answered only with a status and a message."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


async def refuse(context: grpc.aio.ServicerContext, status: grpc.StatusCode, message: str) -> NoReturn:
    """End a call with a status and a message. Nobody receives them if the client has gone."""
    if context.done():
        raise asyncio.CancelledError
    try:
        await context.abort(status, message[:LONGEST_MESSAGE])
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort() raises")


def of_triton(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    """The status of an error of Triton's, and its reason in one line that names no file and no host of the server."""
    status, details = error.code(), (error.details() or "").strip()
    line = details.splitlines()[0] if details else "no reason given"
    if status is Status.UNAVAILABLE and "maximum queue size" in line:
        return Status.RESOURCE_EXHAUSTED, "too many requests wait for this model; ask again later"
    if "Request timeout expired" in line:
        return Status.DEADLINE_EXCEEDED, "the request waited for as long as its deadline allows"
    if "shared memory pool" in line:
        return Status.INTERNAL, "the server's /dev/shm is too small for this request: docker run --shm-size"
    gone = "is not healthy" in line or "no available versions" in line or "Stub process" in line
    if gone or status is Status.UNAVAILABLE:
        return Status.UNAVAILABLE, "the models are starting again; repeat the request"
    return status, PATH.sub("…", line).replace(socket.gethostname(), "…")
