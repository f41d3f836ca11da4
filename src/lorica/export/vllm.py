"""vLLM: one rank, one scale, the checkpoint's names; experts one by one, or a layer's fused where the model has it so.

What the loader takes, and where it says so (https://github.com/vllm-project/vllm):

- ``vllm/lora/utils.py``, ``parse_fine_tuned_lora_name``: names ``base_model.model.<module>.lora_A.weight``,
  ``.lora_B.weight``, ``.lora_embedding_A``, ``.lora_embedding_B``; any other is an error. ``<module>`` goes through the
  model's mapper of checkpoint names.
- ``vllm/lora/lora_model.py`` at 0306474e9d1f26d8717aad457b9511f0c9e57d60, ``check_unexpected_modules``: the last part
  of a module's name must be one of the model's linear layers; of an expert's, all that follows ``.experts``. DoRA is
  refused (``from_lora_tensors``).
- ``vllm/lora/peft_helper.py`` up to 0.30: ``alpha / r`` (``alpha / √r`` with rsLoRA) is the scale of *every* module:
  ``rank_pattern`` and ``alpha_pattern`` are not read. ``bias``, ``modules_to_save`` and ``use_dora`` are refused;
  ``lora_bias`` and starts that change the base weights are not seen by older ones, refused by newer ones.
- ``vllm/config/lora.py``: ``max_lora_rank`` is one of the numbers in ``_RANKS``, 16 if nothing is said.
- ``vllm/lora/lora_weights.py``, ``pack_moe``: experts one by one have all of ``w1``, ``w2``, ``w3``; none may be
  missing.
- ``vllm/lora/model_manager.py`` at 01533aa8f9c07da9766323fbaf4c8b81bb2aa958, ``_stack_moe_lora_weights``: models with
  ``is_3d_moe_weight`` take ``experts.base_layer`` for the first projection and ``experts`` for the second, both there,
  A ``[E·r, in]``, B ``[out, r·E]`` (PEFT's form of ``target_parameters``).
"""

from __future__ import annotations

from torch import Tensor

from lorica.checkpoint.forms import FORMS
from lorica.export import pairs
from lorica.export.pairs import PREFIX, Pair
from lorica.export.source import Exported, Source, refuse

#: Values of ``max_lora_rank``, and what it is without one.
_RANKS, _DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
#: Model types whose class says ``is_3d_moe_weight`` (``vllm/model_executor/models/gpt_oss.py``, ``qwen3_vl_moe.py``,
#: ``qwen3_5.py``, ``interns1_pro.py``).
_FUSED = ("gpt_oss", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_5_moe", "qwen3_5_moe_text", "interns1_pro")


def export(source: Source) -> Exported:
    """Return an adapter as vLLM reads it.

    Raises:
        ExportError: it holds something that vLLM would refuse, or lose.
    """
    saved = source.plain("vLLM")
    kind = getattr(saved.base.config, "model_type", "")
    fused = source.experts == "fused" or (source.experts == "auto" and kind in _FUSED)
    single, stacks = pairs.single(saved), pairs.fused(saved) if fused else []
    experts = [] if fused else pairs.per_expert(saved, fill=True)
    plain = [*single, *experts]
    everything = [*plain, *(pair for _, pair in stacks)]
    rank, scale = pairs.common_rank(everything), pairs.common_scale(everything)
    refuse(source.path, "vLLM", _problems(rank))
    alpha = rank * (1.0 if scale is None else scale)
    tensors: dict[str, Tensor] = {}
    for pair in plain:
        tensors |= named(_even(pair, scale))
    for place, pair in stacks:
        tensors |= _stack(place, pairs.padded(_even(pair, scale), rank))
    leaves = sorted({pair.leaf for pair in plain} | {"experts" for _ in stacks[:1]})
    notes = _notes(rank, bool(stacks), bool(experts), kind)
    return Exported(tensors, saved.plain_config(rank, alpha, leaves), notes)


def _problems(rank: int) -> list[str]:
    return [f"rank {rank}: vLLM's max_lora_rank is at most {_RANKS[-1]}"] if rank > _RANKS[-1] else []


def _even(pair: Pair, scale: float | None) -> Pair:
    """Return a pair that the scale common to all fits; B carries its own where there is none."""
    return pairs.scaled(pair, pair.scale) if scale is None else pair


def named(pair: Pair) -> dict[str, Tensor]:
    """Return the tensors of a pair under their names in a file."""
    ends = ("lora_embedding_A", "lora_embedding_B") if pair.lookup else ("lora_A.weight", "lora_B.weight")
    return {f"{PREFIX}{pair.name}.{end}": t.contiguous() for end, t in zip(ends, (pair.a, pair.b), strict=True)}


def _stack(place: str, pair: Pair) -> dict[str, Tensor]:
    """Return the tensors of a stack: the second projection under the experts' name, the first below ``base_layer``."""
    inner = "" if pair.leaf == "down_proj" else ".base_layer"
    a, b = FORMS["expert", "rank", "in"].saved(pair.a), FORMS["expert", "out", "rank"].saved(pair.b)
    return {
        f"{PREFIX}{place}{inner}.lora_A.weight": a.contiguous(),
        f"{PREFIX}{place}{inner}.lora_B.weight": b.contiguous(),
    }


def _notes(rank: int, fused: bool, separate: bool, kind: str) -> list[str]:
    notes = []
    if rank > _DEFAULT_RANK:
        notes.append(f"vLLM needs --max-lora-rank {next(most for most in _RANKS if most >= rank)}: the rank is {rank}")
    form = "fused in one file entry for a layer" if fused else "one by one"
    other = "separate" if fused else "fused"
    if fused or separate:
        notes.append(
            f"Experts are written {form}, as vLLM's class for {kind!r} takes them; a version that wants the other form "
            f"gets it with --experts {other}"
        )
    return notes


__all__ = ["export", "named"]
