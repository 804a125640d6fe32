//! Files of calibration scores for Python.

use numpy::ndarray::{Array2, Array4};
use numpy::{IntoPyArray, PyArray2, PyArray4, PyReadonlyArray2, PyReadonlyArray4, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::enter::enter;
use crate::error::Error;
use crate::pattern::scores::{About, Scores};

type Arrays<'py> = (
    Bound<'py, PyArray4<u32>>,
    Bound<'py, PyArray4<f32>>,
    Bound<'py, PyArray2<f64>>,
    Bound<'py, PyArray2<f64>>,
    String,
);

/// Write a file of scores: contiguous arrays, and what they are about as JSON.
#[pyfunction]
pub(super) fn save_scores(
    py: Python<'_>,
    path: String,
    keys: PyReadonlyArray4<'_, u32>,
    scores: PyReadonlyArray4<'_, f32>,
    importance: PyReadonlyArray2<'_, f64>,
    bound: PyReadonlyArray2<'_, f64>,
    about: &str,
) -> PyResult<()> {
    let about: About =
        serde_json::from_str(about).map_err(|error| PyValueError::new_err(format!("about: {error}")))?;
    let sizes = keys.shape().try_into().expect("an array of four dimensions");
    let scores = Scores {
        about,
        sizes,
        keys: keys.as_slice()?.to_vec(),
        scores: scores.as_slice()?.to_vec(),
        importance: importance.as_slice()?.to_vec(),
        bound: bound.as_slice()?.to_vec(),
    };
    enter(py, |_| scores.write(&path))
}

/// The arrays of a file of scores: keys, scores, importance, bound, and what they are about as JSON.
#[pyfunction]
pub(super) fn load_scores(py: Python<'_>, path: String) -> PyResult<Arrays<'_>> {
    let (keys, scores, importance, bound, about) = enter(py, |_| {
        let (_, read) = Scores::read(&path)?;
        let [layers, heads, patches, candidates] = read.sizes;
        let shape = |error: numpy::ndarray::ShapeError| Error::Shape(error.to_string());
        let whole = (layers, heads, patches, candidates);
        let about = serde_json::to_string(&read.about).expect("plain data");
        Ok((
            Array4::from_shape_vec(whole, read.keys.clone()).map_err(shape)?,
            Array4::from_shape_vec(whole, read.scores.clone()).map_err(shape)?,
            Array2::from_shape_vec((layers, heads), read.importance.clone()).map_err(shape)?,
            Array2::from_shape_vec((layers, heads), read.bound.clone()).map_err(shape)?,
            about,
        ))
    })?;
    Ok((
        keys.into_pyarray(py),
        scores.into_pyarray(py),
        importance.into_pyarray(py),
        bound.into_pyarray(py),
        about,
    ))
}
