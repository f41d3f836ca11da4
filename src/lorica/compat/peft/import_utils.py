"""peft.import_utils: which packages there are, and in which versions."""

from __future__ import annotations

import importlib.util
import platform
import re
from functools import lru_cache
from importlib import metadata

import torch


def _version(package: str) -> tuple[int, ...]:
    """Return the leading numbers of a package's version; nothing where it is not installed."""
    try:
        found = re.match(r"\d+(\.\d+)*", metadata.version(package))
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _need(package: str, least: tuple[int, ...]) -> bool:
    if not _there(package):
        return False
    found = _version(package)
    if found and found < least:
        wanted, has = (".".join(map(str, numbers)) for numbers in (least, found))
        raise ImportError(f"Found an incompatible version of {package}. Found version {has}, but {wanted} is the least")
    return True


is_transformers_ge_v5 = _version("transformers") >= (5, 0)
is_transformers_ge_v5_1_0 = _version("transformers") >= (5, 1)
is_transformers_ge_v5_4_0 = _version("transformers") >= (5, 4)
is_transformers_ge_v5_6_0 = _version("transformers") >= (5, 6)


@lru_cache
def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _there("bitsandbytes")


@lru_cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has four-bit layers."""
    if not is_bnb_available():
        return False
    import bitsandbytes

    return hasattr(bitsandbytes.nn, "Linear4bit")


@lru_cache
def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _there("optimum")


@lru_cache
def is_gptqmodel_available() -> bool:
    """Whether gptqmodel and optimum are installed.

    Raises:
        ImportError: gptqmodel is there and optimum is not, or one of them is too old.
    """
    if not _need("gptqmodel", (7, 0)):
        return False
    if not _need("optimum", (1, 24)):
        raise ImportError("gptqmodel requires optimum version `1.24.0` or higher to be installed.")
    return True


@lru_cache
def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _there("aqlm")


@lru_cache
def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _there("eetq")


@lru_cache
def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _there("hqq")


@lru_cache
def is_inc_available() -> bool:
    """Whether Intel's neural_compressor is installed."""
    return _there("neural_compressor")


@lru_cache
def is_torchao_available() -> bool:
    """Whether torchao is installed.

    Raises:
        ImportError: it is older than 0.16.
    """
    return bool(_version("torchao")) and _need("torchao", (0, 16))


@lru_cache
def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _there("diffusers")


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether there is an Intel GPU that torch can use."""
    del check_device
    return platform.system() != "Darwin" and hasattr(torch, "xpu") and torch.xpu.is_available()


__all__ = [
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_inc_available",
    "is_optimum_available",
    "is_torchao_available",
    "is_transformers_ge_v5",
    "is_transformers_ge_v5_1_0",
    "is_transformers_ge_v5_4_0",
    "is_transformers_ge_v5_6_0",
    "is_xpu_available",
]
