"""How ranks stay equal: gradients summed, the global norm, and the comparison before the first step."""

from lorica.ranks.agreement import verify
from lorica.ranks.gradients import buckets, sum_gradients, watch
from lorica.ranks.norm import clip_grad_norm_, get_total_norm
from lorica.ranks.optim import GradScaler, parameter_groups

__all__ = [
    "GradScaler",
    "buckets",
    "clip_grad_norm_",
    "get_total_norm",
    "parameter_groups",
    "sum_gradients",
    "verify",
    "watch",
]
