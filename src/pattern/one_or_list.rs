//! A parameter that is one value or a list of them.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _};
use serde_json::{Value, from_value};

use crate::error::{Error, Result};

/// One value or a list.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum OneOrList<T> {
    /// One value.
    One(T),
    /// A list.
    List(Vec<T>),
}

/// By the kind of value, so that a wrong type is named as serde names it for any other parameter.
impl<'de, T: DeserializeOwned> Deserialize<'de> for OneOrList<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = if value.is_array() {
            from_value(value).map(OneOrList::List)
        } else {
            from_value(value).map(OneOrList::One)
        };
        read.map_err(D::Error::custom)
    }
}

impl<T: Copy> OneOrList<T> {
    /// The values that were written.
    pub(super) fn values(&self) -> &[T] {
        match self {
            OneOrList::One(value) => std::slice::from_ref(value),
            OneOrList::List(values) => values,
        }
    }

    /// One value per axis of the grid `shape`: the same for all, or the list.
    ///
    /// # Errors
    /// [`Error::Config`] at `key` when the list has another length than the grid has axes.
    pub(super) fn per_axis(&self, key: &str, shape: &[usize]) -> Result<Vec<T>> {
        match self {
            OneOrList::One(value) => Ok(vec![*value; shape.len()]),
            OneOrList::List(values) if values.len() == shape.len() => Ok(values.clone()),
            OneOrList::List(values) => Err(Error::config(
                key,
                format!(
                    "expected one value, or one for each of the {} axes of the grid {shape:?}; got {} values",
                    shape.len(),
                    values.len()
                ),
            )),
        }
    }
}
