"""Options that cannot be used are named, with what would be allowed."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparse_mhsa.train import UsageError
from sparse_mhsa.train.finetune import finetune


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "--lr must be above 0, got nan"),
        ({"drop_path": 1.0}, "--drop-path must be at least 0 and below 1, got 1.0"),
        ({"warmup_epochs": 2.0}, r"--warmup-epochs must be smaller than --epochs \(2\), got 2"),
        ({"seed": 2**63}, "--seed must be at least 0 and below 9223372036854775808, got 9223372036854775808"),
        ({"seed": 10**400}, "--seed must be at least 0 and below 9223372036854775808, got 1000"),
        ({"min_lr": 1.0}, "--min-lr must be at most the peak learning rate 0.002, got 1"),
        ({"eval": True}, "--eval needs --resume"),
        ({"dataset": "imagefolder"}, "imagefolder needs --data-path"),
        (
            {"data_path": Path()},
            "--data-path is only for --dataset cifar10, .*imagefolder; digits comes inside a package",
        ),
        ({"aa": "rand-m9-mstd0.5-inc1"}, "--aa and --color-jitter are only for --dataset cifar10"),
        ({"mixup": 0.5, "batch_size": 3}, "--batch-size must be even"),
        ({"mixup_prob": 1.5}, "--mixup-prob must be at least 0 and at most 1, got 1.5"),
        ({"mixup_switch_prob": 2.0}, "--mixup-switch-prob must be at least 0 and at most 1, got 2.0"),
        ({"layer_decay": 2.0}, "--layer-decay must be above 0 and at most 1, got 2.0"),
        ({"norm_pix_loss": True}, "--norm-pix-loss needs --two-branch"),
        ({"two_branch": True, "mask_ratio": 0.0}, "--mask-ratio must be above 0 with --two-branch, got 0"),
        (
            {"two_branch": True, "mask_ratio": 0.8, "patch_size": 4},
            "--mask-ratio must remove some of the 4 patches and keep some: at most 0.75, got 0.8, which keeps 0",
        ),
        ({"linear_probe": True, "drop_path": 0.3}, "--linear-probe drops nothing .*: no --drop-path, got 0.3"),
        ({"dist_on_itp": True}, "--dist-on-itp needs --dist"),
        ({"cutmix_minmax": (0.8, 0.2)}, "--cutmix-minmax must be two ascending shares of at most 1, got 0.8 0.2"),
        ({"global_pool": True, "cls_token": True}, "--global-pool and --cls-token contradict each other"),
        ({"linear_probe": True, "two_branch": True}, "--linear-probe trains only the head"),
        ({"linear_probe": True, "batch_size": 1}, "--batch-size must be at least 2 for --linear-probe, .*, got 1"),
        ({"two_branch": True, "mixup": 0.5}, "--two-branch predicts from the class token"),
        ({"dist": True}, "--dist: RANK is not set; start the processes with: torchrun"),
        ({"dist_eval": True}, "--dist-eval needs --dist"),
        ({"start_epoch": 2}, r"--start-epoch must be smaller than --epochs \(2\), got 2"),
        ({"download": True}, "--download is only for --dataset cifar10 and cifar100, got digits"),
        ({"pin_mem": True, "no_pin_mem": True}, "--pin-mem and --no-pin-mem contradict"),
        ({"dataset": "cifar10"}, "--dataset cifar10 needs --data-path"),
        ({"accum_iter": 100}, r"images per step .* must be at most the 1438 training images, got 12800"),
        ({"batch_size": 5000}, "--batch-size must be at most the 1438 training images, got 5000"),
        ({"nb_classes": 5}, "--nb-classes must be at least the 10 classes of digits, got 5"),
        ({"patch_size": 3}, "--patch-size must divide the image side 8, got 3"),
        ({"input_size": 32}, "--input-size: the images of digits are 8 pixels wide, got 32"),
        ({"model": "vit_mikro"}, "no model 'vit_mikro'; did you mean vit_micro"),
        ({"model": "resnet18"}, "--model resnet18: expected a Vision Transformer"),
        ({"model": "resnet18", "attn_cfg": Path("vit.yaml")}, "--model resnet18: expected a Vision Transformer"),
        ({"device": "abacus"}, "--device abacus"),
        ({"device": "meta"}, "--device meta: its tensors hold no data"),
        ({"finetune": Path("nowhere.pth")}, "--finetune: no such file: 'nowhere.pth'"),
        ({"attn_cfg": Path("nowhere.yaml")}, "--attn-cfg: no such file: 'nowhere.yaml'$"),
        (
            {"attn_cfg": Path("longformer.yaml")},
            "--attn-cfg: no such file: 'longformer.yaml'; the package has '/",
        ),
        ({"output_dir": Path("vit.yaml/run")}, "--output-dir: cannot make the folder 'vit.yaml/run': Not a directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_options_are_named(options, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vit.yaml").write_text("mask: fibottention\n")
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.0}, "--mask-ratio 0.0 has no effect without --two-branch"),
        ({"world_size": 8}, "--world-size 8 has no effect without --dist"),
        ({"local_rank": 0}, "--local-rank 0 has no effect without --dist"),
        ({"dist_url": "tcp://here"}, "--dist-url tcp://here has no effect without --dist"),
        ({"blr": 0.1}, "--blr 0.1 has no effect beside --lr 0.002"),
        ({"mixup_prob": 0.5}, "--mixup-prob 0.5 has no effect without --mixup, --cutmix or --cutmix-minmax"),
        ({"mixup_mode": "elem"}, "--mixup-mode elem has no effect without --mixup"),
        ({"mixup": 0.5, "mixup_switch_prob": 0.1}, "--mixup-switch-prob 0.1 has no effect unless both"),
        ({"remode": "const"}, "--remode const has no effect without --reprob"),
        ({"recount": 3}, "--recount 3 has no effect without --reprob"),
        ({"resplit": True}, "--resplit has no effect on batches that have no clean splits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_published_programs_accept_and_ignore_is_said_once(options, changes, message, caplog):
    finetune(replace(options, dry_run=True, **changes))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(message)


def test_a_plain_run_has_nothing_without_effect(options, caplog):
    finetune(replace(options, dry_run=True))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
