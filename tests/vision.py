"""Tiny vision-language models of several families, made from configurations, and batches that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: The token that stands for a piece of an image, in every model here.
IMAGE = 5
VOCABULARY = 64

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


class Family(NamedTuple):
    """A family of models.

    Attributes:
        make: a model, with random weights.
        batch: what it takes for two rows with an image each.
        roles: for a few parameters, by the ends of their names, the part that they belong to.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    roles: dict[str, str]


def _tokens(pieces: int) -> dict[str, Tensor]:
    """Two rows of tokens: words, an image of so many pieces, words."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(6, VOCABULARY, (2, 8), generator=generator)
    image = torch.full((2, pieces), IMAGE)
    ids = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_TOWER), text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    grids = [[16, 16], [16, 32], [32, 16]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=grids,
    )
    return LlavaNextForConditionalGeneration(config)


_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": 3, "vision_end_token_id": 2}


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tower = {"depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": 16, "patch_size": 4, "mlp_ratio": 2}
    text = _TEXT | {"rope_parameters": _MROPE}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS))


def _qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "out_hidden_size": 16}
    tower |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    text = _TEXT | {"rope_parameters": _MROPE}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS))


def _qwen3_vl() -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tower = {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "out_hidden_size": 16}
    tower |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = _TEXT | {"head_dim": 4, "rope_parameters": _MROPE}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_TOKENS))


def _gemma3() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = _TEXT | {"head_dim": 4, "sliding_window": 8}
    config = Gemma3Config(
        text_config=text, vision_config=_TOWER, mm_tokens_per_image=4, image_token_id=IMAGE, image_token_index=IMAGE
    )
    model = Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # it starts as zero
    return model


def _idefics3(name: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        text_config={"model_type": "llama"} | _TEXT, vision_config=_TOWER, scale_factor=2, image_token_id=IMAGE
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _internvl() -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    tower = _TOWER | {"image_size": [16, 16], "patch_size": [4, 4]}
    config = InternVLConfig(
        text_config={"model_type": "qwen2"} | _TEXT, vision_config=tower, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def _square(pieces: int, **more: Any) -> dict[str, Tensor]:
    return _tokens(pieces) | {"pixel_values": _pixels(2, 3, 16, 16)} | more


def _tiled() -> dict[str, Tensor]:
    ids = _tokens(36)  # a base image of 4 × 4 pieces, and one tile of 4 rows with a new line each
    return ids | {"pixel_values": _pixels(2, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16], [16, 16]])}


def _flat() -> dict[str, Tensor]:
    found = _tokens(4)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (found["input_ids"] == IMAGE).int()
    return found | {"pixel_values": _pixels(32, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _typed() -> dict[str, Tensor]:
    found = _square(4)
    return found | {"token_type_ids": (found["input_ids"] == IMAGE).long()}


def _stacked() -> dict[str, Tensor]:
    return _tokens(4) | {"pixel_values": _pixels(2, 1, 3, 16, 16)}


_BESIDE = {"language_model": "language_model", "lm_head.weight": "language_model"}
_TIED = {"language_model": "language_model"}
_PROJECTOR = {"vision_tower": "vision_model", "multi_modal_projector": "vision_projection"}
_INSIDE = _BESIDE | {"visual.blocks": "vision_model", "visual.merger": "vision_projection"}
_CONNECTOR = {"text_model": "language_model", "vision_model": "vision_model", "connector": "vision_projection"}

FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, lambda: _square(16), _BESIDE | _PROJECTOR),
    "llava_next": Family(_llava_next, _tiled, _BESIDE | _PROJECTOR | {"image_newline": "vision_projection"}),
    "qwen2_vl": Family(_qwen2_vl, _flat, _INSIDE),
    "qwen2_5_vl": Family(_qwen2_5_vl, _flat, _INSIDE),
    "qwen3_vl": Family(_qwen3_vl, _flat, _INSIDE | {"deepstack_merger_list": "vision_projection"}),
    "gemma3": Family(_gemma3, _typed, _TIED | _PROJECTOR),
    "idefics3": Family(lambda: _idefics3("Idefics3"), _stacked, _CONNECTOR),
    "smolvlm": Family(lambda: _idefics3("SmolVLM"), _stacked, _CONNECTOR),
    "internvl": Family(_internvl, lambda: _square(4), _TIED | _PROJECTOR),
}


def make(family: str) -> nn.Module:
    """Return a tiny model of a family, the same in every call."""
    torch.manual_seed(0)
    return FAMILIES[family].make().eval()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the words after the image."""
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    found: Tensor = model(**batch, labels=labels).loss
    return found
