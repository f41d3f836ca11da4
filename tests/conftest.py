"""What every test shares: no network, one thread, fixed seeds, and the tiny models."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import models
from lorica.kernels import recorded


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a part of the contract be run: ``--cases "dora,dropout"``."""
    parser.addoption("--cases", default="", help="only those cases of the contract whose names hold one of these words")


def pytest_configure() -> None:
    """Let interrupts be seen: shells start jobs in the background with SIGINT ignored, which is inherited."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _deterministic():
    """Start every test from the same random state, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _as_large_inputs():
    """Let tiny models go the way that large ones go, in fixtures of every scope; that of small inputs has its tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recorded, "ELEMENTS", 0)
        yield


@pytest.fixture
def llama():
    """A tiny Llama for causal language modelling, untied."""
    return models.tiny_llama()


@pytest.fixture
def tied_llama():
    """The same with its output layer tied to the input embedding."""
    return models.tiny_llama(tied=True)


@pytest.fixture
def gpt2():
    """A tiny GPT-2."""
    return models.tiny_gpt2()


@pytest.fixture
def bert():
    """A tiny BERT for sequence classification."""
    return models.tiny_bert()


@pytest.fixture
def t5():
    """A tiny T5."""
    return models.tiny_t5()


@pytest.fixture
def mlp():
    """A plain network of three linears."""
    return models.mlp()


@pytest.fixture
def embedding_net():
    """An embedding with a linear head."""
    return models.embedding_net()


@pytest.fixture
def token_ids():
    """A small batch of token ids."""
    return models.ids(2, 7)
