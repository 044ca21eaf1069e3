"""Metrics of judge and retriever, their significance, and the release gate."""
