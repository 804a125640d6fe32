"""`Mask`, the functions of module `masks`, pictures, costs, and `load_config`."""

import copy
import io
import json
import math
import pickle
import re
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import sparse_mhsa as sm
from comparison import assert_same
from sparse_mhsa import viz
from sparse_mhsa._torch_version import check_torch
from sparse_mhsa.catalogue import registered
from sparse_mhsa.config import MAX_CONFIG_BYTES
from sparse_mhsa.flops import attention_cost, attention_macs, in_unit

LOCAL = {"mask": "local", "mask_kwargs": {"window": 2}}


def local(n, window):
    i = torch.arange(n)
    return (i[:, None] - i).abs() <= window


def windows_of_swin(side, window, shift):
    """Which patches attend to which, as Swin does it: roll, cut into windows, mask what the roll brought together."""
    regions = torch.zeros(side, side, dtype=torch.int64)
    parts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in parts for columns in parts):
        regions[rows, columns] = number
    patches = torch.arange(side**2).view(side, side).roll((-shift, -shift), (0, 1))

    def partition(image):
        cut = image.view(side // window, window, side // window, window)
        return cut.transpose(1, 2).reshape(-1, window**2)

    keeps = torch.zeros(side**2, side**2, dtype=torch.bool)
    for inside, region in zip(partition(patches), partition(regions), strict=True):
        keeps[inside[:, None], inside] = region[:, None] == region
    return keeps


class TestMask:
    def test_counts_of_a_mask_known_by_hand(self):
        mask = sm.Mask.from_config(LOCAL, num_tokens=6, num_heads=3)
        assert (mask.num_tokens, mask.num_heads, mask.num_prefix_tokens) == (6, 3, 0)
        assert mask.nnz_per_head == [24, 24, 24]
        assert mask.nnz == 72
        assert mask.density == 24 / 36
        assert mask.pruning_ratio == pytest.approx(12 / 36)
        assert mask.degrees(1).tolist() == [3, 4, 5, 5, 4, 3]
        assert torch.equal(mask.to_dense(), local(6, 2).expand(3, 6, 6))

    def test_the_pruning_ratio_is_over_patches_and_the_density_over_everything(self):
        mask = sm.Mask.from_config(LOCAL, num_tokens=8, num_heads=1, num_prefix_tokens=2)
        dense = mask.to_dense()[0]
        assert mask.num_prefix_tokens == 2
        assert dense[:2].all()
        assert dense[:, :2].all()
        assert torch.equal(dense[2:, 2:], local(6, 2))
        assert mask.nnz_patches == 24
        assert mask.pruning_ratio == pytest.approx(1 - 24 / 36)
        assert mask.density == (64 - 36 + 24) / 64

    def test_published_density_of_fibottention(self):
        mask = sm.masks.fibottention(num_tokens=197, num_heads=12, head_dim=64)
        assert round(100 * mask.pruning_ratio, 2) == 98.01

    def test_modified_fibonacci_numbers_start_with_the_query_itself_and_one_distance_twice_is_one_edge(self):
        shape = {"num_tokens": 60, "num_heads": 3, "schedule": "fibonacci", "add_class_token": False}
        plain, modified = (sm.masks.fibottention(modified=m, **shape) for m in (False, True))
        assert torch.equal(modified.to_dense(), plain.to_dense() | torch.eye(60, dtype=torch.bool))
        assert modified.nnz == plain.nnz + 3 * 60

    def test_only_prefix_tokens(self):
        mask = sm.Mask.from_config(LOCAL, num_tokens=2, num_heads=1, num_prefix_tokens=2)
        assert mask.pruning_ratio == 0.0
        assert mask.density == 1.0

    @pytest.mark.parametrize("config", [LOCAL, {"mask": "fibottention"}, {"mask": "none"}])
    @pytest.mark.parametrize("num_tokens", [1, 2, 17])
    def test_csr_is_the_dense_mask_with_absolute_offsets(self, config, num_tokens):
        mask = sm.Mask.from_config(config, num_tokens=num_tokens, num_heads=3)
        row_ptr, col = mask.to_csr()
        assert (row_ptr.dtype, col.dtype) == (torch.int64, torch.int64)
        assert row_ptr.shape == (3, num_tokens + 1)
        assert len(col) == mask.nnz
        dense = torch.zeros(3, num_tokens, num_tokens, dtype=torch.bool)
        for head in range(3):
            for row in range(num_tokens):
                cols = col[row_ptr[head, row] : row_ptr[head, row + 1]]
                assert (cols.diff() > 0).all()
                dense[head, row, cols] = True
        assert torch.equal(dense, mask.to_dense())

    def test_the_operators_take_what_to_csr_gives(self):
        mask = sm.masks.fibottention(num_tokens=9, num_heads=2)
        q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
        out, _ = torch.ops.sparse_mhsa.forward_edges(q, k, v, *mask.to_csr(), None, None, None, 0.0, 0.5)
        assert_same(out, sm.sparse_attention(q, k, v, mask), atol=1e-6)

    def test_equality_hash_and_immutability(self):
        a = sm.Mask.from_config(LOCAL, num_tokens=6, num_heads=3)
        b = sm.Mask.from_config("mask: local\nmask_kwargs:\n  window: 2\n", 6, 3)
        assert a == b
        assert hash(a) == hash(b)
        assert a != sm.Mask.from_config(LOCAL, 7, 3)
        assert a != sm.Mask.from_config(LOCAL, 6, 2)
        assert a != sm.masks.local(num_tokens=6, num_heads=3, window=1)
        assert a != "local"
        for name in ("num_tokens", "nnz", "anything"):
            with pytest.raises(AttributeError):
                setattr(a, name, 3)

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
    def test_copies(self, copied):
        mask = sm.masks.fibottention(num_tokens=17, num_heads=3, layer=2, shuffled=True, head_dim=4)
        twin = copied(mask)
        assert twin == mask
        assert twin.head_dim == 4
        assert twin.config == mask.config
        assert torch.equal(twin.to_dense(), mask.to_dense())

    def test_layer_grid_and_prefix_reach_the_mask(self):
        layers = [sm.masks.fibottention(num_tokens=65, num_heads=6, layer=i, shuffled=True) for i in range(4)]
        assert len({mask.to_dense().numpy().tobytes() for mask in layers}) > 1
        assert sm.Mask.from_config(LOCAL, 8, 1, num_prefix_tokens=1).nnz > sm.Mask.from_config(LOCAL, 8, 1).nnz

    def test_the_configuration_wins_over_what_the_model_says(self):
        mask = sm.Mask.from_config({**LOCAL, "num_prefix_tokens": 0}, 8, 1, num_prefix_tokens=3)
        assert mask.num_prefix_tokens == 0

    def test_sizes_that_cannot_be_are_refused(self):
        with pytest.raises(ValueError, match="num_tokens: expected at most 4294967294, got 4611686018427387904"):
            sm.Mask.from_config(LOCAL, num_tokens=2**62, num_heads=1)
        with pytest.raises(ValueError, match="heads"):
            sm.Mask.from_config(LOCAL, num_tokens=4, num_heads=0)
        sizes = {"num_tokens": 4, "num_heads": 1}
        for name in ("num_tokens", "num_heads", "layer", "num_layers", "epoch", "head_dim", "num_prefix_tokens"):
            with pytest.raises(TypeError, match=f"{name}: expected an integer, got float 3.5"):
                sm.Mask.from_config(LOCAL, **(sizes | {name: 3.5}))
            with pytest.raises(TypeError, match=f"{name}: expected an integer, got bool True"):
                sm.Mask.from_config(LOCAL, **(sizes | {name: True}))
            with pytest.raises(ValueError, match=f"{name}: expected at least"):
                sm.Mask.from_config(LOCAL, **(sizes | {name: -1}))
        with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
            sm.Mask.from_config(LOCAL, 4, 1, head_dim=0)
        for grid in (4, "22", [2.0, 2]):
            with pytest.raises(TypeError, match="grid: expected"):
                sm.Mask.from_config(LOCAL, 4, 1, grid=grid)
        with pytest.raises(
            ValueError, match=r"grid: expected .* together at most 4294967295 cells, got \[2147483648, "
        ):
            sm.Mask.from_config(LOCAL, 4, 1, grid=[2**31, 2**31])
        with pytest.raises(TypeError, match="num_heads"):
            sm.Mask.from_config(LOCAL, 4)

    def test_more_prefix_tokens_than_tokens_are_an_error_of_the_configuration_that_asks_for_them(self):
        message = "num_prefix_tokens: expected at most the 25 tokens there are, got 30"
        with pytest.raises(sm.ConfigError, match=message) as raised:
            sm.Mask.from_config({**LOCAL, "num_prefix_tokens": 30}, num_tokens=25, num_heads=1)
        assert raised.value.key == "num_prefix_tokens"
        with pytest.raises(ValueError, match=message) as raised:
            sm.Mask.from_config(LOCAL, num_tokens=25, num_heads=1, num_prefix_tokens=30)
        assert not isinstance(raised.value, sm.ConfigError)

    def test_integers_of_numpy_are_numbers(self):
        expected = sm.Mask.from_config(LOCAL, 4, 2, grid=[2, 2], layer=1)
        assert (
            sm.Mask.from_config(LOCAL, np.int64(4), np.int32(2), grid=np.array([2, 2]), layer=np.uint8(1)) == expected
        )

    @pytest.mark.parametrize(("side", "window", "shift"), [(14, 7, 3), (12, 4, 1), (8, 4, 2), (9, 3, 2)])
    def test_shifted_windows_of_swin_have_the_shift_window_size_minus_its_own(self, side, window, shift):
        kwargs = {"window_size": window, "shift": window - shift}
        got = sm.masks.grid_window(num_tokens=side**2, num_heads=1, grid=[side, side], **kwargs)
        assert torch.equal(got.to_dense()[0], windows_of_swin(side, window, shift))

    def test_the_configuration_that_comes_with_the_package_is_swins(self):
        got = sm.Mask.from_config(sm.configs()["grid_window"], num_tokens=197, num_heads=1)
        assert torch.equal(got.to_dense()[0, 1:, 1:], windows_of_swin(14, 7, 3))

    def test_a_mask_of_a_million_tokens_takes_no_n_squared_memory(self):
        mask = sm.masks.local(num_tokens=1_000_000, num_heads=12, window=5)
        assert mask.nnz == 12 * (11 * 1_000_000 - 30)
        assert mask.density_image(0).shape == (512, 512)


class TestFactories:
    def test_every_registered_mask_and_alias_is_a_function(self):
        for name in ("none", "local", "longformer", "sparse", "fibottention", "fibo", "crossdiag"):
            assert name in dir(sm.masks)
            factory = getattr(sm.masks, name)
            assert "num_tokens" in factory.__doc__
        assert sm.masks.fibo(num_tokens=17, num_heads=2) == sm.masks.fibottention(num_tokens=17, num_heads=2)

    @pytest.mark.parametrize("mask", registered(), ids=lambda mask: mask.name)
    def test_a_docstring_has_definition_source_and_every_parameter(self, mask):
        text = getattr(sm.masks, mask.name).__doc__
        assert mask.definition in text
        assert "Source: " in mask.definition
        for parameter in mask.parameters:
            assert re.search(rf"^    {parameter.name}: .+", text, re.MULTILINE)
            assert parameter.required or f"Default: {parameter.default}." in text

    def test_keywords_of_the_mask_and_of_from_config_mix(self):
        mask = sm.masks.local(num_tokens=9, num_heads=2, window=1, num_prefix_tokens=1, head_dim=8)
        config = {"mask": "local", "mask_kwargs": {"window": 1}}
        assert mask == sm.Mask.from_config(config, 9, 2, num_prefix_tokens=1)
        assert mask.head_dim == 8

    def test_the_order_of_tokens_is_asked_for_where_the_grid_is(self):
        sizes = {"num_tokens": 24, "num_heads": 1}
        mask = sm.masks.space_time(**sizes, grid=[2, 3, 4], kind="space", token_order="t_fastest")
        config = {"mask": "space_time", "mask_kwargs": {"kind": "space"}, "token_order": "t_fastest"}
        assert mask == sm.Mask.from_config(config, **sizes, grid=[2, 3, 4])
        assert mask != sm.masks.space_time(**sizes, grid=[2, 3, 4], kind="space")
        with pytest.raises(sm.ConfigError, match="token_order: has no meaning for the mask `local`"):
            sm.masks.local(**sizes, window=1, token_order="t_fastest")

    def test_unknown_keywords_and_names_get_a_suggestion(self):
        with pytest.raises(TypeError, match=r"masks.local: unknown keyword `windw`, did you mean `window`\?"):
            sm.masks.local(num_tokens=9, num_heads=2, windw=1)
        with pytest.raises(
            TypeError,
            match=r"masks.axial: unknown keyword `colour`\. Allowed: grid, num_tokens, num_heads, layer, num_layers, "
            r"epoch, head_dim, num_prefix_tokens, token_order$",
        ):
            sm.masks.axial(num_tokens=9, num_heads=2, colour=1)
        with pytest.raises(TypeError, match=r"did you mean `num_tokens`\?"):
            sm.masks.local(num_token=9, num_heads=2)
        with pytest.raises(AttributeError, match="did you mean `fibottention`"):
            sm.masks.fibotention  # noqa: B018
        assert not hasattr(sm.masks, "_hidden")

    def test_a_mask_by_content_says_what_shows_its_edges(self):
        with pytest.raises(ValueError, match=r"`topk` chooses keys by the content.*`choose_masks` shows them"):
            sm.masks.topk(num_tokens=9, num_heads=2, k=3)

    def test_a_bad_value_is_a_config_error(self):
        with pytest.raises(sm.ConfigError, match="window"):
            sm.masks.local(num_tokens=9, num_heads=2, window=-3)


class TestPictures:
    @staticmethod
    def decode(png):
        """Grey pixels of an unfiltered 8-bit PNG."""
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        place, data = 8, b""
        while place < len(png):
            (length,) = struct.unpack(">I", png[place : place + 4])
            kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
            assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
            if kind == b"IHDR":
                width, height = struct.unpack(">II", body[:8])
            elif kind == b"IDAT":
                data += body
            place += 12 + length
        lines = np.frombuffer(zlib.decompress(data), dtype=np.uint8).reshape(height, width + 1)
        assert (lines[:, 0] == 0).all()
        return lines[:, 1:]

    def test_the_png_shows_every_head(self):
        mask = sm.masks.local(num_tokens=4, num_heads=2, window=1)
        pixels = self.decode(mask._repr_png_())
        cells = pixels[4 : 4 + 128, 4 : 4 + 128].reshape(4, 32, 4, 32)
        assert (cells.min(axis=(1, 3)) == cells.max(axis=(1, 3))).all()
        assert torch.equal(torch.from_numpy(cells[:, 0, :, 0] == 0), local(4, 1))
        assert (pixels[4 : 4 + 128, 136 : 136 + 128] == pixels[4 : 4 + 128, 4 : 4 + 128]).all()

    @pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (7, 3), (100, 5), (2, 1000)])
    def test_the_png_of_any_size_can_be_decoded(self, heads, tokens):
        mask = sm.masks.local(num_tokens=tokens, num_heads=heads, window=1)
        assert self.decode(mask._repr_png_()).size

    def test_html_has_the_numbers_and_the_picture(self):
        text = sm.masks.fibottention(num_tokens=17, num_heads=2, head_dim=8)._repr_html_()
        for piece in ("fibottention", "17 (1 prefix)", "pruning ratio", "GMACs", "GFLOPs", "data:image/png;base64,"):
            assert piece in text

    def test_repr(self):
        text = repr(sm.masks.local(num_tokens=6, num_heads=3, window=2))
        assert text == "Mask(local, num_tokens=6, num_heads=3, nnz=72, density=0.6667, pruning_ratio=0.3333)"

    @pytest.fixture
    def pyplot(self):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
        from matplotlib import pyplot

        yield pyplot
        pyplot.close("all")

    def test_plot_draws_one_axes_per_head_with_its_density(self, pyplot):
        mask = sm.masks.fibottention(num_tokens=65, num_heads=6)
        axes = mask.plot()
        assert [ax.get_title().split(",")[0] for ax in axes] == [f"head {i}" for i in range(6)]
        assert f"{mask.nnz_per_head[2] / 65**2:.2%}" in axes[2].get_title()
        image = axes[0].images[0].get_array()
        assert torch.equal(torch.from_numpy(np.asarray(image)) > 0, mask.to_dense()[0])
        axes[0].figure.savefig(io.BytesIO())

    def test_plot_on_given_axes(self, pyplot):
        mask = sm.masks.local(num_tokens=2000, num_heads=3, window=1)
        _, ax = pyplot.subplots()
        assert mask.plot(heads=[1], ax=ax) == [ax]
        assert ax.images[0].get_array().shape == (512, 512)
        with pytest.raises(ValueError, match="heads: expected one head to draw on `ax`, got 3"):
            mask.plot(ax=ax)
        with pytest.raises(ValueError, match=r"heads: expected numbers from 0 to 2, got \[3\]"):
            mask.plot(heads=[3])
        with pytest.raises(ValueError, match=r"heads: expected"):
            mask.plot(heads=[])

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'sparse_mhsa\[plot\]'"):
            viz.plot(sm.masks.local(num_tokens=4, num_heads=1, window=1))


class TestCosts:
    def test_units(self):
        assert attention_macs(10, 4) == 80
        assert attention_macs(10, 4, 6) == 100
        assert in_unit(3_000_000_000, "GMACs") == 3.0
        assert in_unit(3_000_000_000, "GFLOPs") == 6.0
        with pytest.raises(ValueError, match="unit: expected 'GMACs' or 'GFLOPs', got 'flops'"):
            in_unit(1, "flops")

    def test_published_numbers_of_vit_b(self):
        """0.72 GMACs dense and 0.014 at a pruning ratio of 98.01 %, all twelve layers."""
        dense = sm.masks.none(num_tokens=197, num_heads=12, head_dim=64)
        assert 12 * dense.flops() == pytest.approx(0.7153, abs=1e-4)
        assert 12 * dense.flops(unit="GFLOPs") == pytest.approx(1.4307, abs=1e-4)
        sparse = sm.masks.fibottention(num_tokens=197, num_heads=12)
        assert 12 * 2 * 64 * sparse.nnz_patches / 1e9 == pytest.approx(0.0141, abs=1e-4)
        assert sparse.flops(64) == 2 * 64 * sparse.nnz / 1e9

    def test_head_dim_is_asked_for(self):
        with pytest.raises(ValueError, match="head_dim: expected a number"):
            sm.masks.none(num_tokens=4, num_heads=1).flops()

    def test_cost_of_a_model(self):
        model = nn.ModuleList(
            [
                sm.SparseMHSA(12, 3, config={"mask": "fibottention"}),
                nn.MultiheadAttention(12, 3),
            ]
        )
        cost = attention_cost(model, 17)
        mask = sm.masks.fibottention(num_tokens=17, num_heads=3)
        assert [layer.nnz for layer in cost.layers] == [mask.nnz, 3 * 17 * 17]
        assert cost.sparse() == pytest.approx(2 * 4 * (mask.nnz + 867) / 1e9)
        assert cost.sparse("GFLOPs") == 2 * cost.sparse("GMACs")
        assert cost.dense() == pytest.approx(2 * 4 * 2 * 867 / 1e9)
        assert cost.pruning_ratio_whole == pytest.approx(1 - (mask.nnz + 867) / (2 * 867))
        kept, whole = mask.nnz_patches + 3 * 17 * 17, 3 * 16 * 16 + 3 * 17 * 17
        assert cost.pruning_ratio_patches == pytest.approx(1 - kept / whole)
        assert json.loads(json.dumps(cost.to_dict()))["layers"][0]["mask"] == "fibottention"
        for piece in ("GMACs", "GFLOPs", "patch-to-patch", "whole matrix"):
            assert piece in str(cost)


class TestLoadConfig:
    TEXT = "attention:\n  mask: local\n  mask_kwargs:\n    window: 2\n"

    def test_every_form_gives_the_same(self, tmp_path):
        path = tmp_path / "any name"
        path.write_text(self.TEXT)
        expected = sm.load_config(self.TEXT)
        forms = [
            path,
            str(path),
            LOCAL,
            {"attention": LOCAL},
            expected,
            json.dumps(LOCAL),
            "{mask: local, mask_kwargs: {window: 2}}",
        ]
        for form in forms:
            assert sm.load_config(form) == expected
        assert sm.load_config(expected) is expected

    def test_a_colon_in_a_file_name_does_not_make_it_text(self, tmp_path):
        path = tmp_path / "a: b.yaml"
        with pytest.raises(FileNotFoundError, match=r"a: b.yaml"):
            sm.load_config(str(path))
        path.write_text(self.TEXT)
        assert sm.load_config(str(path)).mask == "local"

    def test_a_missing_file_is_named(self, tmp_path):
        for missing in ("no_such_file.yaml", "no_such_file.yml", tmp_path / "nothing"):
            with pytest.raises(FileNotFoundError, match=r"config: no such file: .*(no_such_file|nothing)"):
                sm.load_config(missing)

    def test_a_directory_is_named(self, tmp_path):
        with pytest.raises(sm.ConfigError, match="is a directory; expected a YAML file") as error:
            sm.load_config(tmp_path)
        assert error.value.source == str(tmp_path)

    def test_numbers_of_numpy_are_numbers(self):
        kwargs = {"window": np.int64(2), "causal": np.bool_(False)}
        ours = {"mask": "local", "mask_kwargs": kwargs, "scale": np.float32(0.5), "grid": np.array([2, 3])}
        plain = LOCAL | {"scale": 0.5, "grid": [2, 3]}
        assert sm.load_config(ours) == sm.load_config(plain)
        with pytest.raises(TypeError, match="Tensor is no number"):
            sm.load_config({"scale": torch.tensor(0.5)})

    def test_a_bare_word_is_no_configuration(self):
        with pytest.raises(sm.ConfigError, match=r"the package has '.*fibottention\.yaml'"):
            sm.load_config("fibottention")
        with pytest.raises(sm.ConfigError, match="'mask: dense'"):
            sm.load_config("dense")

    def test_errors_carry_source_line_and_key(self, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text("mask: local\nmask_kwargs:\n  windw: 2\n")
        with pytest.raises(sm.ConfigError, match=r"bad.yaml.*did you mean `window`") as error:
            sm.load_config(path)
        assert (error.value.source, error.value.line, error.value.key) == (str(path), 3, "mask_kwargs.windw")
        assert isinstance(error.value, ValueError)

    @pytest.mark.parametrize("content", [b"# " + b"x" * MAX_CONFIG_BYTES, b"mask: \xff\xfe", b"\x00\x01\x02"])
    def test_files_that_are_no_configuration(self, tmp_path, content):
        path = tmp_path / "hostile.yaml"
        path.write_bytes(content)
        with pytest.raises(sm.ConfigError, match=r"hostile.yaml"):
            sm.load_config(path)

    @pytest.mark.parametrize("number", [math.nan, math.inf, np.float32("-inf"), np.array([1.0, math.nan])])
    def test_numbers_that_are_not_finite_are_refused_as_in_yaml(self, number):
        with pytest.raises(sm.ConfigError, match=r"^mask_kwargs.window(.1)?: \S+ is not a finite number") as raised:
            sm.load_config({"mask": "local", "mask_kwargs": {"window": number}})
        assert raised.value.key.startswith("mask_kwargs.window")

    @pytest.mark.parametrize("value", [{"mask": object()}, {"mask_kwargs": {1j: 2}}])
    def test_mappings_that_yaml_cannot_express(self, value):
        with pytest.raises(TypeError, match="config: the mapping cannot be written as YAML"):
            sm.load_config(value)

    def test_a_mapping_that_contains_itself(self):
        value = {"mask": "none"}
        value["mask_kwargs"] = value
        with pytest.raises(TypeError, match="config: the mapping cannot be written as YAML"):
            sm.load_config(value)

    @pytest.mark.parametrize("value", [None, 3, ["mask"], b"mask: none", 1.5])
    def test_other_types(self, value):
        with pytest.raises(TypeError, match="config: expected a path, YAML text, mapping"):
            sm.load_config(value)

    def test_hostile_one_line_text_does_not_reach_the_file_system(self):
        for text in ("a" * 10_000 + ": 1", "mask: \x00"):
            with pytest.raises(sm.ConfigError):
                sm.load_config(text)


class TestTorchVersion:
    @pytest.mark.parametrize("found", ["2.13.0", "2.13.1+cpu", "2.13.0+cu130"])
    def test_the_release_line_of_the_build_passes(self, found):
        check_torch(found)

    @pytest.mark.parametrize("found", ["2.12.1", "2.14.0+cpu", "3.13.0", "2.130.0", "2.1"])
    def test_any_other_is_an_import_error_with_the_remedy(self, found):
        with pytest.raises(ImportError) as error:
            check_torch(found)
        for piece in ("built for torch 2.13.*", f"found torch {found}", "pip install 'torch==2.13.*'"):
            assert piece in str(error.value)

    def test_it_is_the_torch_that_the_core_was_compiled_against(self):
        check_torch(sm._core.TORCH_VERSION)
