//! What a head is expected to cost, and which kernel computes it.

use std::sync::atomic::{AtomicU8, Ordering};

use super::HeadPlan;
use super::panels::PAIRS_PER_SIX_EDGES_OF_LINES;

/// Nanoseconds per product of an edge with a row of this many channels, in f32 on one thread: `FIXED + PER_CHANNEL * channels`.
/// Measured with AVX-512 (`benches/LOG.md`); other machines differ by a factor, which orders nothing differently.
const FIXED: f64 = 0.7;
const PER_CHANNEL: f64 = 0.045;
/// Products per edge: forward `q . k` and `P v`; backward `q . k` and `dO . v` by query and again by key, and the sums dq, dk, dv.
const FORWARD_PRODUCTS: f64 = 2.0;
const BACKWARD_PRODUCTS: f64 = 7.0;
/// The kernel for lines keeps P and dS from one backward pass to the other, and needs no lists of edges.
const BACKWARD_LINES_PRODUCTS: f64 = 5.0;
/// What an edge of the kernel for lines costs, in edges of the general kernel: 0.8 forward, 0.65 with backward.
const LINES: f64 = 0.78;
/// What a pair of the panel kernel costs, in edges of the kernel for lines.
const PANELS: f64 = 6.0 / PAIRS_PER_SIX_EDGES_OF_LINES as f64;
/// The panel kernel finds scores once per pass: `q . k`, `dO . v`, and the sums dq, dk, dv.
const BACKWARD_PANEL_PRODUCTS: f64 = 5.0;

/// A kernel of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Edge by edge: irregular edges, and whatever a key mask, a bias, dropout or a background takes from the others.
    Edges,
    /// Along lines: scattered diagonals, narrow windows, single dense rows and columns.
    Lines,
    /// Squares of pairs computed whole: windows, blocks, dense attention.
    Panels,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Kernel; 3] = [Kernel::Edges, Kernel::Lines, Kernel::Panels];

    /// What `explain` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Edges => "edges",
            Kernel::Lines => "lines",
            Kernel::Panels => "panels",
        }
    }
}

/// The place in [`Kernel::ALL`] of the kernel that is forced; no place if none is.
static FORCED: AtomicU8 = AtomicU8::new(u8::MAX);

/// From now on, compute in this process every head with `kernel` that it can compute: to measure and to test it where another one
/// would be chosen. `None` ends that.
pub fn force_kernel(kernel: Option<Kernel>) {
    let place = kernel.and_then(|kernel| Kernel::ALL.iter().position(|&other| other == kernel));
    FORCED.store(place.map_or(u8::MAX, |place| place as u8), Ordering::Relaxed);
}

pub(super) fn forced() -> Option<Kernel> {
    Kernel::ALL.get(usize::from(FORCED.load(Ordering::Relaxed))).copied()
}

/// What one head of one batch element is expected to cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// The kernel that computes it, where a call has no bias, no dropout and no background; else it is always [`Kernel::Edges`]. With
    /// a key mask, and where heads of q share heads of k and v, [`Kernel::Lines`] gives way to one of the others.
    pub kernel: Kernel,
    /// Edges kept.
    pub edges: usize,
    /// Query-key pairs that the kernel computes, kept or not.
    pub pairs: usize,
    /// Predicted forward time of one thread, in nanoseconds.
    pub forward_ns: f64,
    /// Predicted backward time of one thread, in nanoseconds.
    pub backward_ns: f64,
}

impl HeadPlan {
    /// The expected cost with `head_dim` channels in f32.
    pub fn cost(&self, head_dim: usize) -> Cost {
        self.cost_of(self.kernel(), head_dim)
    }

    /// The expected cost if `kernel` computed the head.
    pub fn cost_of(&self, kernel: Kernel, head_dim: usize) -> Cost {
        let edges = self.by_query().nnz();
        let per_edge = FIXED + PER_CHANNEL * head_dim as f64;
        let (pairs, per_pair, backward) = match kernel {
            Kernel::Edges => (edges, per_edge, BACKWARD_PRODUCTS),
            Kernel::Lines => (edges, per_edge * LINES, BACKWARD_LINES_PRODUCTS),
            Kernel::Panels => (self.in_panels().pairs, per_edge * LINES * PANELS, BACKWARD_PANEL_PRODUCTS),
        };
        let per_product = pairs as f64 * per_pair;
        Cost {
            kernel,
            edges,
            pairs,
            forward_ns: FORWARD_PRODUCTS * per_product,
            backward_ns: backward * per_product,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pattern::edges::{Builder, EdgeSet};
    use crate::plan::Plan;

    fn cost(n: usize, describe: impl Fn(Builder) -> Builder) -> [Cost; 4] {
        let set = Arc::new(describe(EdgeSet::builder(n, n).unwrap()).build().unwrap());
        let plan = Plan::new(&[set]).unwrap();
        let head = plan.head(0, 0, 1);
        let lines = if head.lines().is_some() { Kernel::Lines } else { Kernel::Edges };
        let [edges, lines, panels] =
            [Kernel::Edges, lines, Kernel::Panels].map(|kernel| head.cost_of(kernel, 64));
        [head.cost(64), edges, lines, panels]
    }

    #[test]
    fn windows_go_to_panels_and_scattered_diagonals_along_lines() {
        let n = 1024;
        let [window, ..] = cost(n, |builder| builder.band((-64, 64, 1), 0..n, 0..n));
        assert_eq!(window.kernel, Kernel::Panels);
        assert!(window.pairs >= window.edges);
        let [scattered, ..] =
            cost(n, |builder| [1, 55, 233, -89].iter().fold(builder, |b, &o| b.diagonal(o, 0..n, 0..n)));
        assert_eq!((scattered.kernel, scattered.pairs), (Kernel::Lines, scattered.edges));
        let [irregular, ..] = cost(n, |builder| builder.anti_diagonal(n as i64, 0..n, 0..n));
        assert_eq!((irregular.kernel, irregular.pairs), (Kernel::Edges, irregular.edges));
    }

    #[test]
    fn the_chosen_kernel_is_the_one_predicted_to_be_faster() {
        for n in [64, 200, 1024] {
            for half in [0, 1, 2, 4, 8, 100] {
                for step in [1, 2, 7] {
                    let [chosen, edges, lines, panels] = cost(n, |builder| {
                        builder.band((-half * step as i64, half * step as i64, step), 0..n, 0..n)
                    });
                    let best = edges.forward_ns.min(lines.forward_ns).min(panels.forward_ns);
                    assert!(
                        chosen.forward_ns <= 1.1 * best,
                        "{n} {half} {step}: {chosen:?} {edges:?} {lines:?} {panels:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn time_grows_with_edges_and_channels() {
        let costs = |n: usize, dim: usize| {
            let set = Arc::new(EdgeSet::builder(n, n).unwrap().diagonal(0, 0..n, 0..n).build().unwrap());
            Plan::new(&[set]).unwrap().head(0, 0, 1).cost(dim)
        };
        assert!(costs(200, 64).forward_ns > 1.9 * costs(100, 64).forward_ns);
        assert!(costs(100, 128).backward_ns > 1.5 * costs(100, 64).backward_ns);
    }
}
