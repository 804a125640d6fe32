//! Backends that bring attention of their own, built in and registered.

use super::super::*;
use super::error;

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
        ("backend: linformer", "a.yaml:1:1: backend_kwargs.projector: missing: it has no default"),
        ("backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9}}", "projector.r: missing"),
        (
            "backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9, r: 0}}",
            "projector.r: expected 1 to",
        ),
        (
            "backend: linformer\nbackend_kwargs: {projector: {max_seq_len: 9, r: 1, rank: 2}}",
            "projector.rank: unknown key `rank`",
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
        ("backend: mine", "backend_kwargs.width: missing"),
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
