"""The account of a prepared or converted graph, as a value, text, a rich table and JSON."""

from .explain import Report, explain

__all__ = ["Report", "explain"]
