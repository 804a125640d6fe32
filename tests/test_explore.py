"""What a query sees, laid over an image: the picture, the plot, and the widget with and without ipywidgets."""

import io
import re
import sys

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa.explore import MAX_SHOWN, PatchView


@pytest.fixture
def mask():
    return sm.masks.fibottention(num_tokens=50, num_heads=4, layer=1)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 60, 3)).astype(np.uint8)


def pixels_of(png):
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)).convert("RGB"))


class TestKeys:
    @pytest.mark.parametrize("query", [0, 1, 25, 49])
    def test_they_are_the_row_of_the_query(self, mask, query):
        dense = mask.to_dense()
        for head in range(4):
            assert torch.equal(mask.keys(head, query), dense[head, query].nonzero().flatten())

    def test_a_long_dense_mask_costs_one_row(self):
        dense = sm.masks.none(num_tokens=300_001, num_heads=2)
        assert torch.equal(dense.keys(1, 7), torch.arange(300_001))

    def test_a_query_without_keys_has_none(self):
        empty = sm.Mask.from_dense(torch.zeros(3, 3, dtype=torch.bool))
        assert empty.keys(0, 1).shape == (0,)

    @pytest.mark.parametrize(
        ("head", "query", "message"), [(4, 0, "head: expected 0 to 3"), (0, 50, "query: expected")]
    )
    def test_what_is_not_there_is_named(self, mask, head, query, message):
        with pytest.raises(ValueError, match=message):
            mask.keys(head, query)


class TestPatchView:
    def test_patches_that_are_not_seen_are_pale_and_the_query_is_framed(self, mask, image):
        view = PatchView.of(mask, image)
        assert (view.rows, view.columns) == (7, 7)
        picture, cell = view.picture(2, (3, 4)), view.pixels.shape[0] // 7
        token = 1 + 3 * 7 + 4
        seen = mask.to_dense()[2, token, 1:].reshape(7, 7)
        for row in range(7):
            for column in range(7):
                # Its middle: the frame of the query is on the edge.
                place = np.s_[row * cell + cell // 2, column * cell + cell // 2]
                same = (picture[place] == view.pixels[place]).all()
                assert same == bool(seen[row, column]), (row, column)
                pale = 255 - 0.25 * (255 - view.pixels[place].astype(float))
                assert same or np.abs(picture[place] - pale).max() <= 0.5
        red = (picture == [214, 39, 40]).all(-1)
        assert red.any()
        red[3 * cell : 4 * cell, 4 * cell : 5 * cell] = False
        assert not red.any()

    def test_a_token_off_the_grid_is_no_patch(self, mask):
        view = PatchView.of(mask)
        assert not (view.picture(0, 0) == [214, 39, 40]).all(-1).any()
        assert view.caption(0, 0) == "head 0, token 0 (off the grid): sees 49 of 49 patches and 1 of 1 off the grid"

    def test_the_grid_of_the_configuration_is_taken_before_a_square(self):
        wide = sm.masks.neighborhood(num_tokens=36, num_heads=1, kernel_size=3, grid=[4, 9], num_prefix_tokens=0)
        assert (wide.grid, PatchView.of(wide).rows) == ((4, 9), 4)
        assert PatchView.of(wide).pixels.shape == (4 * 24, 9 * 24, 3)
        told = sm.Mask.from_config({"mask": "axial"}, 37, 2, grid=[3, 12], num_prefix_tokens=1)
        assert told.grid == (3, 12)
        # A mask made of others has edges and no grid.
        assert (wide | wide).grid is None
        assert PatchView.of(wide | wide, grid=[9, 4]).rows == 9

    @pytest.mark.parametrize("values", [np.uint8, np.float32, np.float64])
    def test_an_image_is_numbers_of_either_range(self, mask, image, values):
        given = image if values is np.uint8 else (image / 255).astype(values)
        assert np.array_equal(PatchView.of(mask, given).pixels, PatchView.of(mask, image).pixels)
        assert PatchView.of(mask, given[..., 0]).pixels.shape == (224, 224, 3)
        assert PatchView.of(mask, torch.from_numpy(given)).pixels.shape == (224, 224, 3)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"grid": [7, 8]}, ValueError, r"grid: expected \[H, W\] with 49 patches, got \[7, 8\]"),
            ({"grid": [49]}, ValueError, r"grid: expected \[H, W\] with 49 patches, got \[49\]"),
            ({"image": np.zeros((4, 4, 2), np.uint8)}, ValueError, r"image: expected .* got \(4, 4, 2\)"),
            ({"image": np.zeros((0, 4), np.uint8)}, ValueError, r"image: expected .* got \(0, 4"),
            ({"image": np.zeros((4, 4), np.int64)}, TypeError, "image: expected uint8, .* got int64"),
            ({"image": np.full((4, 4), np.nan)}, TypeError, "image: expected uint8, or finite numbers"),
            ({"query": (7, 0)}, ValueError, r"query: expected a patch from \(0, 0\) to \(6, 6\), got \(7, 0\)"),
            ({"query": 50}, ValueError, "query: expected a token from 0 to 49, got 50"),
            ({"query": 1.5}, TypeError, "query"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_named(self, mask, given, error, message):
        with pytest.raises(error, match=message):
            mask.explore(**given)

    def test_patches_that_are_no_square_need_a_grid(self):
        with pytest.raises(ValueError, match=r"grid: expected \[H, W\], because 12 patches are no square"):
            sm.masks.local(num_tokens=12, num_heads=1, window=1).explore()


class TestOverlay:
    @pytest.fixture
    def pyplot(self):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        yield plt
        plt.close("all")

    def test_it_draws_one_picture_per_head(self, mask, image, pyplot):
        axes = mask.overlay(image, query=(2, 2))
        assert [ax.get_title() for ax in axes] == [f"head {head}" for head in range(4)]
        view = PatchView.of(mask, image)
        for head, ax in enumerate(axes):
            assert np.array_equal(ax.images[0].get_array(), view.picture(head, (2, 2)))
        (ax,) = mask.overlay(None, query=17, heads=[3])
        assert ax.get_title() == "head 3"

    def test_heads_that_are_not_there_are_named(self, mask, pyplot):
        with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
            mask.overlay(None, query=1, heads=[4])
        with pytest.raises(ValueError, match="heads: expected at least one"):
            mask.overlay(None, query=1, heads=[])

    def test_without_matplotlib_the_extra_is_named(self, mask, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'sparse_mhsa\[plot\]'"):
            mask.overlay(None, query=1)


class TestExplorer:
    def test_the_picture_shows_the_row_of_the_query_beside_its_patches(self, mask, image):
        explorer = mask.explore(image, query=(3, 4))
        pixels = pixels_of(explorer.png(2, (3, 4)))
        assert pixels.shape == (224 + 6, 2 * (224 + 6), 3)
        assert np.array_equal(pixels[:224, 230:454], PatchView.of(mask, image).picture(2, (3, 4)))
        # Of the matrix, only the row of the query is marked, and only where it keeps nothing.
        token = 26
        marked = (pixels[:224, :224] == [214, 39, 40]).all(-1)
        tokens = np.arange(224) * 50 // 224
        kept = mask.to_dense()[2, token].numpy()[tokens]
        assert np.array_equal(marked, (tokens == token)[:, None] & ~kept)

    def test_without_ipywidgets_there_is_a_picture_of_every_head(self, mask, image, monkeypatch):
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        explorer = mask.explore(image)
        bundle = explorer._repr_mimebundle_(include=None, exclude=None)
        assert {*bundle} == {"text/plain", "text/html"}
        assert bundle["text/html"].count("<li>head ") == 4
        assert "token 25 (patch (3, 3))" in bundle["text/html"]
        assert "data:image/png;base64," in bundle["text/html"]
        assert bundle["text/plain"] == f"Explorer({mask!r}, query=25)"
        with pytest.raises(ImportError, match=r"pip install 'sparse_mhsa\[notebook\]'"):
            explorer.widget()

    def test_many_heads_are_counted_and_not_all_drawn(self):
        text = sm.masks.local(num_tokens=16, num_heads=40, window=1).explore()._repr_html_()
        assert text.count("<li>head ") == MAX_SHOWN
        assert f"{40 - MAX_SHOWN} more heads are not shown" in text

    def test_with_ipywidgets_the_sliders_change_picture_and_caption(self, mask, image):
        widgets = pytest.importorskip("ipywidgets")
        explorer = mask.explore(image, query=(3, 4))
        sliders, picture, caption = explorer.widget().children
        head, query = sliders.children
        assert (head.max, query.value, query.max) == (3, 26, 49)
        assert isinstance(picture, widgets.Image)
        assert picture.value == explorer.png(0, 26)
        head.value, query.value = 2, 8
        assert picture.value == explorer.png(2, 8)
        assert caption.value == explorer.view.caption(2, 8)
        assert re.search(r"head 2, token 8 \(patch \(1, 0\)\)", caption.value)

    def test_a_stored_notebook_has_the_picture_beside_the_widget(self, mask):
        pytest.importorskip("ipywidgets")
        bundle = mask.explore()._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in bundle
        assert bundle["text/html"].count("<li>head ") == 4
