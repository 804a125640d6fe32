//! Arguments that do not fit together are refused by name, before anything is written.

use super::*;
use crate::error::Error;

const SIZES: [usize; 7] = [2, 4, 2, 6, 5, 3, 2];

fn case() -> Case<f32> {
    Case::new(
        &mut Random(1),
        SIZES,
        &[Arc::new(EdgeSet::builder(6, 5).unwrap().rect(0..6, 0..5).build().unwrap())],
    )
}

/// The message of a forward call, and of a backward call, with `change` made to the problem.
fn messages(change: impl for<'a> Fn(&mut Attention<'a, f32>, &'a [f32], &'a [u8])) -> Vec<Error> {
    let case = case();
    let (spare, bytes) = (vec![0.0; 4096], vec![1; 4096]);
    let mut problem = case.problem();
    change(&mut problem, &spare, &bytes);
    let run = run(Isa::Scalar, 1);
    let nan = f32::NAN;
    let (mut out, mut lse) = (vec![nan; 2 * 4 * 6 * 2], vec![f64::NAN; 2 * 4 * 6]);
    let forward = problem.forward(room(&mut out, [2, 4, 6, 2]), &mut lse, &run).unwrap_err();
    let (mut dq, mut dk, mut dv) =
        (vec![nan; case.q.len()], vec![nan; case.k.len()], vec![nan; case.v.len()]);
    let lse_view = View::contiguous("lse", &lse, [2, 4, 6]).unwrap();
    let gradients = Gradients {
        dq: room(&mut dq, case.problem().q.shape()),
        dk: room(&mut dk, case.problem().k.shape()),
        dv: room(&mut dv, case.problem().v.shape()),
    };
    let backward = problem.backward(case.grad_out(), case.grad_out(), lse_view, gradients, &run).unwrap_err();
    assert!([out, dq, dk, dv].iter().flatten().all(|value| value.is_nan()), "something was written");
    assert!(lse.iter().all(|value| value.is_nan()), "something was written");
    vec![forward, backward]
}

fn view<'a, T, const RANK: usize>(spare: &'a [T], shape: [usize; RANK]) -> View<'a, T, RANK> {
    View::contiguous("spare", &spare[..shape.iter().product()], shape).unwrap()
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    type Change = for<'a> fn(&mut Attention<'a, f32>, &'a [f32], &'a [u8]);
    let cases: [(&str, Change); 10] = [
        ("k: expected shape [2, 2, 5, 3], got [2, 2, 5, 4]", |p, spare, _| p.k = view(spare, [2, 2, 5, 4])),
        ("k: expected shape [2, 2, 5, 3], got [1, 2, 5, 3]", |p, spare, _| p.k = view(spare, [1, 2, 5, 3])),
        ("v: expected shape [2, 2, 5, 2], got [2, 2, 4, 2]", |p, spare, _| p.v = view(spare, [2, 2, 4, 2])),
        ("v: expected shape [2, 2, 5, 2], got [2, 4, 5, 2]", |p, spare, _| p.v = view(spare, [2, 4, 5, 2])),
        ("k: expected a number of heads that divides the 4 of q, got [2, 3, 5, 3]", |p, spare, _| {
            (p.k, p.v) = (view(spare, [2, 3, 5, 3]), view(spare, [2, 3, 5, 2]));
        }),
        ("q: expected a head dimension of at least 1, got [2, 4, 6, 0]", |p, spare, _| {
            p.q = view(spare, [2, 4, 6, 0])
        }),
        ("v: expected a head dimension of at least 1, got [2, 2, 5, 0]", |p, spare, _| {
            p.v = view(spare, [2, 2, 5, 0])
        }),
        ("key_mask: expected shape [2, 5], got [2, 6]", |p, _, bytes| {
            p.key_mask = Some(View::contiguous("key_mask", &bytes[..12], [2, 6]).unwrap());
        }),
        ("bias: expected shape [2, 4, 6, 5], got [1, 4, 6, 5]", |p, spare, _| {
            p.bias = Some(view(spare, [1, 4, 6, 5]))
        }),
        ("edges: expected 7 queries x 5 keys, got 6 x 5", |p, spare, _| p.q = view(spare, [2, 4, 7, 3])),
    ];
    for (expected, change) in cases {
        for error in messages(change) {
            assert_eq!(error, Error::Shape(expected.to_owned()));
        }
    }
}

#[test]
fn a_plan_for_another_number_of_heads_is_refused() {
    let edges = Arc::new(EdgeSet::builder(6, 5).unwrap().build().unwrap());
    let plan = Plan::new(&[edges.clone(), edges.clone(), edges]).unwrap();
    let case = case();
    let problem = Attention { plan: &plan, ..case.problem() };
    let mut out = [0.0; 96];
    let out = room(&mut out, [2, 4, 6, 2]);
    let error = problem.forward(out, &mut [0.0; 48], &run(Isa::Scalar, 1)).unwrap_err();
    assert!(
        matches!(&error, Error::Shape(text) if text.contains("edges: expected 1, 4 (heads) or 8")),
        "{error}"
    );
}

#[test]
fn dropout_is_a_probability_and_excludes_masked_logits_zero() {
    for p in [-0.1, 1.1, f64::NAN] {
        for error in messages(|problem, _, _| problem.dropout = Some(Dropout { seed: 0, p })) {
            assert_eq!(
                error,
                Error::Value(format!("dropout_p: expected a probability from 0 to 1, got {p}"))
            );
        }
    }
    for error in messages(|problem, _, _| {
        (problem.dropout, problem.masked_logits) = (Some(Dropout { seed: 0, p: 0.5 }), MaskedLogits::Zero);
    }) {
        assert_eq!(
            error,
            Error::Value("dropout_p: expected 0 with masked_logits `zero`, got 0.5".to_owned())
        );
    }
}

#[test]
fn outputs_of_the_wrong_size_are_named() {
    let case = case();
    let problem = case.problem();
    let run = run(Isa::Scalar, 1);
    let mut few = [[0.0; 95]; 2];
    for (new, few) in [ViewMut4::contiguous, ViewMut4::merged_heads].into_iter().zip(&mut few) {
        assert_eq!(
            new("out", few, [2, 4, 6, 2]).unwrap_err(),
            Error::Shape("out: expected contiguous room for shape [2, 4, 6, 2], got 95 elements".into())
        );
    }
    let error = problem.forward(room(&mut [0.0; 96], [2, 4, 2, 6]), &mut [0.0; 48], &run).unwrap_err();
    assert_eq!(error, Error::Shape("out: expected shape [2, 4, 6, 2], got [2, 4, 2, 6]".into()));
    let error = problem.forward(room(&mut [0.0; 96], [2, 4, 6, 2]), &mut [0.0; 49], &run).unwrap_err();
    assert!(error.to_string().starts_with("lse: expected contiguous room for shape [2, 4, 6"), "{error}");

    let (out, lse) = ([0.0; 96], [0.0; 48]);
    let lse_view = View::contiguous("lse", &lse, [2, 4, 6]).unwrap();
    let right = [problem.q.shape(), problem.k.shape(), problem.v.shape()];
    for (index, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
        let mut shapes = right;
        shapes[index].swap(2, 3);
        let [mut dq, mut dk, mut dv] = right.map(|shape| vec![0.0; shape.iter().product()]);
        let gradients = Gradients {
            dq: room(&mut dq, shapes[0]),
            dk: room(&mut dk, shapes[1]),
            dv: room(&mut dv, shapes[2]),
        };
        let error = problem
            .backward(case.grad_out(), view(&out, [2, 4, 6, 2]), lse_view, gradients, &run)
            .unwrap_err();
        assert!(error.to_string().contains(&format!("{name}: expected shape {:?}", right[index])), "{error}");
    }
    type Shapes = [[usize; 4]; 2];
    let wrong: [(&str, Shapes, [usize; 3]); 3] = [
        ("grad_out: expected shape [2, 4, 6, 2], got [2, 4, 6, 1]", [[2, 4, 6, 1], [2, 4, 6, 2]], [2, 4, 6]),
        ("out: expected shape [2, 4, 6, 2], got [2, 2, 6, 2]", [[2, 4, 6, 2], [2, 2, 6, 2]], [2, 4, 6]),
        ("lse: expected shape [2, 4, 6], got [2, 4, 5]", [[2, 4, 6, 2], [2, 4, 6, 2]], [2, 4, 5]),
    ];
    for (expected, [grad_out, out_shape], lse_shape) in wrong {
        let [mut dq, mut dk, mut dv] = right.map(|shape| vec![0.0; shape.iter().product()]);
        let gradients = Gradients {
            dq: room(&mut dq, right[0]),
            dk: room(&mut dk, right[1]),
            dv: room(&mut dv, right[2]),
        };
        let (grad_out, out, lse) = (view(&out, grad_out), view(&out, out_shape), view(&lse, lse_shape));
        assert_eq!(
            problem.backward(grad_out, out, lse, gradients, &run),
            Err(Error::Shape(expected.to_owned()))
        );
    }
}
