"""Every mask, backend and cache policy is documented: a row, a source, a page, and a picture that a real run made."""

import importlib.util
import json
import re
from dataclasses import MISSING
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import sparse_mhsa as sm
from sparse_mhsa import backends as module
from sparse_mhsa._core import config_schema
from sparse_mhsa.cache_policy import POLICIES, PolicyName
from sparse_mhsa.catalogue import backends, policies, registered, tables
from sparse_mhsa.cli import main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"masks": "masks.md", "backends": "backends.md", "cache policies": "caches.md"}
MECHANISMS = [
    pytest.param(kind, mechanism, id=f"{kind}-{mechanism.name}")
    for kind, mechanisms in zip(PAGES, (registered(), backends(), policies()), strict=True)
    for mechanism in mechanisms
]
ALLOWED = json.loads(config_schema())["$defs"]["document"]["properties"]["backend"]["enum"]
BACKENDS = {backend.name: backend for backend in backends()}


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class TestDocumentation:
    @pytest.mark.parametrize(("kind", "mechanism"), MECHANISMS)
    def test_each_has_a_row_a_source_and_a_picture_on_its_page(self, kind, mechanism):
        assert f"\n| `{mechanism.name}`" in tables(markdown=True)[kind]
        assert f"\n| `{mechanism.name}`" in (DOCS.parent / "README.md").read_text()
        assert mechanism.about
        assert "Source: " in mechanism.definition
        page = (DOCS / PAGES[kind]).read_text()
        section = page.partition(f"\n## `{mechanism.name}`")[2].partition("\n## ")[0]
        pictures = re.findall(r"^!\[.*\]\((.+)\)$", section, re.MULTILINE)
        assert Path(pictures[0]).stem == mechanism.name
        assert all((DOCS / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
        assert all(parameter.about for parameter in mechanism.parameters)
        assert re.search(r"^```(yaml|python)$", section, re.MULTILINE)

    def test_variants_and_budgets_have_pictures_too(self):
        for picture in ("vertical_slash_estimated", "backends/efficient_local_blockwise", "caches/budget"):
            page = {"backends": "backends.md", "caches": "caches.md"}.get(picture.partition("/")[0], "masks.md")
            assert f"(gallery/{picture}.png)" in (DOCS / page).read_text()

    def test_the_command_lists_the_three_kinds(self, capsys):
        assert main(["masks", "--list"]) == 0
        out = capsys.readouterr().out
        assert re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE) == list(PAGES)
        assert "\nvit (softmax, sparse, vit_qchunk)\n" in out
        assert "\nlocal, prefix 0\n" in out
        assert "\nattention_sinks\n    the first sinks tokens and the last capacity - sinks\n" in out
        assert "    capacity (null), recent (required), sinks (0)\n" in out
        assert main(["masks", "--list", "--markdown"]) == 0
        assert capsys.readouterr().out.count("|---|---|---|") == len(PAGES)

    def test_every_name_a_configuration_takes_is_in_one_row(self):
        names = [name for backend in BACKENDS.values() for name in (backend.name, *backend.aliases)]
        assert sorted(names) == sorted(filter(None, ALLOWED))

    def test_what_users_register_is_listed_by_its_docstring(self, monkeypatch):
        monkeypatch.setattr(module, "_IMPLEMENTATIONS", dict(module._IMPLEMENTATIONS))

        @sm.register_backend("listed")
        def listed(q, k, v, *, width: int, mode: str | None = None):
            """The values themselves.

            Source: nobody.
            """
            return v

        mine = backends()[-1]
        assert (mine.name, mine.about, mine.definition) == (
            "listed",
            "The values themselves",
            "The values themselves.\n\nSource: nobody.",
        )
        assert [(x.name, x.required, x.default) for x in mine.parameters] == [
            ("width", True, ""),
            ("mode", False, "null"),
        ]
        # Another process has the name from a configuration, and not the function.
        del module._IMPLEMENTATIONS["listed"]
        assert "listed" not in [backend.name for backend in backends()]

    @pytest.mark.parametrize("name", BACKENDS)
    def test_defaults_are_those_that_a_configuration_gets(self, name):
        for parameter in BACKENDS[name].parameters:
            if name != "linformer":  # two of its parameters are required
                given = sm.load_config(f"backend: {name}\nbackend_kwargs: {{{parameter.name}: {parameter.default}}}")
                assert given == sm.load_config(f"backend: {name}")

    def test_policies_are_all_there_with_the_defaults_that_they_have(self):
        assert tuple(POLICIES) == get_args(PolicyName)
        for policy in policies():
            given = {parameter.name: 3 for parameter in policy.parameters if parameter.required}
            made = sm.CachePolicy(policy.name, **given)
            defaults = {key: value for key, value in POLICIES[policy.name].items() if value is not MISSING}
            spelled_out = sm.CachePolicy(policy.name, **given, **defaults)
            for of in ("worth", "safe_first", "safe_last", "least_capacity"):
                assert getattr(made, of) == getattr(spelled_out, of)


class TestPictures:
    def test_the_weights_of_efficient_attention_are_those_of_the_paper(self, gallery):
        q, k = gallery.queries_and_keys(gallery.BACKEND_SIDE, gallery.BACKEND_HEADS)
        (path,) = gallery.configs_of_backend(BACKENDS["efficient"])
        expected = torch.softmax(q, -1) @ torch.softmax(k, -2).transpose(-2, -1)
        torch.testing.assert_close(gallery.weights_of(path), expected[0])

    def test_the_weights_of_blocks_are_zero_elsewhere(self, gallery):
        reference, blockwise = map(gallery.weights_of, gallery.configs_of_backend(BACKENDS["efficient_local"]))
        block = (torch.arange(1 + gallery.BACKEND_SIDE**2) - 1).div(4, rounding_mode="floor")
        inside = block[:, None] == block
        for weights in (reference, blockwise):
            assert torch.equal(weights[:, 1:, :] > 0, inside[1:].expand_as(weights[:, 1:, :]))
        assert (reference[:, 1:].sum(-1) < 0.5).all()
        torch.testing.assert_close(blockwise.sum(-1), torch.ones_like(blockwise[..., 0]))

    def test_negative_weights_are_red(self, gallery):
        pixels = gallery.coloured(torch.tensor([[0.0, 1.0], [-1.0, 0.25]]))[::2, ::2]
        assert pixels.tolist() == [[[255] * 3, [0] * 3], [[255, 0, 0], [128] * 3]]


def test_the_weights_of_softmax_are_those_of_softmax(gallery):
    q, k = gallery.queries_and_keys(gallery.BACKEND_SIDE, gallery.BACKEND_HEADS)
    (path,) = gallery.configs_of_backend(BACKENDS["vit"])
    expected = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
    torch.testing.assert_close(gallery.weights_of(path), expected[0])


def test_the_picture_of_a_cache_shows_what_is_kept(gallery, monkeypatch):
    drawn = []
    monkeypatch.setattr(gallery.viz, "side_by_side", lambda squares: drawn.extend(squares) or b"")
    gallery.cache_picture('sm.KVCache(sm.CachePolicy("attention_sinks", capacity=6, sinks=2), num_layers=1)')
    steps, positions = np.ogrid[: gallery.CACHE_TOKENS, : gallery.CACHE_TOKENS]
    joined = positions <= steps
    kept = joined & ((positions < 2) | (steps - positions < 4))
    assert len(drawn) == gallery.CACHE_HEADS
    for pixels in drawn:
        cells = pixels[:: gallery.CELL, :: gallery.CELL]
        assert ((cells == gallery.KEPT).all(-1) == kept).all()
        assert ((cells == gallery.FORGOTTEN).all(-1) == (joined & ~kept)).all()
        assert ((cells == gallery.TO_COME).all(-1) == ~joined).all()
