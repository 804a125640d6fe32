//! Documents that are accepted, and what becomes of them.

mod backends;
mod rejected;

use super::*;
use crate::pattern::registry;
use proptest::prelude::*;

fn error(text: &str) -> ConfigError {
    match AttentionConfig::parse(text, Some("a.yaml")) {
        Err(Error::Config(error)) => *error,
        other => panic!("expected a configuration error, got {other:?}"),
    }
}

#[test]
fn a_minimal_document_gets_every_default() {
    let config =
        AttentionConfig::parse("mask: fibo\nmask_kwargs: {w_min: 5, w_max: 65, schedule: wythoff}", None)
            .unwrap();
    assert_eq!(config.mask(), "fibottention");
    let kwargs = &config.canonical()["mask_kwargs"];
    assert_eq!((&kwargs["w_max"], &kwargs["shuffled"]), (&json!(65), &json!(true)));
}

#[test]
fn the_attention_key_is_optional_and_json_is_yaml() {
    let plain = AttentionConfig::parse("mask: local\nmask_kwargs: {window: 2}", None).unwrap();
    let nested =
        AttentionConfig::parse(r#"{"attention": {"mask": "LOCAL", "mask_kwargs": {"window": 2}}}"#, None)
            .unwrap();
    assert_eq!(plain, nested);
}

#[test]
fn an_unknown_key_names_file_line_path_and_the_likely_meaning() {
    let error = error("attention:\n  mask: local\n  mask_kwargs:\n    windw: 3\n");
    assert_eq!(error.position, Some((4, 5)));
    assert_eq!(error.key, "attention.mask_kwargs.windw");
    let text = error.to_string();
    assert!(
        text.starts_with(
            "a.yaml:4:5: attention.mask_kwargs.windw: unknown key `windw`: did you mean `window`?"
        ),
        "{text}"
    );
    assert!(text.contains("dilation"), "{text}");
}

#[test]
fn overrides_by_layer_replace_keys_in_order() {
    let text = "mask: local\nmask_kwargs: {window: 1}\nlayers:\n  blocks: {mask: fibo}\n  'blocks\\.0\\.': {mask: none}\n";
    let config = AttentionConfig::parse(text, None).unwrap();
    assert_eq!(config.layers().collect::<Vec<_>>(), ["blocks", "blocks\\.0\\."]);
    assert_eq!(config.unmatched_layers(&["blocks.3.attn".into()]), ["blocks\\.0\\."]);
    assert_eq!(config.for_layer("head").unwrap().mask(), "local");
    assert_eq!(config.for_layer("blocks.3.attn").unwrap().mask(), "fibottention");
    assert_eq!(config.for_layer("blocks.0.attn").unwrap().mask(), "none");
}

#[test]
fn a_mask_that_ignores_the_layer_has_one_text_for_all_layers() {
    let spec = |mask: &str, layer| {
        AttentionConfig::parse(mask, None).unwrap().spec(3, layer, Some(12), 7, None, Some(1), None).unwrap()
    };
    let local = "{mask: local, mask_kwargs: {window: 1}}";
    assert_eq!(spec(local, 0), spec(local, 5));
    assert_ne!(spec("mask: fibo", 0), spec("mask: fibo", 5));
}

#[test]
fn the_reference_gather_backend_is_the_fibottention_mask() {
    let config =
        AttentionConfig::parse("backend: fibottention_sparse\nbackend_kwargs: {shuffled: true}", None)
            .unwrap();
    assert_eq!(config, AttentionConfig::parse("mask: fibottention", None).unwrap());
}

#[test]
fn prefix_tokens_come_from_the_configuration_then_the_model_then_the_mask() {
    let prefix = |text: &str, found| {
        let config = AttentionConfig::parse(text, None).unwrap();
        Spec::from_text(&config.spec(2, 0, None, 0, None, found, None).unwrap()).unwrap().num_prefix_tokens
    };
    assert_eq!(prefix("mask: fibo\nnum_prefix_tokens: 5", Some(2)), 5);
    assert_eq!(prefix("mask: fibo", Some(2)), 2);
    assert_eq!(prefix("mask: fibo", None), 1);
    assert_eq!(prefix("{mask: fibo, mask_kwargs: {add_class_token: false}}", Some(1)), 0);
}

/// Parameters for the masks that cannot do without.
const REQUIRED: &[(&str, &str)] = &[
    ("local", "{window: 1}"),
    ("strided", "{stride: 3}"),
    ("strided_columns", "{stride: 3}"),
    ("block", "{block_size: 4, layout: {band: 1}}"),
    ("vertical_slash", "{vertical: [0]}"),
    ("random", "{k: 2}"),
    ("pruning", "{keep_ratio: 0.5}"),
    ("neighborhood", "{kernel_size: [3, 5]}"),
    ("grid_window", "{window_size: 7}"),
    ("space_time", "{kind: tube, radius: 1}"),
    ("union", "{masks: [{mask: fibo}, {mask: random, mask_kwargs: {keep_ratio: 0.5}}]}"),
    ("intersection", "{masks: [{mask: full}]}"),
    ("difference", "{masks: [{mask: dense}, {mask: axial, mask_kwargs: {grid: [2, 3]}}]}"),
    ("importance", "{score: list, indices: [0, 2]}"),
    ("per_head", "{masks: [{mask: fibo, heads: [1]}, {mask: none, mask_kwargs: null, heads: 3}]}"),
];

#[test]
fn every_registered_mask_round_trips_through_yaml() {
    for mask in registry::MASKS {
        let kwargs = REQUIRED.iter().find(|(name, _)| *name == mask.name).map_or("{}", |(_, kwargs)| kwargs);
        let text = format!(
            "mask: {}\nmask_kwargs: {kwargs}\nscale: 0.5\nlayers: {{'0': {{mask: none}}}}",
            mask.name
        );
        let config = AttentionConfig::parse(&text, None).unwrap();
        assert_eq!(AttentionConfig::parse(&config.to_yaml(), None).unwrap(), config, "{}", config.to_yaml());
    }
}

#[test]
fn a_seed_that_is_missing_is_filled_in_once_and_one_that_is_given_stays() {
    let parse = |text: &str| AttentionConfig::parse(text, None).unwrap();
    let config = parse("{mask: random, mask_kwargs: {k: 2, seed: None}}");
    assert_eq!((config.seeds(), config.with_seed(7).seeds()), (vec![None], vec![Some(7)]));
    assert_eq!(config.with_seed(7), parse("{mask: random, mask_kwargs: {k: 2, seed: 7}}"));
    assert_eq!(config.with_seed(7).with_seed(8), config.with_seed(7));
    assert_eq!(parse("mask: bigbird").seeds(), [Some(1234)]);
    assert!(parse("mask: fibo").seeds().is_empty());
    let parts = "[{mask: random, mask_kwargs: {k: 1}}, {mask: bigbird}, {mask: random, mask_kwargs: {k: 1}}]";
    let union = parse(&format!("{{mask: union, mask_kwargs: {{masks: {parts}}}}}"));
    assert_eq!(union.with_seed(7).seeds(), [Some(7), Some(1234), Some(8)]);
    assert_eq!(AttentionConfig::parse(&union.with_seed(7).to_yaml(), None).unwrap(), union.with_seed(7));
}

#[test]
fn only_masks_that_look_at_the_grid_hear_of_the_models() {
    let edges = |text: &str, found, num_tokens| {
        let spec =
            AttentionConfig::parse(text, None).unwrap().spec(2, 0, None, 0, found, None, None).unwrap();
        Spec::from_text(&spec).unwrap().edges(num_tokens).map(|edges| edges.heads[0].nnz())
    };
    let message = |text: &str, found, num_tokens| edges(text, found, num_tokens).unwrap_err().to_string();
    let local = "{mask: local, mask_kwargs: {window: 1}}";
    assert!(edges(local, Some(vec![3, 3]), 8).is_ok());
    assert_eq!(
        message("{mask: local, mask_kwargs: {window: 1}, grid: [3, 3], num_prefix_tokens: 1}", None, 8),
        "grid: [3, 3] has 9 cells, but 8 tokens with 1 prefix tokens leave 7 patches"
    );
    assert_eq!(edges("mask: axial", Some(vec![2, 3]), 6).unwrap(), 6 * 4);
    assert!(message("mask: axial", None, 9).starts_with("grid: expected [H, W] or [T, H, W]"));
    assert!(message("mask: axial", Some(vec![3, 3]), 8).contains("has 9 cells"));
    assert!(
        message("{mask: axial, token_order: t_fastest}", Some(vec![3, 3]), 9).starts_with("token_order: ")
    );
    assert_eq!(edges("{mask: axial, mask_kwargs: {grid: [2, 3]}}", Some(vec![3, 2]), 0).unwrap(), 0);
}

#[test]
fn keys_of_the_reference_without_effect_are_accepted() {
    for text in [
        "mask: longformer\nmask_kwargs: {seed: 3, reseed_each_epoch: true, plot_once: true}",
        "backend: efficient_local\nbackend_kwargs: {plot_once: false}",
        "backend: vit_qchunk\nbackend_kwargs: {query_chunk_size: 64}",
    ] {
        let plain = text.split_inclusive('\n').next().unwrap();
        assert_eq!(
            AttentionConfig::parse(text, None).unwrap(),
            AttentionConfig::parse(plain, None).unwrap(),
            "{text}"
        );
    }
}

/// Documents that can be honoured, over every key.
fn documents() -> impl Strategy<Value = Value> {
    let mask = proptest::sample::select(registry::MASKS.iter().collect::<Vec<_>>()).prop_flat_map(|mask| {
        let kwargs = REQUIRED.iter().find(|(name, _)| *name == mask.name).map_or("{}", |(_, kwargs)| kwargs);
        let kwargs: Value = serde_yaml::from_str(kwargs).unwrap();
        let names: Vec<_> = std::iter::once(mask.name).chain(mask.aliases.iter().copied()).collect();
        proptest::sample::select(names).prop_map(move |name| json!({ "mask": name, "mask_kwargs": kwargs }))
    });
    let backend = prop_oneof![
        Just(json!({"backend": "efficient", "mask": "none"})),
        (1..99i64, any::<bool>()).prop_map(|(size, global)| {
            json!({"backend": "efficient_local", "backend_kwargs": {"block_size": size, "keep_cls_global": global}})
        }),
        (1..999i64, 1..99i64).prop_map(|(length, r)| {
            json!({"backend": "linformer", "backend_kwargs": {"projector": {"max_seq_len": length, "r": r}}})
        }),
    ];
    let scale =
        proptest::option::of(prop_oneof![any::<f64>().prop_filter("finite", |x| x.is_finite()), -9e9..9e9]);
    let sizes =
        (proptest::option::of(0..9u64), proptest::option::of(1..99u64), proptest::option::of(1..99u64));
    let pattern = "[a-z.*\\\\#: '\"0-9\u{e9}]{0,9}"
        .prop_filter("a regular expression", |text| regex::Regex::new(text).is_ok());
    let layers = proptest::collection::btree_map(pattern, Just(json!({"scale": 0.5})), 0..3);
    (prop_oneof![3 => mask, 1 => backend], scale, sizes, layers, any::<bool>()).prop_map(
        |(mut document, scale, (prefix, width, heads), layers, wrapped)| {
            let map = document.as_object_mut().unwrap();
            map.insert("scale".into(), json!(scale));
            map.insert("num_prefix_tokens".into(), json!(prefix));
            map.insert("embed_dim".into(), json!(width));
            map.insert("num_heads".into(), json!(heads));
            map.insert("layers".into(), json!(layers));
            if wrapped { json!({ "attention": document }) } else { document }
        },
    )
}

proptest! {
    #[test]
    fn every_document_round_trips_through_yaml_and_json(document in documents()) {
        let config = AttentionConfig::parse(&document.to_string(), None).unwrap();
        for text in [config.to_yaml(), config.canonical().to_string(), serde_yaml::to_string(&document).unwrap()] {
            prop_assert_eq!(&AttentionConfig::parse(&text, None).unwrap(), &config, "{}", text);
        }
        let hash = |config: &AttentionConfig| config.canonical().to_string();
        prop_assert_eq!(hash(&AttentionConfig::parse(&config.to_yaml(), None).unwrap()), hash(&config));
    }
}
