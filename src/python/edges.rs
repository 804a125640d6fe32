//! `Edges` for Python: the edges of every head of a mask, as numbers, lists and pictures.

use std::sync::Arc;

use numpy::ndarray::{Array2, Array3};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArray3};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use super::enter::enter;
use crate::config::{MaskEdges, Spec};
use crate::error::{Error, Result};
use crate::pattern::edges::EdgeSet;
use crate::pattern::image;

/// The edges of every head of one mask.
#[pyclass(name = "Edges", module = "sparse_mhsa._core", frozen)]
pub(super) struct PyEdges(MaskEdges);

impl PyEdges {
    fn head(&self, head: usize) -> PyResult<&Arc<EdgeSet>> {
        let heads = &self.0.heads;
        heads.get(head).ok_or_else(|| {
            PyIndexError::new_err(format!("head: expected 0 to {}, got {head}", heads.len() - 1))
        })
    }

    /// One number per head, computed once for heads that share their edges.
    fn per_head<T: Copy>(&self, count: impl Fn(&EdgeSet) -> T) -> Vec<T> {
        let heads = &self.0.heads;
        let mut counts: Vec<T> = Vec::with_capacity(heads.len());
        for (index, set) in heads.iter().enumerate() {
            let earlier = heads[..index].iter().position(|other| Arc::ptr_eq(other, set));
            counts.push(earlier.map_or_else(|| count(set), |earlier| counts[earlier]));
        }
        counts
    }
}

/// Compressed rows of one edge set, columns ascending.
pub(super) fn compressed_rows(set: &EdgeSet) -> (Vec<i64>, Vec<i64>) {
    let mut row_ptr = Vec::with_capacity(set.num_rows() + 1);
    let (mut col, mut runs) = (Vec::with_capacity(set.nnz()), Vec::new());
    row_ptr.push(0);
    for row in 0..set.num_rows() {
        set.row(row, &mut runs);
        col.extend(runs.iter().cloned().flatten().map(|c| c as i64));
        row_ptr.push(col.len() as i64);
    }
    (row_ptr, col)
}

#[pymethods]
impl PyEdges {
    #[staticmethod]
    fn from_spec(py: Python<'_>, spec: &str, num_tokens: usize) -> PyResult<Self> {
        enter(py, |_| Spec::from_text(spec)?.edges(num_tokens)).map(Self)
    }

    #[getter]
    fn num_heads(&self) -> usize {
        self.0.heads.len()
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.0.num_tokens
    }

    #[getter]
    fn num_prefix_tokens(&self) -> usize {
        self.0.num_prefix_tokens
    }

    fn nnz(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        enter(py, |_| Ok(self.per_head(EdgeSet::nnz)))
    }

    fn nnz_patches(&self, py: Python<'_>) -> PyResult<Vec<usize>> {
        enter(py, |_| Ok(self.per_head(|set| set.nnz_after(self.0.num_prefix_tokens))))
    }

    fn degrees<'py>(&self, py: Python<'py>, head: usize) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let set = self.head(head)?;
        let degrees =
            enter(py, |_| Ok((0..set.num_rows()).map(|row| set.degree(row) as i64).collect::<Vec<_>>()))?;
        Ok(degrees.into_pyarray(py))
    }

    #[expect(clippy::type_complexity, reason = "a pair of arrays is the plainest Python return value")]
    fn to_csr<'py>(
        &self,
        py: Python<'py>,
        head: usize,
    ) -> PyResult<(Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>)> {
        let set = self.head(head)?;
        let (row_ptr, col) = enter(py, |_| Ok(compressed_rows(set)))?;
        Ok((row_ptr.into_pyarray(py), col.into_pyarray(py)))
    }

    fn to_dense<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<bool>>> {
        let dense = enter(py, |_| dense(&self.0))?;
        Ok(dense.into_pyarray(py))
    }

    fn density_image<'py>(
        &self,
        py: Python<'py>,
        head: usize,
        size: usize,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let set = self.head(head)?;
        let side = size.clamp(1, self.0.num_tokens.max(1));
        let pixels = enter(py, |_| {
            let pixels = image::density(set, side);
            Array2::from_shape_vec((side, side), pixels).map_err(|error| Error::Shape(error.to_string()))
        })?;
        Ok(pixels.into_pyarray(py))
    }
}

fn dense(mask: &MaskEdges) -> Result<Array3<bool>> {
    let (heads, n) = (mask.heads.len(), mask.num_tokens);
    let too_large = || {
        Error::Value(format!(
            "to_dense: {heads} heads x {n} x {n} cells do not fit in memory; use to_csr, which grows with the edges"
        ))
    };
    let size = heads.checked_mul(n).and_then(|rows| rows.checked_mul(n)).ok_or_else(too_large)?;
    let mut cells = Vec::new();
    cells.try_reserve_exact(size).map_err(|_| too_large())?;
    cells.resize(size, false);
    let mut runs = Vec::new();
    for (head, set) in mask.heads.iter().enumerate() {
        for row in 0..n {
            set.row(row, &mut runs);
            let cells = &mut cells[(head * n + row) * n..][..n];
            runs.iter().for_each(|run| cells[run.clone()].fill(true));
        }
    }
    Array3::from_shape_vec((heads, n, n), cells).map_err(|error| Error::Shape(error.to_string()))
}
