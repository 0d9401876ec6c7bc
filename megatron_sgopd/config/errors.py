"""The one error of this package, for people who write recipes."""

from __future__ import annotations


class ConfigError(ValueError):
    """Something in a recipe or an override is wrong; the message says what to do."""
