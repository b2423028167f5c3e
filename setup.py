"""Metadata lies in pyproject.toml; this file is where the native build attaches. It never imports torch."""

from setuptools import setup

setup()
