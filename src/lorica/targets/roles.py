"""Which part of a vision-language model is which: the vision tower, the projection, the language model.

The parts are found by what their modules are called, in transformers' models and in Megatron's. Names are what authors
of models agree on; the places differ (Qwen's projection is inside the tower, Idefics' is beside it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from torch import nn

from lorica.errors import TargetError
from lorica.targets.walk import bare

#: What belongs to a vision-language model. ``"other"``: to none of the three, such as what hears, speaks or draws.
Role = Literal["vision_model", "vision_projection", "language_model", "other"]

_CALLED: dict[Role, str] = {
    "vision_model": "vision_model vision_tower visual vision_encoder image_encoder image_tower video_tower",
    "vision_projection": (
        "vision_projection multi_modal_projector mm_projector projector connector merger merger_list "
        "deepstack_merger_list aligner embed_vision vision_embed_tokens visual_embeddings_table visual_projection "
        "image_to_text_projection language_projection qformer query_tokens perceiver_resampler vision_resampler "
        "resampler_model vision_adapter layerwise_projectors spatial_projectors image_newline view_separator"
    ),
    "language_model": "language_model text_model lm_head embed_tokens",
    "other": (
        "audio_tower audio_model embed_audio audio_projection vqmodel generation_embeddings generation_aligner "
        "generation_head talker token2wav code2wav"
    ),
}
_ROLES: dict[str, Role] = {name: role for role, names in _CALLED.items() for name in names.split()}
# They have no forward of their own, so nothing can stand in their place.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class Outermost(NamedTuple):
    """What holds the parameters of some roles: full names of modules with a forward, and of parameters beside them."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def role_of(name: str) -> Role:
    """Return the role of a module or parameter of a vision-language model, by its full name.

    The outermost word that is known decides; what is called a projection inside a vision tower is one. A model's other
    parts are its language model.
    """
    found: list[Role] = [_ROLES[word] for word in name.split(".") if word in _ROLES]
    if not found:
        return "language_model"
    return "vision_projection" if found[0] == "vision_model" and "vision_projection" in found else found[0]


def check_sees(model: nn.Module) -> None:
    """Refuse a model without a part that sees.

    Raises:
        TargetError: it says how such parts are called.
    """
    if not any(role_of(name).startswith("vision") for name, _ in model.named_parameters()):
        raise TargetError(
            f"{type(model).__name__}: no part of it sees. In a vision-language model a module is called one of "
            f"{_CALLED['vision_model'].split()}; in another model freeze and thaw parameters by name"
        )


def outermost(model: nn.Module, roles: Collection[Role]) -> Outermost:
    """Return what holds all the parameters of some roles, and nothing else, as far out as can be.

    Args:
        model: a vision-language model, adapted or not; names are those in the base model.
        roles: which ones.
    """
    found = list(_outermost("", model, roles))
    modules, parameters = ([name for name, is_module in found if is_module is kind] for kind in (True, False))
    return Outermost(tuple(modules), tuple(parameters))


def _outermost(name: str, module: nn.Module, roles: Collection[Role]) -> Iterator[tuple[str, bool]]:
    module = bare(module)
    prefix = f"{name}." if name else ""
    inside = {role_of(prefix + key) in roles for key, _ in module.named_parameters()}
    if True not in inside:
        return
    if False not in inside and name and not isinstance(module, _CONTAINERS):
        yield name, True
        return
    for key, parameter in module._parameters.items():
        if parameter is not None and role_of(prefix + key) in roles:
            yield prefix + key, False
    for key, child in module._modules.items():
        if child is not None:
            yield from _outermost(prefix + key, child, roles)
