"""The open_clip package for comparison, also without torchvision: it needs that for pictures in files alone."""

import importlib.util
import sys
from unittest.mock import MagicMock

import pytest

_PICTURES = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")


def import_open_clip():
    """The module; the test is skipped where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("open_clip")
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # asked while the answer is still no, and remembered
    stubs = {f"torchvision{name}": MagicMock() for name in _PICTURES}
    sys.modules.update(stubs)
    try:
        return pytest.importorskip("open_clip")
    finally:
        for name in stubs:
            del sys.modules[name]
