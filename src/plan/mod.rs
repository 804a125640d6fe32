//! `Plan`: what kernels read. The edges of every head by query (forward, dq) and, once a backward asks for it, by key (dk, dv).

mod cache;
mod cost;
pub mod lines;
pub mod panels;

use std::sync::{Arc, OnceLock};

pub use cache::PlanCache;
pub use cost::{Cost, Kernel, force_kernel};

use self::lines::Lines;
use self::panels::Coverage;
use crate::error::{Error, Result};
use crate::pattern::edges::EdgeSet;

/// One head's edges in both directions.
#[derive(Debug)]
pub struct HeadPlan {
    by_query: Arc<EdgeSet>,
    by_key: OnceLock<Arc<EdgeSet>>,
    in_panels: OnceLock<Coverage>,
    lines: OnceLock<Option<Lines>>,
    keeps_most: OnceLock<bool>,
}

impl HeadPlan {
    /// Rows are queries, columns are keys.
    pub fn by_query(&self) -> &EdgeSet {
        &self.by_query
    }

    /// What the panel kernel would make of this head.
    pub fn in_panels(&self) -> Coverage {
        *self.in_panels.get_or_init(|| Coverage::of(&self.by_query))
    }

    /// The edges as lines, where they can be had like that.
    pub fn lines(&self) -> Option<&Lines> {
        self.lines.get_or_init(|| Lines::of(&self.by_query)).as_ref()
    }

    /// The kernel that computes the head, where a call leaves the choice.
    pub fn kernel(&self) -> Kernel {
        self.kernel_of(true)
    }

    /// The kernel that computes the head in a call that can, or cannot, go along lines.
    pub fn kernel_of(&self, with_lines: bool) -> Kernel {
        let has_lines = with_lines && self.lines().is_some();
        match cost::forced() {
            Some(kernel) if kernel != Kernel::Lines || has_lines => kernel,
            _ if has_lines && !self.in_panels().beats_lines => Kernel::Lines,
            _ if has_lines || self.in_panels().pays => Kernel::Panels,
            _ => Kernel::Edges,
        }
    }

    /// Whether some query keeps more than half of the keys, but not all of them.
    fn keeps_most(&self) -> bool {
        *self.keeps_most.get_or_init(|| {
            let (rows, keys) = (0..self.by_query.num_rows(), self.by_query.num_cols());
            rows.map(|row| self.by_query.degree(row)).any(|degree| 2 * degree > keys && degree < keys)
        })
    }

    /// Rows are keys, columns are queries. Built on first use: inference never pays for it. A symmetric mask is stored once.
    pub fn by_key(&self) -> &EdgeSet {
        self.by_key.get_or_init(|| {
            let transposed = self.by_query.transposed();
            if transposed == *self.by_query { Arc::clone(&self.by_query) } else { Arc::new(transposed) }
        })
    }
}

/// The edges of all heads, ready for the kernels. Heads with the same edges share one [`HeadPlan`].
#[derive(Debug, Clone)]
pub struct Plan {
    num_queries: usize,
    num_keys: usize,
    sets: Vec<Arc<HeadPlan>>,
}

impl Plan {
    /// `sets` holds one edge set (shared by every head), one per head, or one per (batch, head) in that order.
    ///
    /// # Errors
    /// [`Error::Shape`] when `sets` is empty or its members differ in shape.
    pub fn new(sets: &[Arc<EdgeSet>]) -> Result<Self> {
        let first =
            sets.first().ok_or_else(|| Error::Shape("a plan needs the edges of at least one head".into()))?;
        let (num_queries, num_keys) = (first.num_rows(), first.num_cols());
        let mut heads: Vec<Arc<HeadPlan>> = Vec::with_capacity(sets.len());
        for (index, set) in sets.iter().enumerate() {
            if (set.num_rows(), set.num_cols()) != (num_queries, num_keys) {
                return Err(Error::Shape(format!(
                    "edges of head {index}: expected {num_queries} x {num_keys}, got {} x {}",
                    set.num_rows(),
                    set.num_cols()
                )));
            }
            let shared = sets[..index].iter().position(|earlier| Arc::ptr_eq(earlier, set));
            heads.push(match shared {
                Some(earlier) => Arc::clone(&heads[earlier]),
                None => Arc::new(HeadPlan {
                    by_query: Arc::clone(set),
                    by_key: OnceLock::new(),
                    in_panels: OnceLock::new(),
                    lines: OnceLock::new(),
                    keeps_most: OnceLock::new(),
                }),
            });
        }
        Ok(Plan { num_queries, num_keys, sets: heads })
    }

    /// Number of queries N.
    pub fn num_queries(&self) -> usize {
        self.num_queries
    }

    /// Number of keys S.
    pub fn num_keys(&self) -> usize {
        self.num_keys
    }

    /// Number of edge sets: 1, one per head, or one per (batch, head).
    pub fn num_sets(&self) -> usize {
        self.sets.len()
    }

    /// Check that the plan serves `batch` x `num_heads`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming what was expected and what the plan holds.
    pub fn check_heads(&self, batch: usize, num_heads: usize) -> Result<()> {
        if [1, num_heads, batch * num_heads].contains(&self.sets.len()) {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "edges: expected 1, {num_heads} (heads) or {} (batch x heads) edge sets, got {}",
            batch * num_heads,
            self.sets.len()
        )))
    }

    /// The edges of head `head` of batch element `batch`, in a problem with `num_heads` heads.
    #[inline]
    pub fn head(&self, batch: usize, head: usize, num_heads: usize) -> &HeadPlan {
        let index = match self.sets.len() {
            1 => 0,
            len if len == num_heads => head,
            _ => batch * num_heads + head,
        };
        &self.sets[index]
    }

    /// Whether some query of some head keeps more than half of the keys, but not all of them.
    pub fn keeps_most(&self) -> bool {
        self.sets.iter().any(|head| head.keeps_most())
    }

    /// Bytes held once both directions exist, counting shared heads once.
    pub fn bytes(&self) -> usize {
        let mut seen: Vec<*const HeadPlan> = Vec::new();
        let mut bytes = size_of::<Self>();
        for head in &self.sets {
            bytes += size_of::<Arc<HeadPlan>>();
            if !seen.contains(&Arc::as_ptr(head)) {
                seen.push(Arc::as_ptr(head));
                bytes += 2 * head.by_query.bytes();
            }
        }
        bytes
    }
}
