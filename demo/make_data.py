"""Write the demonstration's task: ``python demo/make_data.py`` writes ``demo/data/train.jsonl`` and ``test.jsonl``.

Each example is an order note in free words; the answer is the same order as a JSON record. Nothing can be known by
heart: the dates of the test notes occur in no training note, and the orders are drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import date, timedelta
from pathlib import Path

from corpus import FIRST_NAMES, THINGS, amount, spoken_date

HERE = Path(__file__).resolve().parent
SEED = 7
TRAIN, TEST = 4000, 200
FIRST_DAY, DAYS = date(1990, 1, 1), 14_600  # forty years
EVERY = 8  # one day in eight belongs to the test notes

NOTES = (
    "{customer} ordered {many} {item} on {day}.",
    "On {day}, {customer} ordered {many} {item}.",
    "An order for {many} {item} came in from {customer} on {day}.",
    "{many} {item} for {customer}, ordered on {day}.",
    "We delivered {many} {item} to {customer} on {day}.",
    "{customer} called on {day} and asked for {many} {item}.",
    "Please pack {many} {item} for {customer}, to be shipped on {day}.",
    "New order, {day}: {customer} wants {many} {item}.",
    "{customer} would like {many} {item}, please, no later than {day}.",
    "{many} {item} left the warehouse on {day}, addressed to {customer}.",
)
REMARKS = (
    "The bill is paid.",
    "Payment is due in 30 days.",
    "The bill has number {number}.",
    "Send it by post.",
    "It weighs {number} kilograms.",
    "A gift, please wrap it.",
)


def make(rng: random.Random, *, test: bool) -> dict[str, str]:
    """Return one note and its record; ``test`` chooses which days may occur."""
    while True:
        number = rng.randrange(DAYS)
        if (number % EVERY == 0) == test:
            break
    day = FIRST_DAY + timedelta(number)
    customer, item = rng.choice(FIRST_NAMES), rng.choice(THINGS)
    many, quantity = amount(rng)
    said = spoken_date(rng, day.year, day.month, day.day)
    note = rng.choice(NOTES).format(customer=customer, many=many, item=item, day=said)
    note = note[0].upper() + note[1:]
    if rng.random() < 0.4:
        note += " " + rng.choice(REMARKS).format(number=rng.randint(2, 9999))
    record = {"customer": customer, "item": item, "quantity": quantity, "date": day.isoformat()}
    return {"prompt": f"Note: {note}\nRecord:\n", "completion": json.dumps(record)}


def write(path: Path, examples: list[dict[str, str]]) -> None:
    """Write one example per line."""
    path.write_bytes("".join(json.dumps(example) + "\n" for example in examples).encode())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "data")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, count, test in (("train", TRAIN, False), ("test", TEST, True)):
        rng = random.Random(f"{SEED} {name}")
        write(output / f"{name}.jsonl", [make(rng, test=test) for _ in range(count)])


if __name__ == "__main__":
    main()
