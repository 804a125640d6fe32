"""The latency table: what is measured, what is left out and why, and from where on sparse attention is faster."""

import copy
import json

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from sparse_mhsa.bench import latency
from sparse_mhsa.bench.latency import bench_latency, crossover
from sparse_mhsa.bench.methods import METHODS, OURS
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
    assert large["methods"]["sdpa"]["status"] == "unsupported"
    assert "B 1, N 50, SDPA: left out: a call would take about" in text


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
    assert forward.keys() < step.keys()
    assert all(step[name] == colour for name, colour in forward.items())
    assert [text.get_text() for text in drawn[0].axes[0].get_xticklabels()] == ["30", "50"]


def test_the_crossover_is_the_size_from_which_on_sparse_is_always_faster():
    def row(tokens, ours, dense):
        times = {OURS: ours, "sdpa": dense}
        methods = {name: {"seconds": {"median": x}} for name, x in times.items() if x is not None}
        return {"kind": "attention", "direction": "forward", "batch": 1, "tokens": tokens, "methods": methods}

    def found(*rows):
        return crossover({"rows": [row(*one) for one in rows]}, "attention", "forward", 1)

    assert found((10, 2.0, 1.0), (20, 1.0, 2.0), (40, 1.0, 3.0)) == 20
    assert found((10, 1.0, 2.0), (20, 3.0, 2.0), (40, 1.0, 3.0)) == 40
    assert found((40, 1.0, None), (20, 1.0, 2.0)) == 20
    assert found((10, 2.0, 1.0)) is None


def test_the_command_names_what_it_cannot_use(capsys):
    assert main(["bench", "latency", "--tokens", "1"]) == 2
    assert "--tokens must be at least 2, got 1" in capsys.readouterr().err
    assert main(["bench", "latency", "--attn-cfg", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert torch.get_num_threads() > 0
