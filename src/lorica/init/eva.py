"""EVA: A holds the directions in which the layer's inputs vary most (https://arxiv.org/abs/2410.07170)."""

from __future__ import annotations

from lorica.init.base import Factors, InitRequest, initialise, register


@register("eva", needs="inputs", options="eva_config")
def eva(request: InitRequest) -> Factors:
    """Until :func:`lorica.initialize_lora_eva_weights` has seen data, as by default: A Kaiming-uniform, B zero.

    With them, A holds orthonormal rows and the ranks are shared out anew. B is zero, so that nothing is taken out of
    the base weight, whatever it is stored as.
    """
    return initialise(True, request)
