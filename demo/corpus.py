"""The text the demonstration's base model is trained on: Python's own documentation, and prose written here.

The written prose gives a very small model what a large one picks up from the web: that names are copied letter by
letter, that "twelve" is 12 and "March" is 03, that a question about a sentence is answered from that sentence. It
never holds the task of ``make_data.py``: neither its prompt, nor its sentences, nor its JSON answer with those keys.
"""

from __future__ import annotations

import ast
import pydoc_data.topics
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path


def words(text: str) -> tuple[str, ...]:
    """Return the words of ``text``: long lists are easier to read and to edit without quotation marks."""
    return tuple(text.split())


MONTHS = words("January February March April May June July August September October November December")
SMALL = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
FIRST_NAMES = words(
    "Ada Alice Anna Aron Bela Bruno Carla Cleo Clara Dan Dora Ed Ella Emil Erik Eva Felix Fiona Frank Greta Hana Hugo "
    "Ida Igor Ines Ivan Jack Jana Joan Jon Karl Kate Lara Leo Lina Luis Maria Mark Max Mia Mila Nadia Nina Noah Nora "
    "Olga Omar Oscar Otto Paul Petra Rafa Rosa Ruth Sam Sara Simon Sofia Tara Theo Tim Tom Uma Vera Viktor Yara Zoe"
)
THINGS = words(
    "apples baskets bells belts blankets boats bolts books boots bottles bowls boxes bricks brushes buckets buttons "
    "cables cakes candles caps cards carpets chairs chests clocks coats coins combs cups curtains desks dolls doors "
    "drums eggs fans flags flutes forks frames gates glasses gloves hammers hats hooks horns jackets jars kettles keys "
    "kites knives ladders lamps lemons locks maps masks mats mirrors mugs nails needles nets nuts pans parcels pears "
    "pencils pens pillows pins pipes plates plums pots prints puzzles quilts rakes ribbons rings ropes rugs rulers "
    "saddles saws scarves shelves shirts shoes signs skates socks spades spoons stamps stools stoves tables tents "
    "tiles tools towels toys trays tubes vases violins wheels whistles wires"
)
# Surnames that the corpus never holds, so that a task can ask for names the model has not seen.
RESERVED_SURNAMES = words(
    "Albrecht Ashton Baxter Bishop Bramley Carlson Corbett Crane Darling Dorn Fairley Feldman Fischer Gable Garland "
    "Gruber Hadley Hansen Hobbs Ingram Jarvis Jordan Kessler Lambert Lester Lockwood Marlow Merkel Nash Naylor Oakley "
    "Perkins Pollard Raven Redman Rowland Sattler Sherman Stadler Stroud Talbot Thorne Ullman Vickers Wendell Whitman "
    "Winkler Yates Zeller Zorn"
)
ONSETS = words("b br c ch d dr f fl g gr h j k kl l m n p pr r s sch st t th tr v w z")
VOWELS = words("a e i o u ai au ea ei ee ie oo ou")
CODAS = ["", "", "", *words("b ck d g ll lt m n nd ng nt p r rd rg rn rt s ss st t tz x")]
ENDINGS = words("a e o y er ers en in ini man mann son sen ska ton ville well wood ford ley ard ov")


def documentation() -> Iterator[str]:
    """Yield the language reference's topics and every docstring of the standard library, in a fixed order."""
    for name in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[name].strip()
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the signature and docstring of each function and class of one file, and the module's docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text or len(text) < 40:
            continue
        if isinstance(node, ast.FunctionDef):
            text = f"def {node.name}({ast.unparse(node.args)}):\n{textwrap.indent(text, '    ')}"
        elif isinstance(node, ast.ClassDef):
            text = f"class {node.name}:\n{textwrap.indent(text, '    ')}"
        yield text


def surname(rng: random.Random) -> str:
    """Return an invented surname, such as "Draunders" or "Kemp": there are far too many to know by heart."""
    middle = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    tail = rng.choice((rng.choice(ENDINGS), rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS), ""))
    return (middle + tail).capitalize()


def person(rng: random.Random) -> str:
    """Return a first name and an invented surname."""
    return f"{rng.choice(FIRST_NAMES)} {surname(rng)}"


def ordinal(day: int) -> str:
    """Return 1st, 2nd, 3rd, 4th …"""
    return f"{day}{'th' if 10 <= day % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def amount(rng: random.Random) -> tuple[str, int]:
    """Return a number as prose has it, in words or in figures, and the number."""
    if rng.random() < 0.5:
        number = rng.randint(2, 20)
        return SMALL[number - 1], number
    number = rng.randint(2, 999)
    return str(number), number


def spoken_date(rng: random.Random, year: int, month: int, day: int) -> str:
    """Return one of the ways in which a date is written in prose."""
    name = MONTHS[month - 1]
    return rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"the {ordinal(day)} of {name}, {year}",
            f"the {ordinal(day)} of {name} {year}",
            f"{name} {ordinal(day)}, {year}",
        )
    )


def _date(rng: random.Random) -> tuple[str, int, int, int]:
    year, month, day = rng.randint(1900, 2059), rng.randint(1, 12), rng.randint(1, 28)
    return spoken_date(rng, year, month, day), year, month, day


def _calendar(rng: random.Random) -> str:
    """Dates in words and in figures (with slashes or dots, never the form that the task asks for)."""
    lines = []
    for _ in range(rng.randint(2, 6)):
        said, year, month, day = _date(rng)
        lines.append(
            rng.choice(
                (
                    f"{said} is {year}/{month:02}/{day:02} for short.",
                    f"{year}/{month:02}/{day:02} was {said}.",
                    f"{said}: year {year}, month {month:02}, day {day:02}.",
                    f"{MONTHS[month - 1]} is month {month:02}.",
                    f"In figures {said} reads {day:02}.{month:02}.{year}.",
                )
            )
        )
    return "\n".join(lines)


def _counting(rng: random.Random) -> str:
    """Numbers in words and in figures."""
    numbers = rng.sample(range(1, 21), rng.randint(3, 8))
    shape = rng.choice(("{w} is {n}", "{n} is {w}", "{w} = {n}", "{n} in words: {w}"))
    return "; ".join(shape.format(w=SMALL[n - 1], n=n) for n in numbers) + "."


def _story(rng: random.Random) -> str:
    """One or two things that happened, then questions about them, answered."""
    lines, questions = [], []
    for thing in rng.sample(THINGS, rng.choice((1, 1, 2))):
        who, other, (many, number) = person(rng), person(rng), amount(rng)
        said, year, month, day = _date(rng)
        verb = rng.choice(("gave", "sent", "lent", "sold", "showed", "threw", "brought"))
        lines.append(
            rng.choice(
                (
                    f"{who} {verb} {other} {many} {thing} in the spring; that was {said}.",
                    f"It was {said} when {who} {verb} {many} {thing} to {other}.",
                    f"The {thing} that {who} {verb} {other}, {many} of them, were new. The day was {said}.",
                    f"{other} thanked {who} for {many} {thing}. {said[0].upper()}{said[1:]} was a fine day.",
                )
            )
        )
        questions += [
            f"Whose {thing} were they? {who}'s.",
            f"Who got the {thing}? {other}.",
            f"How many {thing}? {number}.",
            f"When, with the {thing}? {year}/{month:02}/{day:02}.",
            f"What did {who} part with? {thing.capitalize()}.",
        ]
    rng.shuffle(questions)
    return " ".join(lines) + "\n" + "\n".join(questions)


def _summary(rng: random.Random) -> str:
    """A sentence, then the same in note form: which parts are told, and under which words, changes every time."""
    who, (many, number), thing = person(rng), amount(rng), rng.choice(THINGS)
    said, year, month, day = _date(rng)
    sentence = rng.choice(
        (
            f"{who} counted {many} {thing} at the harbour, {said}.",
            f"We heard of {many} {thing} that {who} had lost. That was {said}.",
            f"In the diary of {who} for {said} there are {many} {thing}.",
            f"{said[0].upper()}{said[1:]}! {many} {thing} fell off the cart, and {who} laughed.",
            f"There stood {who} with {many} {thing}, as the page of {said} tells.",
        )
    )
    facts = [
        f"{rng.choice(('who', 'person', 'by', 'seen'))}{{0}}{who}",
        f"{rng.choice(('what', 'thing', 'goods'))}{{0}}{thing}",
        f"{rng.choice(('how many', 'number', 'pieces'))}{{0}}{number}",
        f"{rng.choice(('when', 'day', 'time'))}{{0}}{year}/{month:02}/{day:02}",
    ]
    rng.shuffle(facts)
    equals, comma = rng.choice(((": ", "\n"), (" = ", ", "), (" is ", "; ")))
    return f"{sentence} {rng.choice(('In short', 'That is', 'Told again'))}:\n" + comma.join(
        fact.format(equals) for fact in facts[: rng.randint(2, 4)]
    )


def _roll_call(rng: random.Random) -> str:
    """Names with a number each, then asked for again, and literals as Python would print them."""
    pairs = [(person(rng), rng.randint(2, 999), rng.choice(THINGS)) for _ in range(rng.randint(2, 4))]
    told = ", ".join(f"{name} ({number} {thing})" for name, number, thing in pairs)
    rng.shuffle(pairs)
    if rng.random() < 0.5:
        asked = "\n".join(f"{name.split()[1]}: {name} has {number} {thing}" for name, number, thing in pairs)
    else:
        asked = "\n".join(f'{{"{thing}": "{name}", "{name.split()[1]}": {number}}}' for name, number, thing in pairs)
    return f"Present are {told}.\n{asked}"


WRITERS = (_calendar, _counting, _story, _story, _story, _summary, _summary, _summary, _roll_call, _roll_call)


def written(rng: random.Random, characters: int) -> Iterator[str]:
    """Yield pieces of invented prose until about ``characters`` characters are written."""
    while characters > 0:
        piece = rng.choice(WRITERS)(rng)
        characters -= len(piece)
        yield piece
