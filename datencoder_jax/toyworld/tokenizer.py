"""A small tokenizer in CLIP's file format: byte-level BPE in which every word of the world is one token."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from datencoder_jax.toyworld.captions import VOCABULARY

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of CLIP's byte-level BPE, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]


def _apply(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """BPE: joins the pair of lowest rank until no pair has one."""
    while len(pieces) > 1:
        pair = min(itertools.pairwise(pieces), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        joined, k = [], 0
        while k < len(pieces):
            if tuple(pieces[k : k + 2]) == pair:
                joined.append(pieces[k] + pieces[k + 1])
                k += 2
            else:
                joined.append(pieces[k])
                k += 1
        pieces = joined
    return pieces


def build(words: Iterable[str] = VOCABULARY) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary (token -> id) and merges under which each of `words` (ASCII, lower case) is one token.

    Merges are added word by word, shortest first. A later merge has a higher rank, so it never changes how an earlier
    word is put together.
    """
    symbols = byte_symbols()
    vocab = {token: k for k, token in enumerate([*symbols, *(s + "</w>" for s in symbols)])}
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(set(words), key=lambda w: (len(w), w)):
        pieces = _apply([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            vocab.setdefault(pieces[0] + pieces[1], len(vocab))
            pieces = _apply(pieces, ranks)
    for special in (START, END):
        vocab[special] = len(vocab)
    return vocab, list(ranks)


def write_tokenizer(folder: str | Path, words: Iterable[str] = VOCABULARY) -> None:
    """Writes `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json` into `folder`.

    `transformers.CLIPTokenizer.from_pretrained(folder)` reads them; padding is `<|endoftext|>`, as in CLIP.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = build(words)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
