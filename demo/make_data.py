"""Write the demonstration's task: ``python demo/make_data.py`` writes ``demo/data/train.jsonl`` and ``test.jsonl``.

Each example is an order note in free words; the answer is the same order as a JSON record. Nothing can be known by
heart: the surnames and the dates of the test notes occur in no training note, and the orders are drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import date, timedelta
from pathlib import Path

from corpus import FIRST_NAMES, THINGS, amount, spoken_date, surname, words

HERE = Path(__file__).resolve().parent
SEED = 7
TRAIN, TEST = 4000, 200
FIRST_DAY, DAYS = date(1990, 1, 1), 14_600  # forty years
EVERY = 8  # one day in eight belongs to the test notes

TRAIN_SURNAMES = words(
    "Abel Adler Amsel Arnold Bailey Barker Bauer Becker Bell Berg Binder Blake Bloom Brandt Braun Brook Burton Carter "
    "Castle Chapman Clark Cole Conrad Cooper Craig Dahl Dalton Davies Dean Decker Dietz Dixon Doyle Drake Eaton Ebert "
    "Edwards Ellis Engel Evans Falk Farmer Fenton Fink Fletcher Foster Franke Fuller Gardner Gerber Gibson Glover Graf "
    "Graham Green Grimm Haas Hahn Hale Harper Hart Heller Henry Hoffman Holt Horton Hughes Hunter Huber Iversen "
    "Jansen Jenkins Jensen Johnson Kaiser Kaufman Keller Kelly Kent Kirsch Klein Knight Koch Kramer Krause Lamb Lang "
    "Larsen Lawson Lehmann Lewis Lind Lorenz Ludwig Lynch Maier Marsh Martin Mason Mercer Meyer Miller Moore Moser "
    "Mueller Murray Neumann Nolan Norton Olsen Osborne Otter Owen Palmer Parker Paulsen Peters Pfeiffer Pohl Porter "
    "Price Quinn Ramsey Reed Reuter Richter Riley Ritter Roberts Rogers Roth Russell Sailer Sander Schmidt Schulz "
    "Seidel Shaw Simmons Sommer Spencer Stark Stein Stone Sutton Tanner Taylor Thiel Thomas Turner Ulrich Vance Vogel "
    "Wagner Walker Wallace Walsh Warner Weber Weiss Wells West Wheeler Wilson Winter Wolf Woods Wright Young Zander"
)
TEST_SURNAMES = words(
    "Albrecht Ashton Baxter Bishop Bramley Carlson Corbett Crane Darling Dorn Fairley Feldman Fischer Gable Garland "
    "Gruber Hadley Hansen Hobbs Ingram Jarvis Jordan Kessler Lambert Lester Lockwood Marlow Merkel Nash Naylor Oakley "
    "Perkins Pollard Raven Redman Rowland Sattler Sherman Stadler Stroud Talbot Thorne Ullman Vickers Wendell Whitman "
    "Winkler Yates Zeller Zorn"
)

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


def training_surname(rng: random.Random) -> str:
    """Return a surname that no test note has: one of the list, or an invented one, so that few come twice."""
    name = surname(rng) if rng.random() < 0.7 else rng.choice(TRAIN_SURNAMES)
    return training_surname(rng) if name in TEST_SURNAMES else name


def make(rng: random.Random, *, test: bool) -> dict[str, str]:
    """Return one note and its record; ``test`` chooses which days and surnames may occur."""
    while True:
        number = rng.randrange(DAYS)
        if (number % EVERY == 0) == test:
            break
    day = FIRST_DAY + timedelta(number)
    family = rng.choice(TEST_SURNAMES) if test else training_surname(rng)
    customer, item = f"{rng.choice(FIRST_NAMES)} {family}", rng.choice(THINGS)
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
