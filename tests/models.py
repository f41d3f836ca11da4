"""Small models for every test: plain functions; nothing is downloaded, and a seed makes the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40


class MLP(nn.Module):
    """Two linears and a head, with a config that knows no architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.act = nn.ReLU()
        self.lin1 = nn.Linear(20, 20)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.lin1(self.act(self.lin0(x)))))


class EmbeddingNet(nn.Module):
    """A token embedding and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


def transformers_conv1d(out_features: int, in_features: int) -> nn.Module:
    """GPT-2's linear, whose weight is stored as ``[in, out]``."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


def floats(*shape: int) -> Tensor:
    """A fixed batch of normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def ids(*shape: int) -> Tensor:
    """A fixed batch of token ids; id 1 (the padding id of the padded embedding) occurs."""
    values = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))
    values[..., 0] = 1
    return values


def tiny_llama(*, tied: bool = False, layers: int = 2, seed: int = 0, **fields: Any) -> nn.Module:
    """A Llama of a few thousand parameters with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(*, tied: bool = True, seed: int = 0) -> nn.Module:
    """A GPT-2 whose projections are transformers' ``Conv1D``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def _bert_config(**fields: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        **fields,
    )


def tiny_bert(head: str = "SequenceClassification", *, seed: int = 0) -> nn.Module:
    """A BERT with a task head: ``SequenceClassification``, ``TokenClassification`` or ``QuestionAnswering``."""
    import transformers

    torch.manual_seed(seed)
    fields = {} if head == "QuestionAnswering" else {"num_labels": 3}
    return getattr(transformers, f"BertFor{head}")(_bert_config(**fields)).eval()


def tiny_bert_encoder(*, seed: int = 0) -> nn.Module:
    """A BERT without a head, for feature extraction."""
    from transformers import BertModel

    torch.manual_seed(seed)
    return BertModel(_bert_config()).eval()


def tiny_t5(*, seed: int = 0) -> nn.Module:
    """An encoder-decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


def mlp(*, seed: int = 0) -> MLP:
    """The plain network that no library knows."""
    torch.manual_seed(seed)
    return MLP().eval()


def embedding_net(*, seed: int = 0) -> EmbeddingNet:
    """An embedding with a head."""
    torch.manual_seed(seed)
    return EmbeddingNet().eval()


def with_model_type(model: nn.Module, model_type: str) -> nn.Module:
    """Give a plain module the config of an architecture, as far as target defaults look at it."""
    model.config = SimpleNamespace(model_type=model_type, to_dict=lambda: {"model_type": model_type})
    return model


def randomise(model: nn.Module, seed: int = 3, scale: float = 0.3) -> nn.Module:
    """Fill every parameter of an adapter with normal values: no factor is zero, no saved module is the original."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    """The output tensor of a transformers model or of a plain one."""
    out = model(batch)
    return out if isinstance(out, Tensor) else out[0]
