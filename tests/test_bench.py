"""The benchmark: what it refuses to time, what it writes, which rows it selects. Times themselves are not tested."""

import json
import math
from typing import get_args

import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa import Mask, _core
from sparse_mhsa.bench import choice, decode, memory, run
from sparse_mhsa.bench.cases import Case, all_cases, select
from sparse_mhsa.bench.gate import Gate, WrongResultError
from sparse_mhsa.bench.measure import Spread, interleave, paired_ratio
from sparse_mhsa.bench.memory import footprint
from sparse_mhsa.bench.methods import DENSE, METHODS, OURS, Flex, Method, Problem, Sparse, UnsupportedError
from sparse_mhsa.bench.options import BenchOptions
from sparse_mhsa.bench.run import bench
from sparse_mhsa.cache_policy import PolicyName
from sparse_mhsa.cli import main
from sparse_mhsa.train import UsageError

BY_NAME = {method.name: method for method in METHODS}
COMPILED = {"flex"}
ONE_PREFIX = {"num_prefix_tokens": 1}
TINY = {
    "fibottention": Case("fibottention-26", {"mask": "fibottention"}, 26, 2, num_heads=3, head_dim=8),
    "local": Case("local-20", {"mask": "local", "mask_kwargs": {"window": 2}}, 20, num_heads=2, head_dim=8),
    "pruning": Case(
        "pruning-30",
        {"mask": "pruning", "mask_kwargs": {"keep_ratio": 0.2, "method": "random", "seed": 0}, **ONE_PREFIX},
        30,
        num_heads=3,
        head_dim=8,
    ),
    "none": Case("none-9", {"mask": "none"}, 9, num_heads=2, head_dim=8),
    "topk": Case("topk-40", {"mask": "topk", "mask_kwargs": {"k": 5}}, 40, num_heads=3, head_dim=8),
    "blocks": Case(
        "block_topk-41",
        {"mask": "block_topk", "mask_kwargs": {"k": 2, "block_size": 6}, **ONE_PREFIX},
        41,
        num_heads=3,
        head_dim=8,
    ),
    "importance": Case("importance-40", {"mask": "importance", "mask_kwargs": {"k": 5}}, 40, num_heads=3, head_dim=8),
    "estimated": Case(
        "vertical_slash-90",
        {
            "mask": "vertical_slash",
            "mask_kwargs": {"num_vertical": 4, "num_slash": 4, "window": 1, "causal": True},
            **ONE_PREFIX,
        },
        90,
        num_heads=3,
        head_dim=8,
    ),
    "sampled": Case("local-700", {"mask": "local", "mask_kwargs": {"window": 2}}, 700, num_heads=1, head_dim=8),
}

LINFORMER = {"max_seq_len": 20, "r": 4, "num_heads": 3}
WITHOUT_EDGES = {
    "efficient": Case("efficient-20", {"backend": "efficient"}, 20, 2, num_heads=3, head_dim=8),
    "efficient_local": Case("efficient_local-20", {"backend": "efficient_local"}, 20, 2, num_heads=3, head_dim=8),
    "linformer": Case(
        "linformer-20",
        {"backend": "linformer", "backend_kwargs": {"projector": LINFORMER}},
        20,
        2,
        num_heads=3,
        head_dim=8,
    ),
}


def problem(name, dtype=torch.float32):
    return Problem(TINY[name], dtype)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The problems are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The gate.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in COMPILED])
def test_every_method_computes_attention_over_the_edges(name, case, dtype):
    method, one = BY_NAME[name], problem(case, dtype)
    if name == "torch_sparse" and dtype is torch.bfloat16:
        with pytest.raises(UnsupportedError, match="no bfloat16 kernels"):
            method.prepare(one)
        return
    attend = method.prepare(one)
    gate = Gate(one, masked=method.masked, stepwise=method.stepwise)
    gate.check(attend, backward=False)
    gate.check(attend, backward=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_computes_attention_over_the_edges():
    one = problem("local")
    Gate(one, masked=True).check(Flex().prepare(one), backward=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_flex_attention_is_compiled_for_every_mask_however_many_came_before():
    """Beyond torch's limit of kernels it would go on as plain Python, which makes all scores, and be timed so."""
    flex = Flex()
    flex.block_sizes = (64,)
    with torch._dynamo.config.patch(recompile_limit=1):
        for name in ("local", "fibottention"):
            one = problem(name)
            Gate(one, masked=True).check(flex.prepare(one), backward=False)


class Wrong(Method):
    """Our attention, spoiled."""

    name, title = OURS, "wrong"

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, problem):
        attend = Sparse().prepare(problem)
        return lambda q, k, v: self.spoil(attend, q, k, v)


def one_row_off(attend, q, k, v):
    out = attend(q, k, v).clone()
    out[:, :, -1] += 1e-3
    return out


def backward_off(attend, q, k, v):
    """The right output with a gradient that is 0.1 % too large."""
    out = attend(q, k, v)
    return out.detach() + 1.001 * (out - out.detach())


SPOILED = {
    "scaled": (lambda attend, q, k, v: 1.0001 * attend(q, k, v), "out"),
    "one row": (one_row_off, "out"),
    "NaN": (lambda attend, q, k, v: attend(q, k, v) * math.nan, "out"),
    "no mask": (lambda attend, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), "out"),
    "keys swapped": (lambda attend, q, k, v: attend(q, k.flip(2), v.flip(2)), "out"),
    "backward": (backward_off, "d[qkv]"),
}


@pytest.mark.parametrize("case", ["local", "sampled"])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_wrong_kernel_does_not_pass(spoiled, case):
    one = problem(case)
    spoil, where = SPOILED[spoiled]
    with pytest.raises(WrongResultError, match=rf"^{where} differs by .*, allowed are "):
        Gate(one, masked=True).check(Wrong(spoil).prepare(one), backward=True)


def test_a_wrong_kernel_is_printed_as_failed_without_a_speed_and_ends_the_command_with_1(tmp_path, monkeypatch):
    wrong = Wrong(SPOILED["scaled"][0])
    monkeypatch.setattr(run, "all_cases", lambda: [TINY["local"]])
    options = BenchOptions(repeat=1, memory=False, plots=False, output_dir=tmp_path)
    assert bench(options, "command", [wrong, BY_NAME[DENSE]]) == 1
    report = json.loads((tmp_path / "kernels.json").read_text())
    for row in report["rows"]:
        result = row["methods"][OURS]
        assert result.keys() == {"status", "reason"}
        assert result["status"] == "failed"
        assert "speedup_of_ours" not in row["methods"][DENSE]
    page = (tmp_path / "kernels.md").read_text()
    assert "| local-20 | forward | 23.50% | FAILED |" in page
    assert "differs by" in page
    assert "above it in 64 queries of every sample and in those gradients" in page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITHOUT_EDGES)
def test_attention_without_edges_is_its_formula(name, dtype):
    one = Problem(WITHOUT_EDGES[name], dtype)
    gate = Gate(one, masked=True)
    gate.check(Sparse().prepare(one), backward=False)
    gate.check(Sparse().prepare(one), backward=True)
    with pytest.raises(WrongResultError):
        gate.check(torch.nn.functional.scaled_dot_product_attention, backward=False)


@pytest.mark.parametrize("name", ["topk", "blocks", "importance", "estimated"])
def test_a_wrong_choice_does_not_pass_even_if_attention_over_it_is_right(name, monkeypatch):
    one = problem(name)
    wrong = one.mask.to_dense().roll(1, dims=-1)
    vars(one)["mask"] = Mask.from_dense(wrong, num_prefix_tokens=one.mask.num_prefix_tokens)
    vars(one)["mask"]._name = one.case.layer_mask.name
    with pytest.raises(WrongResultError, match=r"the choice differs from its definition in \d+ of \d+ edges"):
        Gate(one, masked=True)


def test_the_choice_is_timed_beside_attention_and_methods_without_meaning_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "all_cases", lambda: [TINY["estimated"], WITHOUT_EDGES["linformer"]])
    options = BenchOptions(repeat=2, memory=False, plots=False, output_dir=tmp_path)
    assert bench(options, "command", [BY_NAME[name] for name in (OURS, DENSE, "sdpa_masked")]) == 0
    chosen, _, linear, _ = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    choice = chosen["methods"][OURS]["choice"]
    assert choice["seconds"]["median"] > 0
    assert choice["over_qkt"]["median"] > 0
    assert chosen["methods"]["sdpa_masked"]["status"] == "ok"
    assert linear["edges"] is None
    assert "choice" not in linear["methods"][OURS]
    assert linear["methods"][DENSE]["status"] == "ok"
    assert "which `linformer` does not have" in linear["methods"]["sdpa_masked"]["reason"]
    page = (tmp_path / "kernels.md").read_text()
    assert len({line.count("|") for line in page.splitlines() if line.startswith("| ")}) == 1
    assert "| linformer-20 | forward | no edges |" in page


# What is not timed.


class Raises(Method):
    """A method that fails in some other way."""

    name, title = "raises", "raises"

    def __init__(self, error, bytes_needed=0):
        self.error, self.bytes_needed = error, bytes_needed

    def memory(self, problem, *, backward):
        return self.bytes_needed

    def prepare(self, problem):
        raise self.error


@pytest.mark.parametrize(
    ("method", "status", "reason"),
    [
        (Raises(UnsupportedError("no such thing")), "unsupported", "no such thing"),
        (Raises(RuntimeError("no compiler\nfound")), "unsupported", "no compiler found"),
        (Raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")), "oom", "allocate"),
        (Raises(MemoryError()), "oom", ""),
        (Raises(ValueError("to_dense: 12 heads x 9 x 9 cells do not fit in memory; use to_csr")), "oom", "fit in"),
        (Raises(None, bytes_needed=1 << 60), "oom", "needs 1073741824.0 GiB or more, "),
    ],
)
def test_a_method_that_cannot_run_is_shown_with_the_reason(method, status, reason):
    result = run.admit(method, problem("local"), {}, {}, backward=False)
    assert result["status"] == status
    assert reason in result["reason"]


def test_our_own_error_is_a_failure_and_not_an_excuse():
    method = Raises(RuntimeError("broken"))
    method.name = OURS
    assert run.admit(method, problem("local"), {}, {}, backward=False)["status"] == "failed"


def test_a_method_without_a_backward_pass_is_timed_forward_only():
    assert run.admit(Flex(), problem("local"), {}, {}, backward=True)["status"] == "unsupported"


# Timing.


def test_calls_take_turns_and_every_turn_starts_with_another():
    order = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "abc"}, repeat=4, budget=100.0).seconds
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up, then four turns
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_slow_call_takes_part_in_fewer_turns(monkeypatch):
    from sparse_mhsa.bench import measure

    lengths = {"fast": 0.001, "slow": 0.3, "endless": 9.0}
    monkeypatch.setattr(measure, "seconds_of", lambda call: lengths[call()])
    seconds = interleave({name: lambda name=name: name for name in lengths}, repeat=10, budget=1.5).seconds
    took_part = {name: sum(value is not None for value in values) for name, values in seconds.items()}
    assert took_part == {"fast": 10, "slow": 5, "endless": 1}


def test_a_call_that_runs_out_of_memory_is_left_out_at_any_turn_and_the_others_go_on():
    def shortly(turns):
        def call():
            done.append(None)
            if len(done) > turns:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        done = []
        return call

    turns = interleave({"at once": shortly(0), "later": shortly(3), "never": shortly(99)}, repeat=5, budget=100.0)
    assert turns.seconds.keys() == {"never"}
    assert len(turns.seconds["never"]) == 5
    assert turns.short.keys() == {"at once", "later"}
    assert turns.short["later"].startswith("out of memory: DefaultCPUAllocator: can't allocate")


def test_a_call_that_fails_otherwise_is_not_taken_for_short_of_memory():
    def call():
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        interleave({"odd": call}, repeat=1, budget=1.0)


def test_the_memory_there_is_ends_at_the_limit_of_the_process(monkeypatch):
    used = memory._resident("VmSize")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (used + (64 << 20), used + (64 << 20)))
    assert 0 < memory.available_memory() <= 64 << 20


@pytest.mark.parametrize(
    ("groups", "root", "limit", "none", "use", "droppable"),
    [
        ("12:memory:/elsewhere\n0::/outer/inner\n", "", "max", "max", "current", "inactive_file"),
        (
            "4:memory:/outer/inner\n1:name=systemd:/\n0::/\n",
            "memory",
            "limit_in_bytes",
            str(2**63 - 4096),
            "usage_in_bytes",
            "total_inactive_file",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_memory_counts_what_a_container_may_use(groups, root, limit, none, use, droppable, tmp_path, monkeypatch):
    """A limit of a control group holds for all in it, but for files that could be dropped from its memory."""
    inner = tmp_path / root / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "group").write_text(groups)
    for folder, most, used in ((inner, none, 5 << 20), (inner.parent, str(9 << 20), 6 << 20)):
        (folder / f"memory.{limit}").write_text(f"{most}\n")
        (folder / f"memory.{use}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{droppable} {1 << 20}\n")
    monkeypatch.setattr(memory, "GROUP", tmp_path / "group")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    assert memory.available_memory() == 4 << 20


def test_without_control_groups_what_the_machine_has_free_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUP", tmp_path / "none")
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 0)
    assert memory.available_memory() > 0


def test_flex_attention_without_memory_is_out_of_memory_and_not_unsupported(monkeypatch):
    def short(*_, **__):
        # The compiler's own words come first, and there are many of them.
        raise RuntimeError(
            f"{'x' * 300} [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(Flex, "_compile", short)
    with pytest.raises(MemoryError, match=r"^xxx"):
        Flex().prepare(problem("local"))


def test_flex_attention_is_let_in_with_no_less_memory_than_it_was_seen_to_take():
    """A byte per pair for the mask, and up to 12.8 more while the block mask is made, whatever the batch."""
    of_one = Flex().memory(Problem(Case("case", {"mask": "none"}, 100, 1), torch.float32), backward=False)
    of_many = Flex().memory(Problem(Case("case", {"mask": "none"}, 100, 8), torch.float32), backward=False)
    assert of_one == of_many >= 13.8 * 12 * 100 * 100


def test_above_some_hundred_tokens_gradients_of_one_sample_are_compared():
    config = {"mask": "local", "mask_kwargs": {"window": 3}}
    few, many = (
        Gate(Problem(Case("case", config, tokens, 3, num_heads=2, head_dim=8), torch.float32), masked=True)
        for tokens in (30, 600)
    )
    assert {(part, len(exact)) for part, exact in few.exact.items()} == {
        ((b, h), 4) for b in range(3) for h in range(2)
    }
    assert {(part, len(exact)) for part, exact in many.exact.items()} == {
        ((b, h), 1 if b else 4) for b in range(3) for h in range(2)
    }
    many.check(
        Sparse().prepare(Problem(Case("case", config, 600, 3, num_heads=2, head_dim=8), torch.float32)), backward=True
    )


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_every_head_of_every_sample_is_compared(sample, head):
    def spoil(attend, q, k, v):
        out = attend(q, k, v).clone()
        out[sample, head, 0] += 1e-3
        return out

    one = Problem(
        Case("case", {"mask": "local", "mask_kwargs": {"window": 3}}, 600, 3, num_heads=2, head_dim=8), torch.float32
    )
    with pytest.raises(WrongResultError, match=r"^out differs by 1"):
        Gate(one, masked=True).check(Wrong(spoil).prepare(one), backward=False)


def test_what_is_compared_takes_no_more_memory_than_what_is_timed():
    """At the largest default size: a row that fits is not shown as out of memory for what it is compared with."""
    one = Problem(Case("case", {"mask": "local", "mask_kwargs": {"window": 3}}, 65537, 8), torch.float32)
    assert Gate.memory(one) < 2 * 8 * 12 * 65537 * 64 * 4


def test_a_method_without_memory_for_what_it_is_compared_with_has_no_speed(monkeypatch):
    monkeypatch.setattr(run, "no_room", lambda need: run.refused("oom", str(need)))
    one, gates = problem("local"), {}
    assert run.admit(Sparse(), one, gates, {}, backward=False) == run.refused("oom", str(Gate.memory(one)))
    assert not gates


def test_ratios_are_those_of_the_same_turn():
    """Other work slows the second turn three times: the ratio does not move."""
    assert paired_ratio([2.0, 6.0, None], [1.0, 3.0, 100.0]) == Spread(2.0, 2.0, 2.0, 2)


# Rows.


def test_the_full_table_has_the_sizes_of_the_targets_and_every_registered_mask():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for name in ("fibottention-197x8", "fibottention-577x2", "fibottention-16385", "local_w512-4096", "none-1025"):
        assert name in names
    masks = {case.layer_mask.name for case in all_cases()}
    assert {entry["name"] for entry in _core.registered_masks()} <= masks
    for name in ("topk-1025", "block_topk-1025", "importance-1025", "vertical_slash_estimated-1025", "neighborhood-197",
                 "neighborhood_k7-1025", "pruning-1025", "pruning_drawn-1025", "efficient-1025",
                 "efficient_local-1025", "linformer-197x8"):  # fmt: skip
        assert name in names
    assert {case.name for case in all_cases() if case.quick} == {
        "fibottention-197x8", "fibottention-1025", "local_w64-1024", "none-197x8"
    }  # fmt: skip


def test_rows_are_selected_by_pattern_and_a_pattern_without_rows_is_an_error():
    assert [case.name for case in select(all_cases(), ["none-1025", "local_w*"], quick=False)] == [
        "local_w64-1024", "local_w64-4096", "local_w256-4096", "local_w512-4096", "none-1025"
    ]  # fmt: skip
    assert select(all_cases(), (), quick=True) == [case for case in all_cases() if case.quick]
    with pytest.raises(UsageError, match="--rows fibo: no such row; there are fibottention-197x8, "):
        select(all_cases(), ["fibo"], quick=False)


# Memory.


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="needs /proc")
@pytest.mark.parametrize("whole_layer", [False, True], ids=["alone", "layer"])
@pytest.mark.parametrize("backward", [False, True])
def test_extra_memory_is_seen_and_belongs_to_one_method(backward, whole_layer):
    """Dense scores of 2 x 1024 x 1024 floats are 8 MiB; the edges of a narrow window are next to nothing."""
    case = Case("local-1024", {"mask": "local", "mask_kwargs": {"window": 2}}, 1024, num_heads=2, head_dim=8)
    ask = {"dtype": torch.float32, "backward": backward, "threads": 1, "whole_layer": whole_layer}
    dense = footprint(case, "reference_masked", **ask)
    assert dense.extra_bytes >= 3 * 2 * 1024 * 1024 * 4
    ours = footprint(case, OURS, **ask)
    assert ours.extra_bytes < 4 << 20
    assert ours.second_call_seconds > 0
    assert ours.mask_seconds > 0


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("config", "of_one_head"),
    [
        # P and dS of the edges of one head, in single precision.
        ({"mask": "fibottention", "num_prefix_tokens": 1}, lambda edges: 8 * edges),
        # Sums of dq, dk and dv of one head.
        ({"mask": "local", "mask_kwargs": {"window": 64}}, lambda _: 3 * 4 * 64 * 4096),
    ],
    ids=["along lines", "by panels"],
)
def test_a_call_takes_little_beside_its_results(config, of_one_head):
    threads, tokens, heads = 2, 4096, 12
    case = Case("case", config, tokens, num_heads=heads)
    mask = Mask.from_config(config, tokens, heads)
    edges = max(mask.degrees(head).sum().item() for head in range(heads))
    ask = {"dtype": torch.float32, "threads": threads}
    lse = 8 * heads * tokens
    assert footprint(case, OURS, backward=False, **ask).extra_bytes - lse <= threads * 1.5e6
    assert footprint(case, OURS, backward=True, **ask).extra_bytes - lse <= threads * of_one_head(edges) + 3e6


# The command.


RESULT = {"status", "seconds", "speedup_over_sdpa", "ns_per_edge", "flops_share"}


def test_the_command_writes_json_markdown_and_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "all_cases", lambda: [TINY["local"], TINY["fibottention"]])
    code = main(
        ["bench", "kernels", "--quick", "--rows", "*", "--repeat", "2", "--threads", "1", "--output-dir", str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert torch.get_num_threads() == 1

    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["schema"] == "sparse_mhsa-bench-1"
    assert report["environment"]["threads"] == 1
    assert report["command"].startswith("sparse-mhsa bench kernels --quick")
    assert report["limits"]["flops"]["float32"] > 0
    assert all(rate > 0 for rate in report["limits"]["bandwidth"].values())
    assert "flex" not in report["methods"]
    rows = report["rows"]
    assert [(row["case"], row["direction"]) for row in rows] == [
        (case, direction) for case in ("local-20", "fibottention-26") for direction in ("forward", "step")
    ]
    # A window of 2 over 20 tokens: 3 + 4 + 16 * 5 + 4 + 3 edges per head, two heads.
    assert rows[0]["edges"] == 2 * 94
    for row in rows:
        assert row["methods"].keys() == report["methods"].keys()
        for name, result in row["methods"].items():
            assert result["status"] == "ok", result
            assert result.keys() >= RESULT
            assert result["seconds"].keys() == {"median", "lower_quartile", "upper_quartile", "repeats"}
            assert ("speedup_of_ours" in result) == (name != OURS)
        ours = row["methods"][OURS]
        assert ours["bandwidth"].keys() == {"compulsory_share", "gather_share"}
        if memory.CLEAR.exists():
            assert {"extra_bytes", "mask_seconds", "first_call_seconds", "second_call_seconds"} <= ours.keys()
        work = row["batch"] * row["edges"]
        assert ours["ns_per_edge"] == pytest.approx(1e9 * ours["seconds"]["median"] / work)

    page = (tmp_path / "kernels.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    for line in table:
        assert line in out
    for direction in ("forward", "step"):
        assert (tmp_path / f"kernels-float32-{direction}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_measured_before_ctrl_c_are_kept(tmp_path, monkeypatch):
    measure_case = run.measure_case

    def interrupted(case, *arguments):
        if case is TINY["none"]:
            raise KeyboardInterrupt
        return measure_case(case, *arguments)

    monkeypatch.setattr(run, "all_cases", lambda: [TINY["local"], TINY["none"]])
    monkeypatch.setattr(run, "measure_case", interrupted)
    options = BenchOptions(repeat=1, memory=False, plots=False, output_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench(options, "command", [BY_NAME[OURS], BY_NAME[DENSE]])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"local-20"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows nothing", "--rows nothing: no such row"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--budget 0", "--budget must be above 0, got 0"),
        ("--threads 0", "--threads: must be at least 1"),
    ],
)
def test_bad_usage_is_named(capsys, tmp_path, words, message):
    assert main(["bench", "kernels", *words.split(), "--output-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# Decoding.


SMALL = decode.DecodeCase(64, 4, 2, 8, batch=2)


def test_the_decode_command_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "all_cases", lambda: [SMALL])
    words = "bench decode --rows * --repeat 2 --threads 1 --dtype float32 bfloat16 --output-dir"
    assert main([*words.split(), str(tmp_path)]) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "decode.json").read_text())
    assert report["schema"] == "sparse_mhsa-bench-decode-1"
    assert [(row["case"], row["dtype"], row["capacity"]) for row in report["rows"]] == [
        ("decode-4q2kv-64x2", dtype, 8) for dtype in ("float32", "bfloat16")
    ]
    for row in report["rows"]:
        assert list(row["methods"]) == [decode.SDPA, decode.FULL, *decode.policies(8)]
        for result in row["methods"].values():
            assert result.keys() == {"status", "seconds", "speedup_over_sdpa"}, result
    page = (tmp_path / "decode.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 3
    out = capsys.readouterr().out
    assert all(line in out for line in table)
    assert len({line.count("|") for line in table}) == 1


def test_a_wrong_decoding_step_is_printed_as_failed_and_ends_the_command_with_1(tmp_path, monkeypatch):
    attend = sm.LayerCache.attend
    monkeypatch.setattr(sm.LayerCache, "attend", lambda *arguments: 1.001 * attend(*arguments))
    monkeypatch.setattr(decode, "decode_attention", lambda *_: torch.zeros(2, 4, 1, 8))
    options = BenchOptions(repeat=1, output_dir=tmp_path)
    assert decode.bench_decode(options, "command", [SMALL]) == 1
    methods = json.loads((tmp_path / "decode.json").read_text())["rows"][0]["methods"]
    assert methods.pop(decode.SDPA)["status"] == "ok"
    assert {result["status"] for result in methods.values()} == {"failed"}
    assert (tmp_path / "decode.md").read_text().count("FAILED") == len(methods)


def test_every_policy_that_forgets_has_a_column():
    assert {"full", *decode.policies(8)} == set(get_args(PolicyName))


class ForgetsAnother(sm.LayerCache):
    """One sink too few: the token that goes is not the one that should."""

    def attend(self, *tokens):
        self.policy = sm.CachePolicy("attention_sinks", 8, sinks=3)
        return super().attend(*tokens)


def test_a_cache_that_forgets_another_token_does_not_pass():
    token = SMALL.make(1, torch.float32, seed=1)
    for kind in (sm.LayerCache, ForgetsAnother):
        cache = kind(decode.policies(8)["attention_sinks"])
        sm.LayerCache.attend(cache, *SMALL.make(8, torch.float32))
        if kind is ForgetsAnother:
            with pytest.raises(WrongResultError, match="sinks differs by"):
                decode.check_step(cache, token, "sinks")
        else:
            decode.check_step(cache, token, "sinks")


# The choice of kernels.


def test_the_choice_command_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "cases", lambda: [TINY["fibottention"], TINY["local"]])
    monkeypatch.setattr(choice, "TOLERATED", math.inf)
    words = "bench choice --rows * --repeat 2 --budget 0.1 --threads 1 --output-dir"
    assert main([*words.split(), str(tmp_path)]) == 0, capsys.readouterr()
    report = json.loads((tmp_path / "choice.json").read_text())
    assert report["schema"] == "sparse_mhsa-bench-choice-1"
    assert [(row["case"], row["direction"]) for row in report["rows"]] == [
        (case, direction) for case in ("fibottention-26", "local-20") for direction in ("forward", "step")
    ]
    for row in report["rows"]:
        assert list(row["methods"]) == [OURS, *choice.KERNELS]
        assert all(result["status"] == "ok" for result in row["methods"].values()), row
        assert row["best"] > 0
        assert set(row["chosen"]) <= set(choice.KERNELS)
    out, page = capsys.readouterr().out, (tmp_path / "choice.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 5
    assert all(line in out for line in table)
    assert len({line.count("|") for line in table}) == 1


def test_a_choice_that_another_kernel_beats_is_named_and_ends_the_command_with_1(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(choice, "TOLERATED", 0.0 + 1e-9)
    options = BenchOptions(repeat=1, budget=0.1, output_dir=tmp_path)
    assert choice.bench_choice(options, "command", [TINY["local"]]) == 1
    assert "WRONG CHOICE local-20 float32 forward: another kernel takes" in caplog.text
    assert (tmp_path / "choice.md").read_text().count("WRONG") == 2


def test_every_registered_mask_with_edges_that_stand_has_a_row():
    masks = {case.layer_mask.name for case in choice.cases()}
    assert masks == {
        entry["name"]
        for entry in _core.registered_masks()
        if not sm.load_config(sm.configs()[entry["name"]]).by_content
    }


def test_afterwards_kernels_are_chosen_again(tmp_path):
    mask = Mask.from_config({"mask": "fibottention"}, 197, 4, head_dim=8)
    before = [head.kernel for head in mask.explain().heads]
    choice.bench_choice(BenchOptions(repeat=1, budget=0.1, output_dir=tmp_path), "command", [TINY["local"]])
    assert [head.kernel for head in mask.explain().heads] == before


def test_a_kernel_that_cannot_compute_every_head_is_left_out():
    problem = Problem(TINY["pruning"], torch.float32)
    with pytest.raises(UnsupportedError, match="does not compute every head"):
        choice.Forced("lines").prepare(problem)
    _core.force_kernel(None)
