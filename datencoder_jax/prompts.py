"""Prompts to token ids, with a placeholder that stands for a concept.

The tokenizer's vocabulary is not touched. A placeholder becomes ids past the vocabulary, which the text tower reads
from the concept's vectors; in the *hard* prompt a whole word of the vocabulary stands in its place.
"""

import functools
import itertools
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
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


_BLANKLESS = (
    # Thai, Lao, Tibetan, Burmese, Khmer and their neighbours
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\uaa60-\uaadf"
    # Chinese and Japanese
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0003ffff"
    # Korean, which writes particles on to the word before them
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
)
"""The letters of scripts that put no blanks between words, as ranges of a character class."""

_LETTER = rf"[^\W{_BLANKLESS}]"
"""A letter or digit of all other scripts."""


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
        self,
        prompts: Sequence[str],
        placeholders: Mapping[str, int] | None = None,
        *,
        words: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """Token ids of prompts, int32 `[n, length]`.

        Args:
            prompts: texts; a placeholder may occur several times in each, or not at all.
            placeholders: how many vectors each stands for; their ids follow one another past the vocabulary.
            words: put these words in the placeholders' places instead (the hard prompt).

        Raises:
            UserError: a prompt is so long that a placeholder is not left in it once in full, or it is no text.
        """
        if words:
            prompts = [put_words(prompt, words) for prompt in prompts]
        # The hard prompt goes with a soft one, which has said what is cut.
        return np.array([self._encode(prompt, placeholders or {}, words is None) for prompt in prompts], np.int32)

    def _encode(self, prompt: str, placeholders: Mapping[str, int], tell: bool) -> list[int]:
        first = dict(
            zip(placeholders, itertools.accumulate(placeholders.values(), initial=self.vocab_size), strict=False)
        )
        ids: list[int] = []
        names: dict[int, str] = {}
        end = 0
        for found in _any(placeholders).finditer(prompt) if placeholders else ():
            token = found[0]
            vectors = range(first[token], first[token] + placeholders[token])
            ids += [*self._ids(prompt[end : found.start()]), *vectors]
            names |= dict.fromkeys(vectors, token)
            end = found.end()
        ids += self._ids(prompt[end:])
        room = self.length - 2
        lost = {names[i] for i in names.keys() - set(ids[:room])}
        if lost:
            raise UserError(
                f"the prompt {prompt!r} is longer than {room} tokens and the placeholder {min(lost)!r} does not fit; "
                "write it nearer to the start"
            )
        if len(ids) > room and tell:
            runs = itertools.groupby(ids[room:], lambda i: names.get(i, ""))
            cut = " ".join(token or self._tokenizer.decode(list(run)).strip() for token, run in runs)
            warnings.warn(f"the prompt {prompt!r} is longer than {room} tokens; cut: {cut!r}", stacklevel=4)
        ids = [self._tokenizer.bos_token_id, *ids[:room], self._tokenizer.eos_token_id]
        return ids + [self._tokenizer.pad_token_id] * (self.length - len(ids))

    def _ids(self, text: str) -> list[int]:
        check_unicode(text)
        # Not verbose: it is warned of what is too long above, and without words such as "indexing errors".
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def end(self) -> int:
        """The id that ends every prompt."""
        return self._tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        """The id that prompts are padded with."""
        return self._tokenizer.pad_token_id

    def same(self, other: "PromptTokenizer") -> bool:
        """Whether both have the same words under the same ids."""
        return self._tokenizer.get_vocab() == other._tokenizer.get_vocab()

    def word(self, token_id: int) -> str:
        """The word of a token id, without the end-of-word mark."""
        return self._tokenizer.convert_ids_to_tokens(int(token_id)).removesuffix("</w>")

    def word_ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, of which there is at least one that the vocabulary knows.

        Raises:
            UserError: the text is empty, the vocabulary has none of it, or it is no text.
        """
        ids = [i for i in self._ids(text) if i != self._tokenizer.unk_token_id]
        if not ids:
            raise UserError(f"{text!r} is no word of this model's vocabulary; name what the picture shows with --word")
        return ids

    def word_id(self, word: str) -> int:
        """The id of a word that is one token.

        Raises:
            UserError: it is not.
        """
        ids = self._ids(word)
        if len(ids) != 1:
            raise UserError(f"{word!r} is not a single token of this model's vocabulary; choose a common word")
        return ids[0]

    def words_of(self, known_tokens: np.ndarray) -> list[str]:
        """The alphabetic words that are one token of `known_tokens` (bool `[vocab_size]`), in alphabetical order."""
        texts = (text for text, index in self._tokenizer.get_vocab().items() if known_tokens[index])
        return sorted(text.removesuffix("</w>") for text in texts if text.endswith("</w>") and text[:-4].isalpha())

    def unknown_words(
        self, texts: Iterable[str], known_tokens: np.ndarray, placeholders: Collection[str] = ()
    ) -> list[str]:
        """The words and numbers in texts that hold a token other than `known_tokens`, each once, in their order.

        Args:
            texts: prompts.
            known_tokens: bool `[vocab_size]`.
            placeholders: are no such words.
        """
        if placeholders:
            texts = [_any(placeholders).sub(" ", text) for text in texts]
        words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+(?:['’]\w+)*", text))
        return [word for word in words if not known_tokens[self._ids(word)].all()]

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
    """The pattern of a placeholder in a prompt: where it begins or ends with a letter, no letter may be beside it.

    The letters of scripts without blanks between words, such as Chinese and Thai, are no such letters.
    """
    return _any([token])


def put_words(prompt: str, words: Mapping[str, str]) -> str:
    """The prompt with words in the places of placeholders; a blank keeps each apart from a letter beside it."""

    def word(match: re.Match[str]) -> str:
        before, after = prompt[: match.start()][-1:], prompt[match.end() :][:1]
        blanks = (" " if re.match(r"\w", letter) else "" for letter in (before, after))
        return words[match[0]].join(blanks)

    return _any(words).sub(word, prompt)


def _any(tokens: Iterable[str]) -> re.Pattern[str]:
    """The pattern of several placeholders, the longest first: one may begin with another."""

    def one(token: str) -> str:
        before, after = (re.match(_LETTER, edge) for edge in (token[0], token[-1]))
        return f"{f'(?<!{_LETTER})' if before else ''}{re.escape(token)}{f'(?!{_LETTER})' if after else ''}"

    return re.compile("|".join(one(token) for token in sorted(tokens, key=len, reverse=True)))


def check_prompts(prompts: Sequence[str], tokens: Collection[str] = ()) -> None:
    """Raises `UserError` for a prompt that is empty or no text, or has none of the placeholders where there are any."""
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of texts, such as [{prompts!r}]")
    if not prompts:
        raise UserError("no prompt was given")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt must be a text, not {type(prompt).__name__}")
        if not prompt.strip():
            raise UserError("a prompt is empty; say what the picture should show")
        check_unicode(prompt)
        if tokens and not _any(tokens).search(prompt):
            wanted = " or ".join(repr(token) for token in tokens)
            raise UserError(
                f"the prompt {prompt!r} does not contain the placeholder {wanted}; write it where the concept belongs"
            )


def check_unicode(text: str) -> None:
    """Raises `UserError` for halves of surrogate pairs: stand-ins for bytes that the shell could not decode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"The text {text!r} is not valid Unicode.") from error
