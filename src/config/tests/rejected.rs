//! Documents that are refused, each with the words that say why and where.

use proptest::prelude::*;

use super::super::*;
use super::error;

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
        (
            "mask: local\nmask_kwargs: {window: many}",
            "mask_kwargs.window: invalid type: string \"many\", expected an integer",
        ),
        (
            "num_prefix_tokens: -1",
            "num_prefix_tokens: invalid value: integer `-1`, expected an integer of at least 0",
        ),
        ("grid: [-1, 4]", "grid.0: invalid value: integer `-1`, expected an integer of at least 0"),
        ("scale: x", "scale: invalid type: string \"x\", expected a number"),
        (
            "mask: random\nmask_kwargs: {keep_ratio: x}",
            "keep_ratio: invalid type: string \"x\", expected a number",
        ),
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
        ("mask: strided", "mask_kwargs.stride: missing: it has no default"),
        ("mask: strided\nmask_kwargs: {stride: 0}", "mask_kwargs.stride: expected at least 1, got 0"),
        (
            "mask: strided_columns\nmask_kwargs: {stride: 3, offset: 3}",
            "mask_kwargs.offset: expected 0 to 2, got 3",
        ),
        ("mask: block\nmask_kwargs: {block_size: 4, layout: diagnal}", "did you mean `diagonal`?"),
        (
            "mask: block\nmask_kwargs: {block_size: 4, layout: {bnd: 1}}",
            "mask_kwargs.layout.bnd: unknown key `bnd`: did you mean `band`?",
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
            "mask: vertical_slash\nmask_kwargs: {num_slash: 3}",
            "mask_kwargs.causal: expected true with num_vertical or num_slash",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_vertical: -1, causal: true}",
            "mask_kwargs.num_vertical: expected 0 to 4294967295, got -1",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: -1, causal: true}",
            "mask_kwargs.num_slash: expected 0 to 4294967295, got -1",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 1, causal: true, last_queries: 0}",
            "mask_kwargs.last_queries: expected 1 to 4294967295, got 0",
        ),
        (
            "mask: vertical_slash\nmask_kwargs: {num_slash: 0, causal: true, window: 3}",
            "mask_kwargs.num_vertical: expected at least 1 here or in num_slash, got 0",
        ),
        ("mask: random", "mask_kwargs: give exactly one of k"),
        ("mask: random\nmask_kwargs: {k: 3, keep_ratio: 0.5}", "mask_kwargs: give exactly one of k"),
        (
            "mask: random\nmask_kwargs: {k: 3, causal: true, symmetric: true}",
            "mask_kwargs.symmetric: expected false with `causal: true`",
        ),
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
            "mask_kwargs.masks.0.wieght: unknown key `wieght`",
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
fn what_is_missing_is_reported_where_it_is_asked_for() {
    let cases = [
        ("mask: none\nbackend: linformer", (2, 1), "backend_kwargs.projector"),
        (
            "attention:\n  backend: linformer\n  backend_kwargs: {}",
            (3, 3),
            "attention.backend_kwargs.projector",
        ),
        (
            "backend: linformer\nbackend_kwargs:\n  projector:\n    r: 3",
            (3, 3),
            "backend_kwargs.projector.max_seq_len",
        ),
        ("scale: 1\nattention: null", (1, 1), "scale"),
        ("scale: 1\nmask: strided", (2, 1), "mask_kwargs.stride"),
    ];
    for (text, position, key) in cases {
        let error = error(text);
        assert_eq!((error.position, error.key.as_str()), (Some(position), key), "{text:?} gave {error}");
    }
}
