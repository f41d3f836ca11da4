"""KaSA, BD-LoRA, QA-LoRA, VeLoRA, MonteCLoRA and MiCA compute what PEFT's do, on the layers that PEFT has them for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import peft

import lorica
from lorica.variants import monteclora
from models import embedding_net, floats, ids, tiny_llama

SAMPLES = 3
FIELDS: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": {"beta": 0.3, "gamma": 0.2}},
    "bdlora a": {"use_bdlora": {"target_modules_bd_a": ["lin"], "nblocks": 2}},
    "bdlora b": {"use_bdlora": {"target_modules_bd_b": ["lin"], "nblocks": 4}},
    "bdlora none": {"use_bdlora": {"nblocks": 2, "match_strict": False}},
    "qalora": {"use_qalora": True, "qalora_group_size": 3},
    "velora": {"velora_config": {"num_groups": 4, "scale": 0.7}},
    "velora ragged": {"velora_config": {"num_groups": 5}},
    "velora once": {"velora_config": {"num_groups": 3, "init_type": "batch_average_once"}},
    "velora random": {"velora_config": {"num_groups": 2, "init_type": "random"}},
    "monteclora": {"monteclora_config": {"num_samples": SAMPLES, "sample_scaler": 0.1, "buffer_size": 2}},
    "mica": {"init_lora_weights": "mica"},
}


class Net(nn.Module):
    """One linear to adapt and one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def config(name: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": ["lin"], "r": 4, "lora_alpha": 6, **FIELDS[name], **more}


@pytest.fixture(autouse=True)
def _same_chances(monkeypatch):
    """PEFT has QA-LoRA for GPTQ layers only, and what MonteCLoRA draws is the same on both sides."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.monteclora import BufferedMontecloraSampler
    from peft.tuners.lora.variants import QALoraLinearVariant

    theirs = Linear.resolve_lora_variant
    monkeypatch.setattr(
        Linear,
        "resolve_lora_variant",
        lambda self, *, config, **kw: QALoraLinearVariant() if config.use_qalora else theirs(self, config=config, **kw),
    )
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(SAMPLES, 12, 4, generator=generator)
    wishart = torch.diag(torch.rand(4, generator=generator) * 6) + 0.01  # only its diagonal is looked at
    odds = torch.randn(SAMPLES, generator=generator)
    monkeypatch.setattr(
        BufferedMontecloraSampler, "get", lambda self: {"z_mvn": noise, "z_wishart": wishart, "z_dirichlet": odds}
    )
    monkeypatch.setattr(
        monteclora, "draws", lambda *_: (noise.mT.unsqueeze(1), wishart.diagonal().unsqueeze(0), odds.unsqueeze(0))
    )


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.lin


@pytest.mark.parametrize("name", FIELDS)
def test_parameters_and_files_have_the_same_names_shapes_and_values(name: str) -> None:
    pair = twins.adapted(net(), config(name))
    twins.assert_same_parameters(pair)
    twins.assert_same_files(pair)
    assert {n: b.shape for n, b in pair[1].named_buffers()} == {n: b.shape for n, b in pair[0].named_buffers()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FIELDS)
def test_outputs_and_gradients_are_equal(name: str, training: bool, dropout: float) -> None:
    pair = twins.adapted(net(), config(name, lora_dropout=dropout, use_rslora=training))
    for model in pair:
        model.train(training)
    for batch in (floats(5, 12), floats(2, 3, 12)):  # the second one finds what the first one left
        twins.assert_same_run(pair, batch, 2e-6, seed=11)


@pytest.mark.parametrize("name", FIELDS)
def test_training_steps_are_equal(name: str) -> None:
    pair = twins.adapted(net(), config(name))
    for model in pair:
        model.train()
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            twins.run(model, floats(6, 12) + step)
            optimiser.step()
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in pair]
    twins.assert_same_tensors(trained[1], trained[0], 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "qalora"])
def test_merged_weights_are_equal(name: str, safe_merge: bool) -> None:
    pair = twins.adapted(net(), config(name))
    out = pair[1](floats(5, 12))
    with twins.quiet():
        pair[0].merge_adapter(safe_merge=safe_merge)
    pair[1].merge_adapter(safe_merge=safe_merge)
    merged = [layer_of(model).get_base_layer().weight for model in pair]
    twins.assert_close(merged[1], merged[0])
    twins.assert_close(pair[1](floats(5, 12)), out, 2e-6)


def test_qalora_merges_as_well() -> None:
    """PEFT refuses; the merged model has to compute what the adapted one did."""
    model = twins.adapted(net(), config("qalora"))[1]
    out, weight = model(floats(5, 12)), layer_of(model).get_base_layer().weight
    before = weight.clone()
    model.merge_adapter()
    twins.assert_close(model(floats(5, 12)), out, 2e-6)
    model.unmerge_adapter()
    twins.assert_close(weight, before)


LLAMA: dict[str, dict[str, Any]] = {
    "kasa": FIELDS["kasa"],
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}},
    "velora": FIELDS["velora"],
    "monteclora": FIELDS["monteclora"],
    "mica": FIELDS["mica"],
}


@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
@pytest.mark.parametrize("name", LLAMA)
def test_files_go_both_ways(name: str, direction: str, tmp_path) -> None:
    fields = {"target_modules": ["q_proj", "down_proj"], "r": 4, **LLAMA[name]}
    pair = twins.adapted(tiny_llama(), fields)
    source, reader = (pair[0], lorica) if direction == "theirs to ours" else (pair[1], peft)
    batch = ids(2, 6)
    with twins.quiet():
        source.save_pretrained(tmp_path)
        loaded = reader.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    twins.assert_close(loaded.eval()(batch).logits, source.eval()(batch).logits, 2e-6)
    field = next(iter(LLAMA[name]))
    assert getattr(loaded.peft_config["default"], field) is not None


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_kasa_takes_the_same_out_of_the_base_weight(low_cpu_mem_usage: bool, tmp_path) -> None:
    """When the adapter is added, and when it is loaded; also with factors that have no memory at first."""
    pair = twins.adapted(net(), config("kasa"))
    truncated = [layer_of(model).get_base_layer().weight for model in pair]
    twins.assert_close(truncated[1], truncated[0])
    assert twins.relative(truncated[1], net().lin.weight) > 1e-2
    singular = torch.linalg.svdvals(truncated[1])
    assert float(singular[-4]) < 1e-5 < float(singular[-5])
    pair[1].save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    twins.assert_close(layer_of(loaded).get_base_layer().weight, truncated[0])
    twins.assert_close(loaded(floats(5, 12)), pair[0](floats(5, 12)), 2e-6)


def test_mica_starts_as_theirs(tmp_path) -> None:
    pair = twins.adapt(net(), config("mica"))
    twins.assert_same_files(pair)
    assert not layer_of(pair[1]).lora_B["default"].weight.requires_grad
    pair[1].save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert [p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n] == [True, False]


def test_mica_on_embeddings() -> None:
    pair = twins.adapt(embedding_net(), {"target_modules": ["emb"], "r": 4, "init_lora_weights": "mica"})
    twins.assert_same_files(pair)
    twins.assert_same_parameters(pair)
    twins.share_factors(pair)
    twins.assert_same_run(pair, ids(2, 6), 2e-6)


def test_kasas_penalties_are_equal() -> None:
    pair = twins.adapted(net(), config("kasa"))
    losses = [model._get_kasa_loss() for model in pair]
    twins.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in pair]
    twins.assert_same_tensors(grads[1], grads[0], 2e-6)
    plain = lorica.get_peft_model(net(), lorica.LoraConfig(target_modules=["lin"]))
    assert plain._get_kasa_loss() == plain._get_monteclora_loss() == 0.0


@pytest.mark.parametrize("entropy", [False, True])
def test_monteclora_s_loss_is_equal_but_for_the_divergence_of_dirichlet(entropy: bool, monkeypatch) -> None:
    """PEFT's has the logarithms of the gamma functions with the wrong sign."""
    from peft.tuners.lora.monteclora import MontecloraSampler

    prior = 0.4
    options = {"num_samples": SAMPLES, "use_entropy": entropy, "kl_loss_weight": 0.5, "dirichlet_prior": prior}
    pair = twins.adapted(net(), config("monteclora", monteclora_config=options))

    def right(self: nn.Module, alpha: Tensor) -> Tensor:
        kinds = [torch.distributions.Dirichlet(x) for x in (alpha, torch.full_like(alpha, prior))]
        return torch.distributions.kl_divergence(*kinds)

    wrong = MontecloraSampler.dirichlet_kl
    sampler = layer_of(pair[0]).lora_monteclora_sampler["default"]
    assert float(wrong(sampler, torch.ones(SAMPLES)).detach()) < 0  # no divergence is
    monkeypatch.setattr(MontecloraSampler, "dirichlet_kl", right)
    assert [model.eval()._get_monteclora_loss() for model in pair] == [0.0, 0.0]
    for forward in (False, True):
        losses = []
        for model in pair:
            model.train().zero_grad(set_to_none=True)
            if forward:
                model(floats(5, 12)).square().sum().backward()
                model(floats(5, 12))
            losses.append(model._get_monteclora_loss())
            losses[-1].backward()
        twins.assert_close(losses[1], losses[0], 1e-6)
        grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in pair]
        twins.assert_same_tensors(grads[1], grads[0], 5e-6)


@pytest.mark.parametrize("other", ["use_dora", "velora_config", "init_lora_weights"])
def test_variants_together_are_refused(other: str) -> None:
    values = {"use_dora": True, "velora_config": {"num_groups": 2}, "init_lora_weights": "mica"}
    fields = {"target_modules": ["lin"], "kasa_config": {}, other: values[other]}
    message = "Invalid or unsupported variant combination"
    with pytest.raises(ValueError, match=message), twins.quiet():
        peft.get_peft_model(net(), peft.LoraConfig(**{**fields, "kasa_config": peft.KasaConfig()}))
    with pytest.raises(ValueError, match=message):
        lorica.LoraConfig(**fields)


@pytest.mark.parametrize("first", ["kasa", "lora"])
def test_kasa_beside_others_is_refused(first: str) -> None:
    kinds = {"kasa": FIELDS["kasa"], "lora": {}}
    second = "lora" if first == "kasa" else "kasa"
    pair = twins.adapt(net(), {"target_modules": ["lin"], "r": 4, **kinds[first]})
    before = copy.deepcopy(layer_of(pair[1]).get_base_layer().weight)
    for library, model in zip((peft, lorica), pair, strict=True):
        with pytest.raises(ValueError, match="KaSA cannot be combined with adapters"), twins.quiet():
            model.add_adapter("second", library.LoraConfig(target_modules=["lin"], r=4, **kinds[second]))
    assert torch.equal(layer_of(pair[1]).get_base_layer().weight, before)
    assert "second" not in pair[1].peft_config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("kasa", {"r": 12}, "r"),
        ("bdlora a", {"use_bdlora": {"target_modules_bd_a": ["lin"], "nblocks": 5}}, "divisible"),
        ("bdlora b", {"use_bdlora": {"target_modules_bd_b": ["lin"], "nblocks": 3}}, "divisible"),
        (
            "bdlora a",
            {"use_bdlora": {"target_modules_bd_a": ["l"], "target_modules_bd_b": ["lin"]}},
            "matches both A and",
        ),
        ("bdlora a", {"use_bdlora": {"target_modules_bd_a": ["up"]}}, "matches neither A nor B"),
        ("qalora", {"qalora_group_size": 5}, "divisible"),
        ("mica", {"r": 13}, "r"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, fields: dict[str, Any], message: str) -> None:
    fields = config(name, **fields)
    with pytest.raises(ValueError, match=message), twins.quiet():
        peft.get_peft_model(net(), peft.LoraConfig(**copy.deepcopy(fields)))
    base = net()
    with pytest.raises(ValueError, match=f"lin.*{message}"):
        lorica.get_peft_model(base, lorica.LoraConfig(**fields))
    assert type(base.lin) is nn.Linear
    assert all(torch.equal(value, net().state_dict()[key]) for key, value in base.state_dict().items())
