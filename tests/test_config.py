"""Configurations as users write them: files, mappings, OmegaConf nodes, their schema, and overrides by layer."""

import enum
import itertools
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparse_mhsa as sm
from predicates import ON_GRID, VARIANTS
from sparse_mhsa import _core
from sparse_mhsa.catalogue import backends, policies, registered
from sparse_mhsa.cli import main

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "configs" / "attention").glob("*.yaml"))
CONTRADICTING = sorted((Path(__file__).parent / "contradicting_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema():
    document = json.loads(_core.config_schema())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


def test_the_schema_has_the_defaults_of_a_backend_and_not_those_of_its_mask(schema):
    k = schema.schema["$defs"]["backend_vit_topk"]["properties"]["k"]["default"]
    assert sm.load_config(f"backend: vit_topk\nbackend_kwargs: {{k: {k}}}") == sm.load_config("backend: vit_topk")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_shipped_yaml_fits_the_schema_also_in_its_canonical_form(schema, path):
    schema.validate(yaml.safe_load(path.read_text()))
    config = sm.load_config(path)
    schema.validate(json.loads(config.to_json()))
    schema.validate(yaml.safe_load(config.to_yaml()))
    assert sm.load_config(config.to_yaml()) == config


BROKEN = [
    "[]",
    "attention: null",
    "{attention: {mask: none}, model: vit}",
    "mask: fibotention",
    "msk: none",
    "{mask: local, mask_kwargs: {windw: 1}}",
    "{mask: local, mask_kwargs: {window: many}}",
    "{mask: local, mask_kwargs: {window: 1, causal: 1}}",
    "{mask: local, mask_kwargs: {window_schedule: {kind: step, values: []}}}",
    "{mask_kwargs: {window: 1}}",
    "{mask: fibo, mask_kwargs: {schedule: lucas}}",
    "{mask: none, masked_logits: one}",
    "{mask: none, num_heads: -1}",
    "{mask: none, scale: None}",
    "{mask: none, layers: {'0': {mask: locl}}}",
    "{mask: none, layers: {'0': {mask: local, mask_kwargs: {windw: 1}}}}",
    "{mask: none, layers: {'0': {num_heads: 3}}}",
    "{backend: efficent}",
    "{backend: efficient, mask: fibottention}",
    "{backend: efficient, backend_kwargs: {r: 1}}",
    "{backend: efficient_local, backend_kwargs: {normalize: rows}}",
    "{backend: linformer}",
    "{backend: linformer, backend_kwargs: {projector: {max_seq_len: 9}}}",
    "{backend: linformer, backend_kwargs: {projector: {max_seq_len: 9, r: 1, rank: 2}}}",
    "{backend: fibottention_sparse, mask: local}",
    "{backend: vit, backend_kwargs: {query_chunk_size: 3}}",
    "{mask: local}",
    "{mask: local, mask_kwargs: {window: null}}",
    "{mask: local, mask_kwargs: {window: 1, window_size: 3}}",
    "{mask: random, mask_kwargs: {symmetric: true}}",
    "{mask: random, mask_kwargs: {k: 1, mask_ratio: 0.5}}",
    "{mask: pruning, mask_kwargs: null}",
    "{mask: importance, mask_kwargs: {k: 1, indices: [0]}}",
    "{mask: union, mask_kwargs: {masks: [{mask: local}]}}",
    "{mask: vertical_slash}",
    "{mask: vertical_slash, mask_kwargs: {vertical: [], window: null, causal: true}}",
    "{mask: none, layers: {'0': {mask: pruning}}}",
    "{backend: efficient, masked_logits: zero}",
    "{backend: efficient_local, on_empty_row: error}",
    "{backend: linformer, backend_kwargs: {projector: {max_seq_len: 9, r: 1, num_heads: 1}}, prefix_dense: false}",
    "{backend: flex, on_empty_row: error}",
]


@pytest.mark.parametrize("text", BROKEN)
def test_the_schema_refuses_what_the_loader_refuses(schema, text):
    with pytest.raises(sm.ConfigError):
        sm.load_config(text)
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(yaml.safe_load(text))


WRONG_TYPES = [0, 2.5, True, "?", [], ["?"], {"?": 1}]
RUST = re.compile(r"string or map|internally tagged|struct|variant identifier|[iu](64|size)\b|f64\b|untagged")


@pytest.mark.parametrize("entry", _core.registered_masks(), ids=lambda entry: entry["name"])
def test_a_value_of_a_wrong_type_is_told_what_is_allowed_in_words(entry):
    """Keys of the document, of every mask, and of mappings inside: what the parser says names no type of ours."""
    documents = [
        {"mask": entry["name"], key: value} for key in ("masked_logits", "on_empty_row") for value in WRONG_TYPES
    ]
    for key, value in itertools.product(entry["keys"], WRONG_TYPES):
        documents.append({"mask": entry["name"], "mask_kwargs": {key: value}})
        documents.append({"mask": entry["name"], "mask_kwargs": {key: {"kind": value}}})
    told = {message for message in map(refusal, documents) if RUST.search(message)}
    assert not told


def refusal(document):
    """What the loader says, nothing if it takes the document."""
    try:
        sm.load_config(document)
    except sm.ConfigError as error:
        return str(error)
    return ""


def test_a_choice_of_a_wrong_type_names_the_choices():
    for config, key, allowed in (
        ({"masked_logits": 0}, "masked_logits", "`neg_inf` or `zero`"),
        ({"mask_kwargs": {"window_schedule": 1}}, "mask_kwargs.window_schedule", "a mapping with `kind`"),
        (
            {"mask_kwargs": {"window_schedule": {"kind": 3}}},
            "mask_kwargs.window_schedule.kind",
            "one of `list`, `linear`",
        ),
    ):
        with pytest.raises(sm.ConfigError, match=rf"{key}: invalid type: integer `\d`, expected {allowed}"):
            sm.load_config({"mask": "local", **config})


# Parameters that depend on what stands beside them, which is the loader's business.
CONDITIONAL = {
    ("sparse", "local_attn_ctx"),
    ("strided_columns", "stride"),
    ("strided_columns", "offset"),
    ("vertical_slash", "num_vertical"),
    ("vertical_slash", "num_slash"),
    ("random", "symmetric"),
    ("topk", "symmetric"),
    ("pruning", "scores"),
    ("pruning", "scores_digest"),
    ("pruning", "seed"),
    ("space_time", "radius"),
}


def refusal_of(document):
    """The loader's error, or None if it takes the document."""
    try:
        sm.load_config(document)
    except sm.ConfigError as error:
        return error
    return None


def numbers_in(value, path=()):
    """Path of every number in a document."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in numbers_in(inner, (*path, key))]
    if isinstance(value, list):
        return [found for key, inner in enumerate(value) for found in numbers_in(inner, (*path, key))]
    return [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def with_number(document, path, number):
    changed = document.copy()
    changed[path[0]] = with_number(document[path[0]], path[1:], number) if path[1:] else number
    return changed


DOCUMENTS_WITH_NUMBERS = [
    *({"mask": name, "mask_kwargs": kwargs} for name, variants in VARIANTS.items() for kwargs in variants),
    *({"mask": name, "mask_kwargs": kwargs, "grid": grid} for name, grid, kwargs in ON_GRID),
    {"num_prefix_tokens": 1, "embed_dim": 8, "num_heads": 2},
    {"backend": "efficient_local", "backend_kwargs": {"block_size": 4}},
    {"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": 9, "r": 3, "num_heads": 2}}},
]


def test_the_schema_has_the_ranges_of_the_loader(schema):
    """Every number of many documents, replaced by one that may be out of range: both refuse it or neither."""
    for document in DOCUMENTS_WITH_NUMBERS:
        schema.validate(document)
        for path in numbers_in(document):
            for number in (-(2**40), -1, 0, 1, 1.5, 2**40, 2**40 + 1, 2**62):
                changed = with_number(document, path, number)
                refusal, fits = refusal_of(changed), schema.is_valid(changed)
                assert fits or refusal is not None, changed
                if (mask_at(document, path), path[-1]) not in CONDITIONAL:
                    assert refusal is None or not fits, (changed, refusal)


def mask_at(document, path):
    """Name of the innermost mask or backend around a path."""
    names = []
    for key in path:
        if isinstance(document, dict):
            names.append(document.get("mask", document.get("backend", names[-1] if names else None)))
        document = document[key] if not isinstance(document, dict) else document.get(key)
    return names[-1]


def paths_in(value, path=()):
    """Path of every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, below in inner for found in paths_in(below, (*path, key)))]


WRONG = ["x", True, 1.5, 2**63, -(2**63) - 1, [True], [2**63], [["x"]], [[-(2**64)]], {"a": 1}]


def between_parameters(document, path, refusal):
    """Whether a refusal is about several parameters together."""
    key = str(refusal.key).rpartition(".")[2]
    return (mask_at(document, path), key) in CONDITIONAL or key == "mask_kwargs" != path[-1]


def test_the_schema_refuses_the_types_that_the_loader_refuses(schema):
    """Every value of many documents, and every parameter that they leave out, replaced by one of another type."""
    parameters = {mask.name: [parameter.name for parameter in mask.parameters] for mask in registered()}
    assert parameters.keys() <= {document.get("mask") for document in DOCUMENTS_WITH_NUMBERS} | {"none"}
    for document in DOCUMENTS_WITH_NUMBERS:
        kwargs = document.get("mask_kwargs", {})
        absent = {("mask_kwargs", name) for name in parameters.get(document.get("mask"), ()) if name not in kwargs}
        for path in {*paths_in(document), *absent} - {()}:
            for wrong in WRONG:
                changed = with_number(document, path, wrong)
                refusal = refusal_of(changed)
                if refusal is not None and not between_parameters(document, path, refusal):
                    assert not schema.is_valid(changed), (changed, refusal)


def test_the_schema_knows_what_null_would_be_written_as_for_a_seed(schema):
    for seed, fits in ((None, True), ("None", True), ("none", True), (7, True), ("x", False), ("nonesuch", False)):
        assert schema.is_valid({"mask": "random", "mask_kwargs": {"k": 2, "seed": seed}}) is fits


def test_the_schema_knows_every_mask_and_parameter_from_the_registry(schema):
    definitions = schema.schema["$defs"]
    for entry in _core.registered_masks():
        kwargs = definitions[f"mask_{entry['name']}"]
        assert set(entry["keys"]) <= set(kwargs["properties"])
        assert kwargs["additionalProperties"] is False
        for name in (entry["name"], *entry["aliases"]):
            assert name in definitions["document"]["properties"]["mask"]["enum"]


def test_the_command_line_prints_the_schema(schema, capsys):
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema.schema


def plain_masks():
    """Names of masks that need no parameter."""
    names = []
    for mask in registered():
        try:
            sm.load_config({"mask": mask.name})
        except sm.ConfigError:
            continue
        names += [mask.name, *mask.aliases]
    return names


DOCUMENTS = st.fixed_dictionaries(
    {"mask": st.sampled_from(plain_masks())},
    optional={
        "scale": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        "masked_logits": st.sampled_from(["neg_inf", "zero"]),
        "num_prefix_tokens": st.integers(0, 5),
        "prefix_dense": st.booleans(),
        "on_empty_row": st.sampled_from(["zero", "error"]),
        "embed_dim": st.integers(1, 999),
        "num_heads": st.integers(1, 99),
        "layers": st.dictionaries(st.sampled_from(["a", "b.*", r"\d", "#'\": x"]), st.just({"scale": 0.1})),
    },
)


def test_the_order_of_layers_makes_a_difference():
    first, second = "'0': {mask: fibo}", "'1': {mask: local, mask_kwargs: {window: 1}}"
    text = "{{mask: none, layers: {{{}, {}}}}}"
    assert sm.load_config(text.format(first, second)) != sm.load_config(text.format(second, first))


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.booleans())
def test_every_document_reads_the_same_as_mapping_yaml_json_and_omegaconf(document, wrapped):
    omegaconf = pytest.importorskip("omegaconf")
    document = {"attention": document} if wrapped else document
    config = sm.load_config(document)
    for twin in (
        yaml.safe_dump(document, sort_keys=False),
        json.dumps(document, indent=1),
        omegaconf.OmegaConf.create(document),
        config.to_yaml(),
        json.loads(config.to_json()),
        config,
    ):
        assert sm.load_config(twin) == config
        assert hash(sm.load_config(twin)) == hash(config)


# What readers of YAML 1.1 or of 1.2 take for something other than text, and what neither takes without quotes.
TEXTS = [
    "on", "Yes", "n", "NULL", "~", "", "1_000", "1:30", "2024-01-01", "0o7", "012", "0b1", "0x1F", "1e3", "1.5", "+1",
    "-", ".inf", ".NaN", "=", "<<", "a: b", "a #b", "a:", " a", "a ", "'", '"', "\\", "%a", "@a", "`a", "!a", "&a",
    "*a", "- a", "a\nb", "\t", "\r", "\x00", "\x7f", "\x85", "\u2028", "\ufeff", "\uffff", "\U0001f600", "a" * 2000,
]  # fmt: skip
FLOATS = [1e-10, 1e16, 1.5e300, -2e-7, 0.1, 3.0, 5e-324]


@sm.register_mask("test_mask_of_texts")
def mask_of_texts(context, texts=(), number=0.0):
    """Every query keeps every key, whatever the texts say."""
    return lambda head, row: range(context.num_tokens)


def assert_every_reader_reads(config):
    text = config.to_yaml()
    assert sm.load_config(text) == config
    assert yaml.safe_load(text) == {"attention": json.loads(config.to_json())}


@settings(deadline=None, max_examples=200)
@given(
    texts=st.lists(st.sampled_from(TEXTS) | st.text(max_size=20), max_size=4),
    keys=st.lists(st.sampled_from(TEXTS) | st.text("aeon.-_/1~ {}\n", max_size=9), max_size=3, unique=True),
    number=st.sampled_from(FLOATS) | st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_is_written_as_yaml_reads_the_same_in_yaml_1_1_and_1_2(texts, keys, number):
    kwargs = {"texts": texts, "number": number}
    layers = {re.escape(key)[:1000]: {"mask": "test_mask_of_texts", "mask_kwargs": kwargs} for key in keys}
    assert_every_reader_reads(sm.load_config({"mask": "test_mask_of_texts", "mask_kwargs": kwargs, "layers": layers}))


@pytest.mark.parametrize("key", [text for text in TEXTS if text not in ("+1", "*a", "\\", "a" * 2000)])
def test_a_key_reads_the_same_in_yaml_1_1_and_1_2(key):
    assert_every_reader_reads(sm.load_config({"layers": {key: {"scale": 1e-9}}}))


@pytest.mark.parametrize("name", ["fibottention", "fibottentioncrossdiag"])
def test_add_class_token_false_is_a_prefix_of_no_tokens_in_the_configuration(name):
    """The configuration's word comes before the caller's, and contradicts itself nowhere."""
    config = {"mask": name, "mask_kwargs": {"add_class_token": False}}
    for place in ({}, {"num_prefix_tokens": 2}):
        mask = sm.Mask.from_config(config, 16, 2, **place)
        assert (mask.num_prefix_tokens, mask) == (0, sm.Mask.from_config({**config, "num_prefix_tokens": 0}, 16, 2))
    inside = {"mask": "union", "mask_kwargs": {"masks": [config, {"mask": "global"}]}}
    contradicting = [config, inside, {"layers": {"a": config}}]
    if name == "fibottention":
        contradicting.append({"backend": "fibottention_sparse", "backend_kwargs": {"add_class_token": False}})
    for document in contradicting:
        with pytest.raises(sm.ConfigError, match=r"num_prefix_tokens: expected 0, .*add_class_token: false.* got 1"):
            sm.load_config({**document, "num_prefix_tokens": 1})


@pytest.mark.parametrize(
    ("config", "place", "num_tokens"),
    [
        ({}, {"grid": (4, 4)}, None),
        ({}, {"grid": (4, 4), "num_prefix_tokens": 1}, 17),
        ({"num_prefix_tokens": 0}, {"grid": (4, 4), "num_prefix_tokens": 1}, 17),
        ({"mask_kwargs": {"add_class_token": False}}, {"grid": (4, 4), "num_prefix_tokens": 1}, 17),
        ({"num_prefix_tokens": 2}, {"grid": (4, 4)}, 18),
        ({"grid": [4, 5], "num_prefix_tokens": 2}, {}, 22),
        ({"grid": [4, 5]}, {"num_prefix_tokens": 1}, 21),
        ({"grid": [4, 4], "mask_kwargs": {"add_class_token": False}}, {"num_prefix_tokens": 1}, 16),
    ],
)
def test_a_layer_knows_its_tokens_by_the_grid_and_the_prefix_of_the_model_unless_it_has_its_own(
    config, place, num_tokens
):
    layer = sm.SparseMHSA(8, 2, config={"mask": "fibottention", **config}, **place)
    assert layer.layer_mask.num_tokens == num_tokens
    assert ("num_tokens=" in repr(layer)) == (num_tokens is not None)


def test_an_error_in_a_mapping_names_no_line_that_nobody_wrote():
    with pytest.raises(sm.ConfigError, match=r"\Amask_kwargs\.windw: unknown key") as caught:
        sm.load_config({"mask": "local", "mask_kwargs": {"windw": 2}})
    assert (caught.value.line, caught.value.key) == (None, "mask_kwargs.windw")


def test_omegaconf_interpolation_is_resolved_and_its_failures_are_configuration_errors():
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.create({"w": 3, "attention": {"mask": "local", "mask_kwargs": {"window": "${w}"}}})
    assert sm.load_config(node.attention) == sm.load_config("mask: local\nmask_kwargs: {window: 3}")
    for broken in ({"mask": "${nothing}"}, {"mask": "???"}, ["mask"]):
        with pytest.raises(sm.ConfigError):
            sm.load_config(omegaconf.OmegaConf.create(broken))


def test_omegaconf_nodes_inside_a_mapping_are_resolved_too():
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.create({"w": 3, "mask": "local", "kwargs": {"window": "${w}"}})
    expected = sm.load_config("mask: local\nmask_kwargs: {window: 3}")
    assert sm.load_config({"mask": node.mask, "mask_kwargs": node.kwargs}) == expected
    model = nn.MultiheadAttention(8, 2)
    overrides = omegaconf.OmegaConf.create({".*": {"mask": "local", "mask_kwargs": {"window": 3}}})
    assert sm.sparsify(model, "mask: none", overrides=overrides).swapped[0].mask == "local"
    with pytest.raises(sm.ConfigError, match=r"config: .*window"):
        sm.load_config({"mask": "local", "mask_kwargs": omegaconf.OmegaConf.create({"window": "???"})})


def test_the_name_of_a_configuration_of_the_package_is_no_name_of_a_mask():
    with pytest.raises(
        sm.ConfigError, match=r"neither an existing file nor YAML text; the package has '.*vit_none\.yaml'"
    ):
        sm.load_config("vit_none")
    with pytest.raises(sm.ConfigError, match="for a mask of that name write 'mask: fibo'"):
        sm.load_config("fibo")


class Kind(enum.Enum):
    LOCAL = 1


def test_a_structured_omegaconf_node_names_a_mask_by_an_enumeration():
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.create({"mask": Kind.LOCAL, "mask_kwargs": {"window": 3}})
    assert sm.load_config(node) == sm.load_config("mask: local\nmask_kwargs: {window: 3}")


def test_a_path_in_a_mapping_is_its_text(tmp_path):
    with pytest.raises(sm.ConfigError, match=r"scores: .*missing\.npz"):
        sm.load_config({"mask": "pruning", "mask_kwargs": {"keep_ratio": 0.5, "scores": tmp_path / "missing.npz"}})


@pytest.mark.parametrize("path", CONTRADICTING, ids=lambda path: path.stem)
def test_a_mask_for_a_backend_that_cannot_apply_it_is_refused_by_name(path):
    backend = path.stem.partition("_")[0]
    with pytest.raises(sm.ConfigError, match=f"the backend `{backend}` cannot apply the mask `fibottention`") as raised:
        sm.load_config(path)
    assert raised.value.key == "attention.mask"
    assert raised.value.source == str(path)
    assert raised.value.line == path.read_text().splitlines().index("  mask: fibottention") + 1


PUBLISHED = {
    "dna", "efficient_local", "efficient_none", "fibottention_high_overlap", "linformer_none", "vit_bigbird",
    "vit_fibottention", "vit_fibottention_crossdiag", "vit_fibottention_shuffled", "vit_fibottention_true_sparse",
    "vit_longformer", "vit_none", "vit_qchunk", "vit_qchunk_topk", "vit_random", "vit_sparse_fixed",
    "vit_sparse_local", "vit_sparse_strided", "vit_topk",
}  # fmt: skip
NEEDS = {"vit_bigbird": "bigbird", "vit_random": "random", "vit_topk": "topk", "vit_qchunk_topk": "topk"}


def test_every_published_configuration_ships_once_its_mask_exists():
    names = {mask.name for mask in registered()}
    expected = {name for name in PUBLISHED if NEEDS.get(name, "none") in names}
    assert expected <= {path.stem for path in YAMLS}
    assert {path.stem for path in CONTRADICTING} == {"efficient_fibottention", "linformer_fibottention"}


# Overrides by layer.


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3, enable_nested_tensor=False)


def test_layers_replace_keys_where_their_expression_matches():
    model = encoder()
    layers = {r"layers\.[01]\.": {"mask": "fibo"}, r"layers\.1\.": {"backend": "efficient", "mask": "none"}}
    config = {"mask": "local", "mask_kwargs": {"window": 2}, "scale": 0.5, "layers": layers}
    with pytest.raises(sm.ConfigError, match="dropout"):
        sm.sparsify(model, config)
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    config["layers"][r"layers\.2\."] = {"mask_kwargs": {"window": 1, "causal": True}}
    report = sm.sparsify(model, config)
    assert [row.mask for row in report.swapped] == ["fibottention", "efficient", "local"]
    assert [layer.self_attn.layer_mask.scale for layer in model.layers] == [0.5, 0.5, 0.5]
    kwargs = json.loads(model.layers[2].self_attn.layer_mask.config.to_json())["mask_kwargs"]
    assert (kwargs["window"], kwargs["causal"]) == (1, True)


def test_a_layers_entry_that_matches_no_layer_is_an_error_unless_lenient():
    config = {"mask": "fibo", "layers": {"blocks": {"mask": "none"}, r"layers\.0": {"mask": "none"}}}
    with pytest.raises(sm.ConfigError, match="layers: `blocks` matches none of the attention layers") as raised:
        sm.sparsify(encoder(), config)
    assert raised.value.key == "layers"
    assert [row.mask for row in sm.sparsify(encoder(), config, strict=False).swapped] == ["none"] + ["fibottention"] * 2
    with pytest.raises(sm.ConfigError, match="overrides: `blocks` matches none"):
        sm.sparsify(encoder(), "mask: fibo", overrides={"blocks": {"mask": "none"}})


def test_layers_without_a_model_are_an_error_and_not_ignored(capsys, tmp_path):
    text = "mask: fibo\nlayers: {'blocks.0': {mask: none}}"
    for use in (
        lambda: sm.SparseMHSA(8, 2, config=text),
        lambda: sm.Mask.from_config(text, 9, 2),
        lambda: sm.SparseMHSA.from_dense(nn.MultiheadAttention(8, 2), text),
    ):
        with pytest.raises(sm.ConfigError, match=r"layers: .* there is no model here") as raised:
            use()
        assert raised.value.key == "layers"
    sm.SparseMHSA(8, 2, config=sm.load_config(text).for_layer("blocks.0"))
    (tmp_path / "a.yaml").write_text(text)
    sizes = ["--tokens", "9", "--heads", "2"]
    assert main(["masks", str(tmp_path / "a.yaml"), *sizes]) == 2
    assert "layers" in capsys.readouterr().err
    assert main(["masks", str(tmp_path / "a.yaml"), *sizes, "--module", "blocks.0.attn"]) == 0
    assert capsys.readouterr().out.startswith("none: 9 tokens")


def test_the_list_of_masks_names_every_mask_and_parameter(capsys):
    for arguments in (["--list"], ["--list", "--markdown"]):
        assert main(["masks", *arguments]) == 0
        out = capsys.readouterr().out
        for mask in registered():
            assert mask.name in out
            assert mask.about in out
            assert all(parameter.name in out for parameter in mask.parameters)
    assert out.count("\n| `") == len((*registered(), *backends(), *policies()))
    assert main(["masks", "--tokens", "9"]) == 2
    assert "arguments are required: FILE" in capsys.readouterr().err


def test_a_picture_is_written_to_the_name_that_was_given(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["masks", str(YAMLS[0].with_name("local.yaml")), "--tokens", "9", "--heads", "2", "--plot"]
    assert main([*arguments, str(tmp_path / "picture")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["picture"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", r"the document is empty"),
        (
            {"mask": "union", "mask_kwargs": {"masks": ["local"]}},
            r"masks\.0: .*expected a mapping such as \{mask, mask_kwargs\}",
        ),
    ],
)
def test_errors_speak_of_the_document_and_not_of_the_program(config, message):
    with pytest.raises(sm.ConfigError, match=message):
        sm.load_config(config)
