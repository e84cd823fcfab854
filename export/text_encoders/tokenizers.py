"""Tokenizers, each saved as one JSON file with the truncation and padding that the text encoder needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import Checkpoint, read_json
from ditforge.export.text_encoders.sentencepiece_model import read_model

# A tokenizer's folder needs one of these groups of files. Without them, transformers silently makes a tokenizer that
# knows no words.
BYTE_PAIRS, SENTENCEPIECE = ("vocab.json", "merges.txt"), ("spiece.model",)
VOCABULARIES = (("tokenizer.json",), BYTE_PAIRS, SENTENCEPIECE)
SETTINGS = "tokenizer_config.json"
PADDING = ("<pad>", "<|endoftext|>")  # of T5 and of CLIP
T5_UNKNOWN = 2  # the id of the piece that stands for everything unknown
LONGEST = 1 << 20  # transformers returns a larger number if the files give no length


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the text encoder `name`. Prompts are cut or padded to exactly `max_tokens` tokens."""

    name: str
    max_tokens: int
    tokenizer: Any  # transformers' PreTrainedTokenizerFast

    def save(self, path: Path) -> None:
        """Write the tokenizer to the file `path`, in the format of Hugging Face's tokenizers library."""
        backend, pad = self.tokenizer.backend_tokenizer, self.tokenizer.pad_token
        backend.enable_truncation(self.max_tokens)
        backend.enable_padding(length=self.max_tokens, pad_id=self.tokenizer.pad_token_id, pad_token=pad)
        backend.save(str(path))


def read_tokenizer(
    checkpoint: Checkpoint, component: str, name: str, limit: int | None = None, length: int | None = None
) -> Tokenizer:
    """Read the tokenizer in the checkpoint's folder `component`, as that of the text encoder `name`.

    Prompts have `length` tokens. If it is None, they have the length that the tokenizer's files say, but at most
    `limit`. Raises UserError if the folder has no vocabulary, or if its files are damaged or give no length.
    """
    folder = checkpoint.folder / component
    files = next((group for group in VOCABULARIES if all((folder / file).is_file() for file in group)), None)
    if files is None:
        wanted = ", ".join(" with ".join(files) for files in VOCABULARIES)
        raise UserError(f"{folder} has no vocabulary (one of: {wanted})", f"copy the folder {component} again")
    try:
        tokenizer = load(folder, files)
    except Exception as error:  # transformers raises many kinds, and all of them mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}", "copy the folder again") from error
    lengths = [most for most in (tokenizer.model_max_length, limit) if most is not None and most <= LONGEST]
    if length is None and not lengths:
        raise UserError(f"{folder}/{SETTINGS} has no model_max_length", "copy the folder again")
    return Tokenizer(name, length or min(lengths), tokenizer)


def load(folder: Path, files: tuple[str, ...]) -> Any:
    """Load transformers' tokenizer from `folder`, whose vocabulary is in `files`, one of VOCABULARIES.

    The vocabulary says what kind it is where no tokenizer_config.json does.
    """
    from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

    if files == SENTENCEPIECE:
        model = read_model((folder / SENTENCEPIECE[0]).read_bytes())
        if model.unknown != T5_UNKNOWN:
            raise ValueError(f"its unknown piece has the id {model.unknown}, T5's {T5_UNKNOWN}")
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        known = {key: settings[key] for key in ("extra_ids", "model_max_length") if key in settings}
        return T5Tokenizer(vocab=model.pieces, _spm_precompiled_charsmap=model.charsmap or None, **known)
    if (folder / SETTINGS).is_file():
        return AutoTokenizer.from_pretrained(folder)
    if files == BYTE_PAIRS:
        return CLIPTokenizer.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = next(token for token in PADDING if token in tokenizer.get_vocab())
    return tokenizer
