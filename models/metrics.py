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


class Mean:
    """Running means of named values between two logs."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Count one observation of each name."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    def peek(self) -> dict[str, float]:
        """The means so far."""
        return {name: self._sums[name] / self._counts[name] for name in self._sums}

    def take(self) -> dict[str, float]:
        """The means so far, and start again."""
        means = self.peek()
        self._sums.clear()
        self._counts.clear()
        return means
