"""Losses; each returns one float32 value per example, and the caller takes the mean last."""
