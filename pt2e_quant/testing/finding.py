"""What a check says: one finding for each place that breaks one rule."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """A place that breaks a rule.

    Args:
        rule: id of the rule, a key of `pt2e_quant.testing.RULES`.
        model: name of the model in which it was found; "" when it concerns none in particular.
        where: the node, or the edge as 'producer -> consumer'; "" when it concerns the whole graph.
        message: what is wrong there, in one line.
    """

    rule: str
    model: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {': '.join(filter(None, (self.model, self.where, self.message)))}"
