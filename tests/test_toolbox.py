"""What torch offers around a model, used on one whose attention was swapped.

What concerns a single operator or layer stands with it: compilation, export, transforms, autocast, dropout and second
derivatives in test_ops.py and test_module.py, workers in test_robustness.py, copies and pickles in test_sparsify.py.
"""

import copy
import functools
import io
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, encoder, images, vit
from sparse_mhsa.flops import flop_counter

torchvision = pytest.importorskip("torchvision")


def swapped(config=FIBOTTENTION, **kwargs):
    model = vit(**kwargs)
    sm.sparsify(model, config)
    return model


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class TestParametrize:
    def test_weights_of_a_swapped_model(self):
        model = vit()
        x = images(model)
        for block in model.blocks:
            parametrize.register_parametrization(block.attn.qkv, "weight", Doubled())
        by_hand = swapped()
        for block in by_hand.blocks:
            block.attn.qkv.weight.data *= 2
        sm.sparsify(model, FIBOTTENTION)
        assert_same(model(x).detach(), by_hand(x).detach(), atol=1e-12)

    def test_the_packed_weight_of_a_sparse_layer(self):
        model = encoder()
        sm.sparsify(model, LOCAL)
        attention, x = model.layers[0].self_attn, torch.randn(2, 7, 12, dtype=torch.float64)
        plain = copy.deepcopy(model)
        plain.layers[0].self_attn.in_proj_weight.data *= 2
        parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
        assert_same(model(x).detach(), plain(x).detach(), atol=1e-12)
        parametrize.remove_parametrizations(attention, "in_proj_weight")
        assert type(attention) is sm.SparseMHSA
        assert_same(model(x).detach(), plain(x).detach(), atol=1e-12)

    def test_a_layer_parametrized_since_the_swap_keeps_densify_from_losing_that(self):
        model = encoder()
        sm.sparsify(model, LOCAL)
        attention = model.layers[1].self_attn
        parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
        with pytest.raises(RuntimeError, match=r"layers.1.self_attn: torch has made it a ParametrizedSparseMHSA since"):
            sm.densify(model)
        assert [type(layer.self_attn) for layer in model.layers] == [sm.SparseMHSA, type(attention)]
        parametrize.remove_parametrizations(attention, "in_proj_weight")
        assert len(sm.densify(model).restored) == 2

    def test_a_dense_layer_that_is_parametrized_itself_is_skipped_with_the_reason(self):
        model = encoder()
        parametrize.register_parametrization(model.layers[0].self_attn, "in_proj_weight", Doubled())
        reasons = {row.module: row.reason for row in sm.sparsify(model, LOCAL).skipped}
        assert list(reasons) == ["layers.0.self_attn"]
        assert "parametrized: swap it first" in reasons["layers.0.self_attn"]


@pytest.mark.parametrize("average", ["torch", "timm"])
def test_an_average_of_the_weights_is_sparse_too(average):
    model = swapped()
    x = images(model)
    if average == "torch":
        shadow = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        shadow.update_parameters(model)  # the first time copies
        update = shadow.update_parameters
    else:
        from timm.utils import ModelEmaV3

        shadow = ModelEmaV3(model, decay=0.5)
        update = shadow.update
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), expected.parameters(), strict=True):
            old = parameter.clone()
            parameter.add_(0.1 * torch.randn_like(parameter))
            mean.copy_((old + parameter) / 2)
    update(model)
    assert_same(shadow(x).detach(), expected(x).detach(), atol=1e-10)


def test_meta_as_the_default_device():
    torch.set_default_device("meta")
    try:
        model = swapped()
        assert next(model.parameters()).is_meta
        report = sm.sparsify(model, LOCAL, verify=True)
        assert {row.num_tokens for row in report.swapped} == {17}
        assert model(images(model)).is_meta
        assert sm.SparseMHSA(12, 2, config=LOCAL)(*[torch.randn(5, 2, 12)] * 3)[0].is_meta
    finally:
        torch.set_default_device(None)


def test_the_operators_have_names_in_a_profile():
    model = swapped()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(images(model)).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert (calls["sparse_mhsa::forward"], calls["sparse_mhsa::backward"]) == (3, 3)


class TestFlops:
    """Torch's own counter takes dense attention on the CPU for free."""

    projections_and_scores = 2 * 2 * 17 * 24 * (4 * 24 + 2 * 17)

    def test_dense_and_sparse_models(self):
        model = vit(depth=1).float()
        x = images(model).float()
        counts = {}
        for name in ("dense", "full", "sparse"):
            if name != "dense":
                sm.sparsify(model, "mask: none" if name == "full" else LOCAL)
            with flop_counter() as counter:
                model(x).sum().backward()
            counts[name] = counter.get_total_flops()
        with FlopCounterMode(display=False) as theirs:
            sm.densify(model)
            model(x)
        with flop_counter() as ours:
            model(x)
        assert ours.get_total_flops() - theirs.get_total_flops() == 2 * 2 * 2 * 17 * 17 * 24
        assert counts["dense"] == counts["full"]
        nnz = sm.masks.local(num_tokens=17, num_heads=3, window=1, num_prefix_tokens=1).nnz
        edges_saved = 3 * 17 * 17 - nnz
        # Two products forward and five backward, of 8 features, for 2 samples.
        assert counts["dense"] - counts["sparse"] == 2 * 2 * 7 * 8 * edges_saved

    def test_fused_layers_in_evaluation(self):
        layer = nn.MultiheadAttention(24, 3, batch_first=True)
        block = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
        x = torch.randn(2, 17, 24)
        attention = self.projections_and_scores
        for module, call, expected in (
            (layer, lambda: layer(x, x, x, need_weights=False), attention),
            (block, lambda: block(x), attention + 2 * 2 * 17 * 2 * 24 * 40),
        ):
            for training in (True, False):
                module.train(training)
                with torch.set_grad_enabled(training), flop_counter() as counter:
                    call()
                assert counter.get_total_flops() == expected, (type(module).__name__, training)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestWholeGraphs:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_one_graph_serves_every_number_of_tokens(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = sm.SparseMHSA(12, 2, batch_first=True, dtype=torch.float64, config=FIBOTTENTION)

            def forward(self, x):
                return x + self.attn(x, x, x, need_weights=False)[0]

        model = Block()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch, tokens in ((2, 5), (3, 9), (4, 17), (2, 30)):
            x = torch.randn(batch, tokens, 12, dtype=torch.float64)
            assert_same(compiled(x).detach(), model(x).detach(), atol=1e-12)
            for mine, truth in zip(gradients(compiled, x), gradients(model, x), strict=True):
                assert_same(mine, truth, atol=1e-10)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_inductor_compiles_a_swapped_model_for_every_batch(self):
        model = swapped()
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for batch in (2, 3, 5):
            x = images(model, batch)
            for mine, truth in zip(gradients(compiled, x), gradients(model, x), strict=True):
                assert_same(mine, truth, atol=1e-9)

    def test_an_exported_model_is_saved_loaded_and_takes_other_batches(self):
        model = swapped().eval()
        batch = torch.export.Dim("batch")
        exported = torch.export.export(model, (images(model),), dynamic_shapes={"x": {0: batch}})
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        x = images(model, 5)
        assert_same(torch.export.load(file).module()(x).detach(), model(x).detach(), atol=1e-12)


def test_gradients_of_each_sample_through_a_whole_model():
    model = swapped().eval()
    x = images(model, 3)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for sample in range(3):
        for mine, truth in zip(got.values(), gradients(model, x[sample : sample + 1]), strict=True):
            assert_same(mine[sample], truth, atol=1e-10)


def test_a_gradient_penalty_through_a_whole_model():
    """The second derivative, by the norm of the first: that of the dense model with the masks spelled out."""
    results = []
    for config in ("mask: none", LOCAL):
        dense = encoder().train()
        model = copy.deepcopy(dense)
        sm.sparsify(model, config)
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        keep = model.layers[0].self_attn.mask(7).to_dense()
        penalties = []
        for run in (model, functools.partial(dense, mask=~keep.repeat(2, 1, 1))):
            at = x.clone().requires_grad_()
            # Of torch's own kernels only this one has second derivatives.
            with sdpa_kernel(SDPBackend.MATH):
                (slope,) = torch.autograd.grad(run(at)[..., 0].square().sum(), at, create_graph=True)
                penalties.append(torch.autograd.grad((slope.norm() - 1).square(), at)[0])
        assert_same(penalties[0], penalties[1], atol=1e-8)
        results.append(penalties[0])
    assert not torch.allclose(*results)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class TestShards:
    """`fully_shard` gives a module a class of its own."""

    def test_a_model_that_drops_tokens_is_swapped_before_or_after(self, mesh):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        expected = swapped(patch_drop_rate=0.5).train()
        x = images(expected)
        for first in ("swap", "shard"):
            model = vit(patch_drop_rate=0.5).train()
            if first == "swap":
                sm.sparsify(model, FIBOTTENTION)
            for part in (*model.blocks, model.patch_drop, model):
                fully_shard(part, mesh=mesh)
            if first == "shard":
                sm.sparsify(model, FIBOTTENTION)
            outputs = []
            for each in (model, expected):
                torch.manual_seed(3)
                outputs.append(each(x).detach())
            assert torch.equal(*outputs)
            if first == "swap":
                with pytest.raises(RuntimeError, match=r"patch_drop: torch has made it a FSDPSparsePatchDropout since"):
                    sm.densify(model)
            else:
                sm.densify(model)
                assert isinstance(model.patch_drop, FSDPModule)

    @pytest.mark.parametrize("kind", ["timm", "torch.nn"])
    def test_attention_that_is_sharded_by_itself_is_skipped_with_the_reason(self, mesh, kind):
        from torch.distributed.fsdp import fully_shard

        model = vit() if kind == "timm" else encoder()
        first = model.blocks[0].attn if kind == "timm" else model.layers[0].self_attn
        fully_shard(first, mesh=mesh)
        (row,) = sm.sparsify(model, LOCAL).skipped
        assert row.reason.endswith("which is sharded by itself: swap it first")


def _train_in_a_group(rank, world, folder, how):
    """Two steps on this rank's share of the batch; rank 0 saves the weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    try:
        torch.set_num_threads(1)
        model = swapped()
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (world,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        _train(wrapped, lambda x: x.chunk(world)[rank])
        state = model.state_dict()
        if how == "fsdp":
            state = {name: shard.full_tensor() for name, shard in state.items()}
        if rank == 0:
            torch.save(state, f"{folder}/weights")
    finally:
        dist.destroy_process_group()


def _train(model, share):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(share(x)).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(how):
    expected = swapped()
    _train(expected, lambda x: x)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_train_in_a_group, (2, folder, how), nprocs=2)
        weights = torch.load(f"{folder}/weights", weights_only=True)
    dense = vit()
    dense.load_state_dict(weights, strict=True)
    for name, parameter in expected.state_dict().items():
        assert_same(weights[name], parameter, atol=1e-10, what=name)
    assert not torch.equal(weights["blocks.0.attn.qkv.weight"], vit().blocks[0].attn.qkv.weight)
