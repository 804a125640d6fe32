//! Masks registered from Python: a pattern whose edges a Python callable works out.

use std::cell::RefCell;

use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use super::edges::PyEdges;
use crate::attention::forget_plans;
use crate::error::{Error, Result};
use crate::pattern::registry::{MASKS, Origin, Registered};
use crate::pattern::user::{self, UserMask};
use crate::pattern::{Context, HeadEdges};

thread_local! {
    /// What the callable of a mask raised, on its way through Rust, which runs it on the thread that asked.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// The exception that stands behind an error which a callable caused.
pub(super) fn take_raised() -> Option<PyErr> {
    RAISED.take()
}

/// Make a mask known to configurations, or replace one of the same name.
///
/// `edges` is called with a mapping of the context and the `mask_kwargs` as JSON text, and returns `Edges` over the patches.
#[pyfunction]
pub(super) fn register_mask(
    name: String,
    about: String,
    keys: Vec<String>,
    required: Vec<String>,
    uses_layer: bool,
    uses_epoch: bool,
    edges: Py<PyAny>,
) -> PyResult<()> {
    let taken = MASKS.iter().any(|mask| mask.name == name || mask.aliases.contains(&name.as_str()));
    if taken || name.to_lowercase() != name {
        return Err(PyValueError::new_err(format!(
            "name: expected lower case and no name of a built-in mask, got {name}"
        )));
    }
    let keys: Vec<&'static str> = keys.into_iter().map(|key| &*key.leak()).collect();
    let name: &'static str = name.leak();
    let edges = move |context: &Context, kwargs: &Value| call(name, &edges, context, kwargs);
    // As long-lived as the built-in masks, which configurations point at.
    user::register(Box::leak(Box::new(Registered {
        name,
        aliases: &[],
        about: about.leak(),
        ignored: &[],
        origin: Origin::User(UserMask {
            keys: keys.leak(),
            required,
            uses_layer,
            uses_epoch,
            edges: Box::new(edges),
        }),
    })));
    forget_plans();
    Ok(())
}

fn call(name: &str, edges: &Py<PyAny>, context: &Context, kwargs: &Value) -> Result<HeadEdges> {
    Python::attach(|py| {
        let result = (|| {
            let mapping = PyDict::new(py);
            mapping.set_item("num_tokens", context.num_tokens)?;
            mapping.set_item("num_heads", context.num_heads)?;
            mapping.set_item("layer", context.layer)?;
            mapping.set_item("num_layers", context.num_layers)?;
            mapping.set_item("epoch", context.epoch)?;
            mapping.set_item("grid", context.grid.clone())?;
            let edges = edges.call1(py, (mapping, kwargs.to_string()))?;
            Ok(edges.bind(py).cast::<PyEdges>()?.get().0.heads.clone())
        })();
        result.map_err(|error: PyErr| {
            let error_kind = error.is_instance_of::<PyException>(py);
            let message = format!("mask `{name}`: {error}");
            RAISED.set(Some(error));
            if error_kind { Error::Value(message) } else { Error::Interrupted }
        })
    })
}
