//! From the text of a mask to the plan of its edges: where configuration, patterns and plans meet, and what the Python layer calls.

pub mod selection;

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128;
use zerocopy::IntoBytes;

use crate::config::{MaskedLogits, Spec};
use crate::error::{Error, Result};
use crate::kernel;
use crate::pattern::HeadEdges;
use crate::pattern::edges::EdgeSet;
use crate::plan::{Plan, PlanCache};
use crate::pool::ForkLocal;

/// The only mask that has a meaning between two different sequences.
const RECTANGULAR: &str = "none";

static PLANS: ForkLocal<PlanCache<ResolvedMask>> = ForkLocal::new();

/// A mask at one size, ready for the kernels.
#[derive(Debug)]
pub struct ResolvedMask {
    /// The edges of every head.
    pub plan: Plan,
    /// What the other pairs count as.
    pub masked_logits: kernel::MaskedLogits,
}

impl AsRef<Plan> for ResolvedMask {
    fn as_ref(&self) -> &Plan {
        &self.plan
    }
}

impl From<MaskedLogits> for kernel::MaskedLogits {
    fn from(value: MaskedLogits) -> Self {
        match value {
            MaskedLogits::NegInf => kernel::MaskedLogits::NegInf,
            MaskedLogits::Zero => kernel::MaskedLogits::Zero,
        }
    }
}

/// The plan that the text `spec` means for `num_queries` x `num_keys` tokens and `num_heads` heads. Plans are cached by content.
///
/// # Errors
/// [`Error::Shape`] when the text speaks of another number of heads, or when a mask over one token sequence meets two;
/// otherwise what the mask reports.
pub fn resolve(
    spec: &str,
    num_queries: usize,
    num_keys: usize,
    num_heads: usize,
) -> Result<Arc<ResolvedMask>> {
    let resolved = PLANS.get_or_init(PlanCache::default).get_or_build(spec, num_queries, num_keys, || {
        let spec = Spec::from_text(spec)?;
        let sets = if num_queries == num_keys {
            spec.edges(num_queries)?.heads
        } else if spec.mask == RECTANGULAR {
            let all = Arc::new(EdgeSet::builder(num_queries, num_keys)?.rect(0..num_queries, 0..num_keys).build()?);
            (0..spec.heads).map(|_| Arc::clone(&all)).collect()
        } else {
            return Err(Error::Shape(format!(
                "the mask `{}` relates the tokens of one sequence, but there are {num_queries} queries and {num_keys} keys; \
                 cross-attention takes the mask `{RECTANGULAR}`",
                spec.mask
            )));
        };
        Ok(ResolvedMask { plan: Plan::new(&sets)?, masked_logits: spec.masked_logits.into() })
    })?;
    if resolved.plan.num_sets() != num_heads {
        let described = resolved.plan.num_sets();
        return Err(Error::Shape(format!(
            "q: the mask describes {described} heads, but the tensor has {num_heads}"
        )));
    }
    Ok(resolved)
}

/// Edge sets from compressed rows: P sets in one list, P at least 1. `row_ptr` is P x (num_queries + 1) with absolute offsets into
/// `col`; columns ascend strictly within a row. Equal sets are stored once.
///
/// # Errors
/// [`Error::Value`] naming the place where the lists are not what they should be.
pub fn edge_lists(row_ptr: &[i64], col: &[i64], num_queries: usize, num_keys: usize) -> Result<HeadEdges> {
    let rows = num_queries + 1;
    if row_ptr.is_empty() || !row_ptr.len().is_multiple_of(rows) {
        return Err(Error::Shape(format!(
            "row_ptr: expected rows of {rows} entries (queries + 1), got {}",
            row_ptr.len()
        )));
    }
    let mut sets = HeadEdges::with_capacity(row_ptr.len() / rows);
    let mut next = 0;
    for (index, pointers) in row_ptr.chunks_exact(rows).enumerate() {
        let (first, last) = (pointers[0], pointers[num_queries]);
        if first != next || last < first || last > col.len() as i64 {
            return Err(Error::Value(format!(
                "row_ptr: edge set {index} must start at {next}, where the one before ends, and end at most at {}, the number \
                 of columns; got {first} to {last}",
                col.len()
            )));
        }
        next = last;
        let local: Vec<i64> = pointers.iter().map(|pointer| pointer.wrapping_sub(first)).collect();
        let columns = &col[first as usize..last as usize];
        let set =
            EdgeSet::builder(num_queries, num_keys)?.edge_list(&local, columns)?.build()?.regularised()?;
        sets.push(match sets.last() {
            Some(before) if **before == set => Arc::clone(before),
            _ => Arc::new(set),
        });
    }
    // Lists whose length depends on content have room for the longest, and -1 in what is left of it.
    if let Some(unused) = col[next as usize..].iter().find(|&&column| column != -1) {
        return Err(Error::Value(format!(
            "row_ptr: expected to end at {}, the number of columns, got {next} (column {unused} belongs to no row; only -1 may \
             stand after the last)",
            col.len()
        )));
    }
    Ok(sets)
}

/// The plan of [`edge_lists`], whose other pairs count as `masked_logits` says. Plans are cached by content: lists that were seen before are neither checked nor built again.
///
/// # Errors
/// See [`edge_lists`].
pub fn resolve_edge_lists(
    row_ptr: &[i64],
    col: &[i64],
    num_queries: usize,
    num_keys: usize,
    masked_logits: kernel::MaskedLogits,
) -> Result<Arc<ResolvedMask>> {
    let content = format!(
        "edges {masked_logits:?} {} {:032x} {} {:032x}",
        row_ptr.len(),
        xxh3_128(row_ptr.as_bytes()),
        col.len(),
        xxh3_128(col.as_bytes())
    );
    PLANS.get_or_init(PlanCache::default).get_or_build(&content, num_queries, num_keys, || {
        let sets = edge_lists(row_ptr, col, num_queries, num_keys)?;
        Ok(ResolvedMask { plan: Plan::new(&sets)?, masked_logits })
    })
}

/// Forget every plan: the meaning of a mask's name has changed.
pub fn forget_plans() {
    PLANS.get_or_init(PlanCache::default).clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttentionConfig;

    fn spec(text: &str, heads: usize) -> String {
        AttentionConfig::parse(text, None).unwrap().spec(heads, 0, None, 0, None, None, None).unwrap()
    }

    #[test]
    fn equal_text_and_size_give_the_same_plan_and_other_sizes_another() {
        let spec = spec("mask: fibo", 3);
        let first = resolve(&spec, 50, 50, 3).unwrap();
        assert!(Arc::ptr_eq(&first, &resolve(&spec, 50, 50, 3).unwrap()));
        assert_eq!(resolve(&spec, 51, 51, 3).unwrap().plan.num_queries(), 51);
    }

    #[test]
    fn the_number_of_heads_must_be_the_masks() {
        let error = resolve(&spec("mask: fibo", 3), 50, 50, 4).unwrap_err().to_string();
        assert!(error.contains("3 heads") && error.contains("has 4"), "{error}");
    }

    #[test]
    fn only_dense_attention_is_rectangular() {
        assert!(resolve(&spec("mask: none", 2), 3, 5, 2).unwrap().plan.head(0, 1, 2).by_query().is_full());
        assert!(
            resolve(&spec("mask: fibo", 2), 3, 5, 2).unwrap_err().to_string().contains("cross-attention")
        );
    }

    #[test]
    fn edge_lists_share_one_column_array() {
        let sets = edge_lists(&[0, 1, 2, 2, 2, 4], &[1, 0, 0, 1], 2, 2).unwrap();
        let edges = |head: usize| sets[head].iter().collect::<Vec<_>>();
        assert_eq!(edges(0), [(0, 1), (1, 0)]);
        assert_eq!(edges(1), [(1, 0), (1, 1)]);
    }

    #[test]
    fn broken_edge_lists_are_refused() {
        for (row_ptr, col) in [
            (vec![0, 1], vec![0]),
            (vec![1, 1, 1], vec![0]),
            (vec![0, 1, 2, 1, 2, 2], vec![0, 1]),
            (vec![0, 1, i64::MAX], vec![0]),
            (vec![0, i64::MIN, 1], vec![0]),
            (vec![0, 0, 0], vec![0]),
        ] {
            assert!(edge_lists(&row_ptr, &col, 2, 2).is_err(), "{row_ptr:?} {col:?}");
            assert!(
                resolve_edge_lists(&row_ptr, &col, 2, 2, kernel::MaskedLogits::NegInf).is_err(),
                "{row_ptr:?} {col:?}"
            );
        }
    }

    #[test]
    fn edge_lists_seen_before_are_not_built_again_and_any_change_is_noticed() {
        let neg_inf = kernel::MaskedLogits::NegInf;
        let lists =
            |row_ptr: &[i64], col: &[i64], keys| resolve_edge_lists(row_ptr, col, 2, keys, neg_inf).unwrap();
        let first = lists(&[0, 1, 2], &[1, 0], 2);
        assert!(Arc::ptr_eq(&first, &lists(&[0, 1, 2], &[1, 0], 2)));
        assert!(!Arc::ptr_eq(&first, &lists(&[0, 1, 2], &[1, 1], 2)));
        assert!(!Arc::ptr_eq(&first, &lists(&[0, 0, 2], &[0, 1], 2)));
        assert_eq!(lists(&[0, 1, 2], &[1, 0], 3).plan.num_keys(), 3);
        let zero = resolve_edge_lists(&[0, 1, 2], &[1, 0], 2, 2, kernel::MaskedLogits::Zero).unwrap();
        assert_eq!(zero.masked_logits, kernel::MaskedLogits::Zero);
        assert_eq!(lists(&[0, 1, 2], &[1, 0], 2).masked_logits, neg_inf);
    }

    #[test]
    fn equal_neighbouring_edge_sets_are_stored_once() {
        let sets = edge_lists(&[0, 1, 2, 2, 3, 4], &[1, 0, 1, 0], 2, 2).unwrap();
        assert!(Arc::ptr_eq(&sets[0], &sets[1]));
    }
}
