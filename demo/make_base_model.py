"""Train the demonstration's base model from nothing: ``python demo/make_base_model.py`` writes ``demo/base_model``.

The constants below are the whole recipe. The same seed, Python, torch and number of threads give the same files;
with others the model comes out equally good, not equal byte for byte. ``training.json`` beside the weights says what
this copy was made with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import RESERVED_SURNAMES, documentation, written

HERE = Path(__file__).resolve().parent
SEED = 20240229
VOCABULARY = 1024
WRITTEN_CHARACTERS = 24_000_000  # invented prose; the documentation comes to about 2.4 million
DOCUMENTATION_REPEATS = 2  # how often the documentation is gone through for each pass over the prose
CONTEXT = 256
BATCH = 16
STEPS = 2000
SCHEDULE = 3500  # the learning rate falls as if for so many steps: enough is learned by then
WARMUP = 100
LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 0.02  # as a fraction of the learning rate
WEIGHT_DECAY = 0.1
CLIP = 1.0
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def corpus() -> list[str]:
    """Return every piece of text once per pass, shuffled; whatever holds a reserved surname is left out."""
    rng = random.Random(SEED)
    held_out = re.compile(rf"\b({'|'.join(RESERVED_SURNAMES)})\b")
    pieces = list(documentation()) * DOCUMENTATION_REPEATS + list(written(rng, WRITTEN_CHARACTERS))
    pieces = [piece for piece in pieces if not held_out.search(piece)]
    rng.shuffle(pieces)
    return pieces


def make_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose digits stand alone, so that a number is read and copied figure by figure."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    start = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_stream(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> torch.Tensor:
    """Return all text as one row of token numbers; each piece stands between its start and end tokens."""
    numbers: list[int] = []
    for first in range(0, len(pieces), 1024):
        for encoding in tokenizer.backend_tokenizer.encode_batch(pieces[first : first + 1024]):
            numbers += encoding.ids
            numbers.append(tokenizer.eos_token_id)
    return torch.tensor(numbers)


def learning_rate(step: int) -> float:
    """Return the factor on the learning rate: linear warm-up, then half a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / (SCHEDULE - WARMUP)
    return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> float:
    """Train on random windows of ``stream``; return the mean loss (nats per token) on the last 50 batches."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.cat(
        [torch.randperm(len(windows), generator=generator) for _ in range(1 + steps * BATCH // len(windows))]
    )
    bar = tqdm(range(steps), unit="step", smoothing=0.05)
    for step in bar:
        rows = windows[order[step * BATCH : (step + 1) * BATCH]]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        last = order[max(0, steps - 50) * BATCH : steps * BATCH].view(-1, BATCH)
        return sum(model(input_ids=windows[rows], labels=windows[rows]).loss.item() for rows in last) / len(last)


def main() -> None:
    """Make tokenizer and model and write them with a note of how they came to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "base_model")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a trial")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    started = time.perf_counter()

    pieces = corpus()
    digest = hashlib.sha256("\0".join(pieces).encode()).hexdigest()
    tokenizer = make_tokenizer(pieces)
    stream = make_stream(tokenizer, pieces)
    print(f"{len(pieces):,} pieces, {sum(map(len, pieces)):,} characters, {len(stream):,} tokens")

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    loss = train(model, stream, arguments.steps)

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    note = {
        "command": "python demo/make_base_model.py",
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "corpus_sha256": digest,
        "corpus_characters": sum(map(len, pieces)),
        "corpus_tokens": len(stream),
        "tokens_seen": arguments.steps * BATCH * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 4),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    (arguments.output / "training.json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note, indent=2))


if __name__ == "__main__":
    main()
