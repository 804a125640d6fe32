//! Neighborhood attention (Hassani et al., 2023, arXiv 2204.07143) with dilation (2209.15001), stride and causal axes (2504.16922).

use std::ops::Range;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::grid::Axis;
use super::one_or_list::OneOrList;
use super::registry::check_range;
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// Each query keeps a window of exactly `kernel_size` keys per axis, which slides inside at borders.
///
/// Per axis with kernel k, dilation d and stride s: query and key agree modulo d. Within their residue class, whose members are
/// counted 0..G, the query a stands for its group's leader l = min(a // s * s + s // 2, G - 1), and its window of k members starts
/// at min(max(l - k // 2, 0), G - k). On a causal axis the leader is the group's last member, l = min(a // s * s + s - 1, G - 1),
/// and the window is l - k + 1 ..= a: with s = 1 the k members that end at a. This is what NATTEN computes.
///
/// Source: neighborhood attention, Hassani et al., 2023 (arXiv 2204.07143), dilated (arXiv 2209.15001), with strides and causal axes
/// (arXiv 2504.16922).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Neighborhood {
    /// Keys per axis: one odd number, or one per axis.
    #[schemars(extend(
        "minimum" = 1,
        "not" = { "type": "integer", "multipleOf": 2 },
        "items" = { "minimum": 1, "not": { "multipleOf": 2 } }
    ))]
    kernel_size: OneOrList<i64>,
    /// Distance between neighbouring keys, likewise.
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 1, "items" = { "minimum": 1 }))]
    dilation: OneOrList<i64>,
    /// Queries that share a window, likewise.
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 1, "items" = { "minimum": 1 }))]
    stride: OneOrList<i64>,
    /// Only keys up to the query, for all axes or one by one.
    #[serde(default = "not_causal")]
    causal: OneOrList<bool>,
    /// `[H, W]` or `[T, H, W]` of the tokens after the prefix, unless the document or the model gives it.
    #[serde(default)]
    #[schemars(length(min = 2, max = 3), inner(range(min = 1, max = u32::MAX)))]
    grid: Option<Vec<usize>>,
}

fn one() -> OneOrList<i64> {
    OneOrList::One(1)
}

fn not_causal() -> OneOrList<bool> {
    OneOrList::One(false)
}

/// The keys of each coordinate of an axis.
fn windows(
    length: usize,
    kernel: usize,
    dilation: usize,
    stride: usize,
    causal: bool,
) -> Vec<Vec<Range<usize>>> {
    let window = |coordinate: usize| {
        let (residue, member) = (coordinate % dilation, coordinate / dilation);
        let members = (length - residue).div_ceil(dilation);
        let group = member / stride * stride;
        let kept = if causal {
            let leader = (group + stride - 1).min(members - 1);
            (leader + 1).saturating_sub(kernel)..member + 1
        } else {
            let leader = (group + stride / 2).min(members - 1);
            let start = leader.saturating_sub(kernel / 2).min(members - kernel);
            start..start + kernel
        };
        if dilation == 1 {
            return vec![kept];
        }
        kept.map(|member| member * dilation + residue).map(|coordinate| coordinate..coordinate + 1).collect()
    };
    (0..length).map(window).collect()
}

impl Pattern for Neighborhood {
    const NAME: &'static str = "neighborhood";
    const ABOUT: &'static str =
        "a window of exactly kernel_size keys per axis of the patch grid, sliding inside at borders";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["kernel_size"]];

    fn check(&self) -> Result<()> {
        for &kernel in self.kernel_size.values() {
            if kernel < 1 || kernel % 2 == 0 {
                return Err(Error::config(
                    "kernel_size",
                    format!("expected an odd number of keys per axis, got {kernel}"),
                ));
            }
        }
        for (key, values) in [("dilation", &self.dilation), ("stride", &self.stride)] {
            values.values().iter().try_for_each(|&value| check_range(key, value, 1..=i64::MAX))?;
        }
        Ok(())
    }

    fn uses_grid(&self) -> bool {
        true
    }

    fn grid(&self) -> Option<&[usize]> {
        self.grid.as_deref()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let grid = context.grid()?;
        let shape = grid.shape();
        let kernel = self.kernel_size.per_axis("kernel_size", shape)?;
        let dilation = self.dilation.per_axis("dilation", shape)?;
        let stride = self.stride.per_axis("stride", shape)?;
        let causal = self.causal.per_axis("causal", shape)?;
        let mut axes = Vec::with_capacity(shape.len());
        for (axis, &length) in shape.iter().enumerate() {
            // The smallest residue class has floor(length / dilation) members, and no class is empty.
            let most = (length as i64 / dilation[axis]).max(1);
            if kernel[axis] > most {
                let message = format!(
                    "expected at most {most} on the axis of length {length} (axis {axis} of the grid {shape:?}) with dilation {}, \
                     got {}",
                    dilation[axis], kernel[axis]
                );
                return Err(Error::config("kernel_size", message));
            }
            // Beyond it, a causal query would be left without keys.
            check_range("stride", stride[axis], 1..=kernel[axis])?;
            let sizes =
                [kernel[axis], dilation[axis].min(length as i64), stride[axis]].map(|size| size as usize);
            axes.push(Axis::Windows(windows(length, sizes[0], sizes[1], sizes[2], causal[axis])));
        }
        let n = grid.num_patches();
        Ok(vec![Arc::new(grid.keep(EdgeSet::builder(n, n)?, &axes).build()?)])
    }
}
