"""What masks would keep of dense attention, against weights written out densely from the layers' own inputs."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_mhsa as sm
from sparse_mhsa.cli import main
from sparse_mhsa.layer import SparseLayer

LOCAL = {"mask": "local", "mask_kwargs": {"window": 2}}
CANDIDATES = {
    "local": LOCAL,
    "wider": {"mask": "local", "mask_kwargs": {"window": 6}},
    "fibottention": {"mask": "fibottention"},
    "topk": {"mask": "topk", "mask_kwargs": {"k": 4}},
    "blocks": {"mask": "block_topk", "mask_kwargs": {"k": 1, "block_size": 4}},
    "dense": {"mask": "none"},
}


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1, dtype=torch.float64, **kwargs)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in model.parameters():  # sharper attention than that of fresh weights
        parameter.data.mul_(2.0)
    return model


def vit():
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**kwargs).double()


def heads(module, x):
    """q, k, v (B, H, N, D) of torch's or timm's layer."""
    if isinstance(module, nn.MultiheadAttention):
        packed = x @ module.in_proj_weight.T + module.in_proj_bias
    else:
        packed = module.qkv(x)
    return [t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in packed.chunk(3, -1)]


@torch.no_grad()
def by_definition(model, batches, names, configs, bias=None, keep=None, prefix=None):
    """(mass, error, density) by candidate, layer and head, from the inputs of the layers of a dense model."""
    inputs = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: inputs[name].append(args[0] if args else kwargs["query"]),
            with_kwargs=True,
        )
        for name in names
    ]
    model.eval()
    for args in batches:
        model(*args[0], **args[1])
    for hook in hooks:
        hook.remove()
    expected = {}
    for layer, name in enumerate(names):
        module = model.get_submodule(name)
        for candidate, config in configs.items():
            masses, errors, norms, edges, queries = 0.0, 0.0, 0.0, 0.0, 0
            for x in inputs[name]:
                q, k, v = heads(module, x)
                scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
                scores = scores if bias is None else scores + bias
                real = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
                scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
                dense = scores.softmax(-1)
                if sm.load_config(config).by_content:
                    padding = {"key_padding_mask": keep, "layer": layer, "num_prefix_tokens": prefix}
                    mask = torch.stack([each.to_dense() for each in sm.choose_masks(config, q, k, **padding)])
                else:
                    size = (x.shape[1], module.num_heads)
                    place = {"layer": layer, "num_layers": len(names), "num_prefix_tokens": prefix}
                    mask = sm.Mask.from_config(config, *size, **place).to_dense()[None]
                weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
                of = real[:, None, :]
                masses += ((dense * mask).sum(-1) * of).sum((0, 2))
                errors += (((weights - dense) @ v).square().sum(-1) * of).sum((0, 2))
                norms += ((dense @ v).square().sum(-1) * of).sum((0, 2))
                edges += mask.expand_as(scores).double().mean((0, 2, 3)) * len(x)
                queries += real.sum()
            samples = sum(map(len, inputs[name]))
            for head in range(module.num_heads):
                error = (errors[head] / norms[head]).sqrt()
                expected[candidate, name, head] = (masses[head] / queries, error, edges[head] / samples)
    return expected


def check(result, expected):
    assert sorted((row.config, row.layer, row.head) for row in result.rows) == sorted(expected)
    for row in result.rows:
        mass, error, density = (float(x) for x in expected[row.config, row.layer, row.head])
        assert row.mass == pytest.approx(mass, rel=1e-9), row
        assert row.error == pytest.approx(error, rel=1e-7, abs=1e-9), row
        assert row.density == pytest.approx(density, rel=1e-12), row


def test_a_timm_model_keeps_what_its_dense_weights_say():
    model = vit()
    batches = [torch.randn(n, 3, 32, 32, dtype=torch.float64) for n in (2, 3)]
    names = ["blocks.0.attn", "blocks.1.attn"]
    expected = by_definition(model, [((x,), {}) for x in batches], names, CANDIDATES, prefix=1)
    result = sm.calibrate(model, [(x, torch.zeros(len(x))) for x in batches], CANDIDATES)
    check(result, expected)
    assert all(row.mass == pytest.approx(1.0) for row in result.rows if row.config == "dense")
    assert result.num_batches == 2


@pytest.mark.parametrize("masked", ["nothing", "padding", "attn_mask", "both"])
def test_a_torch_encoder_with_masks_counts_what_they_leave(masked):
    model, batch = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    keep = torch.arange(12) < torch.tensor([[12], [7]]) if masked in ("padding", "both") else None
    bias = torch.randn(2, 4, 12, 12, dtype=torch.float64) if masked in ("attn_mask", "both") else None
    if bias is not None:
        bias[..., 3] = -torch.inf
    padding = None if keep is None else ~keep
    if masked == "both":  # torch wants both of one kind
        padding = torch.zeros(2, 12, dtype=torch.float64).masked_fill(padding, -torch.inf)
    mask = None if bias is None else bias.flatten(0, 1)
    arguments = {"src": batch, "mask": mask, "src_key_padding_mask": padding}
    names = ["layers.0.self_attn", "layers.1.self_attn"]
    candidates = {name: CANDIDATES[name] for name in ("local", "fibottention", "dense")}
    if bias is None:
        candidates["topk"] = CANDIDATES["topk"]
    expected = by_definition(model, [((), arguments)], names, candidates, bias, keep)
    check(sm.calibrate(model, [arguments], candidates), expected)


def test_a_torchvision_model_is_measured_layer_by_layer():
    models = pytest.importorskip("torchvision.models")
    kwargs = {"image_size": 32, "patch_size": 8, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    model = models.VisionTransformer(num_layers=2, num_classes=3, **kwargs).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names = [f"encoder.layers.encoder_layer_{index}.self_attention" for index in range(2)]
    expected = by_definition(model, [((x,), {})], names, CANDIDATES, prefix=1)
    check(sm.calibrate(model, [x], CANDIDATES), expected)


class WithWeights(nn.Module):
    """A model that asks for the attention weights, sequence first."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, dtype=torch.float64)

    def forward(self, x):
        out, weights = self.attn(x, x, x)
        return out * weights.sum()


def test_a_model_that_uses_the_weights_gets_them_and_embedding_norms_are_seen_sequence_first():
    model, x = WithWeights(), torch.randn(9, 2, 16, dtype=torch.float64)
    seen = []
    config = {"mask": "importance", "mask_kwargs": {"score": "embedding_norm", "k": 2}}
    result = sm.calibrate(model, [x], [config], forward=lambda model, batch: seen.append(model(batch)))
    torch.testing.assert_close(seen[0], model(x))
    q, k, _ = heads(model.attn, x.transpose(0, 1))
    top = x.transpose(0, 1).norm(dim=-1).topk(2).indices
    weights = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
    mass = weights.gather(-1, top[:, None, None, :].expand(-1, 4, 9, -1)).sum(-1).mean((0, 2))
    assert [row.mass for row in result.rows] == pytest.approx(mass.tolist())


def test_the_model_is_left_as_it_was():
    model = encoder().train()
    model.layers[0].eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    sm.calibrate(model, [x], [LOCAL])
    assert [type(module) for module in model.modules()] == types
    assert [model.layers[index].training for index in range(2)] == [False, True]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_sparse_already_are_measured_dense_and_stay_sparse():
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    dense = sm.calibrate(model, [x], [LOCAL])
    backend = {"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": 12, "r": 3}}}
    sm.sparsify(model, LOCAL, overrides={r"layers\.1": {**backend, "mask": "none", "mask_kwargs": {}}})
    model.eval()
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    # The second layer's input is that of the dense model: everything is dense while it is measured.
    assert sm.calibrate(model, [x], [LOCAL]).rows == dense.rows
    assert isinstance(model.layers[0].self_attn, SparseLayer)
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    model = encoder()
    types = [type(module) for module in model.modules()]
    batches = [torch.randn(2, 12, 16, dtype=torch.float64), torch.randn(2, 12, 7, dtype=torch.float64)]
    with pytest.raises(AssertionError, match="embedding dim"):
        sm.calibrate(model, batches, [LOCAL])
    assert [type(module) for module in model.modules()] == types


class NoSquares(TorchDispatchMode):
    """Refuses tensors as large as one head's N x N."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        assert self.largest < self.limit, f"{func} made {self.largest} numbers"
        return out


def test_nothing_as_large_as_one_heads_matrix_is_ever_made():
    tokens = 1024
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1)
    configs = [
        LOCAL,
        {"mask": "topk", "mask_kwargs": {"k": 4}},
        {"mask": "vertical_slash", "mask_kwargs": {"slash": [1]}},
    ]
    with NoSquares(tokens**2 // 8) as mode:
        sm.calibrate(model, [torch.randn(1, tokens, 16)], configs)
    assert mode.largest >= tokens * 16


# Recommendations.


def test_the_recommendation_is_the_cheapest_that_keeps_enough_of_each_layer():
    model, x = encoder(), torch.randn(4, 24, 16, dtype=torch.float64)
    result = sm.calibrate(model, [x], CANDIDATES)
    for mass in (0.2, 0.5, 0.9, 1.0):
        text = result.recommend(mass)
        config = sm.load_config(text)
        for layer in result.layers:
            of_layer = config.for_layer(layer)
            enough = {}
            for name in CANDIDATES:
                kept = result.of(name, layer)
                if sum(row.mass for row in kept) / len(kept) >= mass:
                    enough[name] = sum(row.density for row in kept) / len(kept)
            name = min(enough, key=enough.get, default=None)
            expected = sm.load_config(CANDIDATES[name] if name else "mask: none").for_layer(layer)
            assert json.loads(of_layer.to_json())["mask_kwargs"] == json.loads(expected.to_json())["mask_kwargs"]
            assert of_layer.mask == expected.mask
            assert f"#   {layer}: {name or 'dense'}" in text
        sm.sparsify(model, text)
        sm.densify(model)


def test_layers_may_get_different_masks():
    model, x = encoder(), torch.randn(4, 24, 16, dtype=torch.float64)
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    first.in_proj_weight.data.mul_(0.0)  # uniform attention: a window keeps little of it
    second.in_proj_weight.data.mul_(4.0)
    result = sm.calibrate(model, [x], {"topk": CANDIDATES["topk"]})
    config = sm.load_config(result.recommend(0.8))
    assert [config.for_layer(layer).mask for layer in result.layers] == ["none", "topk"]


def test_a_random_candidate_is_recommended_with_the_seed_that_was_measured():
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    result = sm.calibrate(model, [x], {"random": {"mask": "random", "mask_kwargs": {"k": 3}}})
    (seed,) = result.configs["random"].seeds
    assert seed is not None
    assert sm.load_config(result.recommend(0.01)).seeds == [seed]


# How it shows itself.


def test_the_result_is_data_table_and_heat_map():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    result = sm.calibrate(model, [x], {"near": LOCAL, "<far>": CANDIDATES["wider"]})
    data = json.loads(json.dumps(result.to_dict()))
    assert len(data["rows"]) == 2 * 2 * 4
    assert data["configs"]["near"]["mask_kwargs"]["window"] == 2
    table = str(result).splitlines()
    assert len(table) == 1 + 2 * 2
    heads_of = result.of("near", "layers.0.self_attn")
    least = min(heads_of, key=lambda row: row.mass)
    for cell in ("layers.0.self_attn", "near", f"{least.mass:.2%} ({least.head})", f"{heads_of[0].density:.2%}"):
        assert cell in table[1]
    assert "&lt;far&gt;" in result._repr_html_()
    axes = result.plot()
    assert len(axes) == 2
    shown = axes[0].images[0].get_array()
    assert shown.shape == (2, 4)
    assert float(shown[0, 1]) == pytest.approx(heads_of[1].mass)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(result.layers)
    pyplot.close("all")


def test_candidates_of_a_list_are_named_by_file_or_mask():
    model, x = encoder(), torch.randn(2, 197, 16, dtype=torch.float64)
    configs = [sm.configs()["vit_bigbird"], LOCAL, CANDIDATES["wider"]]
    assert list(sm.calibrate(model, [x], configs).configs) == ["vit_bigbird", "local", "local #2"]


# Bad input.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attention_that_is_not_finite_is_an_error_that_names_layer_batch_and_sample(value):
    model, x = encoder(), torch.randn(3, 12, 16, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[2, 5, 0] = value
    message = r"loader: batch 1 .* the layer `layers\.0\.self_attn` attention that is not finite, samples 2;"
    with pytest.raises(ValueError, match=message):
        sm.calibrate(model, [x, spoiled], [LOCAL])
    assert not isinstance(model.layers[0].self_attn, SparseLayer)  # it is as it was


def test_a_batch_without_a_token_is_an_error_that_names_it():
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    padding = {"src": x, "src_key_padding_mask": torch.ones(2, 12, dtype=torch.bool)}
    for nothing in (x[:0], padding):
        with pytest.raises(ValueError, match=r"loader: batch 1 .* layer `layers\.0\.self_attn` no sample, or padding"):
            sm.calibrate(encoder(), [x, nothing], [LOCAL])


@pytest.mark.parametrize("mass", ["a", None, True])
def test_what_is_no_share_of_mass_is_a_type_error(mass):
    result = sm.calibrate(encoder(), [torch.randn(2, 12, 16, dtype=torch.float64)], [LOCAL])
    with pytest.raises(TypeError, match="mass: expected a number above 0 and at most 1, got"):
        result.recommend(mass)


def test_attention_to_padding_need_not_be_finite():
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    padding = torch.arange(12) >= torch.tensor([[12], [0]])  # the second sample has no key at all
    arguments = {"src": x, "src_key_padding_mask": padding}
    expected = sm.calibrate(model, [x[:1]], [LOCAL]).rows
    for got, alone in zip(sm.calibrate(model, [arguments], [LOCAL]).rows, expected, strict=True):
        assert got.mass == pytest.approx(alone.mass)
        assert got.error == pytest.approx(alone.error)


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        ([], ValueError, "configs: expected at least one"),
        ("mask: none", TypeError, "configs: expected a list"),
        (["backend: efficient"], sm.ConfigError, "`efficient` has no edges"),
        ([{"mask": "fibo", "masked_logits": "zero"}], sm.ConfigError, "masked_logits: expected neg_inf, got zero"),
        ([{"mask": "fibo", "scale": 0.5}], sm.ConfigError, "scale: expected null"),
        ([{"mask": "axial"}], sm.ConfigError, r"layers\.0\.self_attn: axial: .*grid"),
        ([{"mask": "none", "layers": {"nowhere": LOCAL}}], sm.ConfigError, "layers: `nowhere` matches none"),
    ],
)
def test_candidates_without_mass_are_named(configs, error, message):
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    with pytest.raises(error, match=message):
        sm.calibrate(model, [x], configs)
    assert not any(isinstance(module, SparseLayer) for module in model.modules())


def test_other_bad_input_is_named():
    model, x = encoder(), torch.randn(2, 12, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        sm.calibrate(model, [], [LOCAL])
    with pytest.raises(ValueError, match="num_batches: expected at least 1, got 0"):
        sm.calibrate(model, [x], [LOCAL], num_batches=0)
    with pytest.raises(TypeError, match=r"num_batches: expected an integer, got float 2\.5"):
        sm.calibrate(model, [x], [LOCAL], num_batches=2.5)
    with pytest.raises(TypeError, match=r"loader: expected tensors, .* got str"):
        sm.calibrate(model, ["text"], [LOCAL])
    with pytest.raises(ValueError, match="include: `nowhere` matches none"):
        sm.calibrate(model, [x], [LOCAL], include="nowhere")
    with pytest.raises(ValueError, match=r"never called: layers\.1\.self_attn"):
        sm.calibrate(model, [x], [LOCAL], forward=lambda model, batch: model.layers[0](batch))
    with pytest.raises(ValueError, match=r"mass: expected above 0 and at most 1, got 1\.5"):
        sm.calibrate(model, [x], [LOCAL]).recommend(1.5)
    model = nn.ModuleList([nn.MultiheadAttention(16, 4, add_zero_attn=True)])
    with pytest.raises(ValueError, match="0: layers with add_bias_kv or add_zero_attn cannot be calibrated"):
        sm.calibrate(model, [x], [LOCAL])


# The command.


def test_the_command_measures_held_out_images_and_writes_what_it_found(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    near, far = tmp_path / "near.yaml", tmp_path / "far.yaml"
    near.write_text(json.dumps(LOCAL))
    far.write_text(json.dumps(CANDIDATES["wider"]))
    out = tmp_path / "out"
    words = ["--dataset", "digits", "--patch-size", "2", "--batch-size", "8", "--batches", "2", "--mass", "0.3"]
    assert main(["calibrate", str(near), str(far), *words, "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the weights are random" in printed
    data = json.loads((out / "calibration.json").read_text())
    assert data["num_batches"] == 2
    assert {(row["config"], row["layer"]) for row in data["rows"]} == {
        (name, f"blocks.{index}.attn") for name in ("near", "far") for index in range(4)
    }
    assert (out / "calibration.txt").read_text() in printed
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    config = sm.load_config(out / "recommended.yaml")
    for layer in range(4):
        rows = [row for row in data["rows"] if (row["config"], row["layer"]) == ("near", f"blocks.{layer}.attn")]
        near_is_enough = sum(row["mass"] for row in rows) / len(rows) >= 0.3
        window = json.loads(config.for_layer(f"blocks.{layer}.attn").to_json())["mask_kwargs"].get("window")
        assert (window == 2) == near_is_enough


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: FILE"),
        ("missing.yaml", "no such file: 'missing.yaml'"),
        ("FILE --mass 1.5", "--mass must be above 0 and at most 1, got 1.5"),
        ("FILE --batches 0", "--batches must be at least 1, got 0"),
        ("FILE --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("FILE --dataset imagefolder", "--dataset imagefolder needs --data-path"),
        ("FILE --dataset digits --model nothing", "--model: timm has no model 'nothing'"),
        ("FILE --dataset digits --finetune missing.pth", "--finetune: no such file: 'missing.pth'"),
    ],
)
def test_bad_usage_of_the_command_is_one_line(tmp_path, capsys, words, message):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    path = tmp_path / "local.yaml"
    path.write_text(json.dumps(LOCAL))
    given = [str(path) if word == "FILE" else word for word in words.split()]
    assert main(["calibrate", *given, "--no-plots", "--output-dir", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
