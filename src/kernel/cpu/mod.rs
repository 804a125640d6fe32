//! Kernels for the processor: tasks are ranges of rows of one head, queries forward and for dq, keys for dk and dv.
//!
//! Rows with few edges go in batches: all products with keys, then all weights, then all sums over values, so that no row waits for
//! itself. Rows that keep everything go in tiles, because they can share what they load.

mod background;
mod backward;
mod batch;
mod buffer;
mod by_key;
mod by_query;
mod decode;
mod forward;
mod gather;
mod lines;
mod long;
mod matrix;
mod panel;
mod row;
mod select;
mod slots;
mod sums;
mod tasks;
mod tile;
mod widened;

pub(super) use backward::backward;
pub(super) use decode::{decode, step};
pub(super) use forward::forward;
pub(super) use select::select;
pub(super) use sums::weight_sums;
