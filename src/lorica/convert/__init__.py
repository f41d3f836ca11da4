"""Moving adapters between PEFT, Megatron Bridge and Optimum Neuron: read, named, fused or taken apart, written.

:func:`convert_adapter` does it. Adapters go by way of one form (:mod:`lorica.convert.adapter`), tensor by tensor.
"""

from lorica.convert.convert import SYSTEMS, Conversion, convert_adapter, read_adapter

__all__ = ["SYSTEMS", "Conversion", "convert_adapter", "read_adapter"]
