"""``lorica train`` on rows with images: the processor's tokens and pixels, and parts of the model that train fully."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
import vision
from lorica import PeftModel
from lorica.errors import RecipeError
from lorica.targets.roles import role_of
from lorica.train import job, models, recipe, sources
from lorica.train import vision as seeing
from lorica.train.collate import Collator
from lorica.train.evaluate import token_losses

pytest.importorskip("PIL")

IMAGES = {"llava": "<image>", "gemma3": "<soft>"}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _without_torchvision(name: str) -> Any:
    import transformers

    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _processor(family: str) -> Any:
    import transformers

    tokenizer = runs.tokenizer(template=CHAT)
    tokenizer.pad_token = "</s>"
    size = {"height": 16, "width": 16}
    if family == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        pixels = _without_torchvision("CLIPImageProcessor")(size={"shortest_edge": 16}, crop_size=size)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(pixels, tokenizer, chat_template=CHAT, **options)
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        extra_special_tokens=names,
    )  # fmt: skip
    pixels = _without_torchvision("Gemma3ImageProcessor")(size=size)
    return transformers.Gemma3Processor(pixels, tokenizer, image_seq_length=4)


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seeing_base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    processor = _processor(family)
    before, vision.VOCABULARY = vision.VOCABULARY, 320
    token, vision.IMAGE = vision.IMAGE, processor.tokenizer.convert_tokens_to_ids(IMAGES[family])
    vision._TEXT |= {"vocab_size": 320, "initializer_range": 0.8}  # so that logits are large enough
    try:
        vision.make(family).save_pretrained(folder)
    finally:
        vision.VOCABULARY, vision.IMAGE = before, token
        vision._TEXT["vocab_size"] = before
        del vision._TEXT["initializer_range"]
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers only the picture tells."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 16), colour).save(folder / f"{name}.png")
        rows += [{"image": str(folder / f"{name}.png"), "prompt": "what is it? ", "completion": name}] * 2
    return runs.write_jsonl(folder / "rows.jsonl", rows)


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    wanted = {
        "vision": {},
        "data": {"train": str(data), "eval": str(data)},
        "lora": {"r": 4, "lora_alpha": 16},
        "training__steps": 3,
        "training__eval_every": None,
        "training__gradient_accumulation": 1,
        "training__batch_size": 4,
        "checkpoint__every": None,
    }
    return runs.settings(base, data, output, **wanted | changes)


def run(values: dict[str, Any], **options: Any) -> job.Result:
    return job.run(recipe.parse(values), progress=False, **options)


def saved(result: job.Result) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def test_what_is_seen_is_learned(seeing_base: Path, pictures: Path, tmp_path: Path, family: str) -> None:
    part = {"freeze_vision_projection": False}
    changes = {"training__steps": 100, "training__learning_rate": 0.01, "lora": {"r": 8, "lora_alpha": 16}}
    result = run(settings(seeing_base, pictures, tmp_path / "run", vision=part, **changes))
    assert result.eval_loss_after < 0.25 * result.eval_loss_before
    # A fresh model with the adapter gives that loss, and another picture another one.
    base = models.load_base(str(seeing_base), sees=True, where=torch.device("cpu"))
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    sight = seeing.Sight(*models.load_processor(str(seeing_base)), "image")
    section = recipe.parse(settings(seeing_base, pictures, tmp_path)).data
    examples = sources.load(section, sight.processor.tokenizer, 96, 0, sight).held_out
    collate = Collator(0, sight=sight)
    with torch.no_grad():
        total, count = token_losses(model, collate([[example] for example in examples]))
        alone = [token_losses(model, collate([[example]]))[0] for example in examples]
        batch = collate([[example] for example in examples])
        batch["pixel_values"] = batch["pixel_values"].flip(0)
        wrong, _ = token_losses(model, batch)
    assert float(total) / count == pytest.approx(result.eval_loss_after, rel=1e-4)
    assert float(sum(alone)) == pytest.approx(float(total), rel=1e-4)  # rows do not depend on their neighbours
    assert float(wrong) > {"llava": 1.5, "gemma3": 1.05}[family] * float(total)


@pytest.mark.parametrize(
    "thawed", [(), ("vision_model",), ("vision_projection",), ("vision_model", "vision_projection")]
)
def test_parts_that_are_not_frozen_train_and_are_saved(seeing_base, pictures, tmp_path, thawed) -> None:
    frozen = {f"freeze_{part}": False for part in thawed}
    result = run(settings(seeing_base, pictures, tmp_path / "run", vision=frozen))
    tensors = saved(result)
    assert {role_of(name) for name in tensors if "lora_" in name} == {"language_model"}
    whole = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    assert {role_of(name) for name in whole} == set(thawed)
    base = models.load_base(str(seeing_base), sees=True)
    parameters = dict(base.named_parameters())
    assert {n.removeprefix("base_model.model.") for n in whole} >= {
        name for name in parameters if role_of(name) in thawed
    }
    changed = [n for n, t in whole.items() if not torch.equal(t, parameters[n.removeprefix("base_model.model.")])]
    assert {role_of(name) for name in changed} == set(thawed)


def test_adapters_on_the_tower_beside_a_language_model_that_trains(seeing_base, pictures, tmp_path, family) -> None:
    part = {"freeze_language_model": False, "adapters": ["vision_model"]}
    if family == "gemma3":
        with pytest.raises(RecipeError, match="would come apart"):
            run(settings(seeing_base, pictures, tmp_path / "run", vision=part))
        return
    tensors = saved(run(settings(seeing_base, pictures, tmp_path / "run", vision=part)))
    assert {role_of(name) for name in tensors if "lora_" in name} == {"vision_model"}
    assert {role_of(name) for name in tensors if "lora_" not in name} == {"language_model"}


def test_a_run_that_is_resumed_gives_the_same(seeing_base, pictures, tmp_path) -> None:
    values = settings(seeing_base, pictures, tmp_path / "whole", vision={"freeze_vision_model": False})
    values["training"]["steps"] = 4
    values["checkpoint"] = {"every": 2, "keep": 3}
    through = run(values)
    values["output_dir"] = str(tmp_path / "cut")
    first = run(values)
    for folder in sorted((first.output_dir / "checkpoints").iterdir())[1:]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    resumed = run(values, resume=True)
    wanted, found = saved(through), saved(resumed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_other_pictures_are_other_data(seeing_base, pictures, tmp_path) -> None:
    sight = seeing.Sight(*models.load_processor(str(seeing_base)), "image")
    rows = [json.loads(line) for line in pictures.read_text().splitlines()]
    turned = [{**row, "image": rows[index - 2]["image"]} for index, row in enumerate(rows)]
    other = runs.write_jsonl(tmp_path / "rows.jsonl", turned)
    section = recipe.parse(settings(seeing_base, pictures, tmp_path)).data
    marks = []
    for file in (pictures, other):
        loaded = sources.load(section.model_copy(update={"train": str(file)}), None, 96, 0, sight)
        marks.append(job.fingerprint(loaded.training))
    assert marks[0] != marks[1]


def conversations(pictures: Path, tmp_path: Path, form: str) -> Path:
    rows = [json.loads(line) for line in pictures.read_text().splitlines()]
    said = {
        "plain": lambda row: row["prompt"],
        "placed": lambda row: [{"type": "text", "text": row["prompt"]}, {"type": "image", "text": None}],
    }[form]
    turns = [
        [{"role": "user", "content": said(row)}, {"role": "assistant", "content": row["completion"]}] for row in rows
    ]
    made = [{"picture": [row["image"]], "messages": turn} for row, turn in zip(rows, turns, strict=True)]
    return runs.write_jsonl(tmp_path / "rows.jsonl", made)


@pytest.mark.parametrize("form", ["plain", "placed"])
def test_conversations_have_their_images_where_they_say(seeing_base, pictures, tmp_path, family, form) -> None:
    if family != "llava":
        pytest.skip("this tiny processor has no template")
    data = conversations(pictures, tmp_path, form)
    section = recipe.parse(settings(seeing_base, data, tmp_path)).data
    sight = seeing.Sight(*models.load_processor(str(seeing_base)), "picture")
    example = sources.load(section, sight.processor.tokenizer, 96, 0, sight).training[0]
    text = sight.processor.tokenizer.decode(example.ids)
    image = "<image>" * 16
    assert text.startswith(f"<|user|>what is it? {image}" if form == "placed" else f"<|user|>{image}what is it? ")
    learned = sight.processor.tokenizer.decode(example.labels[example.labels != -100])
    assert learned == "red<|end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"images": "imagee"}}, "no column 'imagee'. Did you mean 'image'"),
        ({"vision": {"freeze_language_model": False}}, "adapters: no part that is named here is frozen"),
        ({"data__packing": True}, "neither packed nor cut"),
        ({"parallel": {"tp": 2}}, "neither packed nor cut"),
        ({"lora__init_lora_weights": "eva"}, "looks at batches of text alone"),
        ({"lora__exclude_modules": "x.*"}, "with a vision section it is a list"),
        ({"data__max_length": 6}, "no example has anything to learn"),
    ],
)
def test_what_cannot_be_is_refused(seeing_base, pictures, tmp_path, changes, message) -> None:
    with pytest.raises(RecipeError, match=message):
        run(settings(seeing_base, pictures, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_not_there_is_named_with_its_row(seeing_base, pictures, tmp_path) -> None:
    rows = [{"image": str(pictures.parent / "redd.png"), "prompt": "a", "completion": "b"}]
    data = runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError, match=r"Row 1: column 'image': there is no image .*redd\.png"):
        run(settings(seeing_base, data, tmp_path / "run"))


def test_a_model_that_does_not_see_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"processor .* (cannot be loaded|takes no images)"):
        run(settings(base, pictures, tmp_path / "run"))
