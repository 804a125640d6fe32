"""PyTorch's own tests of `nn.MultiheadAttention` and of the layers built on it, with `SparseMHSA` in its place.

Needs a checkout of PyTorch at the release that is installed, named by ``PYTORCH_CHECKOUT``, and the package
`expecttest`, which PyTorch's tests import:

    PYTORCH_CHECKOUT=~/pytorch pytest tests/test_pytorch_suite.py

A test that already fails with PyTorch's own layer, for want of a GPU for instance, says nothing about ours.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest

from sparse_mhsa.engine import ENVIRONMENT_VARIABLE

CHECKOUT = os.environ.get("PYTORCH_CHECKOUT")

FILES = {
    "test/nn/test_multihead_attention.py": "",
    "test/test_transformers.py": "TestTransformers",
    "test/test_nn.py": "transformer or multihead",
}
"""Test file -> which of its tests (pytest's ``-k``)."""


class Exemption(NamedTuple):
    """Tests that ask for what a sparse layer cannot be, and what they get instead."""

    tests: str
    outcome: str
    reason: str


EXEMPTIONS = (
    Exemption(
        "test_multihead_attn_nested_tensor_outside_fast_path"
        "|test_mask_check_fastpath"
        "|test_transformerencoder_batch_first_True_training_False_enable_nested_tensor_True"
        "|test_transformerencoder_fastpath_use_torchscript_False_enable_nested_tensor_True"
        "|test_TransformerEncoderLayer_empty",
        "does not support NestedTensor outside of its fast path",
        "nested tensors exist for the fast path only; ours has none, says so, and says what to do instead",
    ),
    Exemption(
        "test_multihead_self_attn_two_masks_fast_path_mock|test_disable_fastpath",
        "False is not true",
        "asserts that the fast path is taken, which would bypass the mask",
    ),
    Exemption(
        "test_script_|test_transformerencoderlayer_subclass",
        "cannot be compiled by torch.jit.script",
        "TorchScript is not supported",
    ),
    Exemption(
        "test_transformerencoderlayer_cpu_float32",
        "is not true",
        "asserts NaN for a sample whose keys are all masked; ours gives zero context there",
    ),
)


def run(file, selection, tmp_path, *options, engine="auto"):
    """Outcome of every test of a file: its message if it failed, None if it passed."""
    report = tmp_path / "report.xml"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
    finished = subprocess.run(
        [*command, "-k", selection, *options, Path(file).name],
        cwd=Path(CHECKOUT, file).parent,
        env={**os.environ, "PYTHONPATH": path, ENVIRONMENT_VARIABLE: engine},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode in (0, 1), finished.stdout[-4000:] + finished.stderr[-4000:]
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if case.find("skipped") is None:
            outcomes[case.get("name")] = None if failure is None else failure.get("message", "")
    return outcomes


@pytest.mark.skipif(CHECKOUT is None, reason="PYTORCH_CHECKOUT names no checkout of PyTorch")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_pytorchs_own_tests_pass_but_for_what_cannot_be(file, tmp_path, engine):
    theirs = run(file, FILES[file], tmp_path)
    ours = run(file, FILES[file], tmp_path, "-p", "stand_in", engine=engine)
    assert ours.keys() == theirs.keys()
    failed = {name: message for name, message in ours.items() if message is not None and theirs[name] is None}

    def exempt(name, message):
        return any(re.search(e.tests, name) and re.search(e.outcome, message, re.DOTALL) for e in EXEMPTIONS)

    assert sum(message is None for message in ours.values()) > 5, "nothing was tested"
    assert not {name: message for name, message in failed.items() if not exempt(name, message)}
