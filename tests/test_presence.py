"""Layers that are told which tokens are there: masked autoencoders, VideoMAE, patch dropout, and by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from models import FIBOTTENTION, LOCAL, CopiedAttention, encoder, timm, vit
from sparse_mhsa.adapters import find_attention

transformers = pytest.importorskip("transformers")

RANDOM = {"mask": "random", "mask_kwargs": {"k": 4, "keep_cls_dense": False, "seed": 5}}


def some_positions(batch, kept, num_tokens, generator=None):
    return torch.rand(batch, num_tokens, generator=generator).argsort(dim=1)[:, :kept]


def with_class_token(patches):
    return torch.cat([torch.zeros(patches.shape[0], 1, dtype=torch.int64), patches + 1], dim=1)


def dense_at(mask, positions):
    """(B, H, n, n) of a (H, N, N) mask: entry i, j is that of the tokens that stand there."""
    return torch.stack([mask[:, p][:, :, p] for p in positions])


class TestByHand:
    @pytest.mark.parametrize("kind", ["torch.nn", "timm", "transformers"])
    def test_every_kind_of_layer_follows(self, kind, engine):
        # The class token is always there, so that no query is without a key.
        positions = with_class_token(some_positions(2, 8, 16))
        mask = sm.Mask.from_config(FIBOTTENTION, 17, 3)
        keep = dense_at(mask.to_dense(), positions)
        x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
        if kind == "torch.nn":
            layer = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
            expected = layer(x, x, x, attn_mask=~keep.flatten(0, 1))
            sm.sparsify(layer, FIBOTTENTION)
            with sm.token_positions(layer, positions, 17):
                got = layer(x, x, x)
            assert_same(got[1], expected[1], atol=1e-12)
            got, expected = got[0], expected[0]
        elif kind == "timm":
            layer = timm.layers.attention.Attention(24, 3).double()
            expected = layer(x, attn_mask=keep)
            sm.sparsify(layer, FIBOTTENTION)
            with sm.token_positions(layer, positions, 17):
                got = layer(x)
        else:
            config = transformers.ViTConfig(hidden_size=24, num_attention_heads=3)
            config._attn_implementation = "sdpa"
            layer = transformers.models.vit.modeling_vit.ViTAttention(config).double().eval()
            expected, _ = layer(x, attention_mask=keep)
            sm.sparsify(layer, FIBOTTENTION)
            with sm.token_positions(layer, positions, 17):
                got, weights = layer(x, output_attentions=True)
            assert torch.equal(weights > 0, keep)
        assert_same(got.detach(), expected.detach(), atol=1e-12)
        mine, truth = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected))
        assert_same(mine, truth, atol=1e-11)
        assert layer.positions is None

    def test_all_tokens_in_their_order_are_the_plain_mask(self):
        layer = CopiedAttention().double()
        sm.sparsify(layer, FIBOTTENTION)
        x = torch.randn(2, 17, 24, dtype=torch.float64)
        with sm.token_positions(layer, torch.arange(17).expand(2, -1), 17):
            got = layer(x)
        assert_same(got.detach(), layer(x).detach(), atol=1e-12)

    def test_a_shuffled_input_gives_the_shuffled_output(self):
        layer = CopiedAttention().double()
        sm.sparsify(layer, FIBOTTENTION)
        x = torch.randn(1, 17, 24, dtype=torch.float64)
        order = torch.randperm(17)[None]
        with sm.token_positions(layer, order, 17):
            got = layer(x[:, order[0]])
        assert_same(got.detach(), layer(x)[:, order[0]].detach(), atol=1e-12)

    def test_other_tokens_than_the_positions_say_are_an_error(self):
        layer = CopiedAttention()
        sm.sparsify(layer, LOCAL)
        with sm.token_positions(layer, some_positions(2, 9, 17), 17):
            with pytest.raises(ValueError, match=r"token_positions: expected shape \(B, n\) = \(2, 8\), got \(2, 9\)"):
                layer(torch.randn(2, 8, 24))
            layer(torch.randn(2, 17, 24))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"mask": "block_topk", "mask_kwargs": {"k": 1, "block_size": 4}},
                "`block_topk` chooses keys by content and by place",
            ),
            ({**LOCAL, "masked_logits": "zero"}, "masked_logits: `zero` cannot be combined"),
        ],
    )
    def test_what_cannot_be_honoured_is_an_error(self, config, message):
        layer = CopiedAttention()
        sm.sparsify(layer, config)
        with sm.token_positions(layer, some_positions(2, 9, 17), 17), pytest.raises(ValueError, match=message):
            layer(torch.randn(2, 9, 24))

    def test_topk_compares_the_tokens_that_are_there(self):
        layer = CopiedAttention()
        sm.sparsify(layer, "mask: topk")
        x = torch.randn(2, 9, 24)
        expected = layer(x)
        with sm.token_positions(layer, with_class_token(some_positions(2, 8, 16)), 17):
            assert torch.equal(layer(x), expected)

    def test_it_ends_with_the_context_whatever_happens(self):
        model = encoder()
        sm.sparsify(model, LOCAL)
        with pytest.raises(KeyError), sm.token_positions(model, some_positions(2, 9, 17), 17):
            raise KeyError
        assert all(site.module.positions is None for site in find_attention(model))


class MaskedAutoencoder(nn.Module):
    """In the manner of the published one: the encoder sees a shuffled part, the decoder everything."""

    def __init__(self, depth=2, mask_ratio=0.5):
        super().__init__()
        self.mask_ratio = mask_ratio
        block = timm.models.vision_transformer.Block
        self.patch_embed = timm.layers.PatchEmbed(32, 8, 3, 24)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.ModuleList([block(24, 3, qkv_bias=True) for _ in range(depth)])
        self.mask_token = nn.Parameter(torch.randn(1, 1, 24))
        self.decoder_blocks = nn.ModuleList([block(24, 3, qkv_bias=True)])

    def random_masking(self, x, mask_ratio):
        batch, patches, dim = x.shape
        ids_shuffle = torch.rand(batch, patches).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, : int(patches * (1 - mask_ratio))]
        kept = x.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, dim))
        return kept, torch.ones(batch, patches), ids_restore

    def forward_encoder(self, x):
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, _, ids_restore = self.random_masking(x, self.mask_ratio)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x, ids_restore

    def forward(self, x):
        x, ids_restore = self.forward_encoder(x)
        patches = torch.cat([x[:, 1:], self.mask_token.expand(x.shape[0], 17 - x.shape[1], -1)], dim=1)
        patches = patches.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, 24))
        x = torch.cat([x[:, :1], patches], dim=1) + self.pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return x


def _encoded_by(model, x):
    model.__dict__["blocks"] = model.encoder
    try:
        return MaskedAutoencoder.forward_encoder(model, x)
    finally:
        del model.__dict__["blocks"]


def told(model, masks, positions_of):
    """The dense timm model whose layers get, as their attn_mask, their mask at the positions that are there."""
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        attention = model.get_submodule(name)

        def forward(x, attn_mask=None, is_causal=False, dense=attention.forward, mask=mask):
            keep = mask[None] if x.shape[1] == mask.shape[-1] else dense_at(mask, positions_of())
            return dense(x, attn_mask=keep)

        attention.forward = forward
    return model


class TestMaskedAutoencoder:
    def masked(self, model, config, include=None):
        """The oracle: random_masking draws the same numbers, and tells here what it kept."""
        masks, latest = {}, []
        for site in find_attention(model):
            if site.dense_by_design is None or include:
                place = {"layer": site.layer, "num_layers": site.num_layers, "num_prefix_tokens": 1}
                masks[site.name] = sm.Mask.from_config(config, 17, 3, **place).to_dense()
        expected = told(model, masks, lambda: latest[-1])
        original = expected.random_masking

        def random_masking(x, mask_ratio):
            kept, mask, ids_restore = original(x, mask_ratio)
            ids_keep = ids_restore.argsort(dim=1)[:, : kept.shape[1]]
            latest.append(with_class_token(ids_keep))
            return kept, mask, ids_restore

        expected.random_masking = random_masking
        return expected

    @pytest.mark.parametrize("config", [LOCAL, FIBOTTENTION, RANDOM], ids=["local", "fibottention", "random"])
    @pytest.mark.parametrize("include", [None, "attn"], ids=["encoder", "decoder too"])
    def test_the_encoder_has_its_masks_at_the_original_positions(self, config, include):
        model = MaskedAutoencoder().double()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        expected_model = self.masked(model, config, include)
        torch.manual_seed(3)
        expected = expected_model(x)
        report = sm.sparsify(model, config, include=include, verify=True)
        assert len(report.swapped) == (3 if include else 2)
        torch.manual_seed(3)
        got = model(x)
        assert_same(got.detach(), expected.detach(), atol=1e-12)
        got.square().sum().backward()
        expected.square().sum().backward()
        for mine, truth in zip(model.parameters(), expected_model.parameters(), strict=True):
            assert_same(mine.grad, truth.grad, rtol=1e-9, atol=1e-9)

    def test_without_positions_it_would_be_something_else(self):
        model = MaskedAutoencoder().double()
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        sm.sparsify(model, LOCAL)
        torch.manual_seed(3)
        right = model(x)
        for block in model.blocks:
            block.attn.positions = None
        torch.manual_seed(3)
        assert not torch.allclose(model(x), right)

    def test_checkpointed_blocks_see_the_same_positions(self):
        model = MaskedAutoencoder().double()
        sm.sparsify(model, FIBOTTENTION)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(3)
            if checkpointed:
                for block in model.blocks:
                    block.forward = lambda x, forward=block.forward: torch.utils.checkpoint.checkpoint(
                        forward, x, use_reentrant=False
                    )
            gradients.append(torch.autograd.grad(model(x).square().sum(), x)[0])
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_two_views_cannot_be_computed_again_and_one_after_the_other_can(self, reentrant):
        """The positions of the first would be those of the second."""
        model = MaskedAutoencoder().double()
        sm.sparsify(model, FIBOTTENTION)
        for block in model.blocks:
            block.forward = lambda x, forward=block.forward: torch.utils.checkpoint.checkpoint(
                forward, x, use_reentrant=reentrant
            )
        a, b = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
        together = model(a).square().sum() + model(b).square().sum()
        with pytest.raises(RuntimeError, match="token_positions: with gradient checkpointing"):
            together.backward()
        del together  # what nobody waits for any more does no harm
        for view in (a, b, a):
            loss = model(view).square().sum()
            with torch.no_grad():
                model.eval()
            loss.backward()

    def test_a_copy_whose_blocks_have_another_name_is_followed(self):
        model = MaskedAutoencoder().double()
        other = copy.deepcopy(model)
        other.encoder, other.blocks = other.blocks, None
        other.forward_encoder = lambda x: _encoded_by(other, x)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        outputs = []
        for each in (model, other):
            sm.sparsify(each, LOCAL)
            torch.manual_seed(3)
            outputs.append(each(x))
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_follow_their_own_masking(self, how):
        model = MaskedAutoencoder()
        sm.sparsify(model, FIBOTTENTION)
        x = torch.randn(2, 3, 32, 32)
        model(x)
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert twin.blocks[0].attn.positions is twin.noted
        assert twin.noted is not model.noted
        assert twin.noted.positions is None
        outputs = []
        for each in (model, twin):
            torch.manual_seed(3)
            outputs.append(each(x))
        assert torch.equal(*outputs)

    def test_densify_is_the_exact_inverse(self):
        model = MaskedAutoencoder()
        before = copy.deepcopy(model)
        sm.sparsify(model, FIBOTTENTION)
        assert isinstance(model, MaskedAutoencoder)
        model.load_state_dict(before.state_dict(), strict=True)
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name


SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3, "decoder_intermediate_size": 32,
}  # fmt: skip


class TestTransformers:
    def test_vit_mae(self):
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, mask_ratio=0.5)).double().eval()
        x, noise = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16)
        before = copy.deepcopy(model)
        before(x, output_attentions=True)
        report = sm.sparsify(model, LOCAL, verify=True)
        assert {row.reason for row in report.skipped} == {"decoder"}
        attentions = model(x, noise=noise, output_attentions=True).attentions
        kept = noise.argsort(dim=1)[:, :8]
        positions = with_class_token(kept)
        mask = sm.masks.local(num_tokens=17, num_heads=3, window=1, num_prefix_tokens=1).to_dense()
        for weights in attentions:
            assert torch.equal(weights > 0, dense_at(mask, positions))
        model(x).loss.backward()
        sm.densify(model)
        for (name, module), (_, original) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(original), name
            assert module.__dict__.keys() == original.__dict__.keys(), name

    def test_video_mae(self):
        config = transformers.VideoMAEConfig(**SIZES, num_frames=4, tubelet_size=2)
        model = transformers.VideoMAEForPreTraining(config).double().eval()
        x = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
        hidden = torch.stack([torch.randperm(32) < 20 for _ in range(2)])
        sm.sparsify(model, LOCAL, verify=True, sample={"pixel_values": x, "bool_masked_pos": hidden})
        weights = model(x, bool_masked_pos=hidden, output_attentions=True).attentions[0]
        positions = (~hidden).nonzero()[:, 1].view(2, 12)
        mask = sm.masks.local(num_tokens=32, num_heads=3, window=1).to_dense()
        assert torch.equal(weights > 0, dense_at(mask, positions))
        whole = model.videomae(x, bool_masked_pos=None, output_attentions=True).attentions[0]
        assert torch.equal(whole > 0, mask.expand(2, -1, -1, -1))


class TestPatchDropout:
    @pytest.mark.parametrize("name", ["vit", "eva"])
    def test_what_is_left_keeps_its_neighbours(self, name):
        if name == "vit":
            model = vit(patch_drop_rate=0.5)
        else:
            options = {"img_size": 56, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
            model = timm.create_model("eva02_tiny_patch14_224", patch_drop_rate=0.5, **options).double()
        model.train()
        x = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
        masks, latest = {}, []
        for site in find_attention(model):
            place = {"layer": site.layer, "num_layers": site.num_layers, "num_prefix_tokens": 1}
            masks[site.name] = sm.Mask.from_config(FIBOTTENTION, 17, 3, **place).to_dense()
        expected = copy.deepcopy(model)
        for block_name, mask in masks.items():
            attention = expected.get_submodule(block_name)

            def forward(x, dense=attention.forward, mask=mask, **kwargs):
                keep = mask[None] if x.shape[1] == 17 else dense_at(mask, latest[-1])
                return dense(x, **{**kwargs, "attn_mask": keep})

            attention.forward = forward
        expected.patch_drop.register_forward_pre_hook(lambda *_: latest.append(self.drawn(2, 16, 8)))
        sm.sparsify(model, FIBOTTENTION, verify=True)
        for training in (True, False):
            for each in (model, expected):
                each.train(training)
            torch.manual_seed(3)
            truth = expected(x)
            torch.manual_seed(3)
            assert_same(model(x).detach(), truth.detach(), atol=1e-11)
        before = type(expected.patch_drop)
        assert isinstance(model.patch_drop, before)
        sm.densify(model)
        assert type(model.patch_drop) is before

    @staticmethod
    def drawn(batch, patches, kept):
        """The positions that the next call of timm's patch dropout will keep."""
        with torch.random.fork_rng():
            ids = torch.randn(batch, patches).argsort(dim=-1)[:, :kept]
        return with_class_token(ids)


def _that_drops_tokens(kind):
    """A model, its output for a batch of images, and the module that says how much is dropped and its name for it."""
    torch.manual_seed(0)
    if kind == "patch dropout":
        model = vit(patch_drop_rate=0.5).train()
        return model, model, (model.patch_drop, "prob")
    if kind == "autoencoder":
        model = MaskedAutoencoder().double()
        return model, model, (model, "mask_ratio")
    config = transformers.ViTMAEConfig(**SIZES, mask_ratio=0.5)
    model = transformers.ViTMAEForPreTraining(config).double()
    return model, lambda x: model(x).loss, (model.vit.embeddings.config, "mask_ratio")


@pytest.mark.parametrize("kind", ["patch dropout", "autoencoder", "transformers"])
class TestToolbox:
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
    def test_one_graph_serves_every_batch_and_another_share_compiles_again(self, kind):
        torch._dynamo.reset()
        model, run, (owner, share) = _that_drops_tokens(kind)
        sm.sparsify(model, FIBOTTENTION)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        for batch, dropped, graphs in ((2, 0.5, 1), (3, 0.5, 1), (3, 0.25, 2)):
            setattr(owner, share, dropped)
            x = torch.randn(batch, 3, 32, 32, dtype=torch.float64)
            results = []
            for each in (run, compiled):
                torch.manual_seed(3)
                out = each(x)
                gradients = torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)
                results.append([out.detach(), *gradients])
            for mine, truth in zip(*results, strict=True):
                assert_same(mine, truth, rtol=1e-9, atol=1e-12)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        torch._dynamo.reset()

    @pytest.mark.parametrize("config", [LOCAL, {"mask": "topk"}], ids=["local", "topk"])
    @pytest.mark.filterwarnings("ignore:.*batching rule for aten:UserWarning")
    def test_gradients_of_each_sample(self, kind, config):
        model, *_ = _that_drops_tokens(kind)
        sm.sparsify(model, config)
        parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        x = torch.randn(3, 3, 32, 32, dtype=torch.float64)

        def loss(parameters, sample):
            out = torch.func.functional_call(model, parameters, (sample[None],))
            return (out.loss if kind == "transformers" else out).square().sum()

        # Each sample keeps the tokens that it keeps in a batch of its own.
        torch.manual_seed(3)
        got = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="same")(parameters, x)
        for sample in range(3):
            torch.manual_seed(3)
            truth = torch.func.grad(loss)(parameters, x[sample])
            for name in parameters:
                assert_same(got[name][sample], truth[name], rtol=1e-9, atol=1e-10, what=name)
