"""Processes, signals, threads and memory: what breaks attention libraries outside of their mathematics."""

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa import _core

CONFIGS = Path(__file__).parents[1] / "configs" / "attention"
FIBOTTENTION = CONFIGS / "fibottention.yaml"


def attend(num_tokens=300, heads=2, head_dim=8, grad=False):
    mask = sm.Mask.from_config(FIBOTTENTION, num_tokens=num_tokens, num_heads=heads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, num_tokens, head_dim, generator=generator, requires_grad=grad) for _ in range(3))
    out = sm.sparse_attention(q, k, v, mask)
    return torch.autograd.grad(out.square().sum(), (q, k, v)) if grad else out


def run_script(script, *, timeout=120, env=None):
    """A fresh interpreter, so that signals, forks and peaks are its own."""
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout, env=environment
    )


def in_forked_child(work):
    """Run ``work`` in a forked child with a watchdog; True if it returned True."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(20)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes_the_same_after_its_parent_used_the_pool():
    expected = attend()
    assert in_forked_child(lambda: torch.equal(attend(), expected))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_another_thread_is_inside_a_kernel_does_not_hang_the_child():
    expected = attend()
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            attend(num_tokens=2000)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        assert all(in_forked_child(lambda: torch.equal(attend(), expected)) for _ in range(10))
    finally:
        stop.set()
        thread.join()


class AttentionDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return attend()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_attention_works_in_data_loader_workers(method):
    expected = attend()
    loader = torch.utils.data.DataLoader(
        AttentionDataset(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60
    )
    assert all(torch.equal(item, expected) for item in loader)


def test_the_gil_is_released_while_a_kernel_runs():
    mask = sm.Mask.from_config({"mask": "none"}, num_tokens=3000, num_heads=4)
    q = torch.randn(1, 4, 3000, 32)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.perf_counter()
    torch.ops.sparse_mhsa.forward(q, q, q, mask.spec, None, None, None, 0.0, 1.0)
    finished = time.perf_counter()
    done.set()
    thread.join()
    during = sum(started < tick < finished for tick in ticks)
    assert during >= 2, f"the other thread ran {during} times in {finished - started:.3f} s"


def test_ctrl_c_stops_a_long_call_with_keyboard_interrupt():
    script = """
import os, signal, threading, time, torch, sparse_mhsa as sm
mask = sm.Mask.from_config({"mask": "none"}, num_tokens=60_000, num_heads=8)
q = torch.randn(1, 8, 60_000, 32)
def interrupt():
    global sent
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    torch.ops.sparse_mhsa.forward(q, q, q, mask.spec, None, None, None, 0.0, 1.0)
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - sent < 2)
"""
    result = run_script(script)
    assert result.stdout.split() == ["interrupted", "True"], result.stdout + result.stderr


def test_many_python_threads_may_call_at_once():
    expected = attend(grad=True)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: attend(grad=True), range(32)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_repeated_calls_give_the_same_bits():
    expected = attend(grad=True)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(attend(grad=True), expected, strict=True))


def test_importing_beside_another_torch_says_which_one_it_was_built_for():
    script = "import torch; torch.__version__ = '2.14.1+cpu'; import sparse_mhsa"
    result = run_script(script)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert "2.13" in message
    assert "2.14.1" in message


def test_an_unknown_instruction_set_is_refused_by_name():
    script = """
import torch, sparse_mhsa as sm
mask = sm.Mask.from_config("mask: fibo", num_tokens=9, num_heads=1)
q = torch.randn(1, 1, 9, 4)
sm.sparse_attention(q, q, q, mask)
"""
    result = run_script(script, env={"SPARSE_MHSA_SIMD": "avx1024"})
    assert result.returncode != 0
    assert "avx1024" in result.stderr.splitlines()[-1]
    assert "scalar" in result.stderr.splitlines()[-1]


def test_the_python_random_state_is_left_alone():
    script = """
import random, sparse_mhsa as sm
random.seed(7); expected = random.random()
random.seed(7); sm.Mask.from_config("mask: fibo", num_tokens=197, num_heads=12, layer=3).nnz
print(random.random() == expected)
"""
    assert run_script(script).stdout.strip() == "True"


MEMORY_SCRIPT = """
import resource, torch, sparse_mhsa as sm
tokens, heads, dim = {tokens}, {heads}, 64
mask = sm.Mask.from_config({config!r}, num_tokens=tokens, num_heads=heads)
# Enough to start every thread: the allocator reserves address space for each.
small = sm.Mask.from_config({config!r}, num_tokens=2049, num_heads=heads)
q, k, v = (torch.randn(1, heads, 2049, dim, requires_grad=True) for _ in range(3))
sm.sparse_attention(q, k, v, small).sum().backward()
q, k, v = (torch.randn(1, heads, tokens, dim).requires_grad_() for _ in range(3))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
outputs = 4 * (4 * q.numel() + heads * tokens)
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * outputs, -1))
out = sm.sparse_attention(q, k, v, mask)
torch.autograd.backward(out, torch.ones(()).expand(out.shape))
assert all(torch.isfinite(x.grad[0, 0, ::997]).all() for x in (q, k, v))
print("fits")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by Linux's means")
@pytest.mark.parametrize(("tokens", "heads"), [(32_769, 4), (131_073, 12), (1_048_577, 1)])
def test_forward_and_backward_fit_in_twice_the_memory_of_outputs_and_gradients(tokens, heads):
    script = MEMORY_SCRIPT.format(tokens=tokens, heads=heads, config=str(FIBOTTENTION))
    result = run_script(script, timeout=300)
    assert result.stdout.strip() == "fits", result.stderr


def test_a_child_forked_before_the_first_call_does_not_wait_for_threads_of_its_parent():
    script = """
import os, signal, torch, sparse_mhsa as sm
torch.set_num_threads(2)
a = torch.randn(600, 600)
(a @ a).exp().sum()  # the parent has a team of OpenMP threads
mask = sm.masks.local(num_tokens=3000, num_heads=4, window=30)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    q = torch.empty(1, 4, 3000, 32)
    torch.ops.sparse_mhsa.forward(q, q, q, mask.spec, None, None, None, 0.0, 1.0)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_script(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have portable kernels only")
def test_no_vector_instruction_of_a_kernel_is_a_call():
    """What is not inlined into a kernel loses the kernel's instruction set: each of its instructions becomes a call."""
    core = Path(_core.__file__).read_bytes()
    if b"avx5125enter" not in core:
        pytest.skip("the extension was stripped of its symbols")
    assert sorted(set(re.findall(rb"core_arch3x86\w*?\d(_mm\w+?)17h", core))) == []
