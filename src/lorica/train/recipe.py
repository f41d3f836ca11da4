"""The recipe of a training run: every setting with its default, read from YAML and ``key=value`` overrides.

A key that is not known here is an error with a suggestion, never ignored. Paths are relative to the working directory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorica.errors import RecipeError, suggest_path
from lorica.files.yaml import parse_yaml, read_yaml, to_yaml
from lorica.train.mistakes import explain

_Count = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
_Positive = Annotated[float, Field(gt=0.0)]

_Validated = TypeVar("_Validated", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The frozen base model."""

    path: str
    """Directory, or name on the Hugging Face hub, of a causal language model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; auto: as they were saved."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantise the frozen weights of linear layers while loading, with bitsandbytes (QLoRA): 4 bits with double
    quantisation, or 8; dtype is then what they compute in. Ranks can divide batches (parallel.dp) and nothing else."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    fuse_mlp: bool = False
    """Compute each gated MLP as one, so that backward keeps less (lorica.fuse_mlps); a model without any that can be is
    an error. It needs dense weights that are whole on each rank, and gate, up and down adapted by plain LoRA."""
    attn_implementation: str | None = None
    """transformers' name of the attention (eager, sdpa, flash_attention_2, ...); null: its own choice."""
    trust_remote_code: Literal[False] = False
    """Code that comes with a model is never run; only false is accepted."""


class DataSection(_Section):
    """What to learn from."""

    train: str
    """A .jsonl, .json, .parquet, .csv or .txt file, or the name of a dataset on the hub."""
    eval: str | None = None
    """The held-out set, as above; null: eval_split or eval_fraction decides."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """Split (or slice, as in train[:1000]) to learn from."""
    eval_split: str | None = None
    """Split to evaluate on."""
    eval_fraction: _Rate = 0.05
    """Without eval and eval_split: share of the rows that is held out; 0: no evaluation."""
    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    """How a row is read; auto: by the names of its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where the columns have other names, as in {prompt: question, completion: answer}."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens per example; longer ones are cut (plain text: into several). null: what the model takes, at most 1024."""
    calibration_batches: _Count = 8
    """Batches that lora.init_lora_weights eva, corda and lora_ga look at before the first step."""
    packing: bool = False
    """Lay several examples in one row, each with its own positions and attention, so that little is padding."""


_Part = Literal["language_model", "vision_model", "vision_projection"]


class VisionSection(_Section):
    """A vision-language model and rows with images. A part that is not frozen trains fully, in a copy that is saved
    with the adapter, and has no adapters; the other parts have some where ``adapters`` names them."""

    images: str = "image"
    """Column with the image of a row, or a list of them: as pictures, bytes or paths. They go where the text has the
    processor's image token (messages: entries of type image), or before it."""
    freeze_vision_model: bool = True
    freeze_vision_projection: bool = True
    freeze_language_model: bool = True
    adapters: list[_Part] = ["language_model"]
    """The parts in which lora.target_modules are looked for."""

    @property
    def frozen(self) -> dict[_Part, bool]:
        """Whether each part is."""
        return {part: getattr(self, f"freeze_{part}") for part in get_args(_Part)}

    @model_validator(mode="after")
    def _adapters_on_frozen_parts(self) -> VisionSection:
        if not any(self.frozen[part] for part in self.adapters):
            raise ValueError("adapters: no part that is named here is frozen, so there is none to put an adapter on")
        return self


class LoraSection(_Section):
    """The adapter: the fields of ``lorica.LoraConfig``."""

    r: _Count = 16
    lora_alpha: float = 32
    lora_dropout: _Rate = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, Any] = Field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    use_dora: bool = False
    kasa_config: dict[str, Any] | None = None
    use_bdlora: dict[str, Any] | None = None
    use_qalora: bool = False
    qalora_group_size: _Count = 16
    velora_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    lora_dtype: str | None = None
    share_expert_adapters: bool = False
    normalize_moe_lora: bool = False
    a2a_experimental: bool = False
    fused_as_one: bool = False


class TrainingSection(_Section):
    """How to learn."""

    steps: _Count | None = None
    """Optimiser steps; null: epochs decides."""
    epochs: _Positive = 1.0
    """Passes over the training set."""
    batch_size: _Count = 8
    """Rows per forward pass, of all ranks together."""
    gradient_accumulation: _Count = 1
    """Forward passes per optimiser step; the loss is the mean over the completion tokens of all of them."""
    learning_rate: _Positive = 2e-4
    optimizer: Literal["adamw", "lora_fa", "riemannian"] = "adamw"
    """AdamW; on B's projected gradients alone (arXiv:2308.03303); or on preconditioned ones (arXiv:2402.02347)."""
    loraplus_lr_ratio: _Positive | None = None
    """LoRA+ (arXiv:2402.12354): learning rate of B and of embedding factors, as a multiple of A's."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's, not applied to one-dimensional parameters."""
    betas: tuple[_Rate, _Rate] = (0.9, 0.999)
    eps: _Positive = 1e-8
    max_grad_norm: _Positive | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear rise to learning_rate; null: warmup_ratio decides."""
    warmup_ratio: _Fraction = 0.03
    """Share of all steps that is warm-up."""
    min_lr_ratio: _Fraction = 0.0
    """Where cosine and linear end, as a multiple of learning_rate."""
    bf16: bool = False
    """Run the forward pass under bfloat16 autocast."""
    gradient_checkpointing: bool | Literal["reentrant", "non_reentrant"] = False
    """Recompute activations in the backward pass; true: non_reentrant."""
    eval_every: _Count | None = 100
    """Evaluate every so many steps, besides before and after; null: only then."""
    eval_batch_size: _Count | None = None
    """Rows per evaluation pass; null: batch_size."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Governs initialisation, dropout and the order of the data."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto: an accelerator where there is one."""


class CheckpointSection(_Section):
    """Complete states of the run, to resume from."""

    every: _Count | None = 100
    """Steps between checkpoints; null: only at the end and when interrupted."""
    keep: _Count = 2
    """How many of the newest are kept."""
    asynchronous: bool = False
    """Train on while a copy of the state is written."""


class ParallelSection(_Section):
    """How model and data lie over ranks. Their number is pp × dp × fsdp × tp."""

    tp: _Count = 1
    """Tensor parallelism: every layer's weights are cut over so many ranks."""
    sp: bool = False
    """Sequence parallelism: between the cut layers each tensor-parallel rank has its own tokens."""
    fsdp: _Count = 1
    """Fully-sharded data parallelism: the weights are stored in shares, each rank has its own rows."""
    ep: _Count = 1
    """Expert parallelism: the experts are divided over so many of the ranks that fsdp and tp are."""
    pp: _Count = 1
    """Pipeline parallelism: the layers are divided over so many ranks; micro-batches are gradient_accumulation's."""
    dp: _Count | None = None
    """Replicas, each with its own rows; null: under torchrun whatever ranks are left, else 1."""
    engine: Literal["auto", "native", "transformers"] = "auto"
    """Who cuts the model: lorica, or transformers' DistributedConfig; auto: lorica, unless there is ep."""
    backend: str = "auto"
    """Who carries the tensors: gloo, nccl, neuron, ...; auto: what torch has for the device."""
    timeout: _Positive = 600.0
    """Seconds without an answer from another rank after which the run ends with an error."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a lost rank may be replaced; the run goes on from its newest checkpoint."""

    @property
    def axes(self) -> dict[str, int]:
        """The axes from the outermost to the innermost, whose ranks are neighbours and talk most."""
        return {"pp": self.pp, "dp": self.dp or 1, "fsdp": self.fsdp, "tp": self.tp}

    @property
    def cut_by(self) -> Literal["native", "transformers"]:
        """Who cuts the model."""
        if self.engine == "auto":
            return "transformers" if self.ep > 1 else "native"
        return self.engine

    @property
    def ranks(self) -> int:
        """How many processes; with ``dp`` open, as few as can be."""
        return math.prod(self.axes.values())

    @property
    def data_ranks(self) -> int:
        """Over how many ranks the rows of a batch are divided."""
        return (self.dp or 1) * self.fsdp

    @model_validator(mode="after")
    def _possible(self) -> ParallelSection:
        if self.sp and self.tp == 1:
            raise ValueError("sp divides the tokens over the tensor-parallel ranks, of which there is one: set tp")
        if self.pp > 1 and self.fsdp > 1:
            raise ValueError(
                "pp and fsdp exclude each other: every micro-batch would gather a stage's weights again; use dp or tp"
            )
        if self.cut_by == "transformers" and (self.sp or self.pp > 1):
            why = "it cuts the experts" if self.ep > 1 else "engine=transformers"
            raise ValueError(f"transformers trains with neither sp nor pp ({why}): leave them away")
        if self.ep > 1 and self.cut_by == "native":
            raise ValueError("lorica's own layers leave experts whole: set engine=transformers for ep")
        if self.ep > 1 and (self.ep % self.tp or self.fsdp * self.tp % self.ep):
            raise ValueError(
                f"ep={self.ep} has to be a multiple of tp={self.tp} and to divide fsdp × tp = {self.fsdp * self.tp}: "
                "the experts are divided over those ranks"
            )
        return self


class LogSection(_Section):
    """What is reported besides ``metrics.jsonl`` and ``loss.png``."""

    every: _Count = 10
    """Steps between records; each holds the mean over the steps since the last."""
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: str = "lorica"
    run_name: str | None = None


class Recipe(_Section):
    """A LoRA training run."""

    model: ModelSection
    data: DataSection
    vision: VisionSection | None = None
    lora: LoraSection = Field(default_factory=LoraSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    log: LogSection = Field(default_factory=LogSection)
    output_dir: str = "runs/lora"
    """Where adapter/, checkpoints/, metrics.jsonl, loss.png and recipe.yaml go."""

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Recipe:
        if self.data.eval is not None and self.data.eval_split is not None and Path(self.data.eval).exists():
            raise ValueError("data.eval is a file and data.eval_split names a split: give one of them")
        return self

    @model_validator(mode="after")
    def _rows_divide(self) -> Recipe:
        check_rows(self.training.batch_size, self.parallel.data_ranks)
        if self.parallel.ranks > 1 and ":" in self.training.device:
            raise ValueError(f"training.device: {self.training.device} is one device; ranks choose their own")
        return self

    @model_validator(mode="after")
    def _quantised_is_whole(self) -> Recipe:
        ranks = self.parallel
        if self.model.quantization is not None and max(ranks.tp, ranks.pp, ranks.fsdp, ranks.ep) > 1:
            raise ValueError(
                f"model.quantization: {self.model.quantization} weights cannot be cut over ranks; use parallel.dp "
                "alone, or no quantization"
            )
        return self

    @model_validator(mode="after")
    def _images_are_whole(self) -> Recipe:
        ranks = self.parallel
        if self.vision is not None and (max(ranks.tp, ranks.pp, ranks.fsdp, ranks.ep) > 1 or self.data.packing):
            raise ValueError("vision: rows with images are neither packed nor cut over ranks; use parallel.dp alone")
        if self.vision is not None and self.lora.init_lora_weights in ("eva", "corda", "lora_ga"):
            raise ValueError(f"vision: {self.lora.init_lora_weights} looks at batches of text alone; start by another")
        return self

    @property
    def output(self) -> Path:
        return Path(self.output_dir).expanduser()


def check_rows(rows: int, ranks: int) -> None:
    """Refuse a batch that data-parallel ranks could not share evenly.

    Raises:
        RecipeError: it says which batches they could.
    """
    if rows % ranks:
        raise RecipeError(
            f"training.batch_size: {rows} rows do not divide over {ranks} data-parallel ranks "
            f"(parallel.dp × parallel.fsdp); the next that do are {rows - rows % ranks + ranks}"
        )


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (or none) and apply ``section.key=value`` overrides, whose values are YAML.

    Raises:
        RecipeError: the file is missing or not YAML, or a key or value does not fit; lists all that is wrong.
    """
    values = _read_yaml(Path(path).expanduser()) if path is not None else {}
    for override in overrides:
        _apply(values, override)
    return parse(values, source=str(path) if path is not None else "recipe")


def parse(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate a nested mapping; ``source`` names it in errors."""
    return _validated(Recipe, values, source)


def parse_parallel(text: str, *, source: str = "--parallel") -> ParallelSection:
    """Validate the ``parallel`` section alone, given as ``key=value`` pairs with commas or blanks between them."""
    values: dict[str, Any] = {}
    for pair in text.replace(",", " ").split():
        _apply(values, pair.removeprefix("parallel."))
    return _validated(ParallelSection, values, source, "parallel")


def _validated(model: type[_Validated], values: Mapping[str, Any], source: str, *section: str) -> _Validated:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        items = [dict(item) | {"loc": (*section, *item["loc"])} for item in error.errors()]
        lines = list(dict.fromkeys(explain(Recipe, item) for item in items))
        separator = f"\n  {source}: " if len(lines) > 1 else f"{source}: "
        head = f"{len(lines)} settings are wrong:" if len(lines) > 1 else ""
        raise RecipeError(head + "".join(separator + line for line in lines)) from None


def dump_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML."""
    return to_yaml(recipe.model_dump(mode="json"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping from dotted keys; the free-form mappings in a section stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:  # Mapping would ask each of its subclasses, which are hundreds
            flat.update(flatten(value, f"{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {path}.{suggest_path(path)}")
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of sections")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{override!r} is neither a recipe file nor an override; write section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"The value of {key} is not YAML: {error}") from None
    *sections, last = key.strip().split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{key}: {section!r} is a value, not a section")
        target = inner
    target[last] = value
