"""docs/support.md says what the quantizers do, and shows every rule that they have."""

from __future__ import annotations

from docs.make_support import FILE, backends, cells, markdown, others

ON_REQUEST = {"matmul"}


def test_the_table_is_up_to_date():
    """python -m docs.make_support makes it anew."""
    assert FILE.read_text() == markdown()


def test_the_table_shows_every_rule_of_every_backend():
    shown = {(backend, cell.rule) for found in cells().values() for (backend, _), cell in found.items()}
    rules = {(backend, rule.name) for backend, (quantizer, _) in backends().items() for rule in quantizer.rules}
    assert {rule for rule in rules - shown if rule[1] not in ON_REQUEST} == set()


def test_every_operator_that_a_quantizer_has_a_reason_for_has_a_row():
    cells_of_names = [line.split("|")[1].strip() for line in FILE.read_text().splitlines() if line.startswith("| ")]
    rows = {name.split(",")[0].split(" ")[0] for name in cells_of_names}
    for quantizer, _ in backends().values():
        names = {str(op).split(".")[1].rstrip("_").removesuffix("_copy") for op in quantizer.reasons}
        assert names <= rows


def test_what_no_backend_has_a_kernel_for_has_a_reason_in_each_column():
    assert all(others()["hardsigmoid"].values())
    assert others()["channel_shuffle"]["x86"] is None  # the rule for moves takes it
