"""The adapters that the contract tries: every initialisation and variant that is registered, and what else counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from divisions import DIVISIONS
from subjects import SUBJECTS

from lorica.init import INITS
from lorica.variants import VARIANTS

#: Relative error, by norm, that sums in another order are allowed.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        fields: of its config, beside what the subject adapts.
        start: only what it starts from is compared: factors, output, file.
        oracle: whether one process computes the same; not with dropout, whose masks differ from layout to layout.
        collectives: whether it may have collectives of its own in forward and backward.
        off: whether an adapter that has not learned yet leaves the output as it is, bit for bit.
        within: words in the names of the divisions where it has a meaning.
    """

    fields: Mapping[str, Any]
    start: bool = False
    oracle: bool = True
    collectives: bool = False
    off: bool = True
    within: str = ""


#: Initialisations that change the output from the start.
CHANGING = {False, "orthogonal"}
#: Variants that may talk of their own, with the reason.
TALKING = {
    "use_dora": "norms of layers that are cut by their inputs are summed when the factors have changed",
    "velora_config": "groups of features that lie across ranks are compressed together",
}
#: Variants whose forward in training is random, so that no two layouts draw the same.
RANDOM = {"monteclora_config"}
#: Variants without a meaning in divisions whose names hold a word, with the reason; an empty word: in none.
NOT_IN = {
    "alora_invocation_tokens": ("pp2", "only the first stage of a pipeline sees tokens"),
    "arrow_config": ("", "it routes to other adapters, so test_rows.py has a model with some"),
}
#: Divisions in which the embedding is stored in shards of its own.
SHARDED_ENDS = {f"transformers {axes}" for axes in ("fsdp2", "fsdp2 tp2", "ep2", "ep2 tp2 fsdp2")}
#: What turns a variant on where that is more than True; and fields that a variant cannot do without.
EXAMPLES: dict[str, Mapping[str, Any]] = {
    "kasa_config": {"kasa_config": {}},
    "use_bdlora": {
        "use_bdlora": {
            "nblocks": 2,
            "target_modules_bd_a": ["o_proj", "down_proj", "lm_head", "conv1d"],
            "target_modules_bd_b": ["q_", "k_", "v_", "up_proj", "gate_proj", "embed", "turned", "attention"],
            "match_strict": False,
        }
    },
    "use_qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora_config": {"velora_config": {"num_groups": 4, "scale": 0.9, "init_type": "random"}},
    "monteclora_config": {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.1}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [16], "task_type": "CAUSAL_LM"},
}

#: What an initialisation needs → how far its start may be from one process's. Inputs and gradients differ in the last
#: digit from layout to layout, and directions by that over the gap to the next one: wide for inputs, and narrower for
#: CorDA's W·C and for gradients of a layer that hardly matters yet.
FROM_DATA = {"": 0.0, "inputs": TOLERANCE, "gradient": 10 * TOLERANCE, "covariance": 10 * TOLERANCE}
#: What an initialisation needs to be told.
STARTS: dict[bool | str, Mapping[str, Any]] = {
    "eva": {"eva_config": {}},
    "corda": {"corda_config": {}},
    "lora_ga": {"lora_ga_config": {}},
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
}


def cases(division: str = "native tp2 sp", subject: str = "llama") -> dict[str, Case]:
    """Every initialisation and variant that is registered, and the fields that change the arithmetic."""
    found = {
        "rslora": Case({"use_rslora": True, "init_lora_weights": False}, start=True),
        "lora_bias": Case({"lora_bias": True}),
        "dropout": Case({"lora_dropout": 0.25}, oracle=False),
        "dropout post": Case({"lora_dropout": 0.25, "dropout_position": "post"}, oracle=False),
        "a2a": Case({"a2a_experimental": True}, collectives=True, within="native sp"),
        # fully_shard gathers what it stores of a module again where the module's own output requires a gradient.
        "tokens": Case({"trainable_token_indices": [37, 5, 20, 3]}, collectives=division in SHARDED_ENDS),
        "tokens at the start": Case({"trainable_token_indices": [37, 5, 20, 3], "init_lora_weights": True}, start=True),
        "replicated layers": Case({"layer_replication": [(0, 2), (1, 2)]}, within="tp2, before"),
        "shared experts": Case({"share_expert_adapters": True}),
        "mica": Case({"init_lora_weights": "mica"}),
    }
    found |= {
        f"variant {name or 'lora'}": Case(
            EXAMPLES.get(name, {name: True} if name else {}), oracle=name not in RANDOM, collectives=name in TALKING
        )
        for name in VARIANTS
        if not (name in NOT_IN and NOT_IN[name][0] in division)
    }
    found |= {
        f"init {name}": Case({"init_lora_weights": _example(name), **STARTS.get(name, {})}, start=True)
        for name in INITS
    }
    brief = SUBJECTS[subject].brief or DIVISIONS[division].brief
    return {
        name: case
        for name, case in found.items()
        if set(case.within.split()) <= set(division.split()) and (name.startswith("variant") or not brief)
    }


def _example(name: bool | str) -> bool | str:
    """An initialisation as a user writes it: where it is named after a number, with one."""
    return name.replace("_N", "_4") if isinstance(name, str) else name
