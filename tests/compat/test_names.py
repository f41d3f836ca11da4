"""Every name that users of peft's LoRA import is at the same path below ``lorica.compat.peft``."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "peft_names.json").read_text())
PATHS = [f"{module}.{name}" for module, names in NAMES.items() for name in names]

#: Names without a meaning here, which say so when they are used, and why.
REFUSED = {
    "peft.PeftMixedModel": "LoRA only",
    "peft.PromptLearningConfig": "not prompts",
    "peft.TrainableTokensConfig": "trainable_token_indices",
    "peft.tuners.lora.monteclora.MontecloraSampler": "keeps no buffer",
}


@pytest.mark.parametrize("path", PATHS)
def test_the_name_is_there(path):
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(f"lorica.compat.{module}"), name)


def test_the_list_is_whole():
    assert len(PATHS) == len(set(PATHS)) == 128


@pytest.mark.parametrize("path", PATHS)
def test_a_name_means_the_same_kind_of_thing_as_with_peft(path):
    """A class where peft has a class, a function where it has one, and the arguments that peft's takes."""
    pytest.importorskip("peft", reason="the comparison is with peft")
    module, _, name = path.rpartition(".")
    theirs = getattr(pytest.importorskip(module, exc_type=ImportError), name)  # one of peft's needs the package attrs
    ours = getattr(importlib.import_module(f"lorica.compat.{module}"), name)
    assert inspect.isclass(ours) == inspect.isclass(theirs)
    assert callable(ours) == callable(theirs)
    if inspect.isroutine(theirs):
        wanted, found = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())
        missing = [key for key in wanted if key not in found]
        assert takes_any or not missing
        order = [key for key, parameter in wanted.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert [key for key in found if key in order] == [key for key in order if key in found]


@pytest.mark.parametrize(("path", "reason"), REFUSED.items())
def test_what_is_refused_says_why(path, reason):
    module, _, name = path.rpartition(".")
    with pytest.raises(NotImplementedError, match=reason):
        getattr(importlib.import_module(f"lorica.compat.{module}"), name)()


def test_importing_lorica_takes_neither_the_drop_in_nor_peft():
    code = "import sys, lorica; print([name for name in sys.modules if 'compat' in name.split('.') or name == 'peft'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lorica.compat" not in done.stdout
    assert "'peft'" not in done.stdout


WITHOUT = """
import importlib, json, sys, tempfile
for name in ("peft", "transformers", "accelerate"):
    sys.modules[name] = None                                     # importing it raises ImportError
import torch
with open(sys.argv[1]) as file:
    names = json.load(file)
for module, wanted in names.items():
    found = importlib.import_module("lorica.compat." + module)
    assert all(hasattr(found, name) for name in wanted), module
import lorica.compat.peft as peft
from lorica.compat.peft.tuners.lora.layer import Linear
base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
assert isinstance(model.base_model.model[0], Linear)
with torch.no_grad():
    model.base_model.model[0].lora_B["default"].weight.fill_(0.5)
x = torch.ones(1, 4)
expected = model(x)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    plain = model.unload()
    again = peft.PeftModel.from_pretrained(plain, folder)
    assert torch.allclose(again(x), expected)
try:
    peft.take_over()
except ImportError as error:
    assert "not installed" in str(error)
print("fine")
"""


def test_it_works_where_peft_is_not_installed():
    """All but the integrations that check for peft's own classes."""
    place = str(Path(__file__).parent / "peft_names.json")
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT, place], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
