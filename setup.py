"""Installs gspo_moe; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
