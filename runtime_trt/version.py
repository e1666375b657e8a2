"""Version of the installed project, for `fkv --version`, bundles and benchmark rows."""

from __future__ import annotations

from importlib.metadata import version


def project_version() -> str:
    """Returns the version as pyproject.toml states it, such as "0.1.0"."""
    return version("forcing-kv")
