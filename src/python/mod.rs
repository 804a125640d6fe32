//! The Python extension `sparse_mhsa._core`: thin, typed, and the only place that knows PyO3, numpy and torch.

mod aten;
mod budget;
mod config;
mod decode;
mod edge_lists;
mod edges;
mod enter;
mod error;
mod ops;
mod scores;
mod selection;
mod tensor;
mod user_mask;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::config::mask_schema;
use crate::error::unknown_name;
use crate::pattern::registry::MASKS;
use crate::plan::Kernel;

/// The torch release that torch-sys links.
const TORCH_VERSION: &str = "2.13.0";

/// One mapping per registered mask.
#[pyfunction]
fn registered_masks(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let masks = PyList::empty(py);
    for mask in MASKS {
        let entry = PyDict::new(py);
        entry.set_item("name", mask.name)?;
        entry.set_item("aliases", mask.aliases)?;
        entry.set_item("about", mask.about)?;
        entry.set_item("keys", mask.keys())?;
        entry.set_item("budget_keys", mask.budget_keys().to_vec())?;
        entry.set_item("budget_unordered", mask.budget_unordered())?;
        entry.set_item("default_prefix", mask.default_prefix())?;
        entry.set_item("schema", mask_schema(mask).to_string())?;
        masks.append(entry)?;
    }
    Ok(masks)
}

/// Compute every head that it can with the kernel of this name, in the whole process; None ends that.
#[pyfunction]
#[pyo3(signature = (name))]
fn force_kernel(name: Option<&str>) -> PyResult<()> {
    let find = |name: &str| {
        let names = Kernel::ALL.map(Kernel::name);
        let place = names.iter().position(|&known| known == name);
        place
            .map(|place| Kernel::ALL[place])
            .ok_or_else(|| PyValueError::new_err(unknown_name("kernel", name, &names)))
    };
    crate::plan::force_kernel(name.map(find).transpose()?);
    Ok(())
}

/// The instruction set that kernels use in this process.
#[pyfunction]
fn instruction_set(py: Python<'_>) -> PyResult<&'static str> {
    Ok(ops::isa(py)?.name())
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // A second import in the same process (a sub-interpreter, a reload) keeps the first logger.
    let _ = pyo3_log::try_init();
    crate::pool::note_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("TORCH_VERSION", TORCH_VERSION)?;
    module.add("ConfigError", module.py().get_type::<error::ConfigError>())?;
    module.add_class::<config::PyAttentionConfig>()?;
    module.add_class::<edges::PyEdges>()?;
    module.add_function(wrap_pyfunction!(registered_masks, module)?)?;
    module.add_function(wrap_pyfunction!(force_kernel, module)?)?;
    module.add_function(wrap_pyfunction!(instruction_set, module)?)?;
    module.add_function(wrap_pyfunction!(budget::allocate, module)?)?;
    module.add_function(wrap_pyfunction!(config::register_backend, module)?)?;
    module.add_function(wrap_pyfunction!(config::config_schema, module)?)?;
    module.add_function(wrap_pyfunction!(user_mask::register_mask, module)?)?;
    module.add_function(wrap_pyfunction!(ops::edge_index, module)?)?;
    module.add_function(wrap_pyfunction!(ops::dropout_keep, module)?)?;
    module.add_function(wrap_pyfunction!(selection::selection_room, module)?)?;
    module.add_function(wrap_pyfunction!(selection::count_edges, module)?)?;
    module.add_function(wrap_pyfunction!(scores::save_scores, module)?)?;
    module.add_function(wrap_pyfunction!(scores::load_scores, module)?)?;
    module.add_function(wrap_pyfunction!(selection::select_edges, module)?)?;
    module.add_function(wrap_pyfunction!(decode::decode, module)?)?;
    module.add_function(wrap_pyfunction!(decode::cache_step, module)?)?;
    module.add_function(wrap_pyfunction!(ops::forward, module)?)?;
    module.add_function(wrap_pyfunction!(ops::backward, module)?)?;
    module.add_function(wrap_pyfunction!(ops::forward_edges, module)?)?;
    module.add_function(wrap_pyfunction!(ops::backward_edges, module)?)?;
    Ok(())
}
