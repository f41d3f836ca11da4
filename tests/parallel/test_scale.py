"""Plans say what real ranks hold, send and write; at scales that no test has ranks for, what closed formulas say."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

from lorica import LoraConfig, get_peft_model
from lorica.checkpoint.names import saved_entries
from lorica.checkpoint.pieces import pieces
from lorica.errors import LayoutError
from lorica.parallel import parallelize, split_stages, sum_gradients, verify
from lorica.parallel.plan import Division, Outline, Plan, Planner, Refused, Work, divisions, empty_model, search
from lorica.parallel.plan.traffic import Traffic

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
#: Layers that are not alike, and one that is like none.
FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "rank_pattern": {"layers.1.mlp.up_proj": 2}}
WORK = Work(batch=2, sequence=10)
QUOTA = 2**31


def planner(config: Any, fields: dict[str, Any], work: Work = WORK, dtype: torch.dtype = torch.float32) -> Planner:
    adapter = LoraConfig(**fields)
    return Planner(Outline(empty_model(config, dtype), adapter), adapter, work)


# ---- real ranks ------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Any) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def adapted(axes: dict[str, int], sequence_parallel: bool) -> Any:
    """This rank's model, adapted."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").requires_grad_(False)
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    parallelize(model, mesh, sequence_parallel=sequence_parallel)
    if "pp" in axes:
        split_stages(model, mesh)
    return get_peft_model(model, LoraConfig(**FIELDS)).train()


def held_and_sent(cases: list[tuple[dict[str, int], bool]]) -> list[dict[str, Any]]:
    """What this rank holds, saves for backward, sends and writes, for each case."""
    return [measured(*case) for case in cases]


def measured(axes: dict[str, int], sequence_parallel: bool) -> dict[str, Any]:
    model = adapted(axes, sequence_parallel)
    found: dict[str, Any] = {
        "weights": size([p for p in [*model.parameters(), *model.buffers()] if not p.requires_grad]),
        "factors": size([p for p in model.parameters() if p.requires_grad]),
        "written": sum(
            piece.tensor[box.local].numel() * piece.tensor.element_size()
            for piece in pieces(saved_entries(model, "default"))
            for box, mine in zip(piece.boxes, piece.owned, strict=True)
            if mine
        ),
    }
    if "pp" in axes:
        return found
    ids = torch.ones(WORK.batch, WORK.sequence, dtype=torch.long)
    own = {local(p).untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[local(tensor).untyped_storage().data_ptr()] = tensor
        return tensor

    with Traffic({}) as forward:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if "fsdp" not in axes:  # which frees the memory of gathered weights, and uses it again
            found["saved"] = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
        loss.backward()
    verify(model)  # as before the first sum, once
    with Traffic({}) as gradients:
        sum_gradients(model)
    found |= {"base": by_collective(forward.sent), "lora": sum(gradients.sent.values())}
    found["gradients"] = size([p.grad for p in model.parameters() if p.grad is not None])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    found["optimiser"] = size(t for state in optimizer.state.values() for t in state.values() if t.dim())
    return found


def by_collective(sent: Any) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for (_, collective), number in sent.items():
        sums[collective] += number
    return dict(sums)


CASES = [
    ({"tp": 2}, False),
    ({"tp": 2}, True),
    ({"dp": 2, "tp": 1}, False),
    ({"fsdp": 2}, False),
    ({"pp": 2}, False),
    ({"tp": 4}, True),
    ({"fsdp": 2, "tp": 2}, True),
    ({"pp": 2, "tp": 2}, False),
]


@pytest.mark.parametrize("number", [2, 4])
def test_a_plan_is_what_real_ranks_hold_send_and_write(number: int) -> None:
    cases = [case for case in CASES if Division(**case[0]).ranks == number]
    found = ranks.run(number, held_and_sent, cases)
    made = planner(LlamaConfig(**SIZES), FIELDS, Work(WORK.batch, WORK.sequence, passes=2))
    single = planner(LlamaConfig(**SIZES), FIELDS)
    for index, (axes, sequence_parallel) in enumerate(cases):
        division = Division(**axes, sp=sequence_parallel)
        plan = (made if "pp" in axes else single).plan(division)
        real = [rank[index] for rank in found]
        same(plan, real, str(division))


def same(plan: Plan, real: list[dict[str, Any]], where: str) -> None:
    first = real[plan.division.stage_first(plan.stage)]
    for part in ("weights", "factors"):
        assert plan.memory[part] == first[part], f"{where}: {part}"
    assert {rank: bytes_ for rank, (_, bytes_) in plan.written.items()} == {
        rank: found["written"] for rank, found in enumerate(real) if found["written"]
    }, where
    assert plan.file == sum(found["written"] for found in real), where
    if plan.division.pp > 1:
        return
    for part in ("gradients", "optimiser"):
        assert plan.memory[part] == first[part], f"{where}: {part}"
    if "saved" in first:
        assert plan.memory["activations"] == first["saved"], where
    sums: Counter[str] = Counter()
    for (what, _, collective), number in plan.sent.items():
        sums[collective if what == "base" else "lora"] += number
    wanted = first["base"] | {"lora": first["lora"]}
    assert sums.keys() >= {name for name, number in wanted.items() if number}, where
    for name, number in sums.items():
        assert number == pytest.approx(wanted[name], abs=40), f"{where}: {name}"  # a ring's bytes are rounded


def test_a_plan_is_made_on_a_process_of_its_own() -> None:
    ranks.run(2, refused_among_ranks)


def refused_among_ranks() -> None:
    with pytest.raises(LayoutError, match="process of its own"):
        planner(LlamaConfig(**SIZES), FIELDS).plan(Division(tp=2))


# ---- closed formulas -------------------------------------------------------------------------------------------------

LARGE = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
#: Output, input and whether the input is cut, of a layer's linears.
LINEARS = [(8192, 8192, False), *2 * [(1024, 8192, False)], (8192, 8192, True)]
LINEARS += [(28672, 8192, False), (28672, 8192, False), (8192, 28672, True)]


def on_rank(r: int, tp: int) -> int:
    """Elements of the factors of a layer on each of ``tp`` ranks."""
    return sum(r * (out + width // tp if by_rows else out // tp + width) for out, width, by_rows in LINEARS)


def test_seventy_billion_parameters_on_512_ranks() -> None:
    made = planner(LARGE, {"r": 16, "target_modules": "all-linear"}, dtype=torch.bfloat16)
    plan = made.plan(Division(fsdp=64, tp=8, sp=True), limit=0)
    assert plan.trainable == (80 * on_rank(16, 1), 80 * on_rank(16, 8))
    assert plan.memory["factors"] == 4 * plan.trainable[1]
    rows = [2 * math.ceil(128256 / 8 / 64) * 8192, 161 * 8192 // 64]  # 250 or 251 of a vocabulary's rows; norms
    rows += [80 * out * width // 512 for out, width, _ in LINEARS]
    assert 0 < plan.memory["weights"] - 2 * sum(rows) < 1024  # the rotary embedding's buffers
    assert (plan.tensors, plan.file) == (80 * 7 * 2, 4 * plan.trainable[0])
    assert sorted(plan.written) == list(range(8))
    replicated = 80 * 16 * sum(out if by_rows else width for out, width, by_rows in LINEARS)
    flags = 80 * 7
    assert plan.sent["lora", "tp", "all_reduce"] == 2 * 7 * 4 * (replicated + flags) // 8
    assert plan.sent["lora", "fsdp", "all_reduce"] == 2 * 63 * 4 * (plan.trainable[1] + 2 * flags) // 64


def test_tensor_parallel_collectives_of_a_layer() -> None:
    made = planner(LARGE, {"r": 16, "target_modules": "all-linear"}, Work(sequence=512), torch.bfloat16)
    hidden = 2 * 512 * 8192
    plan = made.plan(Division(tp=8))
    # Two in each layer's forward and backward, one after the embedding, one before the head; the first block has none
    # in backward, as nothing before it trains.
    assert plan.sent["base", "tp", "all_reduce"] == (4 * 80 + 2 - 1) * 2 * 7 * hidden // 8
    assert plan.sent["base", "tp", "all_gather"] == 7 * 2 * 512 * 128256 // 8
    assert sum(made.own_traffic(plan.division).values()) == 0  # I4
    others = made.compared(plan).others
    assert others["lorica"] == 0
    h = 2 * 512 * 16
    assert others["PEFT"] == 80 * 7 * 2 * 7 * h // 8
    megatron = sum(
        2 * 2 * h + 2 * 512 * out if by_rows else 3 * h + 2 * 2 * 512 * width for out, width, by_rows in LINEARS
    )
    assert others["Megatron Bridge"] == 80 * 7 * megatron // 8


def test_a_pipeline_waits_keeps_microbatches_and_hands_on_hidden_states() -> None:
    made = planner(LARGE, {"r": 16, "target_modules": "all-linear"}, Work(sequence=512, passes=8), torch.bfloat16)
    plan = made.plan(Division(pp=4))
    hidden = 2 * 512 * 8192
    assert plan.sent["base", "pp", "send"] == 8 * 2 * hidden  # of a stage between two
    assert plan.idle == pytest.approx(3 / 11)
    assert plan.stage == 0  # which has four microbatches under way
    assert plan.memory["activations"] % 4 == 0
    with pytest.raises(LayoutError, match="as many microbatches as stages"):
        made.plan(Division(pp=16))


def test_six_hundred_billion_parameters_with_experts_on_512_ranks() -> None:
    fields = {"r": 16, "target_modules": "all-linear"}
    fields["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    made = planner(DeepseekV3Config(), fields, dtype=torch.bfloat16)
    plan = made.plan(Division(fsdp=64, tp=8, ep=64, engine="transformers"), limit=0)
    experts = 58 * 16 * ((4096 + 7168) + (7168 + 2048))  # of one expert in each layer
    dense = plan.trainable[0] - 256 * experts
    attention = 61 * 16 * sum(map(sum, [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)]))
    mlp = 16 * (3 * 3 * (18432 + 7168) + 58 * 3 * (2048 + 7168))
    assert dense == attention + mlp
    assert plan.trainable[1] == 256 // 64 * experts + attention + 16 * (
        3 * (2 * (18432 // 8 + 7168) + 18432 // 8 + 7168) + 58 * (2 * (2048 // 8 + 7168) + 2048 // 8 + 7168)
    )
    assert plan.file == 4 * plan.trainable[0]
    assert len(plan.written) == 64
    assert plan.written[9] == plan.written[63]  # what only holds experts writes those


# ---- equal layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_layers_that_are_equal_count_as_often_as_they_are_there(kind: str) -> None:
    config, dtype = LlamaConfig(**{**SIZES, "num_hidden_layers": 5}), torch.float32
    division = Division(tp=2, sp=True)
    if kind == "experts":
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
        config, dtype = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 4}, **few), torch.bfloat16
        division = Division(tp=2, fsdp=2)
    adapter = LoraConfig(**FIELDS)
    short, long = (Outline(empty_model(config, dtype), adapter) for _ in range(2))
    assert len(set(short.kinds)) == 2
    long.kinds = tuple(range(len(long.kinds)))
    plans = [Planner(outline, adapter, WORK).plan(division) for outline in (short, long)]
    for name in ("trainable", "tensors", "file", "written"):
        assert getattr(plans[0], name) == getattr(plans[1], name), name
    assert plans[0].sent == pytest.approx(plans[1].sent, abs=40)  # a ring's bytes are rounded
    for part, number in plans[1].memory.items():
        if part not in ("gathered", "working"):  # which are no sums over layers
            assert plans[0].memory[part] == number, part


# ---- which fit -------------------------------------------------------------------------------------------------------


def test_what_fits_comes_best_first_and_the_rest_with_a_reason() -> None:
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4})
    made = planner(config, {"r": 4, "target_modules": ["o_proj"]})
    every = divisions(8, experts=0, engine="native")
    assert len(every) == len(set(every))
    assert {division.ranks for division in every} == {8}
    fitting, refused = search(made, every, limit=QUOTA, either=True)
    assert {plan.division for plan in fitting} | {one.division for one in refused} == set(every)
    keys = [(plan.idle, plan.per_token) for plan in fitting]
    assert keys == sorted(keys)
    reasons = {str(one.division): one.reason for one in refused}
    assert "4 query and 2 key/value heads" in reasons["tp8"]
    assert "microbatches" in reasons["pp2 dp4"]
    total = fitting[0].total
    fitting, refused = search(made, [fitting[0].division], limit=total - 1)
    assert not fitting
    assert isinstance(refused[0], Refused)
    assert refused[0].plan is not None
    assert refused[0].plan.total == total
