"""SGLang: as for vLLM, but every module of the same rank, and no projection of a fused layer without its siblings.

What the loader takes, and where it says so (https://github.com/sgl-project/sglang):

- ``python/sglang/srt/lora/lora_config.py`` at 0ceb81fe4868b3364267a661da67b5d88aa45fc3: reads ``r``, ``lora_alpha``
  and ``target_modules`` (a list of names; of strings only ``"all-linear"``). The scale is ``lora_alpha / r``
  (``lora.py``, ``LoRAAdapter``): ``use_rslora``, ``rank_pattern`` and ``alpha_pattern`` do not count.
- ``lora.py``, ``_process_weight``: a name has the number of its layer, or ``embed_tokens``, or ``lm_head``; all others
  are dropped without a word. ``normalize_qkv_proj`` and ``normalize_fused_qkv_a_proj`` stack ``q, k, v`` and ``q_a,
  kv_a``; a sibling that is missing is an error, is left where nobody reads it, or becomes zeros of the wrong shape.
  ``_rename_expert_w_to_proj`` knows ``w1, w2, w3``.
- ``mem_pool.py`` at 00639c4d198ed9596d73d45ca54d2d39b98b0b3e, ``load_lora_weight_to_buffer``: every A has ``r`` rows
  (times the projections stacked in it), every B ``r`` columns; experts are found by ``experts.<number>.``.
- ``utils.py`` at 01235a1633d19644d861f3542011bf35aeaee114, ``get_normalized_target_modules`` and
  ``_KNOWN_LORA_TARGET_MODULES``: the names of modules there is room for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lorica.export import pairs
from lorica.export.pairs import Pair
from lorica.export.source import Exported, Source, refuse
from lorica.export.vllm import named

#: Last parts of names that there is room for.
_KNOWN = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj"),
    *("embed_tokens", "lm_head"),
}
#: Projections that are stacked into one: none may be missing.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
_RENAMED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")


def export(source: Source) -> Exported:
    """Return an adapter as SGLang reads it.

    Raises:
        ExportError: it holds something that SGLang would refuse, or drop.
    """
    saved = source.plain("SGLang")
    problems = []
    if source.experts == "fused":
        problems.append("--experts fused: SGLang finds experts by their numbers")
    experts = pairs.per_expert(saved, fill=False)
    found = [*pairs.single(saved), *experts]
    for pair in found:
        problems += _problems(pair)
    refuse(source.path, "SGLang", list(dict.fromkeys(problems)))
    missing, problems = _missing(found, saved.base)
    refuse(source.path, "SGLang", problems)
    everything = [*found, *missing]
    rank, scale = pairs.common_rank(everything), pairs.common_scale(everything)
    tensors: dict[str, Tensor] = {}
    for pair in everything:
        even = pairs.scaled(pair, pair.scale) if scale is None else pair
        tensors |= named(pairs.padded(even, rank))
    leaves = sorted({_RENAMED.get(pair.leaf, pair.leaf) for pair in everything})
    notes = [f"SGLang needs --max-lora-rank {rank} or more, and --lora-target-modules with: {' '.join(leaves)}"]
    if missing:
        notes.append(f"Zeros were added for {len(missing)} projections that SGLang stacks with adapted ones")
    return Exported(tensors, saved.plain_config(rank, rank * (1.0 if scale is None else scale), leaves), notes)


def _problems(pair: Pair) -> list[str]:
    found = []
    if pair.leaf not in _KNOWN:
        found.append(f"{pair.name}: SGLang has no room for modules called {pair.leaf!r}")
    elif not _LAYER.search(pair.name) and pair.leaf not in ("embed_tokens", "lm_head"):
        found.append(f"{pair.name}: SGLang drops what belongs to no layer and is neither embed_tokens nor lm_head")
    elif _LAYER.search(pair.name) and pair.leaf in ("embed_tokens", "lm_head"):
        found.append(f"{pair.name}: SGLang has no {pair.leaf} inside of layers")
    return found


def _missing(found: Iterable[Pair], base: nn.Module) -> tuple[list[Pair], list[str]]:
    """Return zeros for the siblings of adapted projections, and why there are none."""
    modules: dict[str, Any] = dict(base.named_modules())
    have = {pair.name: pair for pair in found}
    added: dict[str, Pair] = {}
    problems = []
    for pair in have.values():
        group: tuple[str, ...] = next((group for group in _SIBLINGS if pair.leaf in group), ())
        for sibling in group:
            name = f"{pair.parent}.{sibling}"
            if name in have or name in added:
                continue
            beside = modules.get(f"{pair.module.rpartition('.')[0]}.{sibling}")
            if beside is not None:
                outs, ins = beside.weight.shape
                r = pair.a.shape[0]
                added[name] = Pair(name, pair.a.new_zeros(r, ins), pair.b.new_zeros(outs, r), pair.scale)
            elif group != _SIBLINGS[1] and pair.leaf != "kv_a_proj_with_mqa":
                problems.append(f"{pair.name}: SGLang stacks it with {sibling}, which the model does not have")
    return list(added.values()), problems


__all__ = ["export"]
