//! Sparse multi-head self-attention whose time and memory grow with the edges kept, not with N x N.
//!
//! Data flows one way: [`config`] (YAML text, typed and range-checked) selects a [`pattern`], which describes the edges of every
//! head as an [`EdgeSet`](pattern::edges::EdgeSet); a [`plan`] holds them in both directions; [`kernel`] computes attention over
//! a plan; [`attention`] ties the steps together. Only `python` knows PyO3 and torch.

pub mod attention;
pub mod budget;
pub mod config;
pub mod error;
pub mod kernel;
pub mod pattern;
pub mod plan;
pub mod pool;
#[cfg(feature = "python")]
mod python;
pub mod rng;
