"""The version. The package and its metadata both read it from here."""

__version__ = "0.1.0"
