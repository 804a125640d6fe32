"""What the tests of training share: tiny runs on one thread."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from sparse_mhsa.train.engine import LAST, LOG, Interrupted, Trainer
from sparse_mhsa.train.finetune import finetune
from sparse_mhsa.train.recipes import FinetuneOptions

TIMES = ("step_time", "attention_time", "train_time", "peak_memory")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The runs are tiny: more threads would only wait for each other (and add in another order)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def options(tmp_path):
    return FinetuneOptions(
        dataset="digits",
        epochs=2,
        batch_size=128,
        lr=2e-3,
        patch_size=2,
        output_dir=tmp_path / "run",
        progress="off",
    )


@pytest.fixture
def attn_cfg(tmp_path):
    path = tmp_path / "fibottention.yaml"
    path.write_text("mask: fibottention\n")
    return path


@pytest.fixture
def log_of():
    """Reads the log of a folder."""

    def read(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]

    return read


@pytest.fixture
def without_times():
    """What two runs of the same recipe must agree in."""

    def strip(log: list[dict]) -> list[dict]:
        return [{key: value for key, value in entry.items() if key not in TIMES} for entry in log]

    return strip


@pytest.fixture(scope="session")
def interrupt_in():
    """Makes a training step that presses Ctrl-C the ``step``-th time it is called."""

    def make(step: int):
        original, calls = Trainer._train_step, 0

        def train_step(self, batches):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, batches)

        return train_step

    return make


@pytest.fixture(scope="session")
def stopped_after(interrupt_in):
    """Starts a run and interrupts it after a number of steps; returns its last checkpoint."""

    def start(options, steps: int, command=finetune) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_train_step", interrupt_in(steps))
            with pytest.raises(Interrupted, match=r"--resume .*checkpoint-last\.pth"):
                command(options)
        return options.output_dir / LAST

    return start


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    finetune(FinetuneOptions(dataset="digits", epochs=1, batch_size=128, patch_size=2, output_dir=folder))
    return folder / LAST


@pytest.fixture
def image_root(tmp_path):
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(level - 50, level + 50, (40, 36, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"
