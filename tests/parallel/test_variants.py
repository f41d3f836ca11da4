"""DoRA, PiSSA and OLoRA on ranks, beyond the contract: what norms cost, residuals, and files from layout to layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pytest
import ranks
import test_fused
import torch
import torch.distributed as dist
from divisions import DIVISIONS
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
from lorica.parallel import RowParallelLinear

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]
#: Row-parallel ones among them, in the two layers.
ROWS = 4
DIVIDED = ["native tp2", "native tp4", "transformers tp2", "torch tp2", "torch fsdp2"]

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(11)
    config = lorica.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields})
    return lorica.get_peft_model(base, config)


def disturb(model: nn.Module, reference: nn.Module) -> None:
    """Give both the same factors, away from where they started."""
    generator = torch.Generator().manual_seed(3)
    values = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(contract.wholes(contract.entries(reference)).items())
    }
    for one in (model, reference):
        lorica.set_peft_model_state_dict(one, values)


def counts_of_norms(division: str) -> list[int]:
    """Collectives beyond the base model's: first forward, second, after a write, after an optimiser's step."""
    subject = SUBJECTS["llama"]
    base, ids = DIVISIONS[division].cut(subject, ""), batch(2)

    def sent(model: nn.Module) -> int:
        with contract.Collectives() as seen, torch.no_grad():
            model(input_ids=ids)
        return sum(seen.counts.values())

    bare = sent(base)
    model = adapted(base, use_dora=True)
    found = [sent(model) - bare, sent(model) - bare]
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.add_(0.1)
    found.append(sent(model) - bare)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, 0.1)
    loss_of(logits_of(model(input_ids=ids)), ids).backward()
    optimiser.step()
    return [*found, sent(model) - bare, sent(model) - bare]


@pytest.mark.parametrize("division", ["native tp2", "torch tp2"])
def test_norms_are_summed_once_for_each_state_of_the_factors(division: str) -> None:
    for found in ranks.run(2, counts_of_norms, division):
        assert found == [ROWS, 0, ROWS, ROWS, 0]


def residuals(division: str, folder: str) -> None:
    """The base weights that are left are one process's, however the model lies when it is adapted."""
    subject = SUBJECTS["llama"]
    for init in ("pissa", "pissa_niter_4", "olora"):
        for variant in (False, True):
            base = DIVISIONS[division].cut(subject, folder)
            oracle = adapted(subject.build(), init_lora_weights=init, use_dora=variant)
            model = adapted(base, init_lora_weights=init, use_dora=variant)
            contract.compare(contract.entries(model), contract.wholes(contract.entries(oracle)), init)
            weights = contract.wholes(contract.base_weights(oracle))
            contract.compare(contract.base_weights(model), weights, f"the residual of {init}")


@pytest.mark.parametrize("division", DIVIDED)
def test_the_residual_is_one_process_s(division: str, tmp_path: Path) -> None:
    SUBJECTS["llama"].save(tmp_path / "base")
    ranks.run(DIVISIONS[division].ranks, residuals, division, str(tmp_path / "base"))


def from_layout_to_layout(division: str, folder: str, fields: dict[str, Any]) -> None:
    """Saved by one process and read here, saved here and read by one process: the same model."""
    subject, ids, path = SUBJECTS["llama"], batch(2), Path(folder)
    oracle = adapted(subject.build(), **fields)
    model = adapted(DIVISIONS[division].cut(subject, str(path / "base")), **fields)
    disturb(model, oracle)
    wanted = oracle(input_ids=ids).logits
    contract.near(model(input_ids=ids).logits, wanted, "as it was trained")
    model.save_pretrained(path / "here", save_embedding_layers=False)
    if torch.distributed.get_rank() == 0:
        oracle.save_pretrained(path / "there", save_embedding_layers=False)
    torch.distributed.barrier()
    torch.manual_seed(99)
    for saved in ("here", "there"):
        one = lorica.PeftModel.from_pretrained(subject.build(), path / saved)
        contract.near(one(input_ids=ids).logits, wanted, f"saved {saved}, read by one process")
        cut = DIVISIONS[division].cut(subject, str(path / "base"))
        several = lorica.PeftModel.from_pretrained(cut, path / saved)
        contract.near(several(input_ids=ids).logits, wanted, f"saved {saved}, read by several")
    several.merge_adapter()
    contract.near(several(input_ids=ids).logits, wanted, "merged")


@pytest.mark.parametrize("division", ["native tp2", "transformers tp2", "torch fsdp2"])
@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4", "use_dora": True}],
    ids=["pissa", "pissa-dora"],
)
def test_files_from_layout_to_layout(division: str, fields: dict[str, Any], tmp_path: Path) -> None:
    SUBJECTS["llama"].save(tmp_path / "base")
    ranks.run(DIVISIONS[division].ranks, from_layout_to_layout, division, str(tmp_path), fields)


@pytest.mark.parametrize(
    ("size", "names", "fields"),
    [
        (4, ["q_proj", "k_proj", "v_proj", "o_proj"], {"use_dora": True}),
        (2, ["k_proj"], {"use_dora": True}),
        (2, ["q_proj", "v_proj"], {"use_dora": True, "init_lora_weights": "pissa"}),
        (4, ["q_proj", "k_proj"], {"init_lora_weights": "olora"}),
        (4, ["q_proj", "k_proj", "v_proj", "o_proj"], {"kasa_config": {"gamma": 0.1}}),
        (2, ["q_proj", "v_proj"], {"kasa_config": {"beta": 0.1}}),
        (4, ["q_proj", "k_proj", "v_proj"], {"r": 4, "use_bdlora": {"target_modules_bd_b": ["_proj"], "nblocks": 4}}),
        (2, ["q_proj", "v_proj"], {"r": 4, "use_bdlora": {"target_modules_bd_a": ["_proj"], "nblocks": 2}}),
        (4, ["q_proj", "v_proj", "o_proj"], {"lora_alpha": 1, "use_qalora": True, "qalora_group_size": 8}),
        (4, ["q_proj", "k_proj", "o_proj"], {"velora_config": {"num_groups": 3, "init_type": "random"}}),
        (2, ["k_proj", "v_proj"], {"monteclora_config": {"num_samples": 2, "sample_scaler": 0.0}}),
        (4, ["q_proj", "k_proj", "v_proj"], {"init_lora_weights": "mica"}),
    ],
    ids=str,
)
def test_fused_projections_and_copies_of_heads(
    size: int, names: list[str], fields: dict[str, Any], tmp_path: Path
) -> None:
    """Each projection has a start and tensors of its own; one that is not adapted has none, though neighbours do."""
    ranks.run(size, test_fused._same, names, True, "strided", fields, str(tmp_path))
    test_fused.compare(tmp_path)


def idle_magnitudes() -> None:
    """Only the key rows of this rank, one head's, may be scaled."""
    model = contract.adapt(
        test_fused.Cut(test_fused.whole(), fused=True, order="strided"),
        test_fused.config(["k_proj"], use_dora=True),
    )
    x = torch.randn(2, 5, test_fused.WIDTH)
    before = model(x)
    before.square().sum().backward()
    (magnitude,) = (p for n, p in model.named_parameters() if "magnitude" in n)
    idle = magnitude.grad == 0
    assert int((~idle).sum()) == test_fused.HEAD
    with torch.no_grad():
        magnitude[idle] *= 3
    assert torch.equal(model(x), before)


def test_projections_that_are_not_adapted_have_no_magnitudes() -> None:
    ranks.run(2, idle_magnitudes)


def _moved() -> bool:
    """Between two forwards one rank's weight moves in memory, as a gathered one may."""
    torch.manual_seed(1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    base = torch.nn.Sequential(RowParallelLinear.from_linear(torch.nn.Linear(8, 6), mesh)).requires_grad_(False)
    model = lorica.get_peft_model(base, lorica.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    x = torch.ones(2, 8)
    with torch.no_grad():
        before = model(x)
        if dist.get_rank() == 1:
            weight = model.base_model.model[0].base_layer.weight
            weight.data = weight.data.clone()
        return torch.equal(before, model(x))


def test_ranks_agree_on_whether_norms_are_still_good() -> None:
    assert ranks.run(2, _moved) == [True, True]
