"""``LoraConfig``: every field of PEFT's, and what lorica adds (LoRA: https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from lorica.config.base import PeftConfig, PeftType
from lorica.config.checks import MAX_ALPHA, MAX_RANK, check_lora_config
from lorica.config.fields import check_types
from lorica.config.options import (
    OPTIONS,
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
    options_of,
)
from lorica.errors import ConfigError


@dataclass
class LoraRuntimeConfig:
    """Settings of the running process, neither saved nor restored.

    Args:
        ephemeral_gpu_offload: move weights to the accelerator only while an initialisation needs them there.
    """

    ephemeral_gpu_offload: bool = field(
        default=False, metadata={"help": "Move weights to the accelerator only while an initialisation needs them."}
    )


def _help(text: str, **bounds: float) -> dict[str, Any]:
    return {"help": text, **bounds}


@dataclass
class LoraConfig(PeftConfig):
    """The configuration of one adapter: which layers, which rank, which scale, how it starts.

    The delta of an adapted weight is ``s·B·A`` with ``A: [r, in]``, ``B: [out, r]`` and ``s = lora_alpha / r``
    (``lora_alpha / √r`` with ``use_rslora``). Names, types and defaults are PEFT's; ``dropout_position`` and
    ``lora_dtype`` are lorica's own. The meaning of each field stands in its ``help`` metadata.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or contradicts another.
    """

    r: int = field(default=8, metadata=_help("The rank: rows of A, columns of B.", most=MAX_RANK))
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata=_help(
            "Which modules to adapt. A list: names that are equal or that end with '.' and the entry; an entry with "
            "'*' is matched against the whole name. A string: a regular expression for the whole name, or "
            "'all-linear' (all linear layers but the output layer). None: the usual ones of the architecture."
        ),
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("Modules to leave alone, matched like target_modules.")
    )
    lora_alpha: int | float = field(
        default=8, metadata=_help("α, the numerator of the scale.", least=-MAX_ALPHA, most=MAX_ALPHA)
    )
    lora_dropout: float = field(default=0.0, metadata=_help("Dropout probability on the way into A."))
    fan_in_fan_out: bool = field(
        default=False,
        metadata=_help("The base weight is stored [in, out]. Found from the layer's type; a wrong value is corrected."),
    )
    bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata=_help("Which biases of the base model train too.")
    )
    use_rslora: bool = field(default=False, metadata=_help("Scale α/√r (https://arxiv.org/abs/2312.03732)."))
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules that train fully, in a copy per adapter, and are saved with it.")
    )
    init_lora_weights: bool | str = field(
        default=True,
        metadata=_help(
            "How the factors start. True: A Kaiming-uniform, B zero. False: both random. Or one of 'gaussian', "
            "'orthogonal', 'xavier', 'kaiming', 'normal'; 'xavier+normal' and the like, for A and B; from the base "
            "weight 'pissa', 'pissa_niter_N', 'olora', 'mica', 'loftq'; from data 'eva', 'corda', 'lora_ga'."
        ),
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("Adapt only the layers with these numbers.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("Name of the module list that layers_to_transform counts in.")
    )
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata=_help("Regular expression for the end of a name → rank, in place of r.")
    )
    alpha_pattern: dict[str, float] | None = field(
        default_factory=dict, metadata=_help("Regular expression for the end of a name → α, in place of lora_alpha.")
    )
    megatron_config: dict[str, Any] | None = field(
        default=None,
        metadata=_help(
            "Fields of Megatron's TransformerConfig, kept for PEFT. Nothing is built from them here: Megatron's layers "
            "are recognised, and say by themselves how they lie over ranks."
        ),
    )
    megatron_core: str | None = field(
        default="megatron.core",
        metadata=_help("Megatron's core module; 'megatron.core' is the only one, since PEFT imports what it names."),
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata=_help("Rows of the embedding that train.")
    )
    loftq_config: LoftQConfig | dict[str, Any] | None = field(
        default_factory=dict, metadata=_help("Configuration of LoftQ.")
    )
    eva_config: EvaConfig | None = field(default=None, metadata=_help("Configuration of EVA."))
    corda_config: CordaConfig | None = field(default=None, metadata=_help("Configuration of CorDA."))
    lora_ga_config: LoraGAConfig | None = field(default=None, metadata=_help("Configuration of LoRA-GA."))
    use_dora: bool = field(default=False, metadata=_help("DoRA (https://arxiv.org/abs/2402.09353)."))
    velora_config: VeloraConfig | None = field(default=None, metadata=_help("Configuration of VeLoRA."))
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_help("Activated LoRA."))
    use_qalora: bool = field(default=False, metadata=_help("QA-LoRA (https://arxiv.org/abs/2309.14717)."))
    qalora_group_size: int = field(default=16, metadata=_help("Group size of QA-LoRA."))
    monteclora_config: MontecloraConfig | None = field(default=None, metadata=_help("Configuration of MonteCLoRA."))
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata=_help("Ranges of layers to stack into a new model.")
    )
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata=_help("Settings of the running process; not saved.")
    )
    lora_bias: bool = field(default=False, metadata=_help("Give B a bias."))
    target_parameters: list[str] | None = field(
        default=None,
        metadata=_help(
            "Bare parameters to adapt, such as 'mlp.experts.gate_up_proj': names that are equal or that end with '.' "
            "and the entry; an entry with '*' is matched against the whole name."
        ),
    )
    use_bdlora: BdLoraConfig | None = field(default=None, metadata=_help("Block-diagonal LoRA."))
    arrow_config: ArrowConfig | None = field(default=None, metadata=_help("Configuration of Arrow routing."))
    kasa_config: KasaConfig | None = field(default=None, metadata=_help("Configuration of KaSA."))
    ensure_weight_tying: bool = field(
        default=False, metadata=_help("Adapt layers that share the embedding's weight with the same factors.")
    )
    dropout_position: Literal["pre", "post"] = field(
        default="pre", metadata=_help("'pre': B·A·drop(x). 'post': drop(B·A·x), before the scale.")
    )
    lora_dtype: str | None = field(
        default=None, metadata=_help("Dtype of the factors, such as 'bfloat16'. None: chosen from the base weight's.")
    )
    share_expert_adapters: bool = field(
        default=False, metadata=_help("Stacked experts of a layer share one adapter; otherwise each has its own.")
    )
    normalize_moe_lora: bool = field(
        default=False,
        metadata=_help("Divide the rank of stacked experts by the number of experts that a token is sent to."),
    )
    a2a_experimental: bool = field(
        default=False,
        metadata=_help(
            "Under sequence parallelism, send the r hidden values of each token between A and B, so that B (of a layer "
            "that reduces its output) or A (of one that gathers its input) works on its rank's tokens only. Where a "
            "layer has no such collective of its own, and for DoRA, nothing changes."
        ),
    )

    fused_as_one: bool = field(
        default=False,
        metadata=_help(
            "Projections that an engine keeps fused in one weight (Megatron's linear_qkv and gated linear_fc1) share "
            "one pair of factors, in files under the fused layer's name; otherwise each has its own."
        ),
    )

    _not_saved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    _own_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("dropout_position", "lora_dtype", "share_expert_adapters", "normalize_moe_lora", "a2a_experimental"),
            "fused_as_one",
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        check_lora_config(self)
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}

    def _check_types(self) -> None:
        for name, cls in OPTIONS.items():
            setattr(self, name, options_of(getattr(self, name), cls, name))
        dtype: Any = self.lora_dtype
        if isinstance(dtype, torch.dtype):
            self.lora_dtype = str(dtype).removeprefix("torch.")
        self.use_dora = False if self.use_dora is None else self.use_dora
        self.use_qalora = False if self.use_qalora is None else self.use_qalora
        check_types(self, LoraConfig, "LoraConfig")


def check_fields(fields: Mapping[str, Any], where: object) -> None:
    """Refuse the values of an ``adapter_config.json`` that is read without making a configuration of it.

    Args:
        fields: what the file holds; what is no field of :class:`LoraConfig` is not looked at.
        where: the file, for messages.

    Raises:
        ConfigError: a field has an impossible value; file and field are named.
    """
    known = {item.name for item in dataclasses.fields(LoraConfig)} - LoraConfig._not_saved
    try:
        LoraConfig(**{name: value for name, value in fields.items() if name in known})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
