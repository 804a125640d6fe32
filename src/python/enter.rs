//! The one door from Python into work that takes time: the GIL is released, a panic becomes a `RuntimeError`, and Ctrl-C stops it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::error::to_python;
use super::user_mask::take_raised;
use crate::error::{Error, Result};
use crate::pool::Interrupt;

/// Asks Python, on the calling thread, whether a signal handler wants to raise; keeps what it raised.
#[derive(Default)]
struct Signals {
    raised: Mutex<Option<PyErr>>,
}

impl Interrupt for Signals {
    fn poll(&self) -> bool {
        match Python::attach(|py| py.check_signals()) {
            Ok(()) => false,
            Err(error) => {
                *self.raised.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                true
            }
        }
    }
}

/// Run `work` without the GIL.
///
/// # Errors
/// The exception that an error of the crate maps to, what a signal handler raised (`KeyboardInterrupt`), or `RuntimeError` for a
/// panic, which is a defect of this package.
pub(super) fn enter<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&dyn Interrupt) -> Result<T> + Send,
) -> PyResult<T> {
    let signals = Signals::default();
    drop(take_raised());
    match py.detach(|| catch_unwind(AssertUnwindSafe(|| work(&signals)))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Error::Interrupted)) => {
            let raised = signals.raised.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
            Err(raised.or_else(take_raised).unwrap_or_else(|| to_python(py, Error::Interrupted)))
        }
        Ok(Err(error)) => {
            let error = to_python(py, error);
            if let Some(cause) = take_raised() {
                error.set_cause(py, Some(cause));
            }
            Err(error)
        }
        Err(panic) => {
            let message = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "unknown".to_owned());
            Err(PyRuntimeError::new_err(format!("sparse_mhsa has a defect (please report it): {message}")))
        }
    }
}
