"""Build script. Metadata is in pyproject.toml; native_build builds the extension."""

import sys
from pathlib import Path

from setuptools import setup

# pip runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import native_build

# A checkout on Windows makes a text file of the symbolic link vovnet_fast/kernels.
folders = {"vovnet_fast.kernels": "kernels", "vovnet_fast.kernels.resources": "kernels/resources"}
linked = (Path(__file__).resolve().parent / "vovnet_fast" / "kernels").is_dir()

setup(package_dir={} if linked else folders, **native_build.options())
