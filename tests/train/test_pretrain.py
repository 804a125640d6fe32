"""Masked autoencoding: the model against its definition, public key names, and what a run leaves behind."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa.cli import main
from sparse_mhsa.train import UsageError
from sparse_mhsa.train.checkpoint import read_checkpoint
from sparse_mhsa.train.datasets import digits, photos
from sparse_mhsa.train.engine import BEST, LAST
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.mae import masked_autoencoder, sincos_embedding
from sparse_mhsa.train.models import build_model, load_initial_weights
from sparse_mhsa.train.pretrain import pretrain
from sparse_mhsa.train.recipes import FinetuneOptions, PretrainOptions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "train_utils.json").read_text())


@pytest.fixture
def recipe(tmp_path):
    return PretrainOptions(
        dataset="digits",
        epochs=2,
        batch_size=128,
        lr=3e-3,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
        output_dir=tmp_path / "pretrain",
        progress="off",
    )


def autoencoder(recipe, **changes):
    torch.manual_seed(0)
    return masked_autoencoder(replace(recipe, **changes), digits()).double().eval()


def run_quietly(options):
    return pretrain(options, "sparse-mhsa pretrain")


# The model.


@pytest.mark.parametrize("case", GOLDEN["sincos"], ids=lambda case: f"dim {case['embed_dim']}")
def test_the_position_embedding_is_that_of_the_reference(case):
    got = sincos_embedding(case["embed_dim"], (case["grid"], case["grid"]), prefix=int(case["cls_token"]))
    torch.testing.assert_close(got, torch.tensor(case["values"]), atol=1e-6, rtol=0)


def test_the_keys_are_those_of_public_checkpoints(recipe):
    names = {name.replace(".1.", ".0.") for name in autoencoder(recipe).state_dict()}
    block = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    own = {name for name in names if not name.startswith(("blocks.2", "blocks.3"))}
    assert own == {
        "cls_token",
        "pos_embed",
        "mask_token",
        "decoder_pos_embed",
        *(f"{stack}.0.{name}" for stack in ("blocks", "decoder_blocks") for name in block),
        *(
            f"{module}.{kind}"
            for module in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
            for kind in ("weight", "bias")
        ),
    }


def test_patches_are_cut_as_in_the_reference_and_put_together_again(recipe):
    model = masked_autoencoder(replace(recipe, dataset="photos"), photos())
    images = torch.randn(2, 3, 32, 32)
    patches = model.patchify(images)
    assert patches.shape == (2, 64, 48)
    # Row 1, column 2 of the grid; pixels by rows, channels fastest.
    assert torch.equal(patches[0, 8 + 2], images[0, :, 4:8, 8:12].permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_the_loss_is_the_error_of_the_removed_patches_alone(recipe):
    model, images = autoencoder(recipe), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    noise = torch.rand(3, 64)
    loss, restored, removed = model.reconstruct(images, noise)
    assert removed.sum(dim=1).tolist() == [48.0] * 3
    kept = noise.argsort(dim=1)[:, :16]
    assert (removed.gather(1, kept) == 0).all()
    error = (restored - model.patchify(images)).pow(2).mean(-1)
    torch.testing.assert_close(loss.double(), error[removed.bool()].mean(), rtol=1e-6, atol=0)
    # What is removed does not matter to what is restored.
    other = torch.where(model.unpatchify(removed[..., None].expand(-1, -1, 1)).bool(), 100.0, images)
    assert torch.equal(model.reconstruct(other, noise)[1], restored)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.75, 16), (0.6, 25), (0.1, 57), (0.001, 63), (0.98, 1)], ids=lambda value: f"{value:g}"
)
def test_the_encoder_sees_as_many_patches_as_in_the_reference(recipe, ratio, kept):
    """MAE's ``int(patches * (1 - ratio))``: a ratio above 0 always removes one."""
    model = autoencoder(recipe, mask_ratio=ratio)
    loss, _, removed = model.reconstruct(torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.rand(2, 64))
    assert removed.sum(dim=1).tolist() == [64 - kept] * 2
    assert loss.isfinite()


def test_normalised_patches_have_no_mean_and_unit_spread(recipe):
    images, noise = photos().test.tensors[0][:2], torch.rand(2, 64)
    torch.manual_seed(0)
    model = masked_autoencoder(replace(recipe, dataset="photos", norm_pix_loss=True), photos()).eval()
    loss, restored, removed = model.reconstruct(images, noise)
    patches = model.patchify(images)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, (restored - target).pow(2).mean(-1)[removed.bool()].mean())


def test_a_full_mask_is_dense_attention(recipe):
    model, images = autoencoder(recipe), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    noise = torch.rand(3, 64)
    dense = model.reconstruct(images, noise)[1]
    sm.sparsify(model, {"mask": "local", "mask_kwargs": {"window": 64}}, include=[r"^blocks\.", r"^decoder_blocks\."])
    torch.testing.assert_close(model.reconstruct(images, noise)[1], dense, atol=1e-12, rtol=0)


def test_the_encoder_applies_its_mask_where_the_patches_came_from(recipe):
    """Removing the other patches from a dense encoder, with the mask of the whole image, gives the same tokens."""
    config = {"mask": "neighborhood", "mask_kwargs": {"kernel_size": 3}}
    model, images = autoencoder(recipe), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    kept = torch.rand(2, 64).argsort(dim=1)[:, :16]
    dense = autoencoder(recipe)
    sm.sparsify(model, config, include=r"^blocks\.")
    whole = model.blocks[0].attn.mask(65).to_dense()
    places = torch.nn.functional.pad(kept + 1, (1, 0))
    masks = torch.stack([whole[:, p][:, :, p] for p in places])

    patches = dense.patch_embed(images) + dense.pos_embed[:, 1:]
    x = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
    x = torch.cat([(dense.cls_token + dense.pos_embed[:, :1]).expand(2, -1, -1), x], dim=1)
    for block in dense.blocks:
        x = x + block.attn(block.norm1(x), attn_mask=masks)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.encode(images, kept), dense.norm(x), atol=1e-11, rtol=0)


# Runs.


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_learns_and_shows_pictures(recipe, attn_cfg, log_of, sparse):
    cfg = {"attn_cfg": attn_cfg, "decoder_attn_cfg": attn_cfg} if sparse else {}
    done = run_quietly(replace(recipe, **cfg))
    log = log_of(recipe.output_dir)
    assert log[1]["train_loss"] < log[0]["train_loss"] < 2
    assert log[1]["test_loss"] < log[0]["test_loss"]
    state = read_checkpoint(recipe.output_dir / BEST, "pretrain")
    assert state["best"] == min(entry["test_loss"] for entry in log)
    assert (state["decoder_attention"] is not None) == sparse
    page = done.report.read_text()
    assert page.count("<img") == page.count("<svg") == 1
    assert page.count("defaults filled in") == 2 * sparse
    layers = [*done.model.blocks, *done.model.decoder_blocks]
    assert all((type(layer.attn).__name__ != "Attention") == sparse for layer in layers)


def test_a_run_resumes_bitwise_with_its_attention(recipe, attn_cfg, stopped_after, without_times, tmp_path):
    recipe = replace(recipe, attn_cfg=attn_cfg, decoder_attn_cfg=attn_cfg)
    straight = run_quietly(recipe)
    stopped = replace(recipe, output_dir=tmp_path / "stopped")
    path = stopped_after(stopped, 14, run_quietly)
    resumed = run_quietly(replace(stopped, attn_cfg=None, decoder_attn_cfg=None, resume=path))
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


@pytest.mark.parametrize("probe", [False, True], ids=["finetune", "linear probe"])
def test_what_was_pretrained_starts_a_classifier(recipe, probe):
    done = run_quietly(replace(recipe, epochs=1))
    given = FinetuneOptions(
        dataset="digits",
        epochs=1,
        batch_size=128,
        finetune=recipe.output_dir / LAST,
        linear_probe=probe,
        cls_token=True,
        lr=1e-9,
        min_lr=0.0,
        weight_decay=0.0,
        output_dir=recipe.output_dir / "classifier",
    )
    run = finetune(given)
    assert not any(name.startswith(("decoder", "mask_token")) for name in run.model.state_dict())
    for name in ("cls_token", "pos_embed", "blocks.3.attn.qkv.weight", "norm.weight", "patch_embed.proj.bias"):
        torch.testing.assert_close(
            run.model.state_dict()[name],
            done.model.state_dict()[name].reshape(run.model.state_dict()[name].shape),
            atol=1e-6,
            rtol=0,
        )


def test_a_checkpoint_of_another_command_is_refused(recipe, checkpoint):
    with pytest.raises(UsageError, match="was written by sparse-mhsa finetune, not pretrain"):
        run_quietly(replace(recipe, resume=checkpoint))


def test_every_tensor_of_a_public_checkpoint_with_its_arguments_beside_the_weights_arrives(recipe, tmp_path, caplog):
    model = autoencoder(recipe).float()
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "public.pth")
    caplog.set_level("INFO", "sparse_mhsa")
    done = run_quietly(replace(recipe, epochs=1, lr=1e-12, seed=5, weight_decay=0.0, finetune=tmp_path / "public.pth"))
    assert re.search(r"public\.pth: (\d+) of \1 tensors taken over, new: none\n", caplog.text)
    for name, value in done.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=0)


def test_a_decoder_goes_between_pretraining_and_two_branches(recipe, tmp_path):
    whole = FinetuneOptions(dataset="digits", two_branch=True, output_dir=tmp_path)
    torch.manual_seed(0)
    first = build_model(whole, digits())
    torch.save({"model": first.state_dict()}, tmp_path / "two.pth")
    dim, depth = first.decoder_embed.out_features, len(first.decoder_blocks)
    pretrained = autoencoder(recipe, decoder_dim=dim, decoder_depth=depth, decoder_heads=4).float()
    load_initial_weights(pretrained, tmp_path / "two.pth")
    torch.save({"model": pretrained.state_dict()}, tmp_path / "mae.pth")
    second = build_model(replace(whole, finetune=tmp_path / "mae.pth"), digits())
    for name in ("mask_token", "decoder_embed.weight", "decoder_pos_embed", "cls_token"):
        assert torch.equal(pretrained.state_dict()[name], first.state_dict()[name]), name
        assert torch.equal(second.state_dict()[name], first.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "--mask-ratio must be above 0 and below 1, got 1.0"),
        (
            {"mask_ratio": 0.99},
            "--mask-ratio must remove some of the 64 patches and keep some: at most 0.9843, got 0.99, which keeps 0",
        ),
        ({"mask_ratio": 1e-17}, "--mask-ratio must remove some .*, got 1e-17, which keeps 64"),
        ({"patch_size": 8}, "--mask-ratio must remove some .* and keep some, and a single patch has none to spare: .*"),
        ({"decoder_heads": 3}, "--decoder-heads must divide --decoder-dim 16, got 3"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "--decoder-dim must be a multiple of 4, got 18"),
        ({"model": "vit_small_patch14_reg4_dinov2"}, "--model .*: expected a Vision Transformer with a class token"),
        ({"model": "resnet18"}, "expected a Vision Transformer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_options_are_named(recipe, changes, message):
    with pytest.raises(UsageError, match=message):
        run_quietly(replace(recipe, **changes))


def test_the_command_explains_itself_and_plans(recipe, capsys):
    assert main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--decoder-attn-cfg" in out
    assert main(["pretrain", "--dataset", "digits", "--epochs", "2", "--dry-run", "--output-dir", "nowhere"]) == 0
    out = capsys.readouterr().out
    assert "65 tokens: 101,400 edges over 6 layers" in out
    assert "the encoder sees 25 % of the patches" in out
    assert not Path("nowhere").exists()


def test_the_photographs_are_cut_from_parts_that_do_not_overlap():
    data = photos()
    assert data.sizes == (1536, 384)
    assert len(data.class_names) == 8
    images, labels = data.train.tensors
    assert images.shape == (1536, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [192] * 8
    assert (images.mean((0, 2, 3)).abs() < 1e-2).all()
    assert ((images.std((0, 2, 3)) - 1).abs() < 1e-2).all()
    assert torch.equal(photos().train.tensors[0], images)
