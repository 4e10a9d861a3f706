"""Noise schedule, prediction types, samplers and guidance: pure functions of arrays."""
