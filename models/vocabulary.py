"""Tokenizers in CLIP's and T5's own formats, trained on captions.

A vocabulary of some hundred words needs a few hundred pieces; the formats, special tokens and lengths are those that
FLUX.1 and Stable Diffusion 3.5 ship, so that code written for their tokenizers reads these.
"""

import io
import json
import string
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_LENGTH = 77
T5_LENGTH = 64

_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(captions: Sequence[str], merges: int = 512) -> CLIPTokenizer:
    """A lower-casing byte-level BPE with at most `merges` merges, padded with its end token to 77.

    The vocabulary is ordered as OpenAI's: 256 bytes, 256 bytes that end a word, merges, start, end. The end token's
    id is thus the highest, which is how older CLIP code finds it, and no text at all is unknown.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in learnt]
    pieces = alphabet + [byte + "</w>" for byte in alphabet] + [left + right for left, right in pairs]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=CLIP_LENGTH)


def t5_tokenizer(captions: Sequence[str], size: int = 384) -> T5TokenizerFast:
    """A Unigram model with at most `size` pieces and T5's 100 sentinels; pad 0, end 1, unknown 2, padded to 64.

    Trained by SentencePiece, as T5's: on so few words the trainer of `tokenizers` cuts most of them into letters.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    learnt = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(learnt.id_to_piece(i), learnt.get_score(i)) for i in range(len(learnt))]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces + sentinels, model_max_length=T5_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer | T5TokenizerFast, folder: Path) -> None:
    """Writes the tokenizer to `folder`; CLIP's also as vocab.json and merges.txt, which older readers want."""
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, CLIPTokenizer):
        tokenizer.backend_tokenizer.model.save(str(folder))


def save_settings(folder: Path) -> None:
    """Writes ditforge.json, which says with how many tokens of T5 the model was trained."""
    (folder / "ditforge.json").write_text(json.dumps({"text_length": T5_LENGTH}, indent=2) + "\n")
