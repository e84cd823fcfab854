"""Tokenizers with only some of their files: the same ids as with all of them, or as their own library gives."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.text_encoders.tokenizers import read_tokenizer

TEXTS = [
    "a photo of a red circle, number 7",
    "\uff21 \ufb01ne  cat \u2460 on the right",
    "",
    "two\nlines é 猫 <extra_id_3>",
]
SPOKEN = [text for text in TEXTS if "extra_id" not in text]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A small model of T5's kind, with its special pieces and the usual normalisation."""
    colours, shapes = ("red", "green", "blue"), ("circle", "square", "fine cat")
    lines = [f"a photo of a {c} {s} number {i} on the right" for c in colours for s in shapes for i in range(30)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}])
def test_only_a_sentencepiece_model(spiece: bytes, settings: dict[str, object] | None, tmp_path: Path) -> None:
    """The ids are SentencePiece's own, followed by the end of the text."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece)
    if settings:
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    read_tokenizer(Checkpoint(tmp_path, ""), "tokenizer", "t5", length=40).save(tmp_path / "saved.json")
    saved, reference = Backend.from_file(str(tmp_path / "saved.json")), sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(spiece)
    for text in SPOKEN:
        ids = [*reference.encode(text), reference.eos_id()]
        assert saved.encode(text).ids == ids + [reference.pad_id()] * (40 - len(ids)), text
    assert saved.token_to_id("<extra_id_0>") is not None


def test_a_sentencepiece_model_that_is_damaged(spiece: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for content in (spiece[:-5], b"", b"\xff" * 50, b"<html>"):
        (tmp_path / "tokenizer" / "spiece.model").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer in .* cannot be read: it is"):
            read_tokenizer(Checkpoint(tmp_path, ""), "tokenizer", "t5", length=40)


@pytest.mark.parametrize(
    ("component", "files"),
    [
        ("tokenizer", ("vocab.json", "merges.txt")),
        ("tokenizer", ("tokenizer.json",)),
        ("tokenizer_3", ("tokenizer.json",)),
    ],
)
def test_only_the_vocabulary(sd35_tiny: Path, component: str, files: tuple[str, ...], tmp_path: Path) -> None:
    """The ids, the padding and the cut are those of transformers with all files."""
    (tmp_path / component).mkdir()
    for file in files:
        shutil.copy(sd35_tiny / component / file, tmp_path / component)
    if files == ("tokenizer.json",):  # the published ones do not say how to pad
        whole = json.loads((tmp_path / component / files[0]).read_text())
        (tmp_path / component / files[0]).write_text(json.dumps(whole | {"padding": None, "truncation": None}))
    read_tokenizer(Checkpoint(tmp_path, ""), component, "any", limit=24).save(tmp_path / "saved.json")
    saved, reference = (
        Backend.from_file(str(tmp_path / "saved.json")),
        AutoTokenizer.from_pretrained(sd35_tiny / component),
    )
    for text in TEXTS:
        expected = reference(text, padding="max_length", truncation=True, max_length=24).input_ids
        assert saved.encode(text).ids == expected, text
