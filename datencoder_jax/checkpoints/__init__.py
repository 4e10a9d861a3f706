"""Weights in and out: Hugging Face folders, concept files, atomic writing."""
