"""The version, in one place: pyproject.toml, every checkpoint and every report read it from here."""

__version__ = "0.1.0"
