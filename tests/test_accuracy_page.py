"""The committed accuracy table: complete, made from its data, and found from the README."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("matplotlib")

from sparse_mhsa.arguments import read_options
from sparse_mhsa.bench.accuracy_methods import METHODS
from sparse_mhsa.bench.accuracy_report import comma_separated, markdown, web
from sparse_mhsa.cli import build_parser
from sparse_mhsa.config import load_config
from sparse_mhsa.train.page import STYLE
from sparse_mhsa.train.recipes import FinetuneOptions

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "accuracy"
TABLES = [FOLDER / "accuracy.json"] if FOLDER.is_dir() else []


@pytest.fixture(params=TABLES, ids=["committed"] if TABLES else None)
def report(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_page_and_csv_are_made_from_the_data(report):
    assert (FOLDER / "accuracy.md").read_text(encoding="utf-8") == markdown(report)
    assert (FOLDER / "accuracy.csv").read_text(encoding="utf-8") == comma_separated(report)


def test_the_web_page_is_that_of_the_report_and_looks_like_the_others(report):
    """But for the curves, whose text depends on the version of matplotlib."""

    def without_curves(text):
        return re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)

    committed = (FOLDER / "accuracy.html").read_text(encoding="utf-8")
    assert without_curves(committed) == without_curves(web(report))
    assert committed.count("<svg") == 1
    assert "`" not in without_curves(committed)
    assert f"<style>{STYLE}</style>" in committed


def test_what_the_operations_leave_out_is_said_of_the_methods_that_choose_keys_by_content(report):
    note = "top-k by score: the choice of its keys is not among the products counted"
    configs = {row["title"]: row["attention_config"] for row in report["rows"] if row["attention_config"] is not None}
    assert [title for title, config in configs.items() if load_config(config).by_content] == ["top-k by score"]
    assert note in markdown(report)
    report["rows"] = report["rows"][:1]
    assert note not in markdown(report)


def test_the_legend_of_memory_is_what_the_column_shows(report):
    dense = report["rows"][0]["peak_memory"]
    assert f"| {sum(dense) / len(dense) / 2**20:.0f} |\n" in markdown(report)
    assert "peak MiB: mean over the seeds of the largest resident memory" in markdown(report)


def test_one_epoch_is_no_epochs(report):
    report["recipe"]["epochs"] = 1
    assert "1 epoch per run" in markdown(report)


def test_every_method_is_there_with_several_seeds(report):
    assert [row["method"] for row in report["rows"]] == list(METHODS)
    for row in report["rows"]:
        assert len(row["seeds"]) >= 2
        assert len(row["test_acc1"]) == len(row["commands"]) == len(row["seeds"])
        assert (row["attention_config"] is None) == (row["method"] == "dense")
        if row["attention_config"] is not None:
            load_config(row["attention_config"])


def test_dense_attention_learned_something(report):
    dense = report["rows"][0]
    assert min(dense["test_acc1"]) > 3 * 100 / 10


def test_the_commands_are_commands_and_name_no_place_of_a_machine(report):
    parser = build_parser()
    for row in report["rows"]:
        for seed, command in zip(row["seeds"], row["commands"], strict=True):
            program, *words = shlex.split(command)
            assert program == "sparse-mhsa"
            options = read_options(FinetuneOptions, parser.parse_args(words))
            assert options.seed == seed
            assert not options.output_dir.is_absolute()
    assert "/home" not in json.dumps(report)
    assert str(ROOT) not in json.dumps(report)


def test_the_readme_links_the_table_or_says_that_it_is_missing():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ("docs/accuracy/accuracy.md" in text) == bool(TABLES)
    assert ("a committed table of accuracies" in text) != bool(TABLES)
