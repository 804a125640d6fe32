"""The latency table: what is measured, what is left out and why, and from where on sparse attention is faster."""

import copy
import json

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from sparse_mhsa.bench import latency, run
from sparse_mhsa.bench.cases import Case
from sparse_mhsa.bench.latency import COMPARED, bench_latency, crossover
from sparse_mhsa.bench.layer import Layer, layer_inputs
from sparse_mhsa.bench.methods import METHODS, OURS, MaskedSdpa, Problem
from sparse_mhsa.bench.options import LatencyOptions
from sparse_mhsa.cli import main


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    options = LatencyOptions(
        tokens=(50, 30), batches=(1, 2), repeat=3, budget=0.2, limit=1e-9, threads=1, output_dir=folder
    )
    bench_latency(options, "sparse-mhsa bench latency", [method for method in METHODS if method.name != "flex"])
    assert (folder / "latency.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "latency.json").read_text()), (folder / "latency.md").read_text()


def test_every_size_has_attention_and_layers_in_both_passes(report):
    rows = report[0]["rows"]
    keys = {(row["kind"], row["direction"], row["batch"], row["tokens"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        ours = row["methods"][OURS]
        assert ours["status"] == "ok"
        assert 0 < ours["seconds"]["lower_quartile"] <= ours["seconds"]["median"]


def test_what_would_take_too_long_is_left_out_and_says_so(report):
    data, text = report
    (small, large) = (
        row for row in data["rows"] if (row["kind"], row["direction"], row["batch"]) == ("attention", "forward", 1)
    )
    assert (small["tokens"], large["tokens"]) == (30, 50)
    assert small["methods"]["sdpa"]["status"] == "ok"
    assert large["methods"]["sdpa"]["status"] == "left_out"
    assert "B 1, N 50, SDPA: left out: a call would take about" in text
    assert "up to 577 tokens in every query of every sample, above it in 64 queries" in text


def test_a_size_that_does_not_fit_in_memory_is_shown_as_such_before_anything_is_allocated(tmp_path, monkeypatch):
    """Where the system promises more memory than there is, the process would be killed."""
    monkeypatch.setattr(run, "available_memory", lambda: 8 << 20)
    options = LatencyOptions(tokens=(30, 300), batches=(1,), repeat=1, budget=0.1, threads=1, output_dir=tmp_path)
    bench_latency(options, "sparse-mhsa bench latency", [method for method in METHODS if method.name in (OURS, "sdpa")])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        results = row["methods"].values()
        assert {result["status"] for result in results} == {"ok" if row["tokens"] == 30 else "oom"}
        assert row["tokens"] == 30 or all("for inputs, results and what" in result["reason"] for result in results)


def test_what_was_made_for_the_forward_pass_is_not_counted_again(tmp_path, monkeypatch):
    """A row with gradients needs less than twice what one without them does."""
    asked = []
    monkeypatch.setattr(run, "no_room", lambda need: asked.append(need))
    options = LatencyOptions(tokens=(600,), batches=(4,), repeat=1, budget=0.1, threads=1, output_dir=tmp_path)
    bench_latency(options, "sparse-mhsa bench latency", [method for method in METHODS if method.name == OURS])
    forward, gate, step = asked
    one = 4 * 12 * 600 * 64 * 4
    # The output, its gradients for the gate and for timing, and those of q, k and v.
    assert step == 6 * one
    # Inputs and output, but no gradients; the gate has those of one sample in four, in float64, and works by heads.
    assert 4 * one < forward == 4 * one + gate < 7 * one


def test_a_layer_has_the_projections_of_torchs_own_whatever_attends_in_it():
    case = Case("local", {"mask": "local", "mask_kwargs": {"window": 5}}, 30, batch=2, num_heads=3, head_dim=8)
    x, *weights = layer_inputs(case, torch.float64)
    module = torch.nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    own = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    assert [tensor.shape for tensor in own] == [tensor.shape for tensor in weights]
    expected = {
        False: module(x, x, x, need_weights=False)[0],
        True: module(x, x, x, need_weights=False, attn_mask=~case.layer_mask.at(30).to_dense().repeat(2, 1, 1))[0],
    }
    for method in METHODS:
        if method.name in COMPARED and method.name != "flex":
            out = Layer(method.prepare(Problem(case, torch.float64)), 3)(x, *own)
            torch.testing.assert_close(out, expected[method.masked], atol=1e-12, rtol=0)


def test_layers_are_timed_around_every_method_that_was_timed_alone(tmp_path, monkeypatch):
    def extra_memory(*_, whole_layer=False, **__):
        return {"extra_bytes": 5 << 20 if whole_layer else 2 << 20}

    for module in (run, latency):
        monkeypatch.setattr(module, "extra_memory", extra_memory)
    methods = [method for method in METHODS if method.name in COMPARED]
    methods[methods.index(next(method for method in methods if method.name == "flex"))] = ForwardAlone()
    options = LatencyOptions(
        tokens=(30,), batches=(1,), repeat=2, budget=0.1, memory=True, threads=1, output_dir=tmp_path
    )
    bench_latency(options, "sparse-mhsa bench latency", methods)
    rows = {
        (row["kind"], row["direction"]): row["methods"]
        for row in json.loads((tmp_path / "latency.json").read_text())["rows"]
    }
    for direction in ("forward", "step"):
        alone, layer = rows["attention", direction], rows["layer", direction]
        status = {name: one["status"] for name, one in layer.items()}
        assert status == {name: one["status"] for name, one in alone.items()}
        assert set(status) == set(COMPARED)
        assert status.pop("flex") == ("ok" if direction == "forward" else "unsupported")
        assert set(status.values()) == {"ok"}
        assert {layer[name]["extra_bytes"] for name in status} == {5 << 20}
    text = (tmp_path / "latency.md").read_text()
    assert "- layer, forward and backward, B 1, N 30, FlexAttention: has no backward pass on this device" in text


class ForwardAlone(MaskedSdpa):
    """Under the name of FlexAttention, which has no backward pass, what needs no compiler."""

    name, title, backward = "flex", "FlexAttention", False


def failing(name, error):
    """A method of this name whose every call needs more memory than there is, but for the gate's."""
    method = copy.copy(next(method for method in METHODS if method.name == name))
    prepare, calls = method.prepare, []

    def short(problem):
        attend = prepare(problem)

        def call(q, k, v):
            calls.append(None)
            if len(calls) > 1:
                raise error
            return attend(q, k, v)

        return call

    method.prepare = short
    return method


def test_what_runs_out_of_memory_while_it_is_timed_is_a_row_that_says_so(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    methods = [failing("sdpa", error), *(method for method in METHODS if method.name in (OURS, "sdpa_masked"))]

    def forward(layer, inputs):
        raise MemoryError

    monkeypatch.setattr(latency, "forward", forward)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    options = LatencyOptions(tokens=(30,), batches=(1,), repeat=2, budget=0.1, threads=1, output_dir=tmp_path)
    bench_latency(options, "sparse-mhsa bench latency", methods)
    rows = {
        (row["kind"], row["direction"]): row["methods"]
        for row in json.loads((tmp_path / "latency.json").read_text())["rows"]
    }
    assert rows["attention", "forward"]["sdpa"]["status"] == "oom"
    assert "can't allocate memory" in rows["attention", "forward"]["sdpa"]["reason"]
    assert rows["attention", "forward"][OURS]["status"] == rows["attention", "forward"]["sdpa_masked"]["status"] == "ok"
    assert {one["status"] for one in rows["layer", "forward"].values()} == {"oom"}
    # What could not be timed alone is not tried with projections around it.
    step = {name: one["status"] for name, one in rows["layer", "step"].items()}
    assert step == {"sdpa": "oom", OURS: "ok", "sdpa_masked": "ok"}
    table = (tmp_path / "latency.md").read_text()
    assert "| layer | forward | 1 | 30 | out of memory | out of memory | out of memory |" in table
    assert "- layer, forward, B 1, N 30, sparse_mhsa: out of memory" in table
    alone, _, layer, _ = drawn[0].axes
    assert [text.get_text() for text in alone.texts] == ["out of memory"]
    assert [text.get_text() for text in layer.texts] == ["out of memory"] * 3


def test_inputs_that_do_not_fit_are_rows_that_say_so(tmp_path, monkeypatch):
    def inputs(self, dtype):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(latency.Case, "inputs", inputs)
    options = LatencyOptions(tokens=(30,), batches=(1,), repeat=1, budget=0.1, threads=1, output_dir=tmp_path)
    bench_latency(options, "sparse-mhsa bench latency", [method for method in METHODS if method.name != "flex"])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    attention = [row["methods"] for row in rows if row["kind"] == "attention"]
    assert len(attention) == 2
    assert {one["status"] for methods in attention for one in methods.values()} == {"oom"}


def test_a_method_keeps_its_colour_and_the_ticks_are_the_sizes(report, monkeypatch, tmp_path):
    written = copy.deepcopy(report[0])
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for row in written["rows"]:
        if (row["kind"], row["direction"]) == ("attention", "forward"):
            row["methods"]["sdpa"] = {"status": "oom", "reason": "needs more than there is"}
    latency._plot(written, tmp_path / "plot.png")
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in drawn[0].axes]
    forward, step = colours[0], colours[2]
    assert forward
    assert forward == step
    marks = {(text.get_text(), text.get_color()) for text in drawn[0].axes[0].texts}
    assert marks >= {("out of memory", forward["SDPA"])}
    assert [text.get_text() for text in drawn[0].axes[0].get_xticklabels()] == ["30", "50"]


def test_the_crossover_is_the_size_from_which_on_sparse_is_always_faster():
    def row(tokens, ours, dense):
        times = {OURS: ours, "sdpa": dense}
        methods = {name: {"seconds": {"median": x}} for name, x in times.items() if x is not None}
        return {"kind": "attention", "direction": "forward", "batch": 1, "tokens": tokens, "methods": methods}

    def found(*rows):
        return crossover({"rows": [row(*one) for one in rows]}, "attention", "forward", 1)["tokens"]

    assert found((10, 2.0, 1.0), (20, 1.0, 2.0), (40, 1.0, 3.0)) == 20
    assert found((10, 1.0, 2.0), (20, 3.0, 2.0), (40, 1.0, 3.0)) == 40
    assert found((40, 1.0, None), (20, 1.0, 2.0)) == 20
    assert found((10, 2.0, 1.0)) is None


def test_where_nothing_was_compared_there_is_no_crossover_to_name(tmp_path):
    options = LatencyOptions(tokens=(30,), batches=(1,), repeat=1, budget=0.1, threads=1, output_dir=tmp_path)
    bench_latency(options, "sparse-mhsa bench latency", [method for method in METHODS if method.name == OURS])
    text = (tmp_path / "latency.md").read_text()
    assert "attention, forward, batch 1: not measured" in text
    assert "at none" not in text


def test_the_command_names_what_it_cannot_use(capsys):
    assert main(["bench", "latency", "--tokens", "1"]) == 2
    assert "--tokens must be at least 2, got 1" in capsys.readouterr().err
    assert main(["bench", "latency", "--attn-cfg", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert torch.get_num_threads() > 0
