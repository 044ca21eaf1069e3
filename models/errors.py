"""Errors a user can act on. Every message says *got / expected / do this*."""

from __future__ import annotations


class RelearnError(Exception):
    """Base of every error relearn raises on purpose; the CLI prints it without a traceback."""


class ConfigError(RelearnError, ValueError):
    """A setting that cannot work."""


class DataContractError(RelearnError, ValueError):
    """Input files that break the data contract of `models/schemas.py`."""


class ArtifactError(RelearnError, RuntimeError):
    """An artifact that is missing, incomplete or altered."""


class DivergenceError(RelearnError, ArithmeticError):
    """A training run whose loss or weights stopped being finite, or whose encoder collapsed."""


class WeightsError(RelearnError, OSError):
    """Model weights that cannot be found or read."""


class ServiceError(RelearnError, RuntimeError):
    """A server, or the worker of `relearn up`, that did not start, or did not stop."""


class StoreError(RelearnError, RuntimeError):
    """A tracking store that is damaged, or was locked or silent for too long; or a full disk."""


class TransientError(RelearnError, ConnectionError):
    """A failure that may pass by itself; the only kind that is retried."""


def explain(got: object, expected: object, do: str) -> str:
    """One message in the house form.

    >>> explain("grade 7", "a grade in 1..4", "map your labels with --set")
    'got grade 7; expected a grade in 1..4; do this: map your labels with --set'
    """
    return f"got {got}; expected {expected}; do this: {do}"
