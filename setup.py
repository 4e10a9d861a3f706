"""Puts recipes and example images, which lie beside the package in a clone, into a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"configs": "*.py", "examples": "*.png"}


class BuildWithShippedFiles(build_py):
    """Builds the package with a copy of the files that its commands find by name (`checkpoints.paths.find_shipped`)."""

    def run(self):
        super().run()
        if self.editable_mode:  # the package is then read from the clone
            return
        for folder, pattern in SHIPPED.items():
            files = sorted(Path(folder).glob(pattern))
            if not files:
                raise FileNotFoundError(f"{folder}/ has no {pattern}: build from a whole clone")
            target = Path(self.build_lib, "datencoder_jax", "assets", folder)
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy2(file, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
