"""What is left to PyTorch's dense attention: bfloat16 with every key kept, where there is a matrix unit."""

from types import SimpleNamespace

import pytest
import torch

import sparse_mhsa as sm
from comparison import assert_as_good_as_dense, oracle_with_grads
from sparse_mhsa import handover

N, HEADS, DIM = 40, 2, 16


@pytest.fixture
def called(monkeypatch):
    """The dense kernels that were called."""
    names = []

    def noting(name, short):
        kernel = getattr(torch.ops.aten, name).default
        return SimpleNamespace(default=lambda *args, **options: names.append(short) or kernel(*args, **options))

    forward, backward = (f"_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward"))
    kernels = {forward: noting(forward, "forward"), backward: noting(backward, "backward")}
    monkeypatch.setattr(handover, "_ATEN", SimpleNamespace(**kernels))
    return names


@pytest.fixture
def matrix_unit(monkeypatch):
    monkeypatch.setattr(handover, "has_matrix_unit", lambda: True)


def draw(*, heads=HEADS, key_heads=HEADS, dim=DIM, value_dim=DIM, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = (heads, dim), (key_heads, dim), (key_heads, value_dim)
    q, k, v = (torch.randn(3, h, N, d, dtype=torch.float64).to(dtype).requires_grad_() for h, d in shapes)
    return q, k, v


def run(q, k, v, mask, **options):
    sm.sparse_attention(q, k, v, mask, **options).sum().backward()


def everything(heads=HEADS):
    return sm.masks.none(num_tokens=N, num_heads=heads)


@pytest.mark.usefixtures("matrix_unit")
class TestWithAMatrixUnit:
    def test_both_directions_are_left_to_dense_attention(self, called):
        with sm.engine("cpu"):
            run(*draw(), everything())
        assert called == ["forward", "backward"]

    @pytest.mark.parametrize(
        ("inputs", "options"),
        [
            ({"dtype": torch.float32}, {}),
            ({"dtype": torch.float16}, {}),
            ({"key_heads": 1}, {}),
            ({"value_dim": 8}, {}),
            ({}, {"dropout_p": 0.1}),
            ({}, {"key_padding_mask": torch.ones(3, N, dtype=torch.bool)}),
            ({}, {"attn_mask": torch.zeros(N, N, dtype=torch.bfloat16)}),
        ],
    )
    def test_not_what_it_cannot_do_or_does_slower(self, called, inputs, options):
        with sm.engine("cpu"):
            run(*draw(**inputs), everything(), **options)
        assert called == []

    @pytest.mark.parametrize("mask", [sm.masks.local(num_tokens=N, num_heads=HEADS, window=N), None])
    def test_a_mask_is_dense_by_its_name(self, called, mask):
        with sm.engine("cpu"):
            run(*draw(), mask)
        assert called == ([] if mask else ["forward", "backward"])

    def test_not_where_another_engine_is_chosen(self, called):
        with sm.engine("aten"):
            run(*draw(), everything())
        assert called == []

    @pytest.mark.parametrize("strided", [False, True])
    def test_outputs_and_gradients_keep_the_tolerance_rule(self, called, strided):
        q, k, v = draw()
        if strided:  # along channels, which dense kernels do not read
            q, k, v = (x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v))
        grad_out = torch.randn(3, HEADS, N, DIM).bfloat16()
        keep = torch.ones(N, N, dtype=torch.bool)
        in_same_dtype, in_float64 = (
            oracle_with_grads(q, k, v, grad_out, keep, dtype) for dtype in (torch.bfloat16, torch.float64)
        )
        with sm.engine("cpu"):
            out, lse = sm.sparse_attention(q, k, v, everything(), return_lse=True)
            got = (out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out))
        names = ("out", "lse", "dq", "dk", "dv")
        for what, mine, base, truth in zip(names, got, in_same_dtype, in_float64, strict=True):
            assert_as_good_as_dense(mine, base, truth, factor=3 if what.startswith("d") else 2, what=what)
        assert "backward" in called

    def test_lse_is_that_of_the_scores(self):
        q, k, v = draw()
        with sm.engine("cpu"):
            _, lse = sm.sparse_attention(q, k, v, everything(), scale=0.3, return_lse=True)
        torch.testing.assert_close(lse, torch.logsumexp(0.3 * q.float() @ k.float().mT, -1), rtol=1e-3, atol=1e-3)
        assert lse.is_contiguous()

    def test_there_is_a_second_derivative(self):
        q, k, v = draw()
        with sm.engine("cpu"):
            second = second_derivative(lambda *x: sm.sparse_attention(*x, everything()), q, k, v)
        exact = second_derivative(
            torch.nn.functional.scaled_dot_product_attention, *(x.detach().double().requires_grad_() for x in (q, k, v))
        )
        assert (second.double() - exact).norm() < 0.03 * exact.norm()

    def test_no_token_is_no_error(self):
        q, k, v = (torch.zeros(2, HEADS, 0, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with sm.engine("cpu"):
            sm.sparse_attention(q, k, v, sm.masks.none(num_tokens=0, num_heads=HEADS)).sum().backward()
        assert q.grad.shape == q.shape


def second_derivative(attention, q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]


def test_without_a_matrix_unit_our_kernels_do_it(monkeypatch, called):
    monkeypatch.setattr(handover, "has_matrix_unit", lambda: False)
    with sm.engine("cpu"):
        run(*draw(), everything())
    assert called == []
