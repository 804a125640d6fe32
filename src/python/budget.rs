//! Budgets for Python.

use pyo3::prelude::*;

use super::error::to_python;
use crate::budget;

/// `total` split among units in proportion to `weights`.
#[pyfunction]
pub(super) fn allocate(
    py: Python<'_>,
    total: u64,
    weights: Vec<f64>,
    minimum: Vec<u64>,
    maximum: Vec<u64>,
) -> PyResult<Vec<u64>> {
    budget::allocate(total, &weights, &minimum, &maximum).map_err(|error| to_python(py, error))
}
