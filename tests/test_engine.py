"""The choice of the engine, and what the ATen engine owes to devices that are not here to be tested on."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sparse_mhsa as sm
from engines import NO_ATTENTION, OWN_CHOICE, runs_on_both
from sparse_mhsa import _core
from sparse_mhsa.engine import engine_for
from sparse_mhsa.reference import dense_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def mask_of(num_tokens=9, **config):
    return sm.Mask.from_config({"mask": "fibottention", **config}, num_tokens=num_tokens, num_heads=2)


def tensors(num_tokens=9, *, kv_heads=2, dtype=torch.float64):
    q, k, v = (torch.randn(2, heads, num_tokens, 5, dtype=dtype) for heads in (2, kv_heads, kv_heads))
    return q, k, v


class TestChoice:
    def test_kernels_compute_cpu_tensors_and_aten_the_rest(self):
        assert engine_for(CPU) == "cpu"
        assert {engine_for(torch.device(name)) for name in ("cuda", "mps", "xpu")} == {"aten"}

    def test_the_innermost_block_decides_and_leaves_no_trace(self):
        with sm.engine("aten"):
            assert engine_for(CPU) == "aten"
            with sm.engine("auto"):
                assert engine_for(CPU) == "cpu"
            assert engine_for(CPU) == "aten"
            with pytest.raises(ZeroDivisionError), sm.engine("cpu"):
                _ = 1 / 0
            assert engine_for(CPU) == "aten"
        assert engine_for(CPU) == "cpu"

    def test_the_operators_ask_when_they_run(self, monkeypatch):
        asked = []
        forward, backward = _core.forward, _core.backward
        # The engines round differently, so the bits say which of them computed.
        mask, inputs = mask_of(70), tensors(70, dtype=torch.float32)
        arguments = (*inputs, mask.spec, None, None, None, 0.0, 0.3)
        for name in ("cpu", "aten"):
            with sm.engine(name):
                out, lse = torch.ops.sparse_mhsa.forward(*arguments)
                grads = torch.ops.sparse_mhsa.backward(out, *inputs, out, lse, *arguments[3:])
            assert torch.equal(out, forward(name, *arguments)[0])
            expected = backward(name, out, *inputs, out, lse, *arguments[3:])
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
            asked.append(out)
        assert not torch.equal(*asked)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_a_compiled_function_follows_the_choice_without_compiling_again(self):
        mask, inputs = mask_of(70), tensors(70, dtype=torch.float32)

        def attend(q, k, v):
            return sm.sparse_attention(q, k, v, mask)

        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attend, fullgraph=True, backend=counter)
        for name in ("cpu", "aten", "cpu"):
            with sm.engine(name):
                assert torch.equal(compiled(*inputs), attend(*inputs))
        assert counter.frame_count == 1
        torch._dynamo.reset()

    def test_other_threads_and_tasks_keep_their_own(self):
        seen = {}
        with sm.engine("aten"):
            thread = threading.Thread(target=lambda: seen.update(thread=engine_for(CPU)))
            thread.start()
            thread.join()
        assert seen == {"thread": "cpu"}

        async def choose(name, turn, other):
            with sm.engine(name):
                turn.set()
                await other.wait()
                return engine_for(CPU)

        async def both():
            first, second = asyncio.Event(), asyncio.Event()
            return await asyncio.gather(choose("aten", first, second), choose("cpu", second, first))

        assert asyncio.run(both()) == ["aten", "cpu"]

    @pytest.mark.parametrize(("variable", "expected"), [("", "cpu"), ("auto", "cpu"), ("cpu", "cpu"), ("aten", "aten")])
    def test_the_environment_decides_where_nothing_else_does(self, variable, expected):
        script = """
import torch, sparse_mhsa as sm
from sparse_mhsa.engine import engine_for
print(engine_for(torch.device("cpu")))
with sm.engine("auto"): print(engine_for(torch.device("cpu")))
"""
        environment = {**os.environ, "SPARSE_MHSA_ENGINE": variable}
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert result.stdout.split() == [expected, "cpu"], result.stderr


class TestBackward:
    """The backward pass uses the engine of its forward pass; the engines round differently, so the bits tell."""

    MASK = mask_of(70)

    def attend(self, q, k, v, mask=None, **options):
        return sm.sparse_attention(q, k, v, mask or self.MASK, **options).square().sum()

    @staticmethod
    def leaves():
        return [x.requires_grad_() for x in tensors(70, dtype=torch.float32)]

    def gradients(self, name, attend=None, leaves=None):
        """Forward pass under ``name``, and the backward pass there too."""
        leaves = leaves or self.leaves()
        with sm.engine(name):
            return torch.autograd.grad((attend or self.attend)(*leaves), leaves)

    @pytest.fixture(params=["mask", "edges"])
    def attend_either(self, request):
        """Attention to a registered mask, and to edges that are given as tensors."""
        if request.param == "mask":
            return self.attend
        own = sm.Mask.from_csr(*self.MASK.to_csr())
        return lambda q, k, v: self.attend(q, k, v, mask=own)

    @pytest.mark.parametrize(("name", "later"), [("aten", "cpu"), ("cpu", "aten"), ("auto", "aten")])
    def test_it_remembers_after_the_block(self, name, later, attend_either):
        leaves = self.leaves()
        expected, other = (self.gradients(engine, attend_either, leaves) for engine in (name, later))
        assert not all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
        with sm.engine(name):
            loss = attend_either(*leaves)
        with sm.engine(later):
            got = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_it_remembers_without_any_block(self):
        leaves = self.leaves()
        expected = self.gradients("aten", leaves=leaves)
        with sm.engine("aten"):
            loss = self.attend(*leaves)
        got = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_it_remembers_in_another_thread(self):
        leaves = self.leaves()
        expected = self.gradients("aten", leaves=leaves)
        with sm.engine("aten"):
            loss = self.attend(*leaves)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        assert all(torch.equal(leaf.grad, b) for leaf, b in zip(leaves, expected, strict=True))

    def test_two_graphs_with_different_engines_do_not_mix(self):
        leaves = self.leaves()
        expected = {name: self.gradients(name, leaves=leaves) for name in ("cpu", "aten")}
        losses = {}
        for name in expected:
            with sm.engine(name):
                losses[name] = self.attend(*leaves)
        for name in ("aten", "cpu"):
            got = torch.autograd.grad(losses[name], leaves)
            assert all(torch.equal(a, b) for a, b in zip(got, expected[name], strict=True))

    def test_it_remembers_inside_torch_func_and_vmap(self):
        leaves = self.leaves()
        expected = self.gradients("aten", leaves=leaves)
        q, k, v = (x.detach() for x in leaves)
        with sm.engine("aten"):
            loss, pull_back = torch.func.vjp(self.attend, q, k, v)
        assert all(torch.equal(a, b) for a, b in zip(pull_back(torch.ones_like(loss)), expected, strict=True))

        batch = [x.expand(3, *x.shape) for x in (q, k, v)]
        with sm.engine("aten"):
            losses, pull_back = torch.func.vjp(torch.func.vmap(self.attend), *batch)
        for gradient, one in zip(pull_back(torch.ones_like(losses)), expected, strict=True):
            assert all(torch.equal(sample, one) for sample in gradient)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_a_compiled_function_remembers_and_is_compiled_once(self, backend):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(self.attend, fullgraph=True, backend=counter)
        for name, later in (("cpu", "aten"), ("aten", "cpu"), ("cpu", "cpu")):
            leaves = self.leaves()
            with sm.engine(name):
                loss = compiled(*leaves)
            with sm.engine(later):
                got = torch.autograd.grad(loss, leaves)
            expected = self.gradients(name, leaves=leaves)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert counter.frame_count == 1
        torch._dynamo.reset()

    def test_an_exported_program_asks_when_it_runs(self):
        class Attend(torch.nn.Module):
            def forward(self, q, k, v):
                return sm.sparse_attention(q, k, v, mask)

        mask, inputs = self.MASK, [x.detach() for x in self.leaves()]
        exported = torch.export.export(Attend(), tuple(inputs)).module()
        outputs = []
        for name in ("cpu", "aten"):
            with sm.engine(name):
                outputs.append(exported(*inputs))
                assert torch.equal(outputs[-1], Attend()(*inputs))
        assert not torch.equal(*outputs)

    def test_the_operators_take_the_choice_as_a_tensor(self):
        arguments = (*tensors(70, dtype=torch.float32), self.MASK.spec, None, None, None, 0.0, 0.3)
        for name in ("cpu", "aten"):
            with sm.engine(name):
                choice = torch.ops.sparse_mhsa.chosen_engine()
                expected = torch.ops.sparse_mhsa.forward(*arguments)[0]
            got, _ = torch.ops.sparse_mhsa.forward(*arguments, engine=choice)
            assert torch.equal(got, expected)
            checked = torch.library.opcheck(torch.ops.sparse_mhsa.forward, arguments, {"engine": choice})
            assert set(checked.values()) == {"SUCCESS"}


class TestRefusals:
    @pytest.mark.parametrize("name", ["gpu", "ATEN", "", None])
    def test_an_unknown_engine_names_what_is_allowed(self, name):
        with pytest.raises(ValueError, match=r"engine: unknown engine .*allowed: auto, cpu, cuda, aten"):
            sm.engine(name).__enter__()

    def test_a_near_miss_is_suggested(self):
        with pytest.raises(ValueError, match="did you mean `aten`"):
            sm.engine("atten").__enter__()

    def test_native_cuda_kernels_do_not_exist_yet(self):
        with pytest.raises(NotImplementedError, match="no native CUDA kernels; `auto`"):
            sm.engine("cuda").__enter__()

    def test_our_kernels_refuse_tensors_of_other_devices(self):
        with sm.engine("cpu"), pytest.raises(RuntimeError, match=r"engine: `cpu` .* got one on cuda:0"):
            engine_for(CUDA)

    @pytest.mark.parametrize(("variable", "message"), [("atne", "did you mean `aten`"), ("cuda", "no native CUDA")])
    def test_the_environment_variable_is_named(self, monkeypatch, variable, message):
        from sparse_mhsa.engine import _from_environment

        monkeypatch.setenv("SPARSE_MHSA_ENGINE", variable)
        _from_environment.cache_clear()
        try:
            with pytest.raises((ValueError, NotImplementedError), match=f"SPARSE_MHSA_ENGINE: .*{message}"):
                sm.sparse_attention(*tensors(), mask_of(), return_lse=True)
        finally:
            _from_environment.cache_clear()

    def test_the_core_knows_two_engines(self):
        with pytest.raises(ValueError, match="unknown engine `cuda`; allowed: cpu, aten"):
            _core.forward("cuda", *tensors(), mask_of().spec, None, None, None, 0.0, 1.0)

    @pytest.mark.usefixtures("engine")
    @pytest.mark.parametrize(
        ("place", "value", "error", "message"),
        [
            (0, torch.zeros(2, 9, 5), ValueError, "q: expected 4 dimensions"),
            (0, torch.zeros(2, 2, 9, 5, dtype=torch.int64), TypeError, "q: expected torch.float32"),
            (1, torch.zeros(2, 2, 9, 5), TypeError, "k: expected dtype torch.float64, got torch.float32"),
            (1, torch.zeros(2, 2, 9, 4).double(), ValueError, "k: expected shape"),
            (2, torch.zeros(2, 2, 8, 5).double(), ValueError, "v: expected shape"),
            (1, torch.zeros(2, 2, 8, 5).double(), ValueError, "the mask `fibottention` relates the tokens of one"),
            (4, torch.ones(2, 8).bool(), ValueError, "key_mask: expected shape"),
            (4, torch.ones(2, 9), TypeError, "key_mask: expected dtype torch.bool"),
            (5, torch.zeros(2, 2, 9, 8).double(), ValueError, "bias: expected a shape that broadcasts"),
            (5, torch.zeros(2, 2, 9, 9), TypeError, "bias: expected dtype torch.float64"),
            (7, 0.5, ValueError, "seed: expected a tensor"),
        ],
    )
    def test_both_engines_refuse_the_same_with_the_same_words(self, place, value, error, message):
        arguments = [*tensors(), mask_of().spec, None, None, None, 0.0, 1.0]
        arguments[place] = value
        with pytest.raises(error, match=message):
            torch.ops.sparse_mhsa.forward(*arguments)


class TestOtherDevices:
    """Tensors without memory: whatever the engine makes must follow them, and nothing may be read back."""

    @pytest.mark.parametrize("masked_logits", ["neg_inf", "zero"])
    @pytest.mark.parametrize("own_edges", [False, True])
    def test_nothing_is_left_on_the_cpu(self, masked_logits, own_edges):
        mask = mask_of(masked_logits=masked_logits)
        row_ptr, col = mask.to_csr()
        edges = (torch.cat([row_ptr, row_ptr + len(col)]), col.repeat(2)) if own_edges else (mask.spec,)
        suffix = "_edges" if own_edges else ""
        forward, backward = getattr(_core, f"forward{suffix}"), getattr(_core, f"backward{suffix}")
        q, k, v, grad = (torch.empty(2, 2, 9, 5, device="meta") for _ in range(4))
        key_mask = torch.empty(2, 9, dtype=torch.bool, device="meta")
        bias = torch.empty(2, 1, 9, 9, device="meta")
        dropout_p = 0.5 if masked_logits == "neg_inf" or own_edges else 0.0
        options = (*edges, key_mask, bias, torch.tensor(3), dropout_p, 0.3)
        out, lse = forward("aten", q, k, v, *options)
        grads = backward("aten", grad, q, k, v, out, lse, *options)
        assert all(x.is_meta and x.transpose(1, 2).is_contiguous() for x in (out, *grads))
        assert lse.is_meta
        assert lse.is_contiguous()
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_double_backward_without_data_has_the_right_shapes(self, with_bias):
        q, k, v = (torch.empty(2, 2, 9, 5, device="meta", requires_grad=True) for _ in range(3))
        bias = torch.empty(1, 2, 9, 9, device="meta", requires_grad=True)
        inputs = [q, k, v, *[bias][:with_bias]]
        out = sm.sparse_attention(q, k, v, mask_of(), attn_mask=bias if with_bias else None)
        first = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        assert all(x.is_meta for x in second)
        assert [x.shape for x in second] == [x.shape for x in inputs]

    @pytest.mark.parametrize("place", [1, 2, 4, 5])
    def test_a_tensor_that_stayed_behind_is_noticed(self, place):
        arguments = [torch.empty(2, 2, 9, 5, device="meta") for _ in range(3)]
        arguments += [mask_of().spec, torch.empty(2, 9, device="meta").bool(), torch.empty(2, 1, 9, 9, device="meta")]
        arguments[place] = torch.zeros_like(arguments[place], device="cpu")
        with pytest.raises(RuntimeError, match="device"):
            _core.forward("aten", *arguments, None, 0.0, 0.3)


class TestWhichTestsRunOnBoth:
    @pytest.mark.parametrize("entry", [*NO_ATTENTION, *OWN_CHOICE])
    def test_every_exception_is_a_test_that_exists(self, entry):
        file, *names = entry.split("::")
        path = Path(__file__).parent / file
        if path.is_dir():
            assert not names
            assert list(path.glob("test_*.py"))
            return
        text = path.read_text()
        for name in names:
            assert f"class {name}:" in text or f"def {name}" in text

    def test_a_test_that_is_not_listed_runs_on_both(self, engine):
        assert runs_on_both("test_anything.py::test_new")
        assert not runs_on_both("test_ops.py::TestReference::test_it_is_scaled_dot_product_attention")
        # This file is listed, so here nothing is chosen but by the test itself.
        assert engine is None

    @pytest.mark.usefixtures("engine")
    def test_the_fixture_chooses(self, engine):
        assert engine_for(CPU) == engine


class TestWork:
    def test_rows_longer_than_a_chunk_are_continued(self):
        # 16 MiB hold 1,024 edges of 2,048 channels in float64.
        q, k, v = (torch.randn(1, 1, 1500, 2048, dtype=torch.float64) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q[:, :, :2].clone(), k, v)]
        with sm.engine("aten"):
            out, lse = sm.sparse_attention(*leaves, None, return_lse=True)
        expected, expected_lse = dense_attention(*leaves)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak by Linux's means")
    def test_memory_grows_with_the_edges(self):
        script = """
import resource, torch, sparse_mhsa as sm
def attend(tokens):
    mask = sm.Mask.from_config({"mask": "fibottention"}, num_tokens=tokens, num_heads=4)
    q, k, v = (torch.randn(1, 4, tokens, 32, requires_grad=True) for _ in range(3))
    with sm.engine("aten"):
        sm.sparse_attention(q, k, v, mask).sum().backward()
attend(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(20_001)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        # 11 tensors of 10 MB, the plan, and chunks of 16 MiB; a mask of all pairs would be 1.6 GB per head.
        assert int(result.stdout) < 400, result.stderr

    def test_ctrl_c_stops_it(self):
        script = """
import os, signal, threading, time, torch, sparse_mhsa as sm
mask = sm.Mask.from_config({"mask": "none"}, num_tokens=8_000, num_heads=8)
q = torch.randn(1, 8, 8_000, 64)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    with sm.engine("aten"):
        torch.ops.sparse_mhsa.forward(q, q, q, mask.spec, None, None, None, 0.0, 1.0)
    print("finished")
except KeyboardInterrupt:
    print("interrupted")
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert result.stdout.split() == ["interrupted"], result.stdout + result.stderr

    def test_dropout_drops_the_same_weights_as_our_kernels(self):
        mask, (q, k, _) = mask_of(40), tensors(40)
        values = torch.eye(40, dtype=torch.float64).expand(2, 2, 40, 40)
        arguments = (q, k, values, mask.spec, None, None, torch.tensor(7), 0.4, 0.5)
        ours, aten = (_core.forward(name, *arguments)[0] for name in ("cpu", "aten"))
        assert torch.equal(ours == 0, aten == 0)
        assert 0 < (ours != 0).sum() < 2 * mask.nnz
        torch.testing.assert_close(aten, ours, rtol=1e-13, atol=0)
