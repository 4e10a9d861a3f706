"""Personalization methods: where a concept's variables come from before they are tuned."""
