"""Read the vocabulary of a SentencePiece model (spiece.model), which is a protobuf message.

The generated code for this in the `sentencepiece` package works only with a protobuf as new as itself: sentencepiece
0.2.3 needs protobuf 7, and tritonclient needs protobuf 6. The few fields that are needed are read here.
Source: google/sentencepiece, src/sentencepiece_model.proto; https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
PIECE, SCORE, KIND = 1, 2, 3  # fields of SentencePiece
UNKNOWN = 2  # the kind of the piece that stands for everything else
MODEL_TYPE, UNIGRAM = 3, 1  # a field of TrainerSpec, and the value that it has for T5's kind
CHARSMAP = 2  # a field of NormalizerSpec
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces with their scores, in the order of their ids; the id of the unknown piece; the normalisation rules."""

    pieces: list[tuple[str, float]]
    unknown: int
    charsmap: bytes


def read_model(content: bytes) -> SentencePieceModel:
    """Return the model that is serialised in `content`. Raises ValueError if it is damaged, or not a unigram model."""
    pieces: list[tuple[str, float]] = []
    unknown, charsmap, model_type = 0, b"", UNIGRAM
    for field, value in fields(content):
        if field == PIECES:
            piece = dict(fields(as_bytes(value)))
            if piece.get(KIND) == UNKNOWN:
                unknown = len(pieces)
            (score,) = struct.unpack("<f", as_bytes(piece.get(SCORE, bytes(4))))
            pieces.append((as_bytes(piece[PIECE]).decode(), score))
        elif field == TRAINER:
            model_type = int(dict(fields(as_bytes(value))).get(MODEL_TYPE, UNIGRAM))
        elif field == NORMALIZER:
            charsmap = as_bytes(dict(fields(as_bytes(value))).get(CHARSMAP, b""))
    if model_type != UNIGRAM or not pieces:
        raise ValueError("it is not a unigram model of SentencePiece")
    return SentencePieceModel(pieces, unknown, charsmap)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a protobuf message: an integer, or bytes.

    Raises ValueError if the message is damaged.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        wire = key & 7
        if wire == VARINT:
            number, at = varint(message, at)
            yield key >> 3, number
            continue
        if wire == BYTES:
            size, at = varint(message, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError("it is damaged")
        if at + size > len(message):
            raise ValueError("it is truncated")
        yield key >> 3, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the integer of 7 bits a byte that begins at `at`, and where it ends. Raises ValueError if it does not."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        number |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return number, at
    raise ValueError("it is truncated")


def as_bytes(value: int | bytes) -> bytes:
    """Return the value. Raises ValueError if it is an integer where bytes must be."""
    if isinstance(value, int):
        raise ValueError("it is damaged")
    return value
