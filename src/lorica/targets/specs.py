"""What a configuration gives each target: the frozen spec of its adapter."""

from __future__ import annotations

from lorica.config import AdapterSpec, LoraConfig
from lorica.config.expressions import clock
from lorica.init import freezes
from lorica.targets.match import Values
from lorica.variants import VARIANTS, variant_of


class Specs:
    """The specs that a configuration gives; where all are the same, all targets have one object.

    Args:
        config: the configuration.
    """

    def __init__(self, config: LoraConfig) -> None:
        self._config = config
        self._clock = clock()
        self._ranks = Values(config.rank_pattern, "rank_pattern")
        self._alphas = Values(config.alpha_pattern, "alpha_pattern")
        alike = not (config.rank_pattern or config.alpha_pattern or variant_of(config))
        self._only = self._made("") if alike else None

    def of(self, key: str) -> AdapterSpec:
        """Return the spec of the module ``key``."""
        return self._made(key) if self._only is None else self._only

    def _made(self, key: str) -> AdapterSpec:
        config = self._config
        r, alpha = int(self._ranks.of(key, config.r, self._clock)), self._alphas.of(key, config.lora_alpha, self._clock)
        variant = variant_of(config)
        return AdapterSpec(
            r=r,
            alpha=alpha,
            scaling=AdapterSpec.scale(r, alpha, rslora=config.use_rslora),
            dropout=config.lora_dropout,
            dropout_position=config.dropout_position,
            rslora=config.use_rslora,
            bias=config.lora_bias,
            variant=variant,
            options=VARIANTS[variant].options(config, variant, key) if variant else None,
            frozen=freezes(config.init_lora_weights),
            a2a=config.a2a_experimental,
        )


def spec_for(config: LoraConfig, key: str) -> AdapterSpec:
    """Return the frozen spec that ``config`` gives to the module ``key``."""
    return Specs(config).of(key)
