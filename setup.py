"""Build script. Metadata is in pyproject.toml; native_build builds the extension."""

import sys
from pathlib import Path

from setuptools import setup

# pip runs this file without its folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import native_build

setup(**native_build.options())
