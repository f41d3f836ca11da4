"""peft.tuners.lora.velora: a linear product that keeps its input compressed for the backward pass."""

from __future__ import annotations

from torch import Tensor

from lorica.variants.velora import compressed_product


class VeloraFunction:
    """A linear product whose weight's gradient is made of one number for every token and group of features."""

    @staticmethod
    def apply(
        input: Tensor, weight: Tensor, bias: Tensor | None, embed: Tensor, num_groups: int, velora_scale: float
    ) -> Tensor:
        """Return ``input · weightᵀ + bias``.

        Args:
            input: ``[…, in]``.
            weight: ``[out, in]``.
            bias: ``[out]``.
            embed: the direction along which each group of features is kept, ``[in/num_groups]`` rounded up.
            num_groups: into how many groups the features fall.
            velora_scale: multiplies the gradient of the weight.
        """
        flat = input.reshape(-1, input.shape[-1])
        product = compressed_product(flat, weight, embed.to(input.dtype), num_groups, velora_scale)
        product = product.view(*input.shape[:-1], weight.shape[0])
        return product if bias is None else product + bias


__all__ = ["VeloraFunction"]
