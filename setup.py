# SPDX-License-Identifier: Apache-2.0
"""Finds the packages. Everything else is declared in pyproject.toml.

Automatic discovery would call kernels/ and pipelines/ by their folder names; they are installed inside headkv_mm.
"""

from setuptools import find_packages, setup

inside = [f"headkv_mm.{name}" for name in find_packages(include=["kernels", "kernels.*", "pipelines", "pipelines.*"])]

setup(packages=[*find_packages(include=["headkv_mm", "headkv_mm.*"]), *inside])
