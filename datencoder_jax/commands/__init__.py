"""What each command does, one module each; its `run(args)` is imported when the command is.

All that can be checked of the input is checked before a model is loaded, and jax is imported inside the functions,
after those checks, so that a mistake is told at once.
"""
