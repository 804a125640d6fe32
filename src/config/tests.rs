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
fn every_kind_of_wrong_document_is_told_apart() {
    let cases = [
        ("", "the document is empty"),
        ("- mask: local", "expected a mapping"),
        ("attention:", "attention: expected a mapping, got null"),
        ("attention: {mask: none}\nmodel: vit", "unknown key `model` beside `attention`"),
        ("mask: fibotention", "did you mean `fibottention`?"),
        ("mask: [local]", "expected a string"),
        ("backend: linformr\nmask: none", "did you mean `linformer`?"),
        ("mask: local\nmask: none", "the key `mask` is given twice"),
        ("mask: local\nmask_kwargs: {window: many}", "mask_kwargs.window: invalid type"),
        ("mask: local\nmask_kwargs: {window: -1}", "mask_kwargs.window: expected 0 to"),
        ("mask: local\nmask_kwargs: {window: 1, window_size: 3}", "exactly one of window"),
        ("mask: local\nmask_kwargs: {window_size: 4}", "expected an odd total width"),
        ("mask: local\nmask_kwargs: {window_schedule: {kind: list, values: []}}", "got an empty list"),
        ("mask: local\nmask_kwargs: {window_schedule: {kind: step, values: []}}", "unknown variant `step`"),
        ("mask: sparse\nmask_kwargs: {pattern: fixd}", "did you mean `fixed`?"),
        (
            "mask: sparse\nmask_kwargs: {pattern: strided, local_attn_ctx: 0}",
            "expected a stride of at least 1",
        ),
        ("mask: fibo\nmask_kwargs: {schedule: lucas}", "unknown variant `lucas`"),
        (
            "mask: fibo\nmask_kwargs: {add_class_token: false}\nnum_prefix_tokens: 1",
            "num_prefix_tokens: expected 0",
        ),
        ("mask: none\nscale: .nan", "not a finite number"),
        ("mask: none\nnum_heads: 123456789012345678901234567890", "num_heads: "),
        ("mask: none\nnum_heads: 0", "num_heads: expected 1 to"),
        ("mask: none\ngrid: [0, 3]", "grid: expected [H, W]"),
        ("mask: none\nmasked_logits: one", "unknown variant `one`"),
        ("mask: topk\nmasked_logits: zero", "masked_logits: expected neg_inf, because `topk` chooses keys"),
        (
            "mask: union\nmask_kwargs: {masks: [{mask: fibo}, {mask: topk}]}",
            "masks.1.mask: `topk` chooses keys by",
        ),
        ("backend: vit_topk\nmask: local", "the backend `vit_topk` cannot apply the mask `local`"),
        ("mask: !local x", "YAML tags (`!name`) are not accepted"),
        // A core-schema tag never runs anything: the value is read as the plain text it is.
        ("mask: !!python/object:os.system x", "unknown mask `x`"),
        ("mask: none\n---\nmask: local", "more than one document"),
        ("mask: 'none", "while scanning"),
        ("mask: none\nlayers: {'(': {mask: local}}", "not a regular expression"),
        ("mask: none\nlayers: {'0': {mask: locl}}", "layers.0.mask: unknown mask `locl`"),
        ("mask: none\nlayers: {'0': {num_heads: 3}}", "cannot be replaced for single layers"),
        ("backend: fibottention_sparse\nmask: local", "cannot apply the mask `local`"),
        ("mask: none\nmask_kwargs: {window: 3}", "unknown key `window`"),
        ("mask: strided", "mask_kwargs: missing field `stride`"),
        ("mask: strided\nmask_kwargs: {stride: 0}", "mask_kwargs.stride: expected at least 1, got 0"),
        (
            "mask: strided_columns\nmask_kwargs: {stride: 3, offset: 3}",
            "mask_kwargs.offset: expected 0 to 2, got 3",
        ),
        ("mask: block\nmask_kwargs: {block_size: 4, layout: diagnal}", "did you mean `diagonal`?"),
        (
            "mask: block\nmask_kwargs: {block_size: 4, layout: {bnd: 1}}",
            "mask_kwargs.layout: unknown field `bnd`",
        ),
        (
            "mask: block\nmask_kwargs: {block_size: 4, layout: {band: -1}}",
            "layout.band: expected at least 0, got -1",
        ),
        ("mask: block\nmask_kwargs: {block_size: 4, layout: [[1, 0], [1]]}", "layout.1: expected 2 entries"),
        ("mask: block\nmask_kwargs: {block_size: 4, layout: [[2]]}", "layout.0: expected 0 or 1, got 2"),
        (
            "mask: block\nmask_kwargs: {block_size: 4, layout: 3}",
            "{band: n} or a matrix of 0 and 1 over blocks, got 3",
        ),
        ("mask: global\nmask_kwargs: {num_global: 1, global_indices: [3]}", "not both"),
        ("mask: global\nmask_kwargs: {num_global: -1}", "num_global: expected at least 0, got -1"),
        ("mask: vertical_slash", "mask_kwargs: give at least one of vertical"),
        ("mask: vertical_slash\nmask_kwargs: {slash: [1, -2]}", "slash: expected at least 0, got -2"),
        (
            "mask: vertical_slash\nmask_kwargs: {num_vertical: 3, slash: [1]}",
            "mask_kwargs.slash: expected nothing with num_vertical or num_slash",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 3, vertical: [1]}",
            "mask_kwargs.vertical: expected nothing with num_vertical or num_slash",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 3, causal: false}",
            "mask_kwargs.causal: expected true with num_vertical or num_slash",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_vertical: -1}",
            "mask_kwargs.num_vertical: expected 0 to 4294967295, got -1",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: -1}",
            "mask_kwargs.num_slash: expected 0 to 4294967295, got -1",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 1, last_queries: 0}",
            "mask_kwargs.last_queries: expected 1 to 4294967295, got 0",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 0, window: 3}",
            "mask_kwargs.num_vertical: expected at least 1 here or in num_slash, got 0",
        ),
        ("mask: random", "mask_kwargs: give exactly one of k"),
        ("mask: random\nmask_kwargs: {k: 3, keep_ratio: 0.5}", "mask_kwargs: give exactly one of k"),
        ("mask: random\nmask_kwargs: {k: 0}", "mask_kwargs.k: expected at least 1, got 0"),
        (
            "mask: random\nmask_kwargs: {keep_ratio: 0}",
            "keep_ratio: expected more than 0 and at most 1, got 0",
        ),
        (
            "mask: random\nmask_kwargs: {mask_ratio: 1}",
            "mask_ratio: expected at least 0 and less than 1, got 1",
        ),
        ("mask: random\nmask_kwargs: {k: 3, seed: x}", "mask_kwargs.seed: expected an integer, or null"),
        ("mask: bigbird\nmask_kwargs: {seed: None}", "mask_kwargs.seed: invalid type: string"),
        (
            "mask: neighborhood\nmask_kwargs: {kernel_size: 4}",
            "kernel_size: expected an odd number of keys per axis, got 4",
        ),
        (
            "mask: neighborhood\nmask_kwargs: {kernel_size: [3, x]}",
            "mask_kwargs.kernel_size: invalid type: string",
        ),
        (
            "mask: neighborhood\nmask_kwargs: {kernel_size: 3, dilation: 0}",
            "dilation: expected at least 1, got 0",
        ),
        (
            "mask: axial\nmask_kwargs: {grid: [14, 14]}\ngrid: [7, 28]",
            "grid: expected [14, 14], as mask_kwargs.grid says",
        ),
        ("mask: axial\nmask_kwargs: {grid: [196]}", "mask_kwargs.grid: expected [H, W] or [T, H, W]"),
        ("mask: grid_window\nmask_kwargs: {window_size: 0}", "window_size: expected at least 1, got 0"),
        ("mask: space_time\nmask_kwargs: {kind: spce}", "mask_kwargs.kind: unknown variant `spce`"),
        (
            "mask: space_time\nmask_kwargs: {kind: space, radius: 2}",
            "radius: has a meaning only with kind: tube",
        ),
        (
            "mask: axial\ngrid: [14, 14]\ntoken_order: t_fastest",
            "token_order: t_fastest needs a grid [T, H, W]",
        ),
        (
            "mask: fibo\ngrid: [4, 7, 7]\ntoken_order: t_fastest",
            "token_order: has no meaning for the mask `fibottention`",
        ),
        ("mask: union\nmask_kwargs: {masks: []}", "masks: expected at least one"),
        (
            "mask: union\nmask_kwargs: {masks: [{mask: locl}]}",
            "mask_kwargs.masks.0.mask: unknown mask `locl`",
        ),
        (
            "mask: union\nmask_kwargs: {masks: [{mask: none}, {mask: local, mask_kwargs: {windw: 1}}]}",
            "mask_kwargs.masks.1.mask_kwargs.windw: unknown key `windw`: did you mean `window`?",
        ),
        ("mask: union\nmask_kwargs: {masks: [{mask: none, heads: 3}]}", "masks.0.heads: unknown key `heads`"),
        (
            "mask: union\nmask_kwargs: {masks: [{mask: fibo, mask_kwargs: {add_class_token: false}, wieght: 1}]}",
            "mask_kwargs.masks.0.wieght: unknown field `wieght`",
        ),
        (
            "mask: per_head\nmask_kwargs: {masks: [{mask: none}, {mask: fibo}]}",
            "masks.1.heads: missing: masks.0 takes the heads that are left already",
        ),
        (
            "mask: per_head\nmask_kwargs: {masks: [{mask: none, heads: [-1]}]}",
            "masks.0.heads: expected at least 0",
        ),
    ];
    for (text, expected) in cases {
        let message = error(text).to_string();
        assert!(message.contains(expected), "{text:?} gave {message:?}");
    }
}

#[test]
fn hostile_text_is_refused_quickly() {
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n";
    assert!(error(bomb).message.contains("more than 8192 values"), "{}", error(bomb));
    let deep = format!("mask: {}{}", "[".repeat(20_000), "]".repeat(20_000));
    assert!(
        error(&deep).message.contains("nested deeper") || error(&deep).message.contains("recursion"),
        "{}",
        error(&deep)
    );
    let long = format!("mask: {}", "x".repeat(MAX_BYTES));
    assert!(error(&long).message.contains("expected at most 65536 bytes"));
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
fn what_does_not_fit_the_sizes_is_named_when_the_edges_are_made() {
    let message = |text: &str, num_tokens| {
        let spec = AttentionConfig::parse(text, None).unwrap().spec(4, 0, None, 0, None, None, None).unwrap();
        Spec::from_text(&spec).unwrap().edges(num_tokens).unwrap_err().to_string()
    };
    let cases = [
        (
            "{mask: block, mask_kwargs: {block_size: 4, layout: [[1]]}}",
            "mask_kwargs.layout: expected 3 x 3 entries",
        ),
        (
            "{mask: global, mask_kwargs: {global_indices: [9]}}",
            "mask_kwargs.global_indices: expected -9 to 8, got 9",
        ),
        ("{mask: global, mask_kwargs: {num_global: 10}}", "mask_kwargs.num_global: expected 0 to 9, got 10"),
        (
            "{mask: vertical_slash, mask_kwargs: {vertical: [9]}}",
            "mask_kwargs.vertical: expected key columns of the 9",
        ),
        (
            "{mask: neighborhood, mask_kwargs: {kernel_size: 3, dilation: [1, 2]}, grid: [3, 3]}",
            "mask_kwargs.kernel_size: expected at most 1 on the axis of length 3 (axis 1 of the grid [3, 3]) with dilation 2",
        ),
        (
            "{mask: neighborhood, mask_kwargs: {kernel_size: [1, 1, 1]}, grid: [3, 3]}",
            "mask_kwargs.kernel_size: expected one value, or one for each of the 2 axes",
        ),
        (
            "{mask: neighborhood, mask_kwargs: {kernel_size: 3, stride: 4}, grid: [3, 3]}",
            "mask_kwargs.stride: expected 1 to 3",
        ),
        (
            "{mask: grid_window, mask_kwargs: {window_size: 2, shift: 2}, grid: [3, 3]}",
            "mask_kwargs.shift: expected 0 to 1",
        ),
        ("{mask: space_time, mask_kwargs: {kind: time}, grid: [3, 3]}", "grid: space_time needs [T, H, W]"),
        ("{mask: random, mask_kwargs: {k: 2}}", "mask_kwargs.seed: expected a number"),
        (
            "{mask: union, mask_kwargs: {masks: [{mask: none}, {mask: vertical_slash, mask_kwargs: {vertical: [9]}}]}}",
            "mask_kwargs.masks.1.mask_kwargs.vertical: expected key columns",
        ),
        ("{mask: union, mask_kwargs: {masks: [{mask: axial}]}}", "grid: expected [H, W]"),
        (
            "{mask: per_head, mask_kwargs: {masks: [{mask: none, heads: [4]}]}}",
            "masks.0.heads: expected heads 0 to 3, got 4",
        ),
        (
            "{mask: per_head, mask_kwargs: {masks: [{mask: none, heads: [0, 0]}]}}",
            "head 0 already takes masks.0",
        ),
        (
            "{mask: per_head, mask_kwargs: {masks: [{mask: none, heads: 5}]}}",
            "asks for 5 heads, but 4 of 4 are left",
        ),
        ("{mask: per_head, mask_kwargs: {masks: [{mask: none, heads: 3}]}}", "heads [3] of 4 take no mask"),
        (
            "{mask: per_head, mask_kwargs: {masks: [{mask: none, heads: 4}, {mask: fibo}]}}",
            "none of the 4 heads are left",
        ),
    ];
    for (text, expected) in cases {
        let message = message(text, 9);
        assert!(message.contains(expected), "{text:?} gave {message:?}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_loader_panic(text in "\\PC{0,200}") {
        let _ = AttentionConfig::parse(&text, None);
    }

    #[test]
    fn no_mapping_makes_the_loader_panic(
        key in "(mask|mask_kwargs|backend|scale|grid|layers|num_heads)",
        value in "(\\{[a-z_]{0,9}: [-0-9a-z.]{0,9}\\}|[-0-9a-z.~]{0,20}|\\[[-0-9,]{0,9}\\])",
    ) {
        let _ = AttentionConfig::parse(&format!("mask: longformer\n{key}: {value}"), None);
    }
}

#[test]
fn a_repeated_key_is_reported_where_it_is_repeated() {
    let error =
        error("attention:\n  mask: local\n  mask_kwargs:\n    window: 1\n    dilation: 1\n    window: 2\n");
    assert_eq!(
        (error.position, error.message.as_str()),
        (Some((6, 5)), "attention.mask_kwargs: the key `window` is given twice")
    );
}

#[test]
fn python_s_none_is_explained() {
    let hint = "(`None` is a YAML string; write `null`)";
    for text in [
        "mask: local\nmask_kwargs: {window: None}",
        "mask: none\nscale: None",
        "mask: none\nmask_kwargs: None",
    ] {
        assert!(error(text).to_string().ends_with(hint), "{}", error(text));
    }
    assert!(!error("mask: none\nscale: Nome").to_string().contains("null"));
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

#[test]
fn backends_with_attention_of_their_own_fill_in_their_parameters() {
    let parsed = |text: &str| AttentionConfig::parse(text, None).unwrap();
    let linformer = parsed("backend: Linformer\nbackend_kwargs: {projector: {max_seq_len: 197, r: 4}}");
    assert_eq!((linformer.backend(), linformer.mask(), linformer.uses_edges()), ("linformer", "none", false));
    let expected = json!({"projector": {
        "max_seq_len": 197, "r": 4, "num_heads": null, "shared_heads": true, "share_kv": true, "separate_cls": true,
    }});
    assert_eq!(linformer.canonical()["backend_kwargs"], expected);
    let local = parsed("backend: efficient_local");
    let expected = json!({"block_size": 4, "keep_cls_global": true, "normalize": "reference"});
    assert_eq!(local.canonical()["backend_kwargs"], expected);
    assert!(parsed("mask: fibo").uses_edges());
}

#[test]
fn what_a_backend_cannot_honour_is_an_error_that_names_the_key() {
    for (text, expected) in [
        (
            "backend: efficient\nmask: fibottention",
            "a.yaml:2:1: mask: the backend `efficient` cannot apply the mask `fibottention`",
        ),
        (
            "backend: efficient\nmask_kwargs: {window: 1}",
            "mask_kwargs: the backend `efficient` applies no mask",
        ),
        ("backend: efficient\nmasked_logits: zero", "masked_logits: the backend `efficient` has no edges"),
        ("backend: efficient\non_empty_row: error", "on_empty_row: the backend"),
        ("backend: efficient\nprefix_dense: false", "prefix_dense: the backend"),
        ("backend: efficient\nbackend_kwargs: {r: 3}", "backend_kwargs.r: unknown key `r`"),
        ("backend: efficent", "backend: unknown backend `efficent`: did you mean `efficient`?"),
        (
            "backend: efficient_local\nbackend_kwargs: {block_size: 0}",
            "backend_kwargs.block_size: expected at least 1, got 0",
        ),
        (
            "backend: efficient_local\nbackend_kwargs: {normalize: rows}",
            "backend_kwargs.normalize: unknown variant `rows`",
        ),
        ("backend: linformer", "backend_kwargs: missing field `projector`"),
        ("backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9}}", "missing field `r`"),
        (
            "backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9, r: 0}}",
            "projector.r: expected 1 to",
        ),
        (
            "backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9, r: 1, rank: 2}}",
            "unknown field `rank`",
        ),
        (
            "mask: fibo\nlayers: {'0': {backend: efficient}}",
            "layers.0.mask: the backend `efficient` cannot apply",
        ),
    ] {
        let message = error(text).to_string();
        assert!(message.contains(expected), "{text:?} gave {message:?}");
    }
}

#[test]
fn a_backend_of_the_user_is_a_name_with_checked_parameters() {
    let parameter = |text: &str| serde_json::from_str::<Parameter>(text).unwrap();
    let mine = UserBackend {
        name: "mine".into(),
        about: "a test".into(),
        parameters: vec![
            parameter(r#"{"name": "width", "types": ["integer"]}"#),
            parameter(r#"{"name": "factor", "types": ["number", "null"], "default": null}"#),
        ],
    };
    register_backend(mine.clone(), false).unwrap();
    let config = AttentionConfig::parse("backend: mine\nbackend_kwargs: {width: 3}", None).unwrap();
    assert_eq!(config.canonical()["backend_kwargs"], json!({"width": 3, "factor": null}));
    assert_eq!(AttentionConfig::parse(&config.to_yaml(), None).unwrap(), config);
    for (text, expected) in [
        ("backend: mine", "backend_kwargs: missing key `width`"),
        (
            "backend: mine\nbackend_kwargs: {width: 1.5}",
            "backend_kwargs.width: expected integer, got a number",
        ),
        ("backend: mine\nbackend_kwargs: {width: 1, wide: 2}", "unknown key `wide`"),
        (
            "backend: mine\nbackend_kwargs: {width: 1}\nmask: fibo",
            "the backend `mine` cannot apply the mask `fibo`",
        ),
    ] {
        assert!(error(text).to_string().contains(expected), "{}", error(text));
    }
    assert!(register_backend(mine.clone(), false).unwrap_err().to_string().contains("registered already"));
    register_backend(mine.clone(), true).unwrap();
    for taken in ["efficient", "vit", "fibottention_sparse", "Upper", ""] {
        assert!(
            register_backend(UserBackend { name: taken.into(), ..mine.clone() }, true).is_err(),
            "{taken}"
        );
    }
    assert!(json_schema().to_string().contains("backend_mine"));
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
