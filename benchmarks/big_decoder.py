"""Time and memory of a large decoder on its way to a .pte with 8da4w: random weights, GPTQ block by block.

    python -m benchmarks.big_decoder [--size 200M] [--tokens 128] [--folder out/big_decoder]

Llama's architecture from a config of transformers. Each stage prints its seconds and its peak of resident memory, as
part of the bytes of the float32 weights. GPTQ keeps a file for each layer in the folder: after kill -9, the same
command goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, prepare_pt2e
from pt2e_quant.algorithms import gptq
from pt2e_quant.lowering.executorch import lower_to_executorch
from quantizers.decoder import get_decoder_quantizer

__all__ = ["main"]

SIZES = {  # hidden, layers, heads, key and value heads, width of the MLP, vocabulary
    "10M": (256, 4, 4, 2, 1024, 16000),
    "60M": (512, 8, 8, 4, 2048, 32000),
    "200M": (1024, 12, 16, 8, 4096, 32000),
    "1B": (2048, 16, 32, 8, 8192, 128256),  # Llama 3.2 1B
}


class Decoder(nn.Module):
    """Tokens (1, n) in, logits out."""

    def __init__(self, size: str) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, layers, heads, kv_heads, width, vocabulary = SIZES[size]
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=width, vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(config).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(input_ids=tokens).logits  # type: ignore[no-any-return]


def resident(name: str) -> int:
    """Bytes of this process, by the name that Linux has for them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


class Stages:
    """Prints what each stage took, beside `weights` bytes; what Python and torch take themselves is left out."""

    def __init__(self) -> None:
        self._before = resident("VmRSS")
        self.weights = 1
        self.peak = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
        start = time.perf_counter()
        yield
        peak = (resident("VmHWM") - self._before) / self.weights
        self.peak = max(self.peak, peak)
        print(f"{name:10} {time.perf_counter() - start:7.1f} s   peak {peak:.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="200M")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=Path("out/big_decoder"))
    options = parser.parse_args()
    import transformers  # noqa: F401  # its memory is no part of the stages

    stages = Stages()
    model = Decoder(options.size)
    stages.weights = sum(4 * one.numel() for one in model.parameters())
    print(f"{stages.weights / 4e6:.0f} million parameters, {stages.weights / 1e9:.2f} GB in float32", flush=True)
    vocabulary = SIZES[options.size][-1]
    data = [(torch.randint(0, vocabulary, (1, options.tokens), generator=torch.Generator().manual_seed(1)),)]
    with stages.stage("export"), torch.no_grad():
        exported = torch.export.export(model, data[0])
    del model
    with stages.stage("prepare"):
        prepared = prepare_pt2e(exported, get_decoder_quantizer(32))
        del exported
    with stages.stage("gptq"):
        prepared = gptq(prepared, data, resume=options.folder / f"gptq_{options.size}", consume=True)[0]
    with stages.stage("convert"):
        converted = convert_pt2e(prepared)
        del prepared
    with stages.stage("lower"):
        program = lower_to_executorch(converted, data[0])
        path = options.folder / f"decoder_{options.size}.pte"
        program.save(path)
    print(f"peak {stages.peak:.2f}x of the float32 weights; {path} has {path.stat().st_size / stages.weights:.3f}x")


if __name__ == "__main__":
    main()
