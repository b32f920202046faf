"""Tiny encoders and decoders from transformers' configs, and helpers that these tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from benchmarks.transformers_models import SentenceEncoder

__all__ = ["Logits", "bert", "calls", "export_tokens", "llama", "minilm", "tokens", "vit"]


class Logits(nn.Module):
    """A decoder without cache: token ids in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Hidden(SentenceEncoder):
    """An encoder whose mask may be left out: then the mean is over all tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.model(input_ids=input_ids).last_hidden_state.mean(1)
        return super().forward(input_ids, attention_mask)


class Pixels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state


def bert(attention: str = "sdpa", layers: int = 1) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=96, vocab_size=80,
        max_position_embeddings=40, layer_norm_eps=1e-3, attn_implementation=attention,
    )  # fmt: skip
    return Hidden(BertModel(config, add_pooling_layer=False)).eval()


def minilm(attention: str = "sdpa") -> nn.Module:
    """One layer as MiniLM has six, with fewer words."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=1536, vocab_size=80,
        max_position_embeddings=40, attn_implementation=attention,
    )  # fmt: skip
    return Hidden(BertModel(config, add_pooling_layer=False)).eval()


def llama(attention: str = "sdpa", tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=80, max_position_embeddings=40, rms_norm_eps=1e-3, tie_word_embeddings=tied,
        attn_implementation=attention,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config)).eval()


def vit(attention: str = "sdpa", layers: int = 1) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=96, image_size=16,
        patch_size=8, attn_implementation=attention,
    )  # fmt: skip
    return Pixels(ViTModel(config, add_pooling_layer=False)).eval()


def tokens(
    length: int = 12, batch: int = 1, padding: int = 3, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random ids, and a mask that ends in padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[:, length - padding :] = 0
    return torch.randint(0, 80, (batch, length), generator=generator), mask


def export_tokens(model: nn.Module, *, batch: bool = False, length: bool = True) -> ExportedProgram:
    """Export for ids and mask with these dimensions dynamic."""
    dims: dict[int, Any] = {0: Dim("batch", max=8)} if batch else {}
    if length:
        dims[1] = Dim("length", min=2, max=32)
    shapes = {"input_ids": dims, "attention_mask": dims} if dims else None
    with torch.no_grad():
        return torch.export.export(model, tokens(batch=2 if batch else 1), dynamic_shapes=shapes)


def calls(gm: GraphModule, target: Any) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=target)
