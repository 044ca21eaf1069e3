"""Metric sinks that need no service."""

from __future__ import annotations

from collections.abc import Mapping


class NullSink:
    """Drops everything."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""


class ListSink:
    """Keeps (step, metrics) in order; for tests and notebooks."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        self.rows.append((step, dict(metrics)))

    def series(self, name: str) -> list[float]:
        """Every value logged under `name`, in order."""
        return [row[name] for _, row in self.rows if name in row]
