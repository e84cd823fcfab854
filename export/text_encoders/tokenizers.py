"""Tokenizers, each saved as one JSON file with the truncation and padding that the text encoder needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import Checkpoint

# A tokenizer's folder needs one of these groups of files. Without them, transformers silently makes a tokenizer that
# knows no words.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


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


def read_tokenizer(checkpoint: Checkpoint, component: str, name: str, limit: int | None = None) -> Tokenizer:
    """Read the tokenizer in the checkpoint's folder `component`, as that of the text encoder `name`.

    Prompts have the length that its files say, but at most `limit` tokens. Raises UserError if the folder has no
    vocabulary, or if its files are damaged or give no length.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.folder / component
    if not any(all((folder / file).is_file() for file in files) for files in VOCABULARIES):
        wanted = ", ".join(" with ".join(files) for files in VOCABULARIES)
        raise UserError(f"{folder} has no vocabulary (one of: {wanted})", f"copy the folder {component} again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds, and all of them mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}", "copy the folder again") from error
    length = tokenizer.model_max_length
    if length > 1 << 20:  # transformers returns such a number if the files give no length
        raise UserError(f"{folder}/tokenizer_config.json has no model_max_length", "copy the folder again")
    return Tokenizer(name, min(length, limit or length), tokenizer)
