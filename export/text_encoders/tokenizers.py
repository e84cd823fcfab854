"""Tokenizers, saved as one tokenizer.json each, with truncation and padding set as the text encoder wants them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.diffusers_folder import Checkpoint

# Without one of these, transformers makes a tokenizer that knows no words, and says nothing.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the text encoder `name`, which always reads `max_tokens` tokens: longer prompts are cut."""

    name: str
    max_tokens: int
    tokenizer: Any  # transformers' PreTrainedTokenizerFast

    def save(self, path: Path) -> None:
        """Write it to the file `path` in the Hugging Face tokenizers format."""
        backend, pad = self.tokenizer.backend_tokenizer, self.tokenizer.pad_token
        backend.enable_truncation(self.max_tokens)
        backend.enable_padding(length=self.max_tokens, pad_id=self.tokenizer.pad_token_id, pad_token=pad)
        backend.save(str(path))


def read_tokenizer(checkpoint: Checkpoint, component: str, name: str, limit: int | None = None) -> Tokenizer:
    """The tokenizer in the checkpoint's folder `component`, for prompts of its own length, or `limit` if less."""
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
    if length > 1 << 20:  # transformers' way to say that the files name none
        raise UserError(f"{folder}/tokenizer_config.json has no model_max_length", "copy the folder again")
    return Tokenizer(name, min(length, limit or length), tokenizer)
