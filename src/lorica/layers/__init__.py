"""The live modules that stand in the place of adapted ones."""

from lorica.layers.holders import Factor
from lorica.layers.layer import LoraLayer
from lorica.layers.saved import ModulesToSaveWrapper
from lorica.layers.switch import Switch
from lorica.layers.tokens import TrainableTokensLayer, TrainableTokensWrapper

__all__ = ["Factor", "LoraLayer", "ModulesToSaveWrapper", "Switch", "TrainableTokensLayer", "TrainableTokensWrapper"]
