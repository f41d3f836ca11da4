"""How ranks stay equal: gradients summed, the global norm, and the comparison before the first step."""

from lorica.ranks.agreement import verify
from lorica.ranks.gradients import sum_gradients, watch
from lorica.ranks.norm import clip_grad_norm_, get_total_norm

__all__ = ["clip_grad_norm_", "get_total_norm", "sum_gradients", "verify", "watch"]
