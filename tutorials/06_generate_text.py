"""Tutorial 6: a decoder that writes text: 4-bit weights, a cache of 8 bits, one .pte to read prompts and to write.

A small Llama of transformers learns lines of the Zen of Python by heart, which takes seconds; then it has to recite
them from the .pte, and through Inductor. Needs transformers. Run it from anywhere, it takes a minute:

    python tutorials/06_generate_text.py

transformers imports torchao, which may first print "Failed to load ..." for kernels of GPUs, and a line for each of two
Enum classes. Both are harmless.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from quantizers.decoder import get_decoder_quantizer
from quantizers.x86_inductor import X86InductorQuantizer, get_default_x86_inductor_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 0. A decoder. Bytes are its tokens; its embedding is its output layer too, and two heads share a key and a value.

with contextlib.redirect_stdout(io.StringIO()):
    import this
zen = torch.tensor(list(codecs.decode(this.s, "rot13").encode()))[:400]

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip
llama = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 300)
for _ in range(300):
    starts = torch.randint(len(zen) - 63, (8,))
    batch = torch.stack([zen[start : start + 64] for start in starts.tolist()])
    loss = llama(input_ids=batch, labels=batch, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"trained: loss {loss.item():.2f}")

# ----------------------------------------------------------------------------------------------------------------------
# 1. One graph for prompts of any length and for single tokens. Its key-value cache of 64 tokens is a buffer that the
#    model writes to. strict=True keeps the names of these buffers.

llama.eval().generation_config.cache_implementation = "static"
decoder = TorchExportableModuleWithStaticCache(llama, batch_size=1, max_cache_len=64)
length = Dim("length", min=1, max=63)


def inputs(tokens: Tensor, first: int = 0) -> dict[str, Tensor]:
    """The arguments of the model, for tokens of which the first stands at this position."""
    return {"input_ids": tokens[None], "cache_position": torch.arange(first, first + len(tokens))}


with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # strict export tells of a variable that transformers keeps for itself
    exported = torch.export.export(
        decoder,
        (),
        inputs(zen[:8]),
        dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
        strict=True,
    )

# ----------------------------------------------------------------------------------------------------------------------
# 2. The recipe is one call: 8da4w for linears (activations of 8 bits for each token, weights of 4 bits in groups of
#    32), the embedding in 4 bits, and what is written to the cache in 8 bits. Only the last needs calibration.

prepared = prepare_pt2e(exported, get_decoder_quantizer(integer_cache=True), require=["linear", "embedding"])
with torch.no_grad():
    for start in range(0, 340, 40):
        prepared(**inputs(zen[start : start + 60]))
quantized = convert_pt2e(prepared, integer_buffers=["*cache*"])
for name, qparams in explain(quantized).buffers.items():
    print(f"{name}: {qparams.dtype}, scale {qparams.scale:.4f}")

# ----------------------------------------------------------------------------------------------------------------------
# 3. One file with two methods. `prefill` keeps the dynamic length; for `decode` it is fixed to one token, so that fewer
#    operators stay outside the delegates. Weights are stored once, and the methods share the caches.

program = lower_to_executorch(
    {"prefill": quantized, "decode": quantized},
    example_kwargs={"decode": inputs(zen[:1])},
    dynamic_shapes={"decode": {"input_ids": {}, "cache_position": {}}},
)
print(program)
print(program["decode"])
for remark in program["decode"].remarks:
    print(f"  {remark}")

# ----------------------------------------------------------------------------------------------------------------------
# 4. Write: the likeliest byte, again and again.

Model = Callable[..., Tensor]


def write(prefill: Model, decode: Model, prompt: Tensor, count: int) -> str:
    tokens = prompt.tolist()
    with torch.no_grad():
        logits = prefill(**inputs(prompt))
        for _ in range(count):
            tokens.append(int(logits[0, -1].argmax()))
            logits = decode(**inputs(torch.tensor(tokens[-1:]), len(tokens) - 1))
    return bytes(tokens).decode()


prompt = torch.tensor(list(b"Sparse is better than dense.\nRead"))
model = exported.module()
in_float = write(model, model, prompt, 20)
of_file = write(lambda **x: program["prefill"].run(**x)[0], lambda **x: program["decode"].run(**x)[0], prompt, 20)
print(f"float:    {in_float!r}\n.pte:     {of_file!r}")

# ----------------------------------------------------------------------------------------------------------------------
# 5. The same on x86, where Inductor's kernels have weights of 8 bits. A program keeps its cache between calls, and one
#    program serves for prompts and single tokens. reset() empties the cache; a new text at position 0 needs none.

x86 = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=True))
compiled = lower_to_inductor(convert_pt2e(prepare_pt2e(exported, x86)))
print(compiled)
of_inductor = write(compiled, compiled, prompt, 20)
print(f"Inductor: {of_inductor!r}")
