"""Packages that are optional: without them the rest works, and what needs one says how to get it."""

import json
import subprocess
import sys

import pytest

OPTIONAL = (
    "av",
    "matplotlib",
    "mlxtend",
    "omegaconf",
    "peft",
    "scipy",
    "skimage",
    "sklearn",
    "timm",
    "torchvision",
    "tqdm",
    "transformers",
)
NEEDS = {
    # what needs it: (the package, its extra, a call)
    "a plot": ("matplotlib", "plot", "sm.masks.local(num_tokens=9, num_heads=2, window=1).plot()"),
    "SparseTimmAttention": ("timm", "timm", "sm.SparseTimmAttention.configured('mask: none')(12, 2)"),
    "legacy_imports": ("timm", "timm", "import sparse_mhsa.adapters.legacy"),
    "this model": ("transformers", "hf", "sm.adapters.transformers.register()"),
    "generation_cache": ("transformers", "hf", "sm.generation_cache(torch.nn.Linear(2, 2), sm.CachePolicy('full'))"),
}
SCRIPT = """
import json, sys
optional, calls = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(optional))
import torch
import sparse_mhsa as sm

layer = torch.nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
x = torch.zeros(1, 7, 12)
report = sm.sparsify(layer, {"mask": "local", "mask_kwargs": {"window": 1}}, verify=True, sample=x)
layer(x).sum().backward()
sm.densify(layer)
said = {"swapped": len(report.swapped)}
for purpose, call in calls.items():
    try:
        exec(call)
    except ImportError as error:
        said[purpose] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
    """What a process without any optional package says."""
    arguments = json.dumps([OPTIONAL, {purpose: call for purpose, (_, _, call) in NEEDS.items()}])
    command = [sys.executable, "-W", "error", "-c", SCRIPT, arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("purpose", NEEDS)
def test_what_needs_a_package_says_how_to_get_it(said, purpose):
    package, extra, _ = NEEDS[purpose]
    assert said[purpose] == f"{purpose} needs {package}: pip install 'sparse_mhsa[{extra}]'"


def test_torch_and_numpy_are_enough(said):
    assert said["swapped"] == 1
