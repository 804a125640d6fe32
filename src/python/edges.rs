//! `Edges` for Python: the edges of every head of a mask, as numbers, lists and pictures.

use std::sync::Arc;

use numpy::ndarray::Array2;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray3, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::edge_lists::{
    Parts, compressed_rows, from_dense, from_parts, reserved, same_edges, to_dense, to_parts,
};
use super::enter::enter;
use crate::attention::edge_lists;
use crate::config::{MaskEdges, Spec};
use crate::error::{Error, Result};
use crate::pattern::algebra::Operation;
use crate::pattern::edges::EdgeSet;
use crate::pattern::image;
use crate::pattern::{self, HeadEdges};
use crate::plan::Plan;

/// The edges of every head of one mask.
#[pyclass(name = "Edges", module = "sparse_mhsa._core", frozen)]
pub(super) struct PyEdges(pub(super) MaskEdges);

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

fn operation(name: &str) -> PyResult<Operation> {
    match name {
        "union" => Ok(Operation::Union),
        "intersection" => Ok(Operation::Intersection),
        "difference" => Ok(Operation::Difference),
        other => Err(PyValueError::new_err(format!(
            "operation: expected union, intersection or difference, got {other}"
        ))),
    }
}

#[pymethods]
impl PyEdges {
    #[staticmethod]
    #[pyo3(signature = (spec, num_tokens, *, tried_out = false))]
    fn from_spec(py: Python<'_>, spec: &str, num_tokens: usize, tried_out: bool) -> PyResult<Self> {
        let edges = || Spec::from_text(spec)?.edges(num_tokens);
        enter(py, |_| if tried_out { pattern::tried_out(edges) } else { edges() }).map(Self)
    }

    #[staticmethod]
    fn from_csr(
        py: Python<'_>,
        row_ptr: PyReadonlyArray2<'_, i64>,
        col: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<Self> {
        let pointers = row_ptr.shape()[1];
        let (row_ptr, col) = (row_ptr.as_slice()?, col.as_slice()?);
        let num_tokens = pointers
            .checked_sub(1)
            .ok_or_else(|| PyValueError::new_err("row_ptr: expected N + 1 entries for each head, got 0"))?;
        enter(py, |_| {
            let heads = edge_lists(row_ptr, col, num_tokens, num_tokens)?;
            Ok(MaskEdges { heads, num_tokens, num_prefix_tokens: 0 })
        })
        .map(Self)
    }

    #[staticmethod]
    fn from_dense(py: Python<'_>, cells: PyReadonlyArray3<'_, u8>) -> PyResult<Self> {
        let cells = cells.as_array();
        let (_, rows, cols) = cells.dim();
        if rows != cols {
            return Err(PyValueError::new_err(format!(
                "dense: expected shape (H, N, N), got {:?}",
                cells.shape()
            )));
        }
        enter(py, |_| Ok(MaskEdges { heads: from_dense(cells)?, num_tokens: rows, num_prefix_tokens: 0 }))
            .map(Self)
    }

    #[staticmethod]
    fn from_heads(heads: Vec<(Bound<'_, PyEdges>, usize)>) -> PyResult<Self> {
        let sets: PyResult<HeadEdges> =
            heads.iter().map(|(edges, head)| edges.get().head(*head).cloned()).collect();
        let Some((first, _)) = heads.first() else {
            return Err(PyValueError::new_err("heads: expected at least one, got none"));
        };
        let first = &first.get().0;
        for (edges, _) in &heads {
            let (expected, got) = (first.num_tokens, edges.get().0.num_tokens);
            if expected != got {
                return Err(PyValueError::new_err(format!(
                    "heads: expected {expected} tokens in each, got {got}"
                )));
            }
        }
        Ok(Self(MaskEdges { heads: sets?, num_tokens: first.num_tokens, num_prefix_tokens: 0 }))
    }

    #[staticmethod]
    fn from_parts(py: Python<'_>, num_tokens: usize, sets: Vec<Parts>, heads: Vec<usize>) -> PyResult<Self> {
        enter(py, |_| {
            let sets: HeadEdges = sets
                .iter()
                .map(|parts| Ok(Arc::new(from_parts(num_tokens, parts)?)))
                .collect::<Result<_>>()?;
            let heads = heads.iter().map(|&index| {
                sets.get(index).cloned().ok_or_else(|| {
                    Error::Value(format!("heads: expected indices below {}, got {index}", sets.len()))
                })
            });
            Ok(MaskEdges { heads: heads.collect::<Result<_>>()?, num_tokens, num_prefix_tokens: 0 })
        })
        .map(Self)
    }

    fn to_parts(&self, py: Python<'_>) -> PyResult<(usize, Vec<Parts>, Vec<usize>)> {
        enter(py, |_| {
            let mut distinct: HeadEdges = Vec::new();
            let mut heads = Vec::with_capacity(self.0.heads.len());
            for set in &self.0.heads {
                let index =
                    distinct.iter().position(|other| Arc::ptr_eq(other, set)).unwrap_or(distinct.len());
                if index == distinct.len() {
                    distinct.push(Arc::clone(set));
                }
                heads.push(index);
            }
            Ok((self.0.num_tokens, distinct.iter().map(|set| to_parts(set)).collect(), heads))
        })
    }

    fn with_prefix(&self, num_prefix_tokens: usize) -> Self {
        Self(MaskEdges { num_prefix_tokens: num_prefix_tokens.min(self.0.num_tokens), ..self.0.clone() })
    }

    fn with_heads(&self, num_heads: usize) -> PyResult<Self> {
        let mut heads = self.0.heads.clone();
        if heads.len() == 1 {
            heads.resize(num_heads, heads[0].clone());
        }
        if heads.len() != num_heads || num_heads == 0 {
            return Err(PyValueError::new_err(format!(
                "num_heads: expected {}, the heads that the edges are for, got {num_heads}",
                heads.len()
            )));
        }
        Ok(Self(MaskEdges { heads, ..self.0.clone() }))
    }

    fn combine(&self, py: Python<'_>, name: &str, other: &Bound<'_, Self>) -> PyResult<Self> {
        let (operation, other) = (operation(name)?, &other.get().0);
        let mine = &self.0;
        let prefix =
            if mine.num_prefix_tokens == other.num_prefix_tokens { mine.num_prefix_tokens } else { 0 };
        enter(py, |_| {
            let heads = operation.apply_per_head(&mine.heads, &other.heads)?;
            Ok(MaskEdges { heads, num_tokens: mine.num_tokens, num_prefix_tokens: prefix })
        })
        .map(Self)
    }

    fn complement(&self, py: Python<'_>) -> PyResult<Self> {
        let mine = &self.0;
        enter(py, |_| {
            let n = mine.num_tokens;
            let full = Arc::new(EdgeSet::builder(n, n)?.rect(0..n, 0..n).build()?);
            let heads = Operation::Difference.apply_per_head(&vec![full], &mine.heads)?;
            Ok(MaskEdges { heads, ..mine.clone() })
        })
        .map(Self)
    }

    fn overlap<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let heads = &self.0.heads;
        let matrix = enter(py, |_| {
            let mut matrix = Array2::from_elem((heads.len(), heads.len()), 1.0);
            for a in 0..heads.len() {
                for b in 0..a {
                    let index =
                        if Arc::ptr_eq(&heads[a], &heads[b]) { 1.0 } else { heads[a].jaccard(&heads[b])? };
                    (matrix[[a, b]], matrix[[b, a]]) = (index, index);
                }
            }
            Ok(matrix)
        })?;
        Ok(matrix.into_pyarray(py))
    }

    fn same_edges(&self, py: Python<'_>, other: &Bound<'_, Self>) -> PyResult<bool> {
        let (mine, other) = (&self.0, &other.get().0);
        let same_shape = (mine.num_tokens, mine.heads.len()) == (other.num_tokens, other.heads.len());
        enter(py, |_| {
            Ok(same_shape
                && mine.heads.iter().zip(&other.heads).all(|(a, b)| Arc::ptr_eq(a, b) || same_edges(a, b)))
        })
    }

    #[pyo3(signature = (head, head_dim=None))]
    fn describe<'py>(
        &self,
        py: Python<'py>,
        head: usize,
        head_dim: Option<usize>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let set = self.head(head)?;
        let (dense_rows, dense_cols): (usize, usize) =
            (set.dense_rows().iter().map(|r| r.len()).sum(), set.dense_cols().iter().map(|c| c.len()).sum());
        let on_diagonals: usize = set.diagonals().iter().map(|d| d.end - d.start).sum();
        let in_dense = dense_rows * set.num_cols() + dense_cols * (set.num_rows() - dense_rows);
        let nnz = enter(py, |_| Ok(set.nnz()))?;
        let entry = PyDict::new(py);
        for (key, value) in [
            ("dense_rows", dense_rows),
            ("dense_cols", dense_cols),
            ("diagonals", set.diagonals().len()),
            ("runs", set.runs().len()),
            ("edges", nnz),
            ("edges_in_dense", in_dense),
            ("edges_on_diagonals", on_diagonals),
            ("edges_in_runs", nnz - in_dense - on_diagonals),
            ("bytes", set.bytes()),
        ] {
            entry.set_item(key, value)?;
        }
        let earlier = self.0.heads[..head].iter().position(|other| Arc::ptr_eq(other, set));
        entry.set_item("shared_with", earlier)?;
        if let Some(head_dim) = head_dim {
            let cost = enter(py, |_| Ok(Plan::new(&[Arc::clone(set)])?.head(0, 0, 1).cost(head_dim)))?;
            entry.set_item("kernel", cost.kernel.name())?;
            entry.set_item("predicted_seconds", cost.forward_ns * 1e-9)?;
        }
        Ok(entry)
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
        let degrees = enter(py, |_| {
            let mut degrees = reserved("degrees", set.num_rows())?;
            degrees.extend((0..set.num_rows()).map(|row| set.degree(row) as i64));
            Ok(degrees)
        })?;
        Ok(degrees.into_pyarray(py))
    }

    #[expect(clippy::type_complexity, reason = "a pair of arrays is the plainest Python return value")]
    fn to_csr<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyArray2<i64>>, Bound<'py, PyArray1<i64>>)> {
        let (heads, n) = (&self.0.heads, self.0.num_tokens);
        let (row_ptr, col) = enter(py, |_| {
            let (row_ptr, col) = compressed_rows("to_csr", heads.iter().map(|set| &**set))?;
            let row_ptr = Array2::from_shape_vec((heads.len(), n + 1), row_ptr);
            Ok((row_ptr.map_err(|error| Error::Shape(error.to_string()))?, col))
        })?;
        Ok((row_ptr.into_pyarray(py), col.into_pyarray(py)))
    }

    fn to_dense<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray3<bool>>> {
        let dense = enter(py, |_| to_dense(&self.0))?;
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
