"""A tiny Llama on Python's own documentation: trained, quantized, and writing text as .pte and through Inductor.

    python -m benchmarks.tiny_llama [--steps 400]

Bytes are its tokens. Prints perplexity on pages that it never saw, measured with the .pte, and the size of the file,
for float, 8 bits, 4-bit weights, and those with a cache of 8 bits; then the error of ten decoded tokens, and what both
backends write for one prompt. Training takes a minute or two on one core, compilers about as long.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.executorch.program import ExecutorchMethods
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.quantizer import ComposableQuantizer, Quantizer
from pt2e_quant.sqnr import sqnr
from quantizers.decoder import get_decoder_quantizer
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

__all__ = [
    "Config", "Generated", "TinyLlama", "difference", "export", "greedy", "int8_quantizers", "lower", "pages",
    "perplexity", "quantize", "train",
]  # fmt: skip

Step = Callable[[Tensor, Tensor], Tensor]
"""Tokens (1, n) and their positions (n) in; logits (1, n, vocabulary) out. Remembers earlier tokens in its cache."""


@dataclass(frozen=True)
class Config:
    """Sizes. `length` is that of the cache: the most tokens of a text."""

    vocabulary: int = 256
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 256
    length: int = 128
    eps: float = 1e-5
    theta: float = 10000.0


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. With positions given, keys and values go through the cache."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.heads, config.kv_heads, config.width // config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * self.size, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * self.size, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        cache = torch.zeros(1, config.kv_heads, config.length, self.size)
        self.register_buffer("key_cache", cache, persistent=False)
        self.register_buffer("value_cache", cache.clone(), persistent=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], positions: Tensor | None, mask: Tensor | None) -> Tensor:
        query = _rotate(self._split(self.query(x), self.heads), turns)
        key = _rotate(self._split(self.key(x), self.kv_heads), turns)
        value = self._split(self.value(x), self.kv_heads)
        if positions is not None:
            key = self.key_cache.index_copy_(2, positions, key)
            value = self.value_cache.index_copy_(2, positions, value)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(2, (heads, self.size)).transpose(1, 2)


def _rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turns
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = (nn.RMSNorm(config.width, config.eps) for _ in range(2))
        self.attention = Attention(config)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], *where: Tensor | None) -> Tensor:
        x = x + self.attention(self.before_attention(x), turns, *where)
        normed = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class TinyLlama(nn.Module):
    """The architecture of Llama: RoPE, GQA, RMSNorm, SwiGLU, and an output layer that is the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        size = config.width // config.heads
        angles = torch.arange(config.length)[:, None] * config.theta ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits. Without positions: whole texts, as in training. With them: one text that goes on, through the cache.

        Args:
            tokens: (batch, n), int64; batch is 1 when positions are given.
            positions: (n), int64, that of each token in its text.
        """
        mask = None
        turns = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        if positions is not None:
            turns = self.cos[positions], self.sin[positions]
            mask = torch.where(positions[:, None] >= torch.arange(self.config.length), 0.0, -1e9)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, turns, positions, mask)
        return self.head(self.norm(x))


# --- data and training ------------------------------------------------------------------------------------------------


def pages() -> tuple[Tensor, Tensor]:
    """Bytes of Python's reference pages, as pydoc has them: nine of ten to train with, the others to test with."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    parts = ([text for i, text in enumerate(texts) if (i % 10 == 9) is held_out] for held_out in (False, True))
    training, test = (torch.tensor(list("\n".join(part).encode())) for part in parts)
    return training, test


def train(model: TinyLlama, text: Tensor, steps: int, batch: int = 16) -> TinyLlama:
    """AdamW on random windows; the learning rate rises for a tenth of the steps and falls as a cosine."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)
    )
    length = model.config.length
    for _ in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        windows = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


# --- quantizing and lowering ------------------------------------------------------------------------------------------


def export(model: TinyLlama) -> ExportedProgram:
    """One graph for all lengths: what reads the prompt and what writes token after token."""
    sizes = Dim("n", min=1, max=model.config.length)
    example = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)
    with torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=({1: sizes}, {0: sizes}))


def quantize(
    exported: ExportedProgram, quantizer: Quantizer, texts: Sequence[Tensor] = (), integer_cache: bool = False
) -> GraphModule:
    """Prepare, calibrate with texts (windows of tokens, (1, n)), convert."""
    prepared = prepare_pt2e(exported, quantizer, require=["linear", "embedding"])
    with torch.no_grad():
        for text in texts:
            prepared(text, torch.arange(text.shape[1]))
        return convert_pt2e(prepared, integer_buffers=["*cache"] if integer_cache else ())


def lower(graph: GraphModule | ExportedProgram) -> ExecutorchMethods:
    """One file: `prefill` for any length, `decode` for one token; weights and cache are the same."""
    one = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    return lower_to_executorch(
        {"prefill": graph, "decode": graph}, {"decode": one}, dynamic_shapes={"decode": ({}, {})}
    )


def int8_quantizers() -> dict[str, Quantizer]:
    """Weights and table of 8 bits on both backends with the same integers; activations of 8 bits, while running.

    XNNPACK has a scale for each token, Inductor for each call: the same where a call has one token.
    """
    ours = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    x86 = replace(get_default_x86_inductor_quantization_config(is_dynamic=True), weight=ours.weight)
    table = EmbeddingQuantizer(replace(ours, input_activation=None, output_activation=None))
    return {
        "xnnpack": ComposableQuantizer([table, XNNPACKQuantizer().set_global(ours)]),
        "inductor": ComposableQuantizer([table, X86InductorQuantizer().set_global(x86)]),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def perplexity(prefill: Step, text: Tensor, windows: int, length: int) -> float:
    """exp of the mean negative log-likelihood of the bytes after the first one of each window."""
    losses = []
    with torch.no_grad():
        for index in range(windows):
            window = text[index * length : (index + 1) * length]
            logits = prefill(window[None], torch.arange(length))[0, :-1]
            losses.append(F.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).mean().exp())


@dataclass(frozen=True)
class Generated:
    """Tokens, and the logits that each was chosen from, (tokens, vocabulary)."""

    tokens: list[int]
    logits: Tensor

    @property
    def text(self) -> str:
        return bytes(self.tokens).decode(errors="replace")


def greedy(prefill: Step, decode: Step, prompt: Tensor, count: int, forced: Sequence[int] = ()) -> Generated:
    """The likeliest token, `count` times; `forced`: go on with these instead, to compare logits for one text."""
    length, tokens, logits = len(prompt), [], []
    with torch.no_grad():
        last = prefill(prompt[None], torch.arange(length))[0, -1].clone()
        for index in range(count):
            logits.append(last)
            tokens.append(int(last.argmax()))
            goes_on = forced[index] if forced else tokens[-1]
            if index < count - 1:
                last = decode(torch.tensor([[goes_on]]), torch.tensor([length + index]))[0, -1].clone()
    return Generated(tokens, torch.stack(logits))


def difference(one: Generated, other: Generated) -> str:
    """'' when the tokens are the same; else the first difference, with the logits that explain it."""
    step = next((i for i, pair in enumerate(zip(one.tokens, other.tokens, strict=True)) if len({*pair}) > 1), None)
    if step is None:
        return ""
    a, b = one.tokens[step], other.tokens[step]
    margins = [float(which.logits[step, a] - which.logits[step, b]) for which in (one, other)]
    moved = float((one.logits[step] - other.logits[step]).abs().max())
    return (
        f"token {step} is {bytes([a])!r} or {bytes([b])!r}: the first leads by {margins[0]:.4f} in one and "
        f"by {margins[1]:.4f} in the other, whose logits differ by up to {moved:.4f}"
    )


def _steps(program: ExecutorchMethods) -> tuple[Step, Step]:
    return lambda *x: program["prefill"].run(*x)[0], lambda *x: program["decode"].run(*x)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--windows", type=int, default=24)
    arguments = parser.parse_args()
    training, test = pages()
    torch.manual_seed(0)
    config = Config()
    start = time.process_time()
    model = train(TinyLlama(config), training, arguments.steps)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {arguments.steps} steps in {time.process_time() - start:.0f} s of CPU time")

    exported = export(model)
    texts = [training[i * 5000 : i * 5000 + config.length][None] for i in range(16)]
    quantizers = int8_quantizers()
    graphs: dict[str, GraphModule | ExportedProgram] = {
        "float": exported,
        "8 bits": quantize(exported, quantizers["xnnpack"]),
        "8da4w, 4-bit table": quantize(exported, get_decoder_quantizer()),
        "the same, int8 cache": quantize(exported, get_decoder_quantizer(integer_cache=True), texts, True),
    }
    programs = {name: lower(graph) for name, graph in graphs.items()}
    found: dict[str, float] = {}
    for name, program in programs.items():
        found[name] = perplexity(_steps(program)[0], test, arguments.windows, config.length)
        cache = sum(value.nbytes for buffer, value in _buffers(graphs[name]) if "cache" in buffer)
        print(
            f"{name:22} {len(program.buffer) / 1e3:7.1f} kB, cache {cache / 1e3:5.1f} kB, perplexity {found[name]:.4f} "
            f"({found[name] / found['float'] - 1:+.2%})"
        )
    for remark in programs["8da4w, 4-bit table"]["decode"].remarks:
        print(f"  {remark}")

    prompt = torch.tensor(list(b"The statement is used to "))
    exact = greedy(*_steps(programs["float"]), prompt, 10)
    of_file = greedy(*_steps(programs["8 bits"]), prompt, 10, exact.tokens)
    print(f"ten decoded tokens with 8-bit weights: SQNR {sqnr(exact.logits, of_file.logits):.1f} dB")

    inductor = lower_to_inductor(quantize(exported, quantizers["inductor"]))
    of_file = greedy(*_steps(programs["8 bits"]), prompt, 20)
    print(f".pte, 8 bits:               {of_file.text!r}")
    for name, prefill in (("whole prompt", inductor), ("token by token", _one_by_one(inductor))):
        inductor.reset()
        other = greedy(prefill, inductor, prompt, 20)
        told = difference(of_file, other) or "the same tokens"
        print(f"Inductor, {name:16}: {other.text!r}, {sqnr(of_file.logits, other.logits):.1f} dB, {told}")


def _buffers(graph: GraphModule | ExportedProgram) -> list[tuple[str, Tensor]]:
    return [*graph.named_buffers()]


def _one_by_one(step: Step) -> Step:
    """Read a prompt with one call a token, so that a scale for each call is one for each token."""
    return lambda tokens, positions: torch.cat(
        [step(tokens[:, i : i + 1], positions[i : i + 1]).clone() for i in range(len(positions))], 1
    )


if __name__ == "__main__":
    main()
