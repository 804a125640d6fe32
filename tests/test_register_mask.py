"""`register_mask`: a user's own mask, wherever a built-in one goes, and what a hostile one meets."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same, oracle_with_grads

PATCHES, HEADS = 12, 2


@sm.register_mask("every_other")
def every_other(context, step=2):
    """Query i keeps every key j with i - j a multiple of step."""
    return lambda head, row: range(row % step, context.num_tokens, step)


def expected_every_other(num_patches, step=2, prefix=0):
    i = torch.arange(num_patches)
    dense = torch.ones(num_patches + prefix, num_patches + prefix, dtype=torch.bool)
    dense[prefix:, prefix:] = (i[:, None] - i) % step == 0
    return dense


@pytest.fixture
def define():
    """Register a mask under a name of its own."""

    def register(function, **options):
        name = f"test_mask_{len(sm.register.user_masks())}"
        sm.register_mask(name, **options)(function)
        return name

    return register


class TestWhereItGoes:
    @pytest.mark.parametrize("prefix", [0, 1, 3])
    @pytest.mark.parametrize("step", [1, 2, 5])
    def test_from_yaml_and_from_the_module_of_masks(self, prefix, step):
        text = f"mask: every_other\nmask_kwargs:\n  step: {step}\nnum_prefix_tokens: {prefix}\n"
        by_yaml = sm.Mask.from_config(text, PATCHES + prefix, HEADS)
        by_name = sm.masks.every_other(
            num_tokens=PATCHES + prefix, num_heads=HEADS, num_prefix_tokens=prefix, step=step
        )
        expected = expected_every_other(PATCHES, step, prefix)
        for mask in (by_yaml, by_name):
            assert torch.equal(mask.to_dense(), expected.expand(HEADS, -1, -1))
            assert (mask.name, mask.num_prefix_tokens) == ("every_other", prefix)
        assert by_yaml == by_name

    def test_the_prefix_may_be_left_sparse(self):
        mask = sm.Mask.from_config("{mask: every_other, num_prefix_tokens: 2, prefix_dense: false}", PATCHES + 2, 1)
        expected = expected_every_other(PATCHES, prefix=2)
        expected[:2], expected[:, :2] = False, False
        assert torch.equal(mask.to_dense()[0], expected)

    def test_values_gradients_and_second_derivatives(self):
        mask = sm.masks.every_other(num_tokens=7, num_heads=HEADS, step=3)
        q, k, v, grad = (torch.randn(2, HEADS, 7, 3, dtype=torch.float64) for _ in range(4))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = sm.sparse_attention(*leaves, mask, return_lse=True)
        got = (out, lse, *torch.autograd.grad(out, leaves, grad))
        for x, y in zip(got, oracle_with_grads(q, k, v, grad, mask.to_dense(), torch.float64), strict=True):
            assert_same(x.detach(), y, rtol=1e-10, atol=1e-11)
        assert torch.autograd.gradgradcheck(lambda *x: sm.sparse_attention(*x, mask), leaves, fast_mode=True)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_module_compiled_copied_and_pickled(self):
        torch._dynamo.reset()
        module = sm.SparseMHSA(8, HEADS, batch_first=True, config={"mask": "every_other"}, num_prefix_tokens=1)
        x = torch.randn(2, PATCHES + 1, 8)
        expected = module(x, x, x, need_weights=False)[0].detach()
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_same(twin(x, x, x, need_weights=False)[0].detach(), expected)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, x, x, need_weights=False)[0].detach(), expected, atol=1e-6)

    def test_layers_and_sparsify(self):
        model = nn.ModuleDict({f"layer{i}": nn.MultiheadAttention(8, HEADS) for i in range(3)})
        layers = {"layer1": {"mask": "every_other", "mask_kwargs": {"step": 3}}}
        report = sm.sparsify(model, {"mask": "local", "mask_kwargs": {"window": 1}, "layers": layers})
        assert [row.mask for row in report.rows] == ["local", "every_other", "local"]
        assert torch.equal(model["layer1"].mask(9).to_dense()[0], expected_every_other(9, 3))

    def test_the_configuration_survives_its_text(self):
        config = sm.load_config({"mask": "every_other", "mask_kwargs": {"step": 4}})
        assert sm.AttentionConfig.parse(config.to_yaml()) == config
        assert json.loads(config.to_json())["mask_kwargs"] == {"step": 4}

    def test_the_operators_pass_their_own_checks(self):
        spec = sm.masks.every_other(num_tokens=6, num_heads=HEADS).spec
        q = torch.randn(1, HEADS, 6, 4)
        options = (None, None, None, 0.0, 0.5)
        torch.library.opcheck(torch.ops.sparse_mhsa.forward.default, (q, q, q, spec, *options))


DENSE = expected_every_other(PATCHES)
FORMS = {
    "mask": lambda dense: sm.Mask.from_dense(dense),
    "tensor": lambda dense: dense,
    "array": lambda dense: dense.numpy(),
    "per head": lambda dense: torch.stack([dense, ~dense]),
    "csr": lambda dense: tuple(x[0] if x.dim() == 2 else x for x in sm.Mask.from_dense(dense).to_csr()),
    "torch coo": lambda dense: dense.to_sparse_coo(),
    "torch coo, uncoalesced": lambda dense: torch.sparse_coo_tensor(
        dense.nonzero().T.repeat(1, 2), torch.ones(2 * int(dense.sum())), dense.shape, is_coalesced=False
    ),
    "torch csr": lambda dense: dense.float().to_sparse_csr(),
    "torch csc": lambda dense: dense.float().to_sparse_csc(),
    "torch bsr": lambda dense: dense.float().to_sparse_bsr((1, 1)),
    "torch bsc": lambda dense: dense.float().to_sparse_bsc((1, 1)),
    "index lists": lambda dense: [row.nonzero()[:, 0].tolist() for row in dense],
    "function of bools": lambda dense: lambda head, row: dense[row],
}


class TestForms:
    """What the function may return."""

    @pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
    @pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta state")
    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_every_form_gives_the_edges(self, define, form):
        name = define(lambda context: form(DENSE))
        mask = sm.Mask.from_config({"mask": name}, PATCHES, HEADS)
        assert torch.equal(mask.to_dense()[0], DENSE)

    def test_scipy(self, define):
        sparse = pytest.importorskip("scipy.sparse")
        name = define(lambda context: sparse.csr_matrix(DENSE.numpy()))
        assert torch.equal(sm.Mask.from_config({"mask": name}, PATCHES, 1).to_dense()[0], DENSE)

    def test_edges_without_a_function(self):
        sm.register_mask("given_edges", [[0], [0, 1], [2]])
        mask = sm.masks.given_edges(num_tokens=4, num_heads=1, num_prefix_tokens=1)
        assert mask.to_dense()[0, 1:, 1:].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
        with pytest.raises(ValueError, match=r"mask `given_edges`: .* over 4 patches, got 1 heads over 3"):
            sm.masks.given_edges(num_tokens=4, num_heads=1)


class TestContext:
    def test_what_the_function_is_told(self, define):
        seen = []

        def spy(context, factor=1.5, names=("a",)):
            seen.append((context, factor, names))
            return torch.eye(context.num_tokens, dtype=torch.bool)

        name = define(spy, uses_layer=True, uses_epoch=True)
        config = {"mask": name, "mask_kwargs": {"factor": 2, "names": ["x", {"y": None}]}, "grid": [3, 4]}
        sm.Mask.from_config(config, 13, HEADS, layer=5, num_layers=6, epoch=7, num_prefix_tokens=1)
        ((context, factor, names),) = seen
        assert (context.num_tokens, context.num_heads, context.grid) == (12, HEADS, (3, 4))
        assert (context.layer, context.num_layers, context.epoch) == (5, 6, 7)
        assert (factor, names) == (2, ["x", {"y": None}])

    def test_layers_share_edges_unless_the_mask_depends_on_them(self, define):
        calls = []

        def count(context):
            calls.append(context.num_tokens)
            return torch.eye(context.num_tokens, dtype=torch.bool)

        for uses_layer, expected in ((False, 1), (True, 4)):
            name = define(count, uses_layer=uses_layer)
            calls.clear()
            x = torch.randn(1, 6, 8)
            for layer in range(4):
                module = sm.SparseMHSA(8, HEADS, batch_first=True, config={"mask": name}, layer=layer)
                for _ in range(3):
                    module(x, x, x)
                assert module.mask(6).nnz == HEADS * 6
            assert len(calls) == expected

    @pytest.mark.parametrize("what", ["layer", "num_layers", "epoch"])
    def test_an_undeclared_dependence_is_an_error_and_not_a_wrong_mask(self, define, what):
        name = define(lambda context: torch.eye(context.num_tokens + 0 * (getattr(context, what) or 0)).bool())
        declared = "layer" if what == "num_layers" else what
        with pytest.raises(ValueError, match=f"depends on the {declared}, but was registered without uses_{declared}="):
            sm.Mask.from_config({"mask": name}, 4, 1)

    def test_epochs(self, define):
        name = define(lambda context: lambda head, row: [(row + context.epoch) % context.num_tokens], uses_epoch=True)
        module = sm.SparseMHSA(8, HEADS, config={"mask": name})
        for epoch in (0, 2, 1):
            sm.set_epoch(module, epoch)
            assert torch.equal(module.mask(5).to_dense()[0], torch.eye(5).roll(epoch, 1).bool())


class TestRegistration:
    def test_an_unknown_mask_names_the_registered_ones(self):
        with pytest.raises(sm.ConfigError, match=r"mask: unknown mask `every_othr`: did you mean `every_other`\?"):
            sm.load_config("mask: every_othr")
        with pytest.raises(AttributeError, match="did you mean `every_other`"):
            _ = sm.masks.every_othr

    def test_keys_are_those_of_the_signature(self, define):
        with pytest.raises(sm.ConfigError, match=r"unknown key `stp`: did you mean `step`\? allowed: step") as error:
            sm.load_config("mask: every_other\nmask_kwargs:\n  stp: 3\n")
        assert (error.value.key, error.value.line) == ("mask_kwargs.stp", 3)
        with pytest.raises(TypeError, match=r"masks.every_other: unknown keyword `stp`, did you mean `step`\?"):
            sm.masks.every_other(num_tokens=4, num_heads=1, stp=3)
        name = define(lambda context, needed, given=1: [[0]])
        with pytest.raises(sm.ConfigError, match=r"mask_kwargs.needed: missing: it has no default"):
            sm.load_config({"mask": name})

    @pytest.mark.parametrize("name", ["local", "fibo", "dense", "every_other"])
    def test_names_are_given_once(self, name):
        with pytest.raises(ValueError, match=f"name: `{name}` is (a built-in mask|registered already)"):
            sm.register_mask(name)

    @pytest.mark.parametrize("name", ["Upper", "two words", "", "a-b", 3, None])
    def test_names_are_lower_case_identifiers(self, name):
        with pytest.raises(ValueError, match="name: expected a lower-case identifier"):
            sm.register_mask(name)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda: None, "expected a function whose first parameter is the context"),
            (lambda *, context: None, "expected a function whose first parameter is the context"),
            (lambda *context: None, "expected a function whose first parameter is the context"),
            (lambda context, **kwargs: None, r"expected parameters with names, .* got `\*\*kwargs`"),
            (lambda context, *args: None, r"expected parameters with names, .* got `\*args`"),
            (3, r"expected a function of \(context, ...\), got int"),
        ],
    )
    def test_signatures_that_cannot_be_checked_are_refused(self, function, message):
        with pytest.raises(TypeError, match=f"mask `unfit`: {message}"):
            sm.register_mask("unfit")(function)

    def test_a_replaced_mask_is_used_at_once(self):
        q = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        outputs = []
        for shift in (0, 1):
            sm.register_mask("shifting", torch.eye(4).roll(shift, 1).bool(), replace=True)
            mask = sm.masks.shifting(num_tokens=4, num_heads=1)
            outputs.append(sm.sparse_attention(q, q, q, mask))
            assert_same(outputs[-1], q.roll(-shift, 2))

    def test_a_mask_that_is_made_keeps_its_edges_when_its_name_is_replaced(self):
        sm.register_mask("changing", torch.eye(4).bool(), replace=True)
        q = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        mask = sm.masks.changing(num_tokens=4, num_heads=1)
        layer = sm.SparseMHSA(4, 1, config=mask, dtype=torch.float64)
        before = layer(q[0, 0], q[0, 0], q[0, 0])[1]
        sm.register_mask("changing", torch.eye(4).roll(1, 1).bool(), replace=True)
        assert torch.equal(mask.to_dense()[0], torch.eye(4).bool())
        assert_same(sm.sparse_attention(q, q, q, mask), q)
        assert_same(layer(q[0, 0], q[0, 0], q[0, 0])[1], before)

    def test_a_mask_that_is_made_keeps_its_zero_logits_when_its_name_is_replaced(self):
        sm.register_mask("changing", torch.eye(4).bool(), replace=True)
        q = torch.randn(1, 1, 4, 4, dtype=torch.float64)
        mask = sm.Mask.from_config({"mask": "changing", "masked_logits": "zero"}, 4, 1)
        before = sm.sparse_attention(q, q, q, mask)
        sm.register_mask("changing", torch.eye(4).roll(1, 1).bool(), replace=True)
        assert_same(sm.sparse_attention(q, q, q, mask), before)

    def test_the_decorator_returns_the_function(self):
        assert every_other.__name__ == "every_other"
        assert "multiple of step" in sm.masks.every_other.__doc__

    def test_a_process_that_does_not_know_the_mask_says_so(self, tmp_path):
        module = sm.SparseMHSA(8, HEADS, config={"mask": "every_other"})
        spec = module.layer_mask.spec
        (tmp_path / "module.pickle").write_bytes(pickle.dumps(module))
        code = f"""
            import pickle, sys, torch, sparse_mhsa
            q = torch.randn(1, {HEADS}, 4, 4)
            for call in (
                lambda: torch.ops.sparse_mhsa.forward(q, q, q, {spec!r}, None, None, None, 0.0, 0.5),
                lambda: pickle.load(open({str(tmp_path / "module.pickle")!r}, "rb")),
            ):
                try:
                    call()
                except ValueError as error:
                    assert "unknown mask `every_other`" in str(error), error
                else:
                    sys.exit("no error")
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


HOSTILE = {
    "nothing": (lambda n: None, "TypeError: expected a Mask, bool"),
    "text": (lambda n: "edges", "TypeError: expected a Mask, bool"),
    "a number": (lambda n: 3, "TypeError: expected a Mask, bool"),
    "floats": (lambda n: torch.ones(n, n), "TypeError: dense: expected dtype bool"),
    "other device": (lambda n: torch.ones(n, n, device="meta").bool(), "TypeError: dense: expected a dense tensor"),
    "not square": (lambda n: np.ones((n, n + 1), dtype=bool), "ValueError: dense: expected shape"),
    "other size": (lambda n: torch.eye(n + 1).bool(), "ValueError: expected edges of 1 or 2 heads over 5 patches"),
    "other heads": (lambda n: torch.ones(3, n, n).bool(), "got 3 heads over 5"),
    "too few lists": (lambda n: [[0]], "got 1 heads over 1"),
    "key out of range": (
        lambda n: [[n]] * n,
        "row 0 of head 0: expected key indices from 0 to 4, got 5",
    ),
    "broken csr": (lambda n: ([0, 2, 1, 1, 1, 1], [0]), "ValueError: row_ptr"),
    "raising rows": (lambda n: lambda head, row: [][row], "IndexError: list index out of range"),
}


class TestHostileFunctions:
    @pytest.mark.parametrize(("result", "message"), HOSTILE.values(), ids=HOSTILE)
    def test_what_is_no_mask_is_an_error_with_the_masks_name(self, define, result, message):
        name = define(lambda context: result(context.num_tokens))
        with pytest.raises(ValueError, match=f"mask `{name}`: ") as error:
            sm.Mask.from_config({"mask": name}, 5, HEADS)
        assert message in str(error.value)

    def test_what_it_raises_is_the_cause(self, define):
        problem = KeyError("mine")

        def broken(context):
            raise problem

        name = define(broken)
        module = sm.SparseMHSA(8, HEADS, config={"mask": name})
        x = torch.randn(5, 1, 8)
        for call in (lambda: module.mask(5), lambda: module(x, x, x)):
            with pytest.raises(ValueError, match=f"mask `{name}`: KeyError: 'mine'") as error:
                call()
            assert error.value.__cause__ is problem
        # The error is not held against the next call.
        with pytest.raises(ValueError, match="spec"):
            torch.ops.sparse_mhsa.forward(x[None], x[None], x[None], "{}", None, None, None, 0.0, 1.0)

    def test_ctrl_c_inside_it_stays_what_it_is(self, define):
        def interrupted(context):
            raise KeyboardInterrupt

        name = define(interrupted)
        with pytest.raises(KeyboardInterrupt):
            sm.Mask.from_config({"mask": name}, 5, HEADS)

    def test_it_may_use_masks_itself(self, define):
        name = define(lambda context: sm.masks.local(num_tokens=context.num_tokens, num_heads=1, window=1))
        mask = sm.Mask.from_config({"mask": name}, 9, HEADS)
        assert mask == sm.masks.local(num_tokens=9, num_heads=HEADS, window=1)

    def test_tensors_that_require_grad_do_no_harm(self, define):
        weight = torch.randn(5, 5, requires_grad=True)
        name = define(lambda context: (weight > 0) | torch.eye(5).bool())
        q = torch.randn(1, 1, 5, 4, requires_grad=True)
        sm.sparse_attention(q, q, q, sm.Mask.from_config({"mask": name}, 5, 1)).sum().backward()
        assert weight.grad is None
        assert torch.isfinite(q.grad).all()
