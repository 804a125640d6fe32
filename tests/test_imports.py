"""The direction of data flow, held by the imports: a Rust module may only use what stands after it."""

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
ALLOWED = {
    "python": {"attention", "budget", "config", "pattern", "plan", "kernel", "pool"},
    "attention": {"config", "pattern", "plan", "kernel", "pool"},
    "config": {"pattern"},
    "kernel": {"plan", "pool", "pattern"},
    "plan": {"pattern"},
    "pattern": {"budget", "rng"},
    "budget": set(),
    "pool": set(),
    "rng": set(),
}


def files_of(module):
    single = SOURCE / f"{module}.rs"
    return [single] if single.exists() else sorted((SOURCE / module).rglob("*.rs"))


def production_code(path):
    """The file without its tests, which may use anything."""
    if "tests" in path.parts or path.stem.endswith("tests"):
        return ""
    return path.read_text().split("#[cfg(test)]\nmod ")[0]


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_uses_only_what_stands_below_it(module):
    assert files_of(module), f"src has no module {module}"
    for path in files_of(module):
        used = set(re.findall(r"\bcrate::(\w+)", production_code(path))) - {"error", module}
        assert used <= ALLOWED[module], f"{path.name} uses {sorted(used - ALLOWED[module])}"


def test_every_module_of_the_crate_is_listed():
    modules = set(re.findall(r"^(?:pub )?mod (\w+);", (SOURCE / "lib.rs").read_text(), re.MULTILINE))
    assert modules == {*ALLOWED, "error"}


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
