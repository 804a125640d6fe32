//! Rows of similar degree side by side, padded to one width: a shape that tensor operators can work on.
//!
//! A row is a query with its keys (forward, dq) or a key with its queries (dk, dv). Rows are sorted by degree and cut into groups in
//! which the longest row has at most twice the edges of the shortest, so padding at most doubles the work. Every sum over edges is
//! then a plain reduction along one axis, in a fixed order: no atomics, no scattered additions, the same bits every time.

use std::ops::Range;

use super::bias::Bias;
use crate::kernel::{Dropout, Sizes};
use crate::pattern::edges::EdgeSet;
use crate::plan::Plan;

/// Which end of the edges the rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Query,
    Key,
}

/// All rows of a plan. Heads follow each other: row `unit * rows_per_unit + i`, where a unit is a head of q (or of k and v), and of
/// the whole batch where every sample has edges of its own.
pub(super) struct Rows<'a> {
    pub plan: &'a Plan,
    pub sizes: Sizes,
    /// Whether the samples of the batch share their edges, and so are handled together.
    pub shared: bool,
    pub by: By,
    /// Whether rows without edges count too, because a background reaches them.
    pub with_empty: bool,
}

/// The rows `order[range]`, none with more than `width` edges. At least 1 wide, so that a row without edges is all padding.
pub(super) struct Group {
    pub range: Range<usize>,
    pub width: usize,
}

/// The edges of a group, on the host: `rows.len() x width` entries where not said otherwise.
#[derive(Default)]
pub(super) struct Entries {
    pub rows: Vec<i64>,
    /// The other end of each edge, counted like rows of the other kind; 0 past the end of a row.
    pub others: Vec<i64>,
    /// Edges per row, where they differ.
    pub degrees: Vec<i64>,
    /// Where the bias of each edge is.
    pub bias: Vec<i64>,
    /// Dropout's factor of each edge, for each sample.
    pub dropout: Vec<f64>,
}

/// One head's share of a row: its edges, the first row of the other kind that they count from, and which head of q it is.
struct Part<'a> {
    edges: &'a EdgeSet,
    others_start: usize,
    batch: usize,
    head: usize,
}

impl Rows<'_> {
    fn rows_per_unit(&self) -> usize {
        match self.by {
            By::Query => self.sizes.queries,
            By::Key => self.sizes.keys,
        }
    }

    fn units(&self) -> usize {
        let heads = if self.by == By::Query { self.sizes.heads } else { self.sizes.kv_heads };
        if self.shared { heads } else { heads * self.sizes.batch }
    }

    fn parts(&self, unit: usize) -> impl Iterator<Item = Part<'_>> {
        let group = self.sizes.group();
        let of_q = match self.by {
            By::Query => unit..unit + 1,
            By::Key => unit * group..(unit + 1) * group,
        };
        of_q.map(move |q_unit| {
            let (batch, head) = (q_unit / self.sizes.heads, q_unit % self.sizes.heads);
            let plan = self.plan.head(batch, head, self.sizes.heads);
            match self.by {
                By::Query => {
                    let others_start = q_unit / group * self.sizes.keys;
                    Part { edges: plan.by_query(), others_start, batch, head }
                }
                By::Key => {
                    Part { edges: plan.by_key(), others_start: q_unit * self.sizes.queries, batch, head }
                }
            }
        })
    }

    /// (degree, row) by degree, of the rows that count.
    pub(super) fn by_degree(&self) -> Vec<(usize, usize)> {
        let mut order = Vec::new();
        let per_unit = self.rows_per_unit();
        if self.sizes.batch == 0 || self.sizes.queries == 0 || self.sizes.keys == 0 {
            return order;
        }
        for unit in 0..self.units() {
            let parts: Vec<_> = self.parts(unit).collect();
            order.extend((0..per_unit).filter_map(|i| {
                let degree: usize = parts.iter().map(|part| part.edges.degree(i)).sum();
                (degree > 0 || self.with_empty).then_some((degree, unit * per_unit + i))
            }));
        }
        order.sort_unstable();
        order
    }

    /// The edges of some rows.
    pub(super) fn entries(
        &self,
        rows: &[(usize, usize)],
        width: usize,
        bias: Option<&Bias>,
        dropout: Option<&Dropout>,
    ) -> Entries {
        let mut entries = Entries::default();
        let padding = |degree: usize| std::iter::repeat_n(0, width - degree);
        // (head of q counted over the batch, query, key) of every edge, which is what dropout draws by.
        let mut places = Vec::new();
        let mut runs = Vec::new();
        for &(degree, row) in rows {
            let (unit, i) = (row / self.rows_per_unit(), row % self.rows_per_unit());
            entries.rows.push(row as i64);
            entries.degrees.push(degree as i64);
            for part in self.parts(unit) {
                part.edges.row(i, &mut runs);
                for other in runs.iter().cloned().flatten() {
                    let (query, key) = if self.by == By::Query { (i, other) } else { (other, i) };
                    entries.others.push((part.others_start + other) as i64);
                    if let Some(bias) = bias {
                        entries.bias.push(bias.place(part.batch, part.head, query, key));
                    }
                    if dropout.is_some() {
                        places.push((part.batch * self.sizes.heads + part.head, query, key));
                    }
                }
            }
            entries.others.extend(padding(degree));
            if bias.is_some() {
                entries.bias.extend(padding(degree));
            }
            if dropout.is_some() {
                places.extend(padding(degree).map(|_| (0, 0, 0)));
            }
        }
        if let Some(dropout) = dropout {
            let samples = if self.shared { self.sizes.batch } else { 1 };
            entries.dropout = (0..samples)
                .flat_map(|sample| {
                    let first = sample * self.sizes.heads;
                    places
                        .iter()
                        .map(move |&(head, query, key)| dropout.factor((first + head) as u64, query, key))
                })
                .collect();
        }
        if entries.degrees.iter().all(|&degree| degree as usize == width) {
            entries.degrees.clear();
        }
        entries
    }
}

/// Cut rows sorted by degree into groups of at most `edges` entries; a row with more is a group of its own.
pub(super) fn groups(order: &[(usize, usize)], edges: usize) -> Vec<Group> {
    let (mut groups, mut start) = (Vec::new(), 0);
    for end in 1..=order.len() {
        let fits = order.get(end).is_some_and(|&(degree, _)| {
            degree <= 2 * order[start].0 && (end + 1 - start).saturating_mul(degree) <= edges
        });
        if !fits {
            groups.push(Group { range: start..end, width: order[end - 1].0.max(1) });
            start = end;
        }
    }
    groups
}
