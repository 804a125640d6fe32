"""The direction of data flow, held by the imports: a Rust module may only use what stands below it."""

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# What a module may use besides `error` and what is inside itself: modules with all they hold, or single items. The
# rules of `a::b` replace those of `a` for the files in it, and say what it may use of `a` too.
ALLOWED = {
    "python": {"attention", "budget", "config", "pattern", "plan", "kernel", "pool"},
    "attention": {"config", "pattern", "plan", "kernel", "pool"},
    "config": {
        "pattern::registry",
        "pattern::user",
        # What a mask of the registry is, what it is asked, and what it answers.
        "pattern::AnyPattern",
        "pattern::Context",
        "pattern::EdgeCount",
        "pattern::HeadEdges",
        "pattern::head_counts",
        "pattern::head_edges",
        "pattern::edges::EdgeSet",
        "pattern::grid::TokenOrder",
    },
    "plan": {"pattern::edges"},
    "kernel": {"plan::Plan", "pool"},
    # A data type knows the vectors that hold it, and they know it.
    "kernel::element": {"kernel::simd", "kernel::softmax"},
    "kernel::simd": {"kernel::element"},
    "kernel::softmax": {"kernel::simd", "kernel::element"},
    "kernel::cpu": {
        "kernel::simd",
        "kernel::softmax",
        "pool",
        "plan",
        "pattern::edges",
        # What a caller states: the problem, its tensors, and how to run.
        *(
            f"kernel::{item}"
            for item in ("Attention", "Gradients", "MaskedLogits", "NO_KEY", "Run", "Selection", "WeightSums")
        ),
        *(
            f"kernel::{item}"
            for item in ("View", "View4", "decode", "dropout", "element", "selection", "shape", "view")
        ),
    },
    "pattern": {"budget", "rng"},
    "budget": set(),
    "pool": set(),
    "rng": set(),
    "error": set(),
}


def module_of(path):
    """`src/kernel/cpu/mod.rs` and `src/kernel/cpu.rs` are `kernel::cpu`."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return "::".join(parts[:-1] if parts[-1] == "mod" else parts)


def production_code(path):
    """The file without comments, text and its tests, which may use anything."""
    if "tests" in path.parts or path.stem.endswith("tests"):
        return ""
    code = re.split(r"#\[cfg\(test\)\]\s+mod \w+ \{", path.read_text())[0]
    code = re.sub(r"pub\(in [\w:]+\)", "pub", re.sub(r"//.*", "", code))
    return re.sub(r'"(?:\\.|[^"\\])*"', '""', code)


def leaves(tree):
    """`a::{b, c::{d, e}}` as a::b, a::c::d and a::c::e."""
    head, brace, rest = tree.partition("{")
    if not brace:
        return [re.sub(r"\s+as\s+\w+|\s|::self$", "", tree)]
    depth, part, parts = 0, "", []
    for letter in rest[: rest.rindex("}")]:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [leaf for part in [*parts, part] if part.strip() for leaf in leaves(head.strip() + part.strip())]


def used_paths(path):
    """Every path from the root of the crate that a file uses, by `use` or in place."""
    here, code = module_of(path).split("::"), production_code(path)
    uses = re.findall(r"\buse\s+((?:crate|super|self)\b[^;]*);", code)
    in_place = re.findall(r"\b((?:crate|super)(?:::\w+)+)", re.sub(r"\buse\s[^;]*;", "", code))
    found = set()
    for leaf in [leaf for tree in uses for leaf in leaves(tree)] + in_place:
        names, place = leaf.split("::"), list(here)
        while names and names[0] in ("crate", "super", "self"):
            place = [] if names[0] == "crate" else place[:-1] if names[0] == "super" else place
            names = names[1:]
        found.add("::".join([*place, *names]))
    return found


def within(name, module):
    return name == module or name.startswith(f"{module}::")


def rules_of(module):
    """The entry of `ALLOWED` that speaks of a module: the longest that it is in."""
    return max((name for name in ALLOWED if within(module, name)), key=len, default=None)


def offences(path):
    """What a file uses and may not."""
    owner = rules_of(module_of(path))
    allowed = {owner, "error", *ALLOWED[owner]}
    return sorted(used for used in used_paths(path) if not any(within(used, name) for name in allowed))


FILES = sorted(path for path in SOURCE.rglob("*.rs") if path.name != "lib.rs" and production_code(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_uses_only_what_stands_below_it(path):
    assert not offences(path)


def test_every_module_of_the_crate_has_a_rule_and_every_rule_a_use():
    modules = set(re.findall(r"^(?:pub )?mod (\w+);", (SOURCE / "lib.rs").read_text(), re.MULTILINE))
    assert modules == {name for name in ALLOWED if "::" not in name}
    for owner, allowed in ALLOWED.items():
        used = set().union(*(used_paths(path) for path in FILES if rules_of(module_of(path)) == owner))
        idle = {name for name in allowed if not any(within(path, name) for path in used)}
        assert not idle, f"{owner} never uses {sorted(idle)}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use crate::kernel::{Run, view::{self, View}};", {"kernel::Run", "kernel::view", "kernel::view::View"}),
        ("use crate::{plan, pool::Pool as Threads};", {"plan", "pool::Pool"}),
        ("use super::super::simd::Vector;", {"kernel::simd::Vector"}),
        ("pub(super) use super::row;", {"kernel::cpu::row"}),
        ("fn f() { crate::config::Spec::read() } // crate::python\n", {"config::Spec::read"}),
        ('let text = "use crate::python;"; /* no */', set()),
        ("#[cfg(test)]\nmod tests;\nuse crate::rng;\n#[cfg(test)]\nmod inside {\n use crate::config;\n}", {"rng"}),
    ],
)
def test_every_way_to_write_an_import_is_read(text, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    path = tmp_path / "kernel" / "cpu" / "tile.rs"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert used_paths(path) == expected


@pytest.mark.parametrize(
    ("words", "rooms"),
    [
        (r"\b(?:pyo3|numpy|tch)::", ["python"]),
        (r"\bcore::arch\b|\bstd::arch\b", ["kernel/simd"]),
        (r"\bunsafe (?:\{|fn|impl)", ["kernel", "pool.rs", "pool", "python/tensor.rs"]),
        (r"\be?print(?:ln)?!|\bdbg!", []),
    ],
)
def test_words_that_belong_in_certain_rooms_stay_there(words, rooms):
    for path in SOURCE.rglob("*.rs"):
        inside = path.relative_to(SOURCE).as_posix()
        if not any(inside == room or inside.startswith(f"{room}/") for room in rooms):
            assert not re.search(words, production_code(path)), f"{inside} has {words}"
