//! Which Python exception each error becomes.

use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

pyo3::create_exception!(sparse_mhsa, ConfigError, PyValueError, "A configuration that cannot be honoured.");

/// Turn a crate error into a Python exception.
pub(super) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    match error {
        Error::Config(error) => {
            let exception = ConfigError::new_err(error.to_string());
            let value = exception.value(py);
            let attributes = value
                .setattr("source", &error.source)
                .and_then(|()| value.setattr("line", error.position.map(|(line, _)| line)))
                .and_then(|()| value.setattr("key", (!error.key.is_empty()).then_some(&error.key)));
            attributes.err().unwrap_or(exception)
        }
        Error::Dtype(message) => PyTypeError::new_err(message),
        Error::Shape(message) | Error::Value(message) => PyValueError::new_err(message),
        Error::Device(message) => PyRuntimeError::new_err(message),
        error @ Error::Overflow { .. } => PyOverflowError::new_err(error.to_string()),
        Error::Torch(message) => torch_error(message),
        Error::Interrupted => PyRuntimeError::new_err("interrupted"),
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Torch(error.to_string())
    }
}

/// What libtorch reports, most often that memory ran out.
pub(super) fn from_torch(error: tch::TchError) -> PyErr {
    torch_error(error.to_string())
}

fn torch_error(message: String) -> PyErr {
    if message.contains("can't allocate memory") || message.contains("not enough memory") {
        return PyMemoryError::new_err(message);
    }
    if message.contains("out of memory") {
        // A device's memory, which torch has an exception for.
        let raised = Python::attach(|py| {
            let exception = py.import("torch")?.getattr("OutOfMemoryError")?.call1((message.as_str(),))?;
            Ok(PyErr::from_value(exception))
        });
        return raised.unwrap_or_else(|error: PyErr| error);
    }
    PyRuntimeError::new_err(message)
}
