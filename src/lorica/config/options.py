"""The options of single initialisations and variants, each a field of ``LoraConfig``; names and defaults are PEFT's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lorica.config.fields import check_types, quoted
from lorica.errors import ConfigError

T = TypeVar("T")

#: The most of anything that is counted; memory for more would end a process.
MANY = 1_000_000


def _option(default: Any, text: str, **bounds: float) -> Any:
    """Return a field; ``least`` and ``most`` bound its numbers."""
    return field(default=default, metadata={"help": text, **bounds})


def _need(options: Any, name: str, condition: bool, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"`{name}` {wanted}, got {type(options).__name__}.{name}={quoted(getattr(options, name))}")


@dataclass
class LoftQConfig:
    """LoftQ (https://arxiv.org/abs/2310.08659): the factors start as what quantisation loses."""

    loftq_bits: int = _option(4, "Bits of the quantised weight: 4 (NF4) or 8 (int8).")
    loftq_iter: int = _option(1, "Rounds of quantising and decomposing what is left.", least=1, most=1000)

    def __post_init__(self) -> None:
        check_types(self, LoftQConfig)


@dataclass
class EvaConfig:
    """EVA (https://arxiv.org/abs/2410.07170): A starts as the directions in which the layer's inputs vary most.

    Raises:
        ConfigError: ``rho`` is below 1, or ``tau`` no number between 0 and 1.
    """

    rho: float = _option(2.0, "No layer gets more than rho times the rank when ranks are shared out anew.")
    tau: float = _option(0.99, "Directions have settled when their cosine with those of the step before is above tau.")
    use_label_mask: bool = _option(True, "Leave positions out whose label is label_mask_value.")
    label_mask_value: int = _option(-100, "The label of positions that are left out.")
    whiten: bool = _option(False, "Divide each direction by its singular value.")
    adjust_scaling_factors: bool = _option(True, "Keep the scale of the gradients when a layer's rank changes.")

    def __post_init__(self) -> None:
        check_types(self, EvaConfig)
        _need(self, "rho", self.rho >= 1.0, "must be >= 1.0")
        _need(self, "tau", 0.0 <= self.tau <= 1.0, "must be between 0.0 and 1.0.")


@dataclass
class CordaConfig:
    """CorDA (https://arxiv.org/abs/2406.05223): the start is the base weight's decomposition along its inputs."""

    cache_file: str | None = _option(None, "File that keeps the decompositions.")
    covariance_file: str | None = _option(None, "File that keeps the covariances of the inputs.")
    corda_method: Literal["ipm", "kpm"] = _option("ipm", "'ipm' learns the new task, 'kpm' keeps old knowledge.")
    verbose: bool = _option(False, "Say which layer is being decomposed.")
    use_float16_for_covariance: bool = _option(False, "Keep covariances in half the memory.")
    prune_temporary_fields: bool = _option(True, "Forget covariances and decompositions once the factors are made.")

    def __post_init__(self) -> None:
        check_types(self, CordaConfig)


@dataclass
class LoraGAConfig:
    """LoRA-GA (https://arxiv.org/abs/2407.05000): the factors start along the full gradient."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = _option(
        "ArB2r", "Which singular directions of the gradient A and B get."
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = _option("stable", "How large the factors start.")
    stable_gamma: int = _option(16, "γ of the scale 'stable'.", most=MANY)

    def __post_init__(self) -> None:
        check_types(self, LoraGAConfig)
        _need(self, "stable_gamma", self.stable_gamma > 0, "must be positive")


@dataclass
class VeloraConfig:
    """VeLoRA (https://arxiv.org/abs/2405.17991): the input is kept compressed for the gradient of A.

    Raises:
        ConfigError: a number is not positive.
    """

    num_groups: int = _option(
        64, "Groups that the features of each token are split into before compression.", most=MANY
    )
    scale: float = _option(1.0, "Scale of the input as it is restored in the backward pass.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = _option(
        "batch_average", "Where the projections come from: every batch, the first batch, or chance."
    )

    def __post_init__(self) -> None:
        check_types(self, VeloraConfig)
        _need(self, "num_groups", self.num_groups > 0, "should be positive")
        _need(self, "scale", self.scale > 0, "should be positive")


@dataclass
class MontecloraConfig:
    """MonteCLoRA (https://arxiv.org/abs/2411.04358): learned noise on A, averaged over Monte Carlo samples.

    Raises:
        ConfigError: a number that counts is not positive.
    """

    num_samples: int = _option(8, "Samples per forward.", most=4096)
    use_entropy: bool = _option(False, "Add an entropy term to the variational loss.")
    dirichlet_prior: float = _option(0.1, "Concentration of the Dirichlet prior of the samples' weights.")
    sample_scaler: float = _option(1e-4, "Size of the noise.")
    kl_loss_weight: float = _option(1e-5, "Weight of the Kullback-Leibler term of the variational loss.")
    buffer_size: int = _option(150, "Samples that are drawn at once and used up one after the other.", most=MANY)

    def __post_init__(self) -> None:
        check_types(self, MontecloraConfig)
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _need(self, name, getattr(self, name) > 0, "must be greater than 0.")


@dataclass
class KasaConfig:
    """KaSA (https://arxiv.org/abs/2412.06071): ``B·diag(d)·A`` on a base weight without its smallest directions.

    ``beta`` and ``gamma`` weigh the two penalties that the paper trains with.

    Raises:
        ConfigError: a weight is negative.
    """

    beta: float = _option(1e-4, "Weight of the penalty on the singular values d.")
    gamma: float = _option(1e-3, "Weight of the penalty on factors that are not orthogonal.")

    def __post_init__(self) -> None:
        check_types(self, KasaConfig)
        for name in ("beta", "gamma"):
            _need(self, name, getattr(self, name) >= 0, "must be non-negative")


@dataclass
class ArrowConfig:
    """Arrow (https://arxiv.org/abs/2405.11157): each token is sent through those adapters that fit it best.

    The names are set by ``create_arrow_model``.

    Raises:
        ConfigError: ``top_k`` or the temperature is not positive.
    """

    top_k: int = _option(3, "Adapters that a token is sent through.", most=MANY)
    router_temperature: float = _option(1.0, "Temperature of the softmax over their scores.")
    use_gks: bool = _option(False, "Take the general adapters' knowledge out of the others first (GenKnowSub).")
    task_adapter_names: list[str] | None = field(
        default=None, init=False, metadata={"help": "The adapters that tokens are sent through."}
    )
    gks_adapter_names: list[str] | None = field(default=None, init=False, metadata={"help": "The general adapters."})
    rng_seed: int | None = _option(None, "Seed of the routing's random numbers.")

    def __post_init__(self) -> None:
        check_types(self, ArrowConfig)
        if self.top_k <= 0:
            raise ConfigError("top_k cannot be negative.")
        if self.router_temperature <= 0:
            raise ConfigError("router_temperature must be greater than 0.")


@dataclass
class BdLoraConfig:
    """BD-LoRA (https://arxiv.org/abs/2510.23346): one of the factors is block-diagonal.

    Raises:
        ConfigError: an entry is in both lists, or ``nblocks`` is not positive.
    """

    target_modules_bd_a: list[str] | None = field(
        default=None, metadata={"help": "Modules whose A is block-diagonal: parts of their names."}
    )
    target_modules_bd_b: list[str] | None = field(
        default=None, metadata={"help": "Modules whose B is block-diagonal: parts of their names."}
    )
    nblocks: int = _option(1, "Blocks of such a factor.", most=MANY)
    match_strict: bool = _option(True, "Refuse targets that are in neither list; otherwise they get plain LoRA.")

    def __post_init__(self) -> None:
        check_types(self, BdLoraConfig)
        both = set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or [])
        if both:
            raise ConfigError(
                f"Found overlapping modules in target_modules_bd lists: {self.target_modules_bd_a} (A) and "
                f"{self.target_modules_bd_b} (B)."
            )
        _need(self, "nblocks", self.nblocks > 0, "must be positive")


#: Field of ``LoraConfig`` → the class of its value. (LoftQ's is kept as a dictionary, as PEFT does.)
OPTIONS: dict[str, type[Any]] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "kasa_config": KasaConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
}


def options_of(value: Any, cls: type[T], name: str) -> T | None:
    """Return options that were given as an object, as a dictionary (as files have them), or not at all.

    Args:
        value: what was given.
        cls: the class of the options.
        name: the field, for messages.

    Raises:
        ConfigError: it is something else, or has names that the class does not know.
    """
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"LoraConfig.{name}={quoted(value)}: `{name}` must be a `{cls.__name__}`, a dict, or None.")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, value.keys() - fields.keys()))
    if unknown:
        raise ConfigError(f"LoraConfig.{name}: {cls.__name__} has no {quoted(unknown)}; it has {sorted(fields)}")
    try:
        made = cls(**{key: item for key, item in value.items() if fields[key].init})
        for key in value.keys() - {key for key, item in fields.items() if item.init}:
            setattr(made, key, value[key])  # what a file knows and a caller does not choose
        check_types(made, cls)
    except ConfigError as error:
        raise ConfigError(f"LoraConfig.{name}: {error}") from None
    return made
