"""Bad prompts and placeholders."""

from collections.abc import Collection, Mapping
from typing import Any

from corpus import models
from corpus.case import Kind
from corpus.files import nothing
from datencoder_jax import api
from datencoder_jax.prompts import check_prompts

KIND = Kind(
    "Prompts",
    "The texts of `--prompt`, `--token` and `--word`, for the embedded model, whose prompts hold 30 tokens.",
    lambda *arguments: encode(*arguments),
)


def encode(prompts: Any, placeholders: Mapping[str, int] | None = None) -> None:
    """What `generate` does with prompts before anything is drawn."""
    tokens: Collection[str] = list(placeholders or ())
    check_prompts(prompts, tokens)
    tokenizer = models.toyworld().tokenizer
    tokenizer.encode(prompts, placeholders)
    tokenizer.encode(prompts, words=dict.fromkeys(tokens, "robot"))


def personalize(**options: Any) -> None:
    """`personalize` with a token or a word."""
    import numpy as np

    with models.without_computing():
        api.personalize(models.toyworld(), np.zeros((32, 32, 3), np.uint8), steps=0, quiet=True, **options)


def generate(negative: str) -> None:
    """`generate` with a negative prompt."""
    with models.without_computing():
        api.generate(models.toyworld(), ["a robot"], negative=negative, num=1, quiet=True)


def prompt(*texts: Any, **placeholders: int) -> Any:
    """Prompts with the placeholder S*."""
    return nothing((list(texts), placeholders or {"S*": 1}))


KIND.refused("no prompt", nothing(([],)))
KIND.refused("one text in the place of a list, in Python", nothing(("a robot",)))
KIND.refused("None in Python", nothing((None,)))
KIND.refused("a list of None in Python", nothing(([None],)))
KIND.refused("a list of numbers in Python", nothing(([3],)))
KIND.refused("bytes in Python", nothing(([b"a robot"],)))
KIND.refused("an empty text", nothing(([""],)))
KIND.refused("blanks", nothing(([" \t "],)))
KIND.refused("line breaks alone", nothing((["\n\n"],)))
KIND.refused("blanks of other scripts", nothing((["\u3000\u2003"],)))
KIND.refused("an empty text among others", nothing((["a robot", ""],)))
KIND.refused("no placeholder", prompt("a robot on the beach"))
KIND.refused("the placeholder in small letters", prompt("a photo of s*"))
KIND.refused("the placeholder inside a word", nothing((["masks"], {"sks": 1})))
KIND.refused("the placeholder with letters beside it", nothing((["a photo of catS"], {"cat": 1})))
KIND.refused("the placeholder with a blank in it", prompt("a photo of S *"))
KIND.refused("the placeholder in one of two prompts", prompt("a S*", "a robot"))
KIND.refused("the placeholder behind the end of a long prompt", prompt("red " * 40 + "S*"))
KIND.refused("the placeholder at the edge of a long prompt", nothing((["red " * 29 + "S*"], {"S*": 2})))
KIND.refused("a placeholder of more vectors than a prompt holds", nothing((["S*"], {"S*": 50})))
KIND.refused("a placeholder without letters, 50,000 letters later", prompt("é" * 50_000 + " S*"))
KIND.used("a prompt that is too long", nothing((["red " * 40],)))
KIND.used("a word of 50,000 letters", nothing((["x" * 50_000],)))
KIND.used("control characters", prompt("a \x00\x07\x1b[2J S*"))
KIND.used("line breaks", prompt("a photo\nof a S*\r\n"))
KIND.used("characters that turn the direction of writing", prompt("a \u202eS*"))
KIND.used("emoji", prompt("a 🐈‍⬛ S*"))
KIND.refused("half of a surrogate pair", prompt("a \udc80 S*"))
KIND.used("letters that are composed", prompt("a cafe\u0301 S*"))
KIND.used("the special tokens of CLIP", prompt("<|startoftext|> a S* <|endoftext|>"))
KIND.used("braces and backslashes", prompt("a {S*} \\1 \\g<0> S*"))
KIND.used("markup of web pages", prompt("a <b>S*</b> &amp;"))
KIND.used("a placeholder that is a regular expression", nothing((["a photo of .*(+ here"], {".*(+": 1})))
KIND.used("a placeholder in Chinese, without blanks", nothing((["一只猫在海边"], {"猫": 1})))
KIND.used("one placeholder that begins with another", nothing((["cat and cats"], {"cat": 1, "cats": 1})))
KIND.used("the placeholder a hundred times", prompt("S* " * 100))
KIND.used("a prompt of punctuation alone", nothing((["..."],)))

for _name, _options in {
    "an empty token": {"token": ""},
    "a token of blanks": {"token": "  "},
    "a token with a line break": {"token": "S*\n"},
    "a token with an escape sequence": {"token": "\x1b[2J"},
    "a token that every prompt holds": {"token": "photo"},
    "a token of one letter that every prompt holds": {"token": "a"},
    "two tokens for a method of one": {"token": "A* B*"},
    "the same token twice": {"token": "A* A*", "method": "disendiff"},
    "an empty word": {"word": "", "method": "lora"},
    "a word of blanks": {"word": "  ", "method": "lora"},
    "a word that the model does not know": {"word": "🐈", "method": "lora"},
    "a word of 500 letters": {"word": "robot " * 100, "method": "lora"},
    "a word for a method that takes none": {"word": "robot"},
}.items():
    KIND.refused(_name, nothing(_options), lambda options: personalize(**options))
KIND.used("a token in Chinese", nothing({"token": "猫"}), lambda options: personalize(**options))
KIND.used("a word in capitals", nothing({"word": "ROBOT", "method": "lora"}), lambda options: personalize(**options))
KIND.refused(
    "half of a surrogate pair in a word",
    nothing({"word": "\udc80", "method": "lora"}),
    lambda options: personalize(**options),
)
KIND.refused("half of a surrogate pair in the negative prompt", nothing("\udc80"), generate)
KIND.used("a negative prompt of blanks", nothing("  "), generate)
