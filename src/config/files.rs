//! Paths of files inside a document: relative ones are relative to the document's own file, or to the working directory for text.

use std::path::{Path, absolute as to_absolute};

use serde_json::{Map, Value};

use crate::pattern::registry;

/// The document with every path absolute, so that it means the same wherever it is read again.
pub(super) fn absolute(mut root: Value, source: Option<&str>) -> Value {
    let folder = source.and_then(|source| Path::new(source).parent()).unwrap_or(Path::new(""));
    if let Value::Object(document) = &mut root {
        match document.get_mut("attention") {
            Some(Value::Object(inner)) => in_document(inner, folder),
            Some(_) => {}
            None => in_document(document, folder),
        }
    }
    root
}

/// What is not as it should be stays as it is: reading the document says so.
fn in_document(document: &mut Map<String, Value>, folder: &Path) {
    let mask = document.get("mask").and_then(Value::as_str).unwrap_or_default().to_owned();
    in_mask(&mask, document, folder);
    if let Some(Value::Object(layers)) = document.get_mut("layers") {
        for keys in layers.values_mut().filter_map(Value::as_object_mut) {
            let of_layer = keys.get("mask").and_then(Value::as_str).unwrap_or(&mask).to_owned();
            in_mask(&of_layer, keys, folder);
        }
    }
}

/// In the `mask_kwargs` beside the name of a mask, and in those of its parts.
fn in_mask(mask: &str, beside: &mut Map<String, Value>, folder: &Path) {
    let Some(kwargs) = beside.get_mut("mask_kwargs").and_then(Value::as_object_mut) else { return };
    for key in registry::find(mask).map(registry::Registered::files).unwrap_or_default() {
        if let Some(Value::String(path)) = kwargs.get_mut(*key)
            && !path.is_empty()
            && let Ok(full) = to_absolute(folder.join(&*path))
            && let Some(full) = full.to_str()
        {
            *path = full.to_owned();
        }
    }
    if let Some(Value::Array(parts)) = kwargs.get_mut("masks") {
        for part in parts.iter_mut().filter_map(Value::as_object_mut) {
            let name = part.get("mask").and_then(Value::as_str).unwrap_or_default().to_owned();
            in_mask(&name, part, folder);
        }
    }
}
