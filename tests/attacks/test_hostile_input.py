"""Executable attempts to make the package crash, hang, allocate without bound or read what it should not."""

import resource
import subprocess
import sys
import time

import pytest
import torch

import sparse_mhsa as sm

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "alias bomb": BOMB,
    "deep lists": "mask: " + "[" * 30_000,
    "deep maps": "mask: " + "{a: " * 10_000,
    "long scalar": "mask: " + "x" * 1_000_000,
    "many keys": "\n".join(f"k{i}: 1" for i in range(20_000)),
    "recursive alias": "mask: &a [*a]",
    "binary": "\x00\x01\x02: \x03",
    "code": "!!python/object/apply:os.system ['touch pwned']",
    "merge key": "base: &b {mask: local}\n<<: *b",
    "huge window": "mask: local\nmask_kwargs: {window: 99999999999999999999999}",
    "negative": "mask: fibo\nmask_kwargs: {w_max: -9223372036854775808}",
    "not a number": "mask: none\nscale: .inf",
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML.keys())
def test_hostile_yaml_is_refused_quickly_and_cheaply(text):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(sm.ConfigError):
        sm.AttentionConfig.parse(text, "hostile.yaml")
    assert time.perf_counter() - started < 5, "a guard against hanging, not a measurement"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_the_command_line_survives_hostile_yaml(tmp_path):
    for name, text in HOSTILE_YAML.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-m", "sparse_mhsa", "config", "check", *map(str, sorted(tmp_path.glob("*.yaml")))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == len(HOSTILE_YAML)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "pwned").exists()


LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    "mask_kwargs",
    [
        {"window": LARGEST, "dilation": LARGEST},
        {"window": -LARGEST - 1},
        {"num_global": LARGEST},
        {"global_indices": [LARGEST, -LARGEST - 1]},
        {"per_head_dilation": [LARGEST, 0]},
    ],
    ids=str,
)
def test_extreme_numbers_are_clamped_as_the_reference_clamps_them(mask_kwargs):
    mask = sm.Mask.from_config({"mask": "longformer", "mask_kwargs": mask_kwargs}, num_tokens=20, num_heads=2)
    assert mask.nnz == int(mask.to_dense().sum())


def edges_of(row_ptr, col):
    q = torch.zeros(1, 1, 4, 2)
    pointers = torch.tensor(row_ptr, dtype=torch.int64).reshape(1, -1)
    columns = torch.tensor(col, dtype=torch.int64)
    return torch.ops.sparse_mhsa.forward_edges(q, q, q, pointers, columns, None, None, None, 0.0, 1.0)


@pytest.mark.parametrize(
    ("row_ptr", "col"),
    [
        ([0, 1, 2, 3, 4], [0, 1, 2, 4]),
        ([0, 1, 2, 3, 4], [0, 1, 2, -1]),
        ([0, 1, 2, 3, 5], [0, 1, 2, 3]),
        ([0, 3, 2, 3, 4], [0, 1, 2, 3]),
        ([0, 2, 2, 3, 4], [1, 1, 2, 3]),
        ([0, 2, 2, 3, 4], [2, 1, 2, 3]),
        ([-1, 1, 2, 3, 4], [0, 1, 2, 3]),
        ([0, LARGEST, 2, 3, 4], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 1, 2]),
        ([], []),
    ],
    ids=str,
)
def test_a_broken_edge_list_is_refused_and_never_read(row_ptr, col):
    with pytest.raises(ValueError, match=r"row_ptr|col"):
        edges_of(row_ptr, col)


@pytest.mark.parametrize("spec", ["", "{}", "null", '{"mask": "fibo"}', "\x00", '{"mask":' * 1000], ids=range(6))
def test_a_made_up_spec_is_refused(spec):
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="spec"):
        torch.ops.sparse_mhsa.forward(q, q, q, spec, None, None, None, 0.0, 1.0)


def test_a_negative_number_of_tokens_is_refused_by_name():
    with pytest.raises(ValueError, match="num_tokens: expected at least 0, got -1"):
        sm.Mask.from_config("mask: fibo", num_tokens=-1, num_heads=2)


def test_an_empty_batch_with_edges_of_its_own_gives_an_empty_result():
    q, nothing = torch.zeros(0, 2, 6, 3), torch.zeros(0, dtype=torch.int64)
    out, lse = torch.ops.sparse_mhsa.forward_edges(q, q, q, nothing.reshape(0, 7), nothing, None, None, None, 0.0, 1.0)
    assert out.shape == (0, 2, 6, 3)
    assert lse.shape == (0, 2, 6)
