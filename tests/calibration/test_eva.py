"""EVA: A holds the principal directions of each layer's inputs, B is zero, ranks go where they explain most."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
import models
from lorica.errors import AdapterError, ConfigError, TargetError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(count: int = 3, rows: int = 4, length: int = 12, **more: Any) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randint(2, models.VOCABULARY, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, **more} for ids in made]


def adapted(base: nn.Module | None = None, *, rho: float = 2.0, options: Any = None, **fields: Any) -> nn.Module:
    given = {"r": 3, "lora_alpha": 6, "target_modules": ALL, "init_lora_weights": "eva", **fields}
    config = lorica.LoraConfig(eva_config=lorica.EvaConfig(rho=rho, **(options or {})), **given)
    return lorica.get_peft_model(models.tiny_llama() if base is None else base, config)


def start(model: nn.Module, data: Any = None, **arguments: Any) -> nn.Module:
    lorica.initialize_lora_eva_weights(model, data or batches(), show_progress_bar=False, **arguments)
    return model


def inputs_of(base: nn.Module, name: str, data: list[dict[str, Tensor]], mask: Tensor | None = None) -> Tensor:
    """What a layer is given, in float64, seen by a plain hook."""
    seen: list[Tensor] = []
    handle = base.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            base(**{key: value for key, value in batch.items() if key != "labels"})
    handle.remove()
    return torch.cat([x if mask is None else x[mask] for x in seen]).reshape(-1, seen[0].shape[-1]).double()


def principal(x: Tensor, rank: int) -> Tensor:
    """Principal directions of rows, dense and in float64."""
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:rank]


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    return lorica.get_peft_model_state_dict(model)


def test_a_is_the_principal_directions_of_the_inputs_and_nothing_changes() -> None:
    base, data = models.tiny_llama(), batches()
    expected = base(**data[0]).logits
    model = start(adapted(copy.deepcopy(base), rho=1.0, options={"tau": 1.0}), data)
    assert torch.equal(model.eval()(**data[0]).logits, expected)
    for name, tensor in factors_of(model).items():
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if "lora_A" in name:
            wanted = principal(inputs_of(base, module, data), 3)
            assert ((tensor.double() * wanted).sum(1).abs() > 1 - 1e-5).all(), name
            assert (tensor.gather(1, tensor.abs().argmax(1, keepdim=True)) > 0).all()
        else:
            assert not tensor.any()


def test_ranks_go_where_they_explain_most() -> None:
    base, data = models.tiny_llama(), batches()
    model = start(adapted(copy.deepcopy(base), options={"tau": 1.0}), data)
    ranks = {layer.target_name: layer.r["default"] for layer in layers(model)}
    assert sum(ranks.values()) == 3 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 6
    explained: list[tuple[float, str]] = []
    for name, _ in base.named_modules():
        if name.rpartition(".")[2] in ALL:
            x = inputs_of(base, name, data)
            squares = torch.linalg.svdvals(x - x.mean(0)).square()
            explained += [(float(value), name) for value in (squares / squares.sum())[:6]]
    chosen = [name for _, name in sorted(explained, key=lambda item: -item[0])[: 3 * 14]]
    for name, rank in ranks.items():  # of equal claims (q, k and v) any may have the last direction
        assert abs(rank - chosen.count(name)) <= 1
    config = model.peft_config["default"]
    assert config.rank_pattern == {name: rank for name, rank in ranks.items() if rank != 3}
    assert {layer.scaling["default"] for layer in layers(model)} == {2.0}
    assert config.alpha_pattern == {name: 2.0 * rank for name, rank in config.rank_pattern.items()}


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "target_name")]


def test_scales_follow_the_ranks_only_when_they_are_to() -> None:
    model = start(adapted(options={"adjust_scaling_factors": False}))
    assert {layer.lora_alpha["default"] for layer in layers(model)} == {6}
    assert model.peft_config["default"].alpha_pattern == {}


def test_the_file_of_an_adapter_with_new_ranks_means_the_same_model(tmp_path: Path) -> None:
    base = models.tiny_llama()
    model = models.randomise(start(adapted(copy.deepcopy(base))))
    model.save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(base, tmp_path)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_layers_without_a_rank_lose_the_adapter(tmp_path: Path) -> None:
    base = models.tiny_llama()
    model = adapted(copy.deepcopy(base))
    state = lorica.get_eva_state_dict(model, batches(), show_progress_bar=False)
    gone = next(name for name in state if name.endswith("layers.1.mlp.up_proj"))
    state[gone] = state[gone][:0]
    lorica.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert isinstance(model.get_submodule(gone), nn.Linear)
    assert gone.removeprefix("base_model.model.") not in model.targeted_module_names
    models.randomise(model).save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(base, tmp_path)
    ids = batches(1)[0]["input_ids"]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_what_trained_before_trains_after_and_only_that() -> None:
    model = start(adapted())
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    model(**batches(1)[0], labels=batches(1)[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_positions_without_a_label_and_padding_do_not_count() -> None:
    base, data = models.tiny_llama(), batches(1)
    labels = data[0]["input_ids"].clone()
    labels[:, :5] = -100
    attention = torch.ones_like(labels)
    attention[1, 9:] = 0
    data[0] |= {"labels": labels, "attention_mask": attention}
    state = {
        use: lorica.get_eva_state_dict(
            adapted(copy.deepcopy(base), rho=1.0, options={"use_label_mask": use}), data, show_progress_bar=False
        )
        for use in (True, False)
    }
    name = "model.layers.0.self_attn.q_proj"
    masks = {True: attention.bool() & (labels != -100), False: attention.bool()}
    for use, mask in masks.items():
        wanted = principal(inputs_of(base, name, data, mask), 3)
        found = state[use][f"base_model.model.{name}"].double()
        assert ((found * wanted).sum(1).abs() > 1 - 1e-5).all()


def test_whitened_directions_are_divided_by_the_root_of_their_singular_value() -> None:
    base, data = models.tiny_llama(), batches(1)
    plain, white = (
        lorica.get_eva_state_dict(
            adapted(copy.deepcopy(base), rho=1.0, options={"whiten": whiten}), data, show_progress_bar=False
        )
        for whiten in (False, True)
    )
    name = "model.layers.0.mlp.down_proj"
    x = inputs_of(base, name, data)
    values = torch.linalg.svdvals(x - x.mean(0))[:3]
    found = white[f"base_model.model.{name}"].double()
    wanted = plain[f"base_model.model.{name}"].double() / values.sqrt().unsqueeze(1)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


class Counted:
    """A loader that counts what was taken from it."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.taken = data, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.taken += 1
            yield batch


def test_data_is_read_once_at_most_and_no_further_than_the_directions_have_settled() -> None:
    loader = Counted(batches(9))
    start(adapted(options={"tau": 1.0}), loader)
    assert loader.taken == 9
    loader = Counted([batches(1)[0]] * 9)  # nothing new
    start(adapted(options={"tau": 0.99}), loader)
    assert loader.taken == 2


def test_a_function_for_each_layer_picks_its_rows() -> None:
    base, data = models.tiny_llama(), batches(2)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    given: list[Any] = []

    def first_tokens(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
        given.append((model_input, layer_name))
        return layer_input[0][:, :6].flatten(0, 1)

    model = adapted(copy.deepcopy(base), rho=1.0)
    state = lorica.get_eva_state_dict(
        model,
        data,
        prepare_model_inputs_fn=lambda batch, config: (config.r, batch["input_ids"].shape),
        prepare_layer_inputs_fn={name: first_tokens},
        show_progress_bar=False,
    )
    assert given == [((3, torch.Size((4, 12))), name)] * len(given)
    bare = name.removeprefix("base_model.model.")
    x = torch.cat([part[:, :6].flatten(0, 1) for part in inputs_of(base, bare, data).view(-1, 12, 16).split(4)])
    wanted = principal(x.view(-1, 16), 3)
    assert ((state[name].double() * wanted).sum(1).abs() > 1 - 1e-5).all()
    with pytest.raises(ConfigError, match=r"not found in the model.*nowhere"):
        lorica.get_eva_state_dict(model, data, prepare_layer_inputs_fn={"nowhere": first_tokens})


def test_a_model_that_is_not_adapted_tells_too() -> None:
    base, data = models.tiny_llama(), batches()
    config = lorica.LoraConfig(r=3, target_modules=ALL, init_lora_weights="eva", eva_config=lorica.EvaConfig())
    state = lorica.get_eva_state_dict(base, data, config, show_progress_bar=False)
    model = adapted(copy.deepcopy(base))
    other = lorica.get_eva_state_dict(model, data, show_progress_bar=False)
    assert {f"base_model.model.{name}" for name in state} == other.keys()
    assert all(torch.equal(tensor, other[f"base_model.model.{name}"]) for name, tensor in state.items())
    with pytest.raises(AdapterError, match="peft_config is required"):
        lorica.get_eva_state_dict(base, data)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes_adapters_and_random_numbers_are_left_as_they_were(mode: str) -> None:
    model = adapted(models.tiny_llama(attention_dropout=0.5))
    getattr(model, mode)()
    model.get_submodule("base_model.model.lm_head").training = mode != "train"
    before = {name: module.training for name, module in model.named_modules()}
    state = lorica.get_eva_state_dict(model, batches(), show_progress_bar=False)
    again = lorica.get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.base_model.switch.enabled


def test_gpt2_embeddings_and_convolutions() -> None:
    start(adapted(models.tiny_gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    model = adapted(models.embedding_net(), target_modules=["emb", "head"], r=2)
    data = [{"ids": models.ids(8, 5)}]
    with pytest.warns(UserWarning, match=r"not found in the eva state_dict: \['emb'\]"):
        start(model, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    assert not factors_of(model)["base_model.model.emb.lora_embedding_A"].any()
    assert factors_of(model)["base_model.model.head.lora_A.weight"].norm(dim=1).allclose(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    base = models.tiny_llama().to(dtype)
    rows = factors_of(start(adapted(base, rho=1.0)))["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-5)


def test_an_adapter_with_magnitudes_keeps_the_output() -> None:
    base, data = models.tiny_llama(), batches()
    expected = base(**data[0]).logits
    model = start(adapted(base, use_dora=True), data)
    assert torch.allclose(model.eval()(**data[0]).logits, expected, atol=1e-5)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    data = batches()
    plain = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(target_modules=ALL))
    with pytest.raises(AdapterError, match="init_lora_weights='eva'"):
        lorica.initialize_lora_eva_weights(plain, data)
    with pytest.raises(AdapterError, match="must be a PeftModel"):
        lorica.initialize_lora_eva_weights(models.tiny_llama(), data)
    model = adapted()
    with pytest.raises(AdapterError, match="dataloader is required"):
        lorica.initialize_lora_eva_weights(model)
    with pytest.raises(AdapterError, match="'other' does not exist"):
        lorica.initialize_lora_eva_weights(model, data, adapter_name="other")
    for empty in ([], iter([])):
        with pytest.raises(ConfigError, match="dataloader is empty"):
            lorica.initialize_lora_eva_weights(model, empty, show_progress_bar=False)
    with pytest.raises(ConfigError, match=r"fewer directions than the rank 3"):
        start(model, batches(1, rows=1, length=3))
    with pytest.raises(TypeError, match="must be a dictionary"):
        start(model, [torch.zeros(2, 3, dtype=torch.long)])
    with pytest.raises(TargetError, match=r"head: is given a tensor of shape.*prepare_layer_inputs_fn"):
        start(
            adapted(models.mlp(), target_modules=["head"], r=2),
            [{"x": models.floats(8, 10)}],
            prepare_model_inputs_fn=lambda batch, config: torch.zeros(1, 2, dtype=torch.long),
        )
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="single active adapter"):
        start(model)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = adapted()
    state = lorica.get_eva_state_dict(model, batches(), show_progress_bar=False)
    before = {name: tensor.clone() for name, tensor in factors_of(model).items()}
    last = [*state][-1]
    with pytest.raises(ConfigError, match=rf"{last.removeprefix('base_model.model.')}.*not rows of"):
        lorica.initialize_lora_eva_weights(model, eva_state_dict=state | {last: torch.zeros(3, 5)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors_of(model).items())


def test_a_bar_shows_how_many_layers_have_settled(capsys: pytest.CaptureFixture[str]) -> None:
    lorica.get_eva_state_dict(adapted(), [batches(1)[0]] * 3)
    assert "14/14 layers have converged" in capsys.readouterr().err
