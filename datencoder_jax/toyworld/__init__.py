"""The embedded world: a renderer of small cartoon objects with known identity, its captions, tokenizer and data."""
