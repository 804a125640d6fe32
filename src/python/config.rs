//! `AttentionConfig` for Python.

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::error::to_python;
use crate::config::{self, AttentionConfig, Parameter, UserBackend};
use crate::error::Error;

/// Make a backend of the user known to configurations. Each parameter is a JSON mapping `{name, types, default}`; without
/// `default` it is required.
#[pyfunction]
#[pyo3(signature = (name, about, parameters, replace=false))]
pub(super) fn register_backend(
    py: Python<'_>,
    name: String,
    about: String,
    parameters: Vec<String>,
    replace: bool,
) -> PyResult<()> {
    let parameters = parameters
        .iter()
        .map(|text| serde_json::from_str(text).map_err(|error| Error::Value(format!("parameters: {error}"))))
        .collect::<Result<Vec<Parameter>, _>>();
    parameters
        .and_then(|parameters| config::register_backend(UserBackend { name, about, parameters }, replace))
        .map_err(|error| to_python(py, error))
}

/// JSON Schema of a configuration document.
#[pyfunction]
pub(super) fn config_schema() -> String {
    config::json_schema().to_string()
}

/// A parsed, range-checked attention configuration.
#[pyclass(name = "AttentionConfig", module = "sparse_mhsa._core", frozen, eq)]
#[derive(Clone, PartialEq)]
pub(super) struct PyAttentionConfig(AttentionConfig);

/// A unit variant's name in a configuration.
fn variant(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

#[pymethods]
impl PyAttentionConfig {
    #[staticmethod]
    #[pyo3(signature = (text, source=None))]
    fn parse(py: Python<'_>, text: &str, source: Option<&str>) -> PyResult<Self> {
        AttentionConfig::parse(text, source).map(Self).map_err(|error| to_python(py, error))
    }

    #[getter]
    fn backend(&self) -> &str {
        self.0.backend()
    }

    #[getter]
    fn uses_edges(&self) -> bool {
        self.0.uses_edges()
    }

    #[getter]
    fn layers(&self) -> Vec<String> {
        self.0.layers().map(str::to_owned).collect()
    }

    #[getter]
    fn mask(&self) -> &'static str {
        self.0.mask()
    }

    #[getter]
    fn by_content(&self) -> bool {
        self.0.by_content()
    }

    #[getter]
    fn scale(&self) -> Option<f64> {
        self.0.scale()
    }

    #[getter]
    fn masked_logits(&self) -> String {
        variant(self.0.masked_logits())
    }

    #[getter]
    fn num_prefix_tokens(&self) -> Option<u64> {
        self.0.num_prefix_tokens()
    }

    #[getter]
    fn prefix_dense(&self) -> bool {
        self.0.prefix_dense()
    }

    #[getter]
    fn grid(&self) -> Option<Vec<u64>> {
        self.0.grid()
    }

    #[getter]
    fn seeds(&self) -> Vec<Option<i64>> {
        self.0.seeds()
    }

    fn with_seed(&self, seed: i64) -> Self {
        Self(self.0.with_seed(seed))
    }

    #[getter]
    fn on_empty_row(&self) -> String {
        variant(self.0.on_empty_row())
    }

    #[getter]
    fn embed_dim(&self) -> Option<u64> {
        self.0.embed_dim()
    }

    #[getter]
    fn num_heads(&self) -> Option<u64> {
        self.0.num_heads()
    }

    fn unmatched_layers(&self, names: Vec<String>) -> Vec<&str> {
        self.0.unmatched_layers(&names)
    }

    fn to_json(&self) -> String {
        self.0.canonical().to_string()
    }

    fn to_yaml(&self) -> String {
        self.0.to_yaml()
    }

    fn for_layer(&self, py: Python<'_>, name: &str) -> PyResult<Self> {
        self.0.for_layer(name).map(Self).map_err(|error| to_python(py, error))
    }

    #[pyo3(signature = (num_heads, layer=0, num_layers=None, epoch=0, grid=None, num_prefix_tokens=None, head_dim=None))]
    #[expect(clippy::too_many_arguments, reason = "the signature is Python's, where they are keywords")]
    fn spec(
        &self,
        py: Python<'_>,
        num_heads: usize,
        layer: usize,
        num_layers: Option<usize>,
        epoch: u64,
        grid: Option<Vec<u64>>,
        num_prefix_tokens: Option<u64>,
        head_dim: Option<usize>,
    ) -> PyResult<String> {
        self.0
            .spec(num_heads, layer, num_layers, epoch, grid, num_prefix_tokens, head_dim)
            .map_err(|error| to_python(py, error))
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.to_json().hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        format!("AttentionConfig({})", self.to_json())
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let parse = py.get_type::<Self>().getattr("parse")?;
        Ok((parse, PyTuple::new(py, [self.to_yaml()])?))
    }
}
