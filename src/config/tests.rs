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
        ("backend: linformer\nmask: none", "unknown backend `linformer`"),
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
        ("mask: !local x", "YAML tags (`!name`) are not accepted"),
        // A core-schema tag never runs anything: the value is read as the plain text it is.
        ("mask: !!python/object:os.system x", "unknown mask `x`"),
        ("mask: none\n---\nmask: local", "more than one document"),
        ("mask: 'none", "while scanning"),
        ("mask: none\nlayers: {'(': {mask: local}}", "not a regular expression"),
        ("mask: none\nlayers: {'0': {mask: locl}}", "layers.0.mask: unknown mask `locl`"),
        ("mask: none\nlayers: {'0': {num_heads: 3}}", "cannot be replaced for single layers"),
        ("backend: fibottention_sparse\nmask: local", "brings its own mask"),
        ("mask: none\nmask_kwargs: {window: 3}", "unknown key `window`"),
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
    assert_eq!(config.for_layer("head").unwrap().mask(), "local");
    assert_eq!(config.for_layer("blocks.3.attn").unwrap().mask(), "fibottention");
    assert_eq!(config.for_layer("blocks.0.attn").unwrap().mask(), "none");
}

#[test]
fn a_mask_that_ignores_the_layer_has_one_text_for_all_layers() {
    let spec = |mask: &str, layer| {
        AttentionConfig::parse(mask, None).unwrap().spec(3, layer, Some(12), 7, None, Some(1)).unwrap()
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
        Spec::from_text(&config.spec(2, 0, None, 0, None, found).unwrap()).unwrap().num_prefix_tokens
    };
    assert_eq!(prefix("mask: fibo\nnum_prefix_tokens: 5", Some(2)), 5);
    assert_eq!(prefix("mask: fibo", Some(2)), 2);
    assert_eq!(prefix("mask: fibo", None), 1);
    assert_eq!(prefix("{mask: fibo, mask_kwargs: {add_class_token: false}}", Some(1)), 0);
}

#[test]
fn every_registered_mask_round_trips_through_yaml() {
    for mask in registry::MASKS {
        let kwargs = if mask.name == "local" { "{window: 1}" } else { "{}" };
        let text = format!(
            "mask: {}\nmask_kwargs: {kwargs}\nscale: 0.5\nlayers: {{'0': {{mask: none}}}}",
            mask.name
        );
        let config = AttentionConfig::parse(&text, None).unwrap();
        assert_eq!(AttentionConfig::parse(&config.to_yaml(), None).unwrap(), config, "{}", config.to_yaml());
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
