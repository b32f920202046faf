"""A tiny Llama trained for a minute on Python's documentation: what quantizing costs it, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from benchmarks.tiny_llama import (
    Config,
    TinyLlama,
    difference,
    export,
    greedy,
    int8_quantizers,
    lower,
    pages,
    perplexity,
    quantize,
    train,
)
from pt2e_quant.lowering.executorch.program import ExecutorchMethods
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.decoder import get_decoder_quantizer
from tests.nets import sqnr

pytestmark = pytest.mark.slow
pytest.importorskip("executorch")

PROMPT = torch.tensor(list(b"The statement is used to "))


@dataclass(frozen=True)
class Trained:
    model: TinyLlama
    exported: ExportedProgram
    texts: list[Tensor]
    test: Tensor

    def perplexity(self, prefill) -> float:
        return perplexity(prefill, self.test, 24, self.model.config.length)


@pytest.fixture(scope="module")
def trained() -> Trained:
    training, test = pages()
    torch.manual_seed(0)
    model = train(TinyLlama(Config()), training, 400)
    length = model.config.length
    return Trained(model, export(model), [training[i * 5000 : i * 5000 + length][None] for i in range(16)], test)


@pytest.fixture(scope="module")
def int8(trained) -> ExecutorchMethods:
    return lower(quantize(trained.exported, int8_quantizers()["xnnpack"]))


def steps(program: ExecutorchMethods):
    return lambda *x: program["prefill"].run(*x)[0], lambda *x: program["decode"].run(*x)[0]


def test_perplexity_before_and_after(trained):
    """4-bit weights cost at most 3 %, a cache of 8 bits at most 1 % more, in the file that runs."""
    found = {"float": trained.perplexity(trained.model)}
    for name, cache in (("8da4w", False), ("8da4w, int8 cache", True)):
        graph = quantize(trained.exported, get_decoder_quantizer(integer_cache=cache), trained.texts, cache)
        found[name] = trained.perplexity(steps(lower(graph))[0])
    print({name: round(value, 4) for name, value in found.items()})
    assert 2 < found["float"] < 6  # it learned: bytes at random are 256, English letters by frequency about 20
    assert found["8da4w"] < 1.03 * found["float"]
    assert found["8da4w, int8 cache"] < 1.01 * found["8da4w"]


def test_ten_decoded_tokens_with_int8_weights_are_above_30_db(trained, int8):
    exact = greedy(trained.model, trained.model, PROMPT, 10)
    of_file = greedy(*steps(int8), PROMPT, 10, exact.tokens)
    assert sqnr(exact.logits, of_file.logits) > 30


def test_both_backends_write_the_same_twenty_tokens(trained, int8):
    """Or logits say why not: up to the first difference they agree, so that two tokens were as likely as each other."""
    program = lower_to_inductor(quantize(trained.exported, int8_quantizers()["inductor"]))
    of_file, other = greedy(*steps(int8), PROMPT, 20), greedy(program, program, PROMPT, 20)
    told = difference(of_file, other)
    print(repr(of_file.text), repr(other.text), told or "the same tokens")
    same = next((i for i in range(20) if of_file.tokens[i] != other.tokens[i]), 20)
    assert sqnr(of_file.logits[: same + 1], other.logits[: same + 1]) > 30, told
