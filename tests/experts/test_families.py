"""Every class of stacked experts in the installed transformers: adapted, it computes what weights plus deltas would.

The classes are found in transformers' sources, so that a new model is tried as soon as it is there. Each is built as
small as its configuration lets it be.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorica
import mixtures
from lorica.errors import TargetError

transformers = pytest.importorskip("transformers")

_SIZES = {16: r"hidden_size$|^hidden|d_model|input_size", 8: r"size|dim|intermediate|ffn|latent"}
_EXPERTS, _TOP_K, _TOKENS = 4, 2, 5
#: Classes with forwards of their own → their arguments for hidden values ``[T, 16]``.
_ARGUMENTS: dict[str, Any] = {
    "JetMoeParallelExperts": lambda x, module: (x, [2, 1, 1, 1]),
    "Llama4TextExperts": lambda x, module: (x.repeat(_EXPERTS, 1),),
    "InklingSharedExperts": lambda x, module: (x, torch.rand(_TOKENS, next(module.parameters()).shape[0])),
}
#: Stacks that are no parameters of three dimensions, or that another module reads → why they are not tried.
_OTHERS = {"DbrxExpertGLU": "one matrix of all experts' rows, read by the module around it"}


def _classes() -> list[tuple[str, str]]:
    """Module and name of every class of transformers that is called experts and has parameters of its own."""
    found = []
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if "xpert" not in source:
            continue
        module = f"transformers.models.{file.parent.name}.{file.stem}"
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and "Expert" in node.name]
        found += [(module, node.name) for node in classes if "nn.Parameter(" in ast.unparse(node)]
    return found


class Small:
    """A configuration whose numbers are small, whatever it is asked."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        if name == "real" or name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.real, name)
        if isinstance(value, bool) or not (isinstance(value, int) or value is None):
            return value
        if name in ("zero_expert_num", "moe_latent_size"):  # more experts, or another input, where there is one
            return value and 0
        if re.search(r"expert", name) and not re.search(r"size|dim|per_tok|hidden|intermediate", name):
            return _EXPERTS
        small = next((size for size, pattern in _SIZES.items() if re.search(pattern, name)), value)
        return _TOP_K if re.search(r"top|per_tok", name) else small


@functools.cache
def _build(module: str, name: str) -> nn.Module:
    """Experts of random weights.

    Raises:
        LookupError: no configuration of the module has what they ask for.
    """
    code = importlib.import_module(module)
    cls = getattr(code, name)
    names = list(inspect.signature(inspect.unwrap(cls.__init__)).parameters)[1:]
    given = {"intermediate_size": 8, "swiglu_limit": 7.0, "num_experts": _EXPERTS, "input_size": 16, "output_size": 8}
    if "config" not in names:
        return _random(cls(**{key: given[key] for key in names}))
    configs = [kind for key, kind in vars(code).items() if key.endswith("Config") and key != "PreTrainedConfig"]
    made = (_made(cls, kind, {key: given[key] for key in names[1:]}) for kind in configs)
    experts = next((one for one in made if one is not None), None)
    if experts is None:
        raise LookupError(f"{name} cannot be made of {[kind.__name__ for kind in configs]}")
    return _random(experts)


def _made(cls: type[nn.Module], config: type, further: dict[str, Any]) -> nn.Module | None:
    try:
        return cls(Small(config()), **further)
    except (AttributeError, TypeError, KeyError):
        return None


def _random(experts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in experts.parameters():
        assert parameter.numel() <= 4096, "not small"
        nn.init.normal_(parameter, std=0.3)
    return experts.eval()


def _arguments(name: str, module: nn.Module) -> tuple[Any, ...]:
    torch.manual_seed(1)
    x = torch.randn(_TOKENS, 16)
    if name in _ARGUMENTS:
        return _ARGUMENTS[name](x, module)
    return x, torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0]]), torch.rand(_TOKENS, _TOP_K)


def _implementations(module: nn.Module) -> tuple[str, ...]:
    return mixtures.IMPLEMENTATIONS if hasattr(module, "is_transposed") else ("",)


def _gradients(output: Tensor, factors: list[nn.Parameter]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), factors)


def _near(got: Tensor, wanted: Tensor, what: str) -> None:
    assert float((got - wanted).detach().norm()) <= 1e-5 * float(wanted.detach().norm()), what


FAMILIES = [pytest.param(*found, id=found[1]) for found in _classes() if found[1] not in _OTHERS]


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("module", "name"), FAMILIES)
def test_family(module: str, name: str, share: bool) -> None:
    """Outputs, gradients and merged weights, however the experts are computed; a warning would be an error."""
    experts = copy.deepcopy(_build(module, name))
    stacks = [key for key, parameter in experts._parameters.items() if parameter is not None and parameter.dim() == 3]
    assert stacks
    base = nn.Sequential()
    base.add_module("experts", experts)
    config = lorica.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[],
        target_parameters=[f"experts.{key}" for key in stacks],
        init_lora_weights=False,
        share_expert_adapters=share,
    )
    for implementation in _implementations(experts):
        if implementation:
            experts.config = type("Implementation", (), {"_experts_implementation": implementation})()
        model = lorica.get_peft_model(copy.deepcopy(base), config)
        adapted, arguments = model.base_model.model.experts, _arguments(name, experts)
        deltas = mixtures.deltas(model)
        changed = {key: experts._parameters[key] + deltas[f"experts.{key}"] for key in stacks}
        output, wanted = adapted(*arguments), functional_call(experts, changed, arguments)
        _near(output, wanted, f"{name}, {implementation}: output")
        factors = [parameter for key, parameter in model.named_parameters() if "lora_" in key]
        for mine, other in zip(_gradients(output, factors), _gradients(wanted, factors), strict=True):
            _near(mine, other, f"{name}, {implementation}: gradient")
        merged = model.merge_and_unload().experts
        for key in stacks:
            _near(merged._parameters[key], changed[key], f"{name}: merged {key}")


def test_families_are_found() -> None:
    names = {name for _, name in _classes()}
    assert {"MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "DeepseekV2Experts", "DeepseekV3Experts"} <= names
    assert len(names) > 50
    assert set(_OTHERS) <= names


def test_a_parameter_that_another_module_reads_is_no_silent_adapter() -> None:
    """DBRX's block reads the matrices of its experts before it calls them, so an adapter on them would do nothing."""
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    config = DbrxFFNConfig(hidden_size=16, ffn_hidden_size=8, moe_num_experts=_EXPERTS, moe_top_k=_TOP_K)
    base = nn.Sequential()
    base.add_module("experts", _random(DbrxExperts(config)))
    fields = {"target_modules": [], "target_parameters": ["experts.mlp.w1"], "init_lora_weights": False}
    model = lorica.get_peft_model(base, lorica.LoraConfig(**fields))
    with pytest.warns(UserWarning, match=r"mlp\.w1: the forward of DbrxExpertGLU did not read this parameter"):
        model.base_model.model.experts(*_arguments("DbrxExperts", base))


def test_experts_have_no_bias_of_b_and_no_magnitudes() -> None:
    base = mixtures.moe("qwen3_moe", num_hidden_layers=1)
    for fields, reason in (({"use_dora": True}, "no file has a place"), ({"lora_bias": True}, "target_parameters")):
        with pytest.raises(TargetError, match=reason):
            lorica.get_peft_model(
                base, lorica.LoraConfig(target_modules=[], target_parameters=mixtures.STACKS, **fields)
            )
