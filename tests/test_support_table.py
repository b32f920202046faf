"""docs/support.md says what the quantizers do, and shows every rule that they have."""

from __future__ import annotations

from docs.make_support import FILE, backends, cells, markdown

ON_REQUEST = {"matmul"}


def test_the_table_is_up_to_date():
    """python -m docs.make_support makes it anew."""
    assert FILE.read_text() == markdown()


def test_the_table_shows_every_rule_of_every_backend():
    shown = {(backend, cell.rule) for _, found in cells() for (backend, _), cell in found.items()}
    rules = {(backend, rule.name) for backend, (quantizer, _) in backends().items() for rule in quantizer.rules}
    assert {rule for rule in rules - shown if rule[1] not in ON_REQUEST} == set()
