"""Prompts to token ids, with a placeholder that stands for a concept.

The tokenizer's vocabulary is not touched. A placeholder becomes ids past the vocabulary, which the text tower reads
from the concept's vectors; in the *hard* prompt a whole word of the vocabulary stands in its place.
"""

import functools
import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datencoder_jax.errors import UserError

TEMPLATE = "a photo of a {}"
"""The prompt a concept is tuned under."""

PROMPTS = (
    "a photo of a S* on the beach",
    "a photo of a S* in the snow",
    "an oil painting of a S*",
    "a pencil sketch of a S*",
)
"""What is drawn when no prompt is given and the base model has none of its own; the placeholder is `S*`."""


class PromptTokenizer:
    """CLIP's tokenizer of a base model's `tokenizer/` folder.

    Args:
        folder: holds `vocab.json` and `merges.txt` (or `tokenizer.json`).
        vocab_size: rows of the text tower's token table.
        length: positions of the text tower; every prompt is padded or cut to it.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer has ids past the token table.
    """

    def __init__(self, folder: Path, vocab_size: int, length: int):
        # Without PyTorch transformers offers tokenizers only, which is all that is needed, and says so at every start.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import CLIPTokenizer  # slow to import, and not needed to show a help text

        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        except Exception as error:  # damaged files fail in every way there is, in Rust with bare exceptions
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"The tokenizer in {folder} is damaged or incomplete ({reason}).") from error
        if max(self._tokenizer.get_vocab().values()) >= vocab_size:
            raise UserError(f"The tokenizer in {folder} has more than the {vocab_size} tokens of the text encoder.")
        self.vocab_size, self.length = vocab_size, length

    def encode(
        self, prompts: Sequence[str], token: str | None = None, *, vectors: int = 1, word: str | None = None
    ) -> np.ndarray:
        """Token ids of prompts, int32 `[n, length]`.

        Args:
            prompts: texts; `token` may occur several times in each, or not at all.
            token: the placeholder.
            vectors: how many vectors the placeholder stands for.
            word: put this word in the placeholder's place instead (the hard prompt).

        Raises:
            UserError: a prompt is so long that nothing of its placeholder is left.
        """
        return np.array([self._encode(prompt, token, vectors, word) for prompt in prompts], np.int32)

    def _encode(self, prompt: str, token: str | None, vectors: int, word: str | None) -> list[int]:
        if token and word is not None:
            prompt, token = placeholder(token).sub(lambda _: word, prompt), None
        concept = [self.vocab_size + i for i in range(vectors)]
        ids: list[int] = []
        for index, part in enumerate(placeholder(token).split(prompt) if token else [prompt]):
            ids += (concept if index else []) + self._ids(part)
        room = self.length - 2
        if max(ids, default=0) >= self.vocab_size > max(ids[:room]):
            raise UserError(
                f"the prompt {prompt!r} is longer than {room} tokens and the placeholder {token!r} does not fit; "
                "write it nearer to the start"
            )
        if len(ids) > room and word is None:  # the hard prompt goes with a soft one, which has said so
            runs = itertools.groupby(ids[room:], lambda i: i >= self.vocab_size)
            cut = " ".join(str(token) if past else self._tokenizer.decode(list(run)).strip() for past, run in runs)
            warnings.warn(f"the prompt {prompt!r} is longer than {room} tokens; cut: {cut!r}", stacklevel=4)
        ids = [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]
        return ids + [self._tokenizer.pad_token_id] * (self.length - len(ids))

    def _ids(self, text: str) -> list[int]:
        # Not verbose: it is warned of what is too long above, and without words such as "indexing errors".
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def word(self, token_id: int) -> str:
        """The word of a token id, without the end-of-word mark."""
        return self._tokenizer.convert_ids_to_tokens(int(token_id)).removesuffix("</w>")

    def word_id(self, word: str) -> int:
        """The id of a word that is one token.

        Raises:
            UserError: it is not.
        """
        ids = self._ids(word)
        if len(ids) != 1:
            raise UserError(f"{word!r} is not a single token of this model's vocabulary; choose a common word")
        return ids[0]

    @functools.cached_property
    def whole_words(self) -> np.ndarray:
        """Which token ids are whole alphabetic words of three letters or more: bool `[vocab_size]`.

        Only these may be a concept's nearest word: the hard prompt has to be readable text.
        """
        allowed = np.zeros(self.vocab_size, bool)
        for text, index in self._tokenizer.get_vocab().items():
            stem = text.removesuffix("</w>")
            if stem != text and index < self.vocab_size and len(stem) > 2 and stem.isascii() and stem.isalpha():
                allowed[index] = True
        return allowed


def placeholder(token: str) -> re.Pattern[str]:
    """The pattern of a placeholder in a prompt: where it begins or ends with a letter, no letter may be beside it."""
    before, after = (r"\b" if re.match(r"\w", edge) else "" for edge in (token[0], token[-1]))
    return re.compile(f"{before}{re.escape(token)}{after}")


def check_prompts(prompts: Sequence[str], token: str | None) -> None:
    """Raises `UserError` for an empty prompt and, when there is a placeholder, for a prompt without it."""
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of texts, such as [{prompts!r}]")
    if not prompts:
        raise UserError("no prompt was given")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("a prompt is empty; say what the picture should show")
        if token and not placeholder(token).search(prompt):
            raise UserError(
                f"the prompt {prompt!r} does not contain the placeholder {token!r}; write it where the concept belongs"
            )
