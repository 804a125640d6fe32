//! Windows, blocks and dense attention: every size around a square of 16 x 16, and nothing that a mask leaves out.

use half::bf16;

use super::accuracy::check;
use super::*;
use crate::plan::panels::{PANEL, Squares};

fn window(rows: usize, cols: usize, lo: i64, hi: i64) -> Arc<EdgeSet> {
    Arc::new(EdgeSet::builder(rows, cols).unwrap().band((lo, hi, 1), 0..rows, 0..cols).build().unwrap())
}

/// A key mask that keeps every key, with which the kernel for lines leaves the head to the panels.
fn in_panels<T: Element>(case: Case<T>) -> Case<T> {
    let [b, _, _, _, s, ..] = case.sizes;
    Case { key_mask: Some(vec![1; b * s]), ..case }
}

fn full(rows: usize, cols: usize) -> Arc<EdgeSet> {
    Arc::new(EdgeSet::builder(rows, cols).unwrap().rect(0..rows, 0..cols).build().unwrap())
}

#[test]
fn squares_hold_exactly_the_edges_whatever_part_is_asked_for() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let (rows, cols) = (1 + random.below(90), 1 + random.below(90));
        let edges = random.edges(rows, cols);
        let first = random.below(rows.div_ceil(PANEL)) * PANEL;
        let end = (first + PANEL * (1 + random.below(3))).min(rows);
        let mut tiles = Squares::new(&edges, first..end);
        let (mut found, mut squares) = (Vec::new(), Vec::new());
        for panels in tiles.chunks(0..cols.div_ceil(PANEL), 1 + random.below(6)) {
            for rows in tiles.rows_reaching(&panels) {
                for start in rows.step_by(PANEL) {
                    tiles.of_tile(start, &panels, &mut squares);
                    assert!(squares.is_sorted_by(|a, b| a.panel < b.panel));
                    for square in &squares {
                        assert!(panels.contains(&square.panel));
                        for (query, bits) in square.bits.iter().enumerate() {
                            assert!(*bits == 0 || square.halves[query / (PANEL / 2)]);
                            let keys = (0..PANEL).filter(|key| bits >> key & 1 != 0);
                            found.extend(keys.map(|key| (start + query, square.panel * PANEL + key)));
                        }
                    }
                }
            }
        }
        found.sort_unstable();
        let expected: Vec<_> = edges.iter().filter(|(row, _)| (first..end).contains(row)).collect();
        assert_eq!(found, expected, "seed {seed}");
    }
}

#[test]
fn dense_windows_go_to_the_panel_kernel_and_scattered_diagonals_do_not() {
    let pays = |edges: Arc<EdgeSet>| Plan::new(&[edges]).unwrap().head(0, 0, 1).in_panels().pays;
    assert!(pays(full(197, 197)) && pays(full(1, 300)) == pays(full(1, 301)));
    assert!(pays(window(500, 500, -64, 64)) && pays(window(500, 500, -500, 0)));
    let mut scattered = EdgeSet::builder(500, 500).unwrap();
    for offset in [-233, -89, -34, -13, 0, 21, 55, 144] {
        scattered = scattered.diagonal(offset, 0..500, 0..500);
    }
    assert!(!pays(Arc::new(scattered.build().unwrap())));
}

#[test]
fn every_number_of_tokens_up_to_two_tiles_is_right() {
    let mut random = Random(1);
    for n in 1..=2 * PANEL + 1 {
        for edges in [full(n, n), window(n, n, -9, 9), window(n, n, -40, 0), window(n, n, 3, 20)] {
            let (sizes, name, edges) = ([1, 1, 1, n, n, 5, 9], format!("{n} tokens"), [edges]);
            check(&in_panels(Case::<f64>::new(&mut random, sizes, &edges)), &name);
            check(&in_panels(Case::<bf16>::new(&mut random, sizes, &edges)), &name);
        }
    }
    for (n, s) in [(3, 50), (50, 3), (17, 47), (48, 49), (1, 16), (16, 1)] {
        let (sizes, name, edges) = ([1, 1, 1, n, s, 7, 3], format!("{n} x {s}"), [full(n, s)]);
        check(&Case::<f64>::new(&mut random, sizes, &edges), &name);
        check(&Case::<bf16>::new(&mut random, sizes, &edges), &name);
    }
}

#[test]
fn every_edge_of_a_band_is_right() {
    let mut random = Random(2);
    for lo in [-70, -33, -17, -16, -15, -1, 0, 5] {
        for width in [12, 15, 16, 17, 31, 48] {
            let (sizes, name) = ([1, 1, 1, 75, 75, 4, 4], format!("offsets {lo} to {}", lo + width));
            let edges = [window(75, 75, lo, lo + width)];
            check(&in_panels(Case::<f64>::new(&mut random, sizes, &edges)), &name);
            check(&in_panels(Case::<bf16>::new(&mut random, sizes, &edges)), &name);
        }
    }
}

#[test]
fn every_width_of_head_is_right() {
    let mut random = Random(3);
    for d in 1..=130 {
        let dv = d * 37 % 130 + 1;
        let case = Case::<f32>::new(&mut random, [1, 1, 1, 18, 20, d, dv], &[full(18, 20)]);
        check(&case, &format!("widths {d} and {dv}"));
    }
    for d in [16, 32, 48, 64, 80, 96, 128, 256] {
        let sizes = [1, 1, 1, 18, 40, d, d];
        let (name, edges) = (format!("width {d}"), [window(18, 40, 0, 20)]);
        check(&in_panels(Case::<bf16>::new(&mut random, sizes, &edges)), &name);
        check(&in_panels(Case::<f64>::new(&mut random, sizes, &edges)), &name);
    }
}

#[test]
fn more_keys_than_are_kept_packed_come_in_parts() {
    come_in_parts::<f32>([1, 2, 1, 40, 1100, 200, 210]);
    come_in_parts::<bf16>([1, 2, 1, 40, 2100, 200, 210]);
}

fn come_in_parts<T: Element>(sizes: [usize; 7]) {
    let mut random = Random(4);
    let [_, _, _, queries, keys, dim, _] = sizes;
    let mut case = Case::<T>::new(&mut random, sizes, &[full(queries, keys)]);
    // Later keys score higher, so that what was summed before has to shrink.
    for (place, k) in case.k.iter_mut().enumerate() {
        *k = T::from_acc(k.to_acc() * T::Acc::from_f64(1.0 + (place / dim) as f64 / 300.0));
    }
    check(&case, "parts");
    case.key_mask = Some((0..keys).map(|key| u8::from(key % 7 != 2 && !(300..420).contains(&key))).collect());
    check(&case, "parts with a key mask");
}

#[test]
fn one_head_on_many_threads_gives_the_bits_of_one_thread() {
    let mut random = Random(5);
    let mixed = EdgeSet::builder(400, 400).unwrap().global(0..2).band((-60, 50, 1), 0..400, 0..400);
    let blocks = EdgeSet::builder(400, 400).unwrap().rect(0..130, 0..130).rect(120..400, 200..390);
    for edges in [
        full(400, 400),
        window(400, 400, -90, 0),
        Arc::new(mixed.build().unwrap()),
        Arc::new(blocks.build().unwrap()),
    ] {
        for isa in Isa::available() {
            the_bits_of_one_thread::<f32>(&mut random, &edges, isa);
            the_bits_of_one_thread::<bf16>(&mut random, &edges, isa);
        }
    }
}

fn the_bits_of_one_thread<T: Element>(random: &mut Random, edges: &Arc<EdgeSet>, isa: Isa) {
    let case = Case::<T>::new(random, [1, 1, 1, 400, 400, 40, 33], std::slice::from_ref(edges));
    let case = in_panels(case);
    let one = case.results(isa);
    for threads in [2, 3, 7] {
        let many = results(&case.problem(), case.grad_out(), &run(isa, threads));
        assert!(one.same_bits(&many), "{threads} threads on {}", isa.name());
    }
}

#[test]
fn tokens_that_are_not_finite_reach_their_window_only() {
    reach_their_window_only::<f32>();
    reach_their_window_only::<bf16>();
}

fn reach_their_window_only<T: Element>() {
    let (n, d, reach, bad) = (200usize, 5, 40usize, 100usize);
    let edges = window(n, n, -(reach as i64), reach as i64);
    assert!(Plan::new(std::slice::from_ref(&edges)).unwrap().head(0, 0, 1).in_panels().pays);
    // In the panel kernel, and in the one for lines.
    let kernels = [true, false];
    for (isa, all_kept) in Isa::available().into_iter().flat_map(|isa| kernels.map(|kernel| (isa, kernel))) {
        for value in [f64::NAN, f64::INFINITY] {
            for tensor in 0..4 {
                let clean =
                    Case::<T>::new(&mut Random(6), [1, 1, 1, n, n, d, d], std::slice::from_ref(&edges));
                let clean = if all_kept { in_panels(clean) } else { clean };
                let mut case = clean.clone();
                let data = [&mut case.q, &mut case.k, &mut case.v, &mut case.grad_out];
                data.into_iter().nth(tensor).unwrap()[bad * d..(bad + 1) * d]
                    .fill(T::from_acc(T::Acc::from_f64(value)));
                let (clean, got) = (clean.results(isa), case.results(isa));
                // A query changes its own row, a key or value the rows of its window; gradients spread once more.
                let (forward, backward) =
                    if tensor == 0 || tensor == 3 { (0, reach) } else { (reach, 2 * reach) };
                for ((name, clean), (_, got)) in clean.named().into_iter().zip(got.named()) {
                    let width = clean.len() / n;
                    let far = if name == "out" || name == "lse" { forward } else { backward };
                    for row in (0..n).filter(|row| row.abs_diff(bad) > far) {
                        let row = row * width..(row + 1) * width;
                        assert_eq!(
                            clean[row.clone()],
                            got[row],
                            "{name}, tensor {tensor}, {value}, {}",
                            isa.name()
                        );
                    }
                    let is_bad =
                        |row: usize| got[row * width..(row + 1) * width].iter().any(|x| !x.is_finite());
                    if name == "out" && tensor == 2 {
                        assert!((bad - reach..=bad + reach).all(is_bad), "{value} on {}", isa.name());
                    }
                    if name == "dv" && tensor == 3 || name == "dk" && tensor == 0 {
                        assert!((bad - reach..=bad + reach).all(is_bad), "{name}, {value} on {}", isa.name());
                    }
                }
            }
        }
    }
}
