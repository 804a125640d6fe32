//! Results depend on what tensors hold, not on how they lie in memory.

use half::f16;

use super::*;

/// A tensor spread over a larger storage: dimensions permuted, reversed, widened, and one element off any alignment.
struct Spread<T> {
    storage: Vec<T>,
    offset: usize,
    shape: [usize; 4],
    strides: [i64; 4],
}

impl<T: Element> Spread<T> {
    fn new(random: &mut Random, data: &[T], shape: [usize; 4]) -> Self {
        let mut order = [0, 1, 2, 3];
        for i in (1..4).rev() {
            order.swap(i, random.below(i + 1));
        }
        let (mut strides, mut size) = ([0i64; 4], 1);
        for &dim in &order {
            let step = 1 + random.below(3);
            strides[dim] = (size * step) as i64;
            size *= step * shape[dim].max(1);
        }
        let mut offset = 1;
        for dim in 0..4 {
            if random.chance(0.3) && shape[dim] > 0 {
                offset += (shape[dim] - 1) * strides[dim] as usize;
                strides[dim] = -strides[dim];
            }
        }
        let nan = T::from_acc(T::Acc::from_f64(f64::NAN));
        let mut spread = Spread { storage: vec![nan; size + 1], offset, shape, strides };
        let mut data = data.iter();
        for b in 0..shape[0] {
            for h in 0..shape[1] {
                for i in 0..shape[2] {
                    for d in 0..shape[3] {
                        let index = [b, h, i, d];
                        let place = (0..4).map(|dim| index[dim] as i64 * strides[dim]).sum::<i64>();
                        spread.storage[(offset as i64 + place) as usize] = *data.next().unwrap();
                    }
                }
            }
        }
        spread
    }

    fn view(&self) -> View4<'_, T> {
        View::strided("spread", &self.storage, self.offset, self.shape, self.strides).unwrap()
    }
}

fn check_spread_tensors<T: Element>(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut random = Random(seed);
        let case = Case::<T>::random(&mut random);
        let [b, h, g, n, s, d, dv] = case.sizes;
        let q = Spread::new(&mut random, &case.q, [b, h, n, d]);
        let k = Spread::new(&mut random, &case.k, [b, g, s, d]);
        let v = Spread::new(&mut random, &case.v, [b, g, s, dv]);
        let grad_out = Spread::new(&mut random, &case.grad_out, [b, h, n, dv]);
        let bias = case.bias.as_ref().map(|bias| Spread::new(&mut random, bias, [b, h, n, s]));
        let problem = Attention {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            bias: bias.as_ref().map(Spread::view),
            ..case.problem()
        };
        for isa in Isa::available() {
            let spread = results(&problem, grad_out.view(), &run(isa, 1));
            assert!(spread.same_bits(&case.results(isa)), "seed {seed} on {}", isa.name());
        }
    }
}

#[test]
fn any_strides_give_the_same_bits_as_contiguous_tensors() {
    check_spread_tensors::<f32>(5000..5060);
    check_spread_tensors::<f64>(5100..5140);
    check_spread_tensors::<f16>(5200..5230);
}

/// `(batch, head, token, channel)` from memory in which the heads of a token lie side by side.
fn unmerged<T: Element>(data: &[T], [b, h, n, d]: [usize; 4]) -> Vec<T> {
    let strides = [h * n * d, d, h * d, 1].map(|stride| stride as i64);
    let view = View::strided("merged", data, 0, [b, h, n, d], strides).unwrap();
    let mut elements = Vec::with_capacity(data.len());
    for (b, h) in (0..b).flat_map(|b| (0..h).map(move |h| (b, h))) {
        elements.extend((0..n).flat_map(|i| (0..d).map(move |d| [b, h, i, d])).map(|index| view.at(index)));
    }
    elements
}

fn merged<T>(data: &mut [T], shape: [usize; 4]) -> ViewMut4<'_, T> {
    ViewMut4::merged_heads("merged", data, shape).unwrap()
}

fn check_merged_heads<T: Element>(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let case = Case::<T>::random(&mut Random(seed));
        let problem = case.problem();
        let [b, h, g, n, s, d, dv] = case.sizes;
        let [of_out, of_q, of_k, of_v] = [[b, h, n, dv], [b, h, n, d], [b, g, s, d], [b, g, s, dv]];
        let poison = T::from_acc(T::Acc::from_f64(f64::NAN));
        for isa in Isa::available() {
            let run = run(isa, 1);
            let [mut out, mut dq, mut dk, mut dv] =
                [of_out, of_q, of_k, of_v].map(|shape| vec![poison; shape.iter().product()]);
            let mut lse = vec![f64::NAN; b * h * n];
            problem.forward(merged(&mut out, of_out), &mut lse, &run).unwrap();
            let out = unmerged(&out, of_out);
            let gradients =
                Gradients { dq: merged(&mut dq, of_q), dk: merged(&mut dk, of_k), dv: merged(&mut dv, of_v) };
            let out_view = View::contiguous("out", &out, of_out).unwrap();
            let lse_view = View::contiguous("lse", &lse, [b, h, n]).unwrap();
            problem.backward(case.grad_out(), out_view, lse_view, gradients, &run).unwrap();
            let (dq, dk, dv) = (unmerged(&dq, of_q), unmerged(&dk, of_k), unmerged(&dv, of_v));
            let merged = Results { out, lse, dq, dk, dv };
            assert!(merged.same_bits(&case.results(isa)), "seed {seed} on {}", isa.name());
        }
    }
}

#[test]
fn outputs_with_merged_heads_hold_the_same_bits() {
    check_merged_heads::<f32>(5300..5360);
    check_merged_heads::<f64>(5400..5430);
    check_merged_heads::<f16>(5500..5530);
}

#[test]
fn a_stride_of_zero_repeats() {
    let mut random = Random(9);
    let (b, h, n, s, d) = (2, 3, 21, 18, 7);
    let edges = random.edges(n, s);
    let mut repeated = Case::<f32>::new(&mut random, [b, h, h, n, s, d, d], std::slice::from_ref(&edges));
    let row: Vec<f32> = repeated.k[..d].to_vec();
    let (one, bias_row) = ([0.75f32], values::<f32>(&mut random, s, 1.0));
    repeated.k = row.iter().copied().cycle().take(b * h * s * d).collect();
    repeated.v = repeated.k.clone();
    repeated.grad_out.fill(one[0]);
    repeated.bias = Some(bias_row.iter().copied().cycle().take(b * h * n * s).collect());
    repeated.key_mask = Some((0..b * s).map(|key| u8::from(key % s % 4 != 0)).collect());

    let key_mask = &repeated.key_mask.as_ref().unwrap()[..s];
    let kv = View::strided("kv", &row, 0, [b, h, s, d], [0, 0, 0, 1]).unwrap();
    let broadcast = Attention {
        k: kv,
        v: kv,
        key_mask: Some(View::strided("key_mask", key_mask, 0, [b, s], [0, 1]).unwrap()),
        bias: Some(View::strided("bias", &bias_row, 0, [b, h, n, s], [0, 0, 0, 1]).unwrap()),
        ..repeated.problem()
    };
    let grad_out = View::strided("grad_out", &one, 0, [b, h, n, d], [0; 4]).unwrap();
    for isa in Isa::available() {
        let got = results(&broadcast, grad_out, &run(isa, 1));
        assert!(got.same_bits(&repeated.results(isa)), "on {}", isa.name());
    }
}

#[test]
fn q_k_and_v_may_be_the_same_tensor() {
    let mut random = Random(10);
    let edges = random.edges(30, 30);
    let mut copied = Case::<f32>::new(&mut random, [2, 2, 2, 30, 30, 16, 16], std::slice::from_ref(&edges));
    (copied.k, copied.v) = (copied.q.clone(), copied.q.clone());
    let shared = Attention { k: copied.problem().q, v: copied.problem().q, ..copied.problem() };
    for isa in Isa::available() {
        assert!(results(&shared, copied.grad_out(), &run(isa, 1)).same_bits(&copied.results(isa)));
    }
}

#[test]
fn a_view_that_could_leave_its_storage_is_refused() {
    let storage = [0.0f32; 24];
    let view = |offset, shape, strides| View::strided("q", &storage, offset, shape, strides);
    assert!(view(0, [1, 2, 3, 4], [24, 12, 4, 1]).is_ok());
    assert!(view(23, [1, 2, 3, 4], [0, -12, -4, -1]).is_ok());
    assert!(view(usize::MAX, [0, 2, 3, 4], [i64::MAX; 4]).is_ok(), "an empty tensor reaches nothing");
    assert!(view(0, [1, 1, 1, 1], [i64::MIN; 4]).is_ok(), "a stride that is never taken reaches nothing");
    let outside = [
        (1, [1, 2, 3, 4], [24, 12, 4, 1]),
        (24, [1, 1, 1, 1], [1; 4]),
        (0, [1, 2, 3, 4], [24, -12, 4, 1]),
        (22, [1, 2, 3, 4], [0, -12, -4, -1]),
        (0, [1, 1, 1, 3], [0, 0, 0, i64::MAX]),
        (0, [1 << 40, 1 << 40, 1, 1], [1 << 62, 1 << 62, 1, 1]),
        (0, [2, 1, 1, 1], [i64::MIN, 0, 0, 0]),
    ];
    for (offset, shape, strides) in outside {
        let error = view(offset, shape, strides).unwrap_err().to_string();
        assert!(error.starts_with("q: shape [") && error.contains("of a storage of 24"), "{error}");
    }
    let error = View::contiguous("k", &storage, [2, 3, 4, 5]).unwrap_err().to_string();
    assert_eq!(error, "k: expected 120 elements for shape [2, 3, 4, 5], got 24");
    // SAFETY: the pointer is refused before anything is read.
    let misaligned = unsafe {
        let pointer = storage.as_ptr().cast::<u8>().add(1).cast::<f32>();
        View::from_raw_parts("v", pointer, 20, 0, [20], [1])
    };
    assert!(misaligned.unwrap_err().to_string().starts_with("v: expected storage aligned to 4 bytes"));
}

#[test]
fn a_huge_view_of_little_memory_is_read_where_it_is() {
    // 2^40 batch elements over one storage would overflow 32-bit arithmetic anywhere.
    let storage: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let view = View::strided("q", &storage, 0, [1 << 40, 1, 4, 16], [0, 0, 16, 1]).unwrap();
    assert_eq!(view.at([(1 << 40) - 1, 0, 3, 15]), 63.0);
}
