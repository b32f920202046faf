"""Nets of the zoo from transformers' configs: one or two layers of each architecture, random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.net import BOTH, DYNAMIC, STATIC, enter

__all__: list[str] = []


class _Output(nn.Module):
    """A model of transformers with tensors in, under the name of its first argument, and one tensor out."""

    def __init__(self, model: nn.Module, argument: str, output: str, **options: Any) -> None:
        super().__init__()
        self.model, self.argument, self.output, self.options = model, argument, output, options

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(**{self.argument: x}, **self.options), self.output)


IDS = (1, 16)
PIXELS = (1, 3, 64, 64)
_HIDDEN = "last_hidden_state"
_WIDTHS: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
}  # fmt: skip
_TEXT: dict[str, Any] = {**_WIDTHS, "vocab_size": 80, "max_position_embeddings": 40}
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}
_IMAGE: dict[str, Any] = {**_WIDTHS, "image_size": 64, "patch_size": 16, "num_labels": 10}
_SOUND: dict[str, Any] = {
    **_WIDTHS, "vocab_size": 32, "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip

# name: (config, model, its options, argument, output, shape of the input, recipes)
_ROWS: dict[str, tuple[str, str, dict[str, Any], str, str, tuple[int, ...], tuple[str, ...]]] = {
    "resnet": (
        "ResNetConfig", "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
        "pixel_values", "logits", PIXELS, STATIC,
    ),
    "mobilenet_v2": (
        "MobileNetV2Config", "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 64, "num_labels": 10}, "pixel_values", "logits", PIXELS, STATIC,
    ),
    "regnet": (
        "RegNetConfig", "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
        "pixel_values", "logits", PIXELS, STATIC,
    ),
    "convnext": (
        "ConvNextConfig", "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 10}, "pixel_values", "logits", PIXELS,
        BOTH,
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGE, "pixel_values", "logits", PIXELS, BOTH),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _IMAGE, "pixel_values", "logits", PIXELS, DYNAMIC),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _IMAGE, "pixel_values", "logits", PIXELS, DYNAMIC),
    "swin": (
        "SwinConfig", "SwinForImageClassification",
        {"image_size": 64, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "num_labels": 10},
        "pixel_values", "logits", PIXELS, DYNAMIC,
    ),
    "segformer": (
        "SegformerConfig", "SegformerForSemanticSegmentation",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "decoder_hidden_size": 48, "num_labels": 5,
         "num_attention_heads": [1, 2, 4, 8]},
        "pixel_values", "logits", PIXELS, DYNAMIC,
    ),
    "mobilevit": (
        "MobileViTConfig", "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96],
         "num_labels": 10},
        "pixel_values", "logits", PIXELS, DYNAMIC,
    ),
    "poolformer": (
        "PoolFormerConfig", "PoolFormerForImageClassification",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 10}, "pixel_values", "logits",
        PIXELS, STATIC,
    ),
    "bert": ("BertConfig", "BertModel", _TEXT, "input_ids", _HIDDEN, IDS, BOTH),
    "roberta": ("RobertaConfig", "RobertaModel", _TEXT, "input_ids", _HIDDEN, IDS, DYNAMIC),
    "distilbert": (
        "DistilBertConfig", "DistilBertModel",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 80, "max_position_embeddings": 40},
        "input_ids", _HIDDEN, IDS, DYNAMIC,
    ),
    "albert": ("AlbertConfig", "AlbertModel", {**_TEXT, "embedding_size": 32}, "input_ids", _HIDDEN, IDS, DYNAMIC),
    "mobilebert": (
        "MobileBertConfig", "MobileBertModel",
        {**_TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, "input_ids", _HIDDEN,
        IDS, DYNAMIC,
    ),
    "t5_encoder": (
        "T5Config", "T5EncoderModel",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 80}, "input_ids",
        _HIDDEN, IDS, DYNAMIC,
    ),
    "clip_text": ("CLIPTextConfig", "CLIPTextModel", _TEXT, "input_ids", _HIDDEN, IDS, DYNAMIC),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 40, "use_cache": False},
        "input_ids", "logits", IDS, DYNAMIC,
    ),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128, "vocab_size": 80,
         "max_position_embeddings": 40, "word_embed_proj_dim": 64, "use_cache": False},
        "input_ids", "logits", IDS, DYNAMIC,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "use_cache": False}, "input_ids", "logits", IDS, DYNAMIC),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_DECODER, "use_cache": False}, "input_ids", "logits", IDS, DYNAMIC),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 4, "use_cache": False, "num_hidden_layers": 1}, "input_ids", "logits", IDS,
        DYNAMIC,
    ),
    "mamba": (
        "MambaConfig", "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 80, "use_cache": False},
        "input_ids", "logits", (1, 8), DYNAMIC,
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model", _SOUND, "input_values", _HIDDEN, (1, 1600), DYNAMIC),
    "whisper_encoder": (
        "WhisperConfig", "WhisperModel",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
         "max_source_positions": 50, "max_target_positions": 20, "vocab_size": 80, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        "input_features", _HIDDEN, (1, 16, 100), DYNAMIC,
    ),
}  # fmt: skip


def _enter(name: str) -> None:
    config, model, options, argument, output, shape, recipes = _ROWS[name]

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**options, attn_implementation="eager"))
        made = made.encoder if name == "whisper_encoder" else made
        x = torch.randint(0, 80, shape) if argument == "input_ids" else torch.randn(shape)
        return _Output(made, argument, output), (x,)

    build.__name__ = name
    enter("transformers", recipes)(build)


for _name in _ROWS:
    _enter(_name)
