"""Adapters as data: several made one, any made plain LoRA, and what they do to the directions of a weight."""

from lorica.combine.convert import Conversion, convert_to_lora, save_as_lora
from lorica.combine.initial import converter, subtract_mutated_init
from lorica.combine.intruders import IntruderDimensions, intruder_dimensions, reduce_intruder_dimension
from lorica.combine.weighted import TYPES, add_weighted_adapter

__all__ = [
    "TYPES",
    "Conversion",
    "IntruderDimensions",
    "add_weighted_adapter",
    "convert_to_lora",
    "converter",
    "intruder_dimensions",
    "reduce_intruder_dimension",
    "save_as_lora",
    "subtract_mutated_init",
]
