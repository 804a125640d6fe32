"""Taking heads away, and what masks look like from the outside."""

import itertools
import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import sparse_mhsa as sm
from sparse_mhsa.cli import main
from sparse_mhsa.train import UsageError, figures
from sparse_mhsa.train.ablate import ablate_heads, recipe_of
from sparse_mhsa.train.checkpoint import read_checkpoint
from sparse_mhsa.train.engine import LAST, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.recipes import AblationOptions
from sparse_mhsa.train.structure import hops, mask_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from sparse_mhsa.train.recipes import FinetuneOptions

    folder = tmp_path_factory.mktemp("trained")
    (folder / "local.yaml").write_text("mask: local\nmask_kwargs: {window: 2}\nnum_prefix_tokens: 1\n")
    run = finetune(
        FinetuneOptions(
            dataset="digits",
            epochs=2,
            batch_size=64,
            lr=3e-3,
            patch_size=2,
            drop_path=0.0,
            attn_cfg=folder / "local.yaml",
            output_dir=folder,
        )
    )
    return folder, run


@pytest.fixture(scope="module")
def ablated(trained):
    folder, _ = trained
    options = AblationOptions(checkpoint=folder / LAST, per_layer=True, output_dir=folder / "heads", progress="off")
    return ablate_heads(options, "sparse-mhsa ablate heads")


def test_a_head_is_worth_what_the_model_loses_when_its_output_is_zero(trained, ablated):
    _, run = trained
    assert ablated["test_acc1"] == run.results["test_acc1"]
    head, handles = 2, []
    for block in run.model.blocks:
        width = block.attn.proj.in_features // 4

        def silence(_, inputs, width=width):
            (x,) = inputs
            x = x.clone()
            x[..., head * width : (head + 1) * width] = 0
            return (x,)

        handles.append(block.attn.proj.register_forward_pre_hook(silence))
    expected = run.trainer.evaluate()["test_acc1"]
    for handle in handles:
        handle.remove()
    assert ablated["heads"][head]["test_acc1"] == expected
    assert ablated["heads"][head]["drop"] == ablated["test_acc1"] - expected
    assert ablated["mean_drop"] == pytest.approx(np.mean([one["drop"] for one in ablated["heads"]]))
    assert np.array(ablated["drop_per_layer"]).shape == (4, 4)
    assert any(one["drop"] != 0 for one in ablated["heads"])


def test_the_weights_come_back(trained, ablated):
    folder, _ = trained
    again = ablate_heads(AblationOptions(checkpoint=folder / LAST, output_dir=folder / "again", progress="off"), "x")
    assert again["heads"] == ablated["heads"]


def test_the_report_shows_drops_overlaps_degrees_and_hops(trained, ablated):
    folder, _ = trained
    written = json.loads((folder / "heads" / "heads.json").read_text())
    assert written == json.loads(json.dumps(ablated))
    assert written["partial"] is False
    page = (folder / "heads" / "heads.html").read_text()
    assert "Stopped before the end" not in page
    assert page.count("<svg") == 1
    assert page.count("<img") == 3
    assert "layer 3 (local): 2; among patches alone: 8" in page


def test_a_folder_that_cannot_be_made_costs_no_test(trained, tmp_path, monkeypatch):
    folder, _ = trained
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: pytest.fail("tested"))
    with pytest.raises(UsageError, match=r"--output-dir: cannot make the folder '.*heads': Not a directory"):
        ablate_heads(AblationOptions(checkpoint=folder / LAST, output_dir=tmp_path / "file" / "heads"), "x")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("tests", "heads", "layers"), [(0, 0, 0), (3, 2, 0), (10, 4, 1)])
def test_what_is_tested_survives_a_signal(trained, ablated, tmp_path, monkeypatch, tests, heads, layers, number):
    """Stopped in the test after the first ``tests``: one of the whole model, four of its heads, four of each layer."""
    folder, _ = trained
    original, left = Trainer.evaluate, tests

    def evaluate(self):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), number)
        left -= 1
        return original(self)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    options = AblationOptions(checkpoint=folder / LAST, per_layer=True, output_dir=tmp_path, progress="off")
    with pytest.raises(KeyboardInterrupt, match=re.escape(str(tmp_path)) if heads else None):
        ablate_heads(options, "x")
    assert (tmp_path / "heads.json").exists() == (tmp_path / "heads.html").exists() == (heads > 0)
    if heads:
        written = json.loads((tmp_path / "heads.json").read_text())
        assert written["partial"] is True
        assert written["heads"] == ablated["heads"][:heads]
        assert written["mean_drop"] == pytest.approx(np.mean([one["drop"] for one in written["heads"]]))
        assert written.get("drop_per_layer", []) == ablated["drop_per_layer"][:layers]
        assert "Stopped before the end" in (tmp_path / "heads.html").read_text()


def test_the_pictures_can_be_read(monkeypatch):
    """Heads are whole numbers, numbers stand out from their field, and the ticks of keys keep apart."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    overlaps = figures.matrices({"layer 0": [[1.0, 0.1], [0.1, 1.0]]}, "head", "head")
    overlaps.draw_without_rendering()
    axes = overlaps.axes[0]
    assert all(tick == round(tick) for tick in (*axes.get_xticks(), *axes.get_yticks()))
    shown = {text.get_text(): text.get_color() for text in axes.texts}
    assert shown == {"1": figures.INK, "0.1": "white"}

    histograms = figures.degree_histograms([{"layer": 0, "degrees": [[(3, 18), (5, 40), (10, 2), (65, 1)]]}])
    histograms.draw_without_rendering()
    axis = histograms.axes[0].xaxis
    assert not axis.get_minorticklabels()
    low, high = histograms.axes[0].get_xlim()
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    assert len(boxes) >= 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert [text.get_text() for text in histograms.axes[0].get_legend().get_texts()] == ["head 0"]


@pytest.mark.parametrize(
    ("config", "expected", "among_patches"),
    [
        ({"mask": "none", "num_prefix_tokens": 1}, 1, 1),
        # 24 patches in a row, three steps a layer: 23 / 3.
        ({"mask": "local", "mask_kwargs": {"window": 3}, "num_prefix_tokens": 1}, 2, 8),
        ({"mask": "block", "mask_kwargs": {"block_size": 4}, "num_prefix_tokens": 1}, 2, None),
        ({"mask": "block", "mask_kwargs": {"block_size": 4}}, None, None),
        ({"mask": "local", "mask_kwargs": {"window": 30, "causal": True}, "num_prefix_tokens": 1}, 2, None),
    ],
    ids=str,
)
def test_hops_are_the_steps_of_the_slowest_message(config, expected, among_patches):
    mask = sm.Mask.from_config(config, 25, 2)
    assert hops(mask) == expected
    assert hops(mask, patches_only=True) == among_patches
    first = mask.num_prefix_tokens
    reach = mask.to_dense().any(0)[first:, first:] | torch.eye(25 - first, dtype=torch.bool)
    power, steps = reach.clone(), 1
    while not power.all() and steps < 30:
        power, steps = (power.float() @ reach.float()) > 0, steps + 1
    assert among_patches == (steps if power.all() else None)


def test_a_record_counts_edges_degrees_and_overlaps():
    mask = sm.Mask.from_config({"mask": "fibottention"}, 50, 4)
    record = mask_record(3, mask)
    dense = mask.to_dense()
    assert record["edges"] == dense.sum((1, 2)).tolist()
    for head in range(4):
        for keys, queries in record["degrees"][head]:
            assert (dense[head].sum(1) == keys).sum() == queries
    both, either = (dense[0] & dense[1]).sum(), (dense[0] | dense[1]).sum()
    assert record["overlap"][0][1] == pytest.approx(float(both / either))


def test_the_recipe_of_a_checkpoint_is_read_back(trained):
    folder, run = trained
    state = read_checkpoint(folder / LAST)
    assert recipe_of(state, folder) == replace(run.options, attn_cfg=None)
    state["args"]["epochs"] = -1
    with pytest.raises(UsageError, match="args: --epochs must be at least 1, got -1"):
        recipe_of(state, folder)


def test_the_command_names_what_is_missing(capsys):
    assert main(["ablate", "heads", "--checkpoint", "nowhere.pth"]) == 2
    assert "--checkpoint: no such file: 'nowhere.pth'" in capsys.readouterr().err


def test_all_heads_together_have_the_accuracy_of_the_log(tmp_path):
    from sparse_mhsa.train.recipes import FinetuneOptions

    (tmp_path / "random.yaml").write_text("mask: random\nmask_kwargs: {k: 2}\n")  # drawn anew in every epoch
    recipe = {"dataset": "digits", "epochs": 2, "batch_size": 128, "patch_size": 2, "lr": 3e-3, "progress": "off"}
    run = finetune(FinetuneOptions(**recipe, attn_cfg=tmp_path / "random.yaml", output_dir=tmp_path / "run"))
    options = AblationOptions(checkpoint=tmp_path / "run" / LAST, output_dir=tmp_path / "heads", progress="off")
    ablated = ablate_heads(options, "sparse-mhsa ablate heads")
    assert ablated["test_acc1"] == run.results["test_acc1"]
    drawn = [record["overlap"] for record in ablated["masks"]]
    assert drawn == [mask_record(layer, block.attn.mask(17))["overlap"] for layer, block in enumerate(run.model.blocks)]


def test_what_only_training_needs_does_not_restrict_the_test(image_root, tmp_path):
    from sparse_mhsa.train.recipes import FinetuneOptions

    few = {"dataset": "imagefolder", "data_path": image_root, "patch_size": 7, "epochs": 1, "progress": "off"}
    finetune(FinetuneOptions(**few, batch_size=4, accum_iter=3, mixup=0.8, output_dir=tmp_path / "run"))
    options = AblationOptions(
        checkpoint=tmp_path / "run" / LAST, batch_size=255, output_dir=tmp_path / "heads", progress="off"
    )
    assert len(ablate_heads(options, "sparse-mhsa ablate heads")["heads"]) == 4
