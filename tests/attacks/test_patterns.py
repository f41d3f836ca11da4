"""Patterns and names of a configuration mean what PEFT lets them mean, and are matched in bounded time."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import pytest
from costs import SECONDS, bounded, ending
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import lorica
from lorica.config import expressions
from lorica.config.expressions import FORMS, Clock
from lorica.errors import ConfigError, LoricaError
from lorica.targets import match
from lorica.targets.match import Values, entry_matches, idle_entries, meaning, pattern_value
from models import mlp

T = TypeVar("T")

#: Each takes ``re`` longer than anybody waits for, on the names of a small network.
CATASTROPHES = [
    r"(\w|.|[a-z])*z",
    r"(?i)(\w|.|[a-z])*Z",
    r"(l|i|n|li|in|ni|lin|[_z.]|\w)*z",
    r"((\w|.)+)+z",
    r"(?=(\w|.|[a-z])*z$)z.*",
    r"(\w?|.?|[a-z]?){60}z",
    r"(\w|.|[a-z])" * 39 + "z",
]
#: Of these ``regex`` knows at once that they mean none of the names; ``re`` does not.
SLOW_FOR_RE = [r"(x+x+)+y", r".*[a-z]*" * 10 + "z", r"\w?.?" * 40 + "z", r"((z)?(l|i|n|[a-z])?)*\2z"]
#: Each becomes huge when it is compiled, by ``re`` or by ``regex``.
BOMBS = [
    "((a{1,9999}){1,9999}){1,9999}",
    "a{4294967294}",
    "(?:a{65535}){65535}",
    "(?:" * 4 + "a" + "{1000})" * 4 + "{1000}",
    "a{1000}" * 500,
    "(?i)" + r"[\0-\U0010ffff]" * 200,
    r"[\0-\U0010ffff]" * 200,
    "(?i)" + "[\u0100-\uffff]" * 300,
    "(" * 2000 + "a" + ")" * 2000,
    "(?:" * 1300 + "a" + ")" * 1300,
    "(" * 5000,
    "a|" * 30_000,
    "a?" * 60_000,
]


@pytest.fixture(autouse=True)
def _alarm():
    """End a match that nothing else would end: ``re`` and ``regex`` look for signals."""
    with ending(100):
        yield


def within(run: Callable[[], T], seconds: float = SECONDS) -> T:
    """Return what it returns, and fail where it takes longer, or 200 MB."""
    result, excess = bounded(run, seconds)
    assert not excess, excess
    return result


def refused(run: Callable[[], object], says: str | None = None) -> LoricaError:
    """Return the error of what is refused, in a second and 200 MB."""

    def refuse() -> LoricaError:
        with pytest.raises(LoricaError, match=says) as caught:
            run()
        return caught.value

    return within(refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter on the disk."""
    folder = tmp_path_factory.mktemp("adapter")
    lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0", "lin1"])).save_pretrained(folder)
    return folder


def _state(model) -> tuple[object, ...]:
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.data_ptr(), p.requires_grad, p._version) for name, p in model.named_parameters()],
        list(model.__dict__),
    )


FIELDS = {
    "target_modules": lambda pattern: {"target_modules": pattern},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "layers_pattern": lambda pattern: {"layers_pattern": [pattern], "layers_to_transform": [0]},
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 4}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 4}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_pattern_of_a_file_is_matched_without_a_bound(field, saved, tmp_path) -> None:
    fields = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    for pattern in [*CATASTROPHES[: None if field == "target_modules" else 1], *SLOW_FOR_RE, *BOMBS]:  # 0.3 s each
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields | FIELDS[field](pattern)))
        base = _with_long_names()
        before = _state(base)
        error = refused(lambda base=base: lorica.PeftModel.from_pretrained(base, tmp_path))
        assert _state(base) == before
        if isinstance(error, ConfigError):  # otherwise it was matched in time, and meant nothing
            assert f"adapter_config.json: LoraConfig.{field}" in str(error)
            assert repr(pattern)[:20] in str(error)
        else:
            assert pattern not in BOMBS


def _with_long_names():
    """The network, in a list of layers whose name gives patterns something to go back over."""
    from torch import nn

    base = nn.Module()
    base.add_module("zlinlinlinlinlinlinlinlinlin_linlinlinlin", nn.ModuleList([mlp()]))
    return base


def test_each_catastrophe_is_one() -> None:
    """So the test above tests something: ``regex`` does not see through them either."""
    name = max((name for name, _ in _with_long_names().named_modules()), key=len)
    for pattern in CATASTROPHES:
        with pytest.raises(ConfigError, match="more than"):
            expressions.matcher("target_modules", pattern, "name")(name, Clock())


@pytest.mark.parametrize(
    ("kind", "pattern"), [("target_modules", "("), ("rank_pattern", "(?i)a"), ("rank_pattern", "a)|(b")]
)
def test_what_is_no_pattern_where_it_is_used_is_refused_when_the_configuration_is_made(kind, pattern) -> None:
    fields = FIELDS[kind](pattern)
    with pytest.raises(ConfigError, match=rf"{kind}.*not a valid regular expression"):
        lorica.LoraConfig(**{"target_modules": ["lin0"], **fields})


def test_all_patterns_of_a_search_share_its_time() -> None:
    """None of these takes long by itself."""
    names = [f"model.layers.{i}.{part}" for i in range(60) for part in ("self_attn.q_proj", "mlp.up_proj")]
    slow = {rf"(?:\w|.|[a-z_]){{9}}[{i % 10}x]{{1}}.{{{i}}}": i + 1 for i in range(20, 320)}
    values = Values(slow, "rank_pattern")
    refused(lambda: [values.of(name, 8, clock) for clock in [Clock()] for name in names * 1000], "rank_pattern")
    loose = Values({f"{'.' * 8}{i:05d}": 1 for i in range(60_000)}, "alpha_pattern")
    others = [f"{'a' * 8}x{i:04d}" for i in range(1000)]
    refused(lambda: [loose.of(name, 8, clock) for clock in [Clock()] for name in others], "alpha_pattern")
    wild = [f"*{'a*' * 40}{i}" for i in range(3000)]
    refused(lambda: list(map(meaning(wild, "exclude_modules"), names * 1000)), "exclude_modules")
    refused(lambda: idle_entries(wild, [name * 5 for name in names * 100]), "target_modules")


ORDINARY = [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|up_proj).*?)",
    r"^(?!.*(?:visual|vision)).*(?:self_attn|mlp|experts).*(?:proj)$",
    r"\w{1,20}\.\w{1,20}\.\w{1,20}\.\w{1,20}\.\w{1,20}\.\w{1,20}\.up_proj",
    "|".join(f"language[a-z_]{{1,20}}{i}" for i in range(60)),
    "|".join(rf"model\.language\.layers\.0\.mlp\.experts\.{i}\.up_proj" for i in range(300)),
]


@pytest.mark.parametrize("pattern", ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_patterns_are_matched_with_the_names_of_large_models(pattern) -> None:
    """A search may take as long as a model is large."""
    names = [f"model.language.layers.{i}.mlp.experts.{j}.up_proj" for i in range(24) for j in range(128)]
    config = lorica.LoraConfig(target_modules=pattern)
    chosen = [name for name, meant in zip(names, map(meaning(config.target_modules), names), strict=True) if meant]
    assert chosen == [name for name in names if re.fullmatch(pattern, name)]


def test_many_patterns_with_something_to_match_are_taken() -> None:
    config = lorica.LoraConfig(rank_pattern={rf"layers\.{i}\.(self_attn|mlp)\..*_proj": i + 1 for i in range(1000)})
    values, clock = Values(config.rank_pattern, "rank_pattern"), Clock()
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(0, 1000, 250)]
    assert [values.of(name, 8, clock) for name in names] == [1, 251, 501, 751]


def test_one_search_shares_its_time_over_calls() -> None:
    with expressions.one_search():
        clock = expressions.clock()
        with expressions.one_search():
            assert expressions.clock() is clock
        clock.left = -1.0
        with pytest.raises(ConfigError, match="more than"):
            meaning(r".*\.q")("a.q")
    assert expressions.clock() is not clock


def _halves(patterns: list[str]) -> dict[str, dict[str, int]]:
    middle = len(patterns) // 2
    return {"rank_pattern": dict.fromkeys(patterns[:middle], 3), "alpha_pattern": dict.fromkeys(patterns[middle:], 3)}


@pytest.mark.parametrize(
    "patterns",
    [
        [f"[a]{i}" for i in range(3500)],
        [f"(?:{'a|' * 90}b{i})" for i in range(400)],
        [f"(?:ab?){{3000}}{i}" for i in range(100)],
        [f"(?i:[\u0100-\uffff]){i}" for i in range(120)],
    ],
    ids=["many", "long", "repeated", "wide"],
)
def test_patterns_of_both_fields_are_counted_together(patterns, saved, tmp_path) -> None:
    """Few enough are taken and compiled, and one of them that is slow is refused; more are refused."""
    fields = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())

    def load() -> object:
        return lorica.PeftModel.from_pretrained(_with_long_names(), tmp_path)

    for some, says in (
        (patterns, "as much work as"),
        ([*patterns[: len(patterns) // 2], CATASTROPHES[0]], "more than"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields | _halves(some)))
        error = refused(load, says)
        assert "adapter_config.json: LoraConfig.alpha_pattern=" in str(error)


def test_what_two_fields_share_counts_once() -> None:
    same = {rf"layers\.{i}\.(self_attn|mlp)\..*_proj": i + 1 for i in range(1000)}
    assert lorica.LoraConfig(rank_pattern=same, alpha_pattern=same).alpha_pattern == same


def test_a_machine_that_is_slow_or_busy_takes_what_a_quick_one_takes(monkeypatch) -> None:
    """Whether patterns are too many to be compiled is counted; what a thread waits is not what matching takes."""
    wall = [0.0]

    def tick() -> float:
        wall[0] += 2.0
        return wall[0]

    slow = SimpleNamespace(perf_counter=tick, thread_time=lambda: 0.0)  # it only waits
    for module in (expressions, match):
        monkeypatch.setattr(module, "time", slow)
    config = lorica.LoraConfig(rank_pattern={rf"layers\.{i}\.(self_attn|mlp)\..*_proj": i + 1 for i in range(900)})
    values, clock = Values(config.rank_pattern, "rank_pattern"), Clock()
    assert values.of("model.layers.7.mlp.up_proj", 8, clock) == 8
    monkeypatch.setattr(slow, "thread_time", lambda: wall[0])  # and now it works
    with pytest.raises(ConfigError, match="more than"):
        [values.of("model.layers.7.mlp.up_proj", 8, clock) for _ in range(10_000)]


def test_more_names_than_a_model_has_cost_little() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(32) for j in range(64)]

    def search() -> None:
        values, clock = Values({name: i + 1 for i, name in enumerate(names)}, "rank_pattern"), Clock()
        assert [values.of(f"base.{name}", 8, clock) for name in names] == list(range(1, len(names) + 1))
        meant = meaning([f"x{i}" for i in range(200_000)] + names[:1])
        assert sum(map(meant, names)) == 1

    within(search)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_file_full_of_patterns_costs_little(field, saved, tmp_path) -> None:
    """As many as the largest mixture of experts has layers are read, in any form; more are refused."""
    fields = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())

    def load() -> object:
        return lorica.PeftModel.from_pretrained(mlp(), tmp_path)

    for form, count in (("n{}.x", 60_000), (r"^n\.{}", 60_000), ("....{:06d}", 60_000), ("n{}", 200_000)):
        changed = fields | {field: {form.format(i): 1 for i in range(count)}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        if count == 60_000:
            within(load)
        else:
            refused(load, rf"{field}: 200,000 entries")


def test_plain_names_are_never_compiled(monkeypatch) -> None:
    monkeypatch.setattr(expressions, "_compiled", lambda _: pytest.fail("a name was taken for a pattern"))
    config = lorica.LoraConfig(
        target_modules=["lin0", "*lin1"],
        exclude_modules="lin2",
        modules_to_save=["out"],
        rank_pattern={"lin0": 2, r"^model\.lin_1": 3, "a.b-c": 4},
        layers_to_transform=[0],
    )
    assert meaning(config.target_modules)("x.lin0")
    assert pattern_value(config.rank_pattern, "model.lin_1", 8) == 3


# ---- the meaning is that of ``re`` -----------------------------------------------------------------------------------

_NAMES = st.text("ab.1_", min_size=1, max_size=12)
_ATOMS = st.sampled_from(
    [
        *("a", "b", "1", "_", ".", r"\.", r"\d", r"\w", r"\W", r"\S", "[ab]", "[^a.]", "[a-b1]", r"[\d.]", "[]a]"),
        *("[^]a]", "^", "$", r"\b", "{", "}", "{a}", "{b<=1}", "a{e}", "{,}", r"\{", "[[]", "[[:alpha:]b]", "(?:)"),
        *(r"\Z", "-"),
    ]
)
_REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}", "{1,}", "{1,2}?"])
_PATTERNS = st.recursive(
    st.lists(st.tuples(_ATOMS, _REPEATS).map("".join), min_size=1, max_size=4).map("".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["({})", "(?:{})", "(?={})", "(?!{})", "({})?", "(?:{})*", r"({})\1"]), inner).map(
            lambda pair: pair[0].replace("{}", pair[1])
        ),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(_PATTERNS, _NAMES, st.sampled_from(sorted(FORMS)))
def test_patterns_mean_what_they_mean_to_re(pattern, name, form) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re warns of [[
        try:
            re.compile(pattern)
            reference = re.compile(FORMS[form].replace("{}", pattern))
        except re.error:
            with pytest.raises(ConfigError):
                expressions.check("target_modules", pattern, form)
            return
        expressions.check("target_modules", pattern, form)
        found = expressions.matcher("target_modules", pattern, form)(name, Clock())
    wanted = reference.fullmatch(name) if form == "name" else reference.match(name)
    assert (found is None) == (wanted is None)
    if form == "layers" and wanted is not None:
        assert found["layer"] == wanted["layer"]


_PLAIN = st.lists(st.sampled_from(["a", "b", ".", r"\.", r"\-", "-", "1"]), min_size=1, max_size=6).map("".join)
_RANKS = st.lists(
    st.one_of(_PLAIN, _PLAIN.map("^{}".format), st.sampled_from([".*a", "a|b", "[ab]", r"a\d?"])), max_size=6
)


@settings(max_examples=400, deadline=None)
@given(_RANKS, st.text("ab.1-", min_size=1, max_size=9))
def test_the_first_pattern_counts_however_it_is_found(patterns, name) -> None:
    table = {pattern: place for place, pattern in enumerate(patterns)}
    found = [value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    assert pattern_value(table, name, -1) == (found[0] if found else -1)


@settings(max_examples=300, deadline=None)
@given(st.text("ab.*", min_size=1, max_size=8).filter(lambda text: "*" in text), st.text("ab.", min_size=1, max_size=8))
@example("*a*a*", "a")
@example("a*a", "a")
@example("*ab*b", "ab")
def test_wildcards_mean_anything_between(wildcard, name) -> None:
    assert entry_matches(wildcard, name) == bool(re.fullmatch(".*".join(map(re.escape, wildcard.split("*"))), name))
    assume("*" in wildcard)
    assert meaning([wildcard])(name) == entry_matches(wildcard, name)


@given(st.text(max_size=40), st.sampled_from(sorted(FORMS)))
def test_anything_is_a_pattern_or_a_readable_error(text, form) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expressions.check("target_modules", text, form)
        except ConfigError:
            return
    expressions.matcher("target_modules", text, form)("model.layers.0.q_proj", Clock())
