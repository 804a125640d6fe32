//! A parameter with one value for all heads, one per head, or one per layer and head: how budgets enter a configuration.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _};
use serde_json::{Value, from_value};

use super::Context;
use crate::error::{Error, Result};

/// One value, a list by head, or a list by layer of lists by head.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Shares<T> {
    /// The same for all.
    All(T),
    /// One per head, in every layer.
    Heads(Vec<T>),
    /// One per head of each layer.
    Layers(Vec<Vec<T>>),
}

/// By the kind of value, so that a wrong type is named as serde names it for any other parameter.
impl<'de, T: DeserializeOwned> Deserialize<'de> for Shares<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let read = match &value {
            Value::Array(items) if items.first().is_some_and(Value::is_array) => {
                from_value(value).map(Shares::Layers)
            }
            Value::Array(_) => from_value(value).map(Shares::Heads),
            _ => from_value(value).map(Shares::All),
        };
        read.map_err(D::Error::custom)
    }
}

impl<T: Copy> Shares<T> {
    /// The values that were written.
    pub(super) fn values(&self) -> impl Iterator<Item = T> + '_ {
        let (one, heads, layers): (Option<&T>, &[T], &[Vec<T>]) = match self {
            Shares::All(value) => (Some(value), &[], &[]),
            Shares::Heads(values) => (None, values, &[]),
            Shares::Layers(values) => (None, &[], values),
        };
        one.into_iter().chain(heads).chain(layers.iter().flatten()).copied()
    }

    /// Whether layers differ.
    pub(super) fn by_layer(&self) -> bool {
        matches!(self, Shares::Layers(_))
    }

    /// The values of the heads of layer `context.layer`: one for all, or one per head.
    ///
    /// # Errors
    /// [`Error::Config`] at `key` when lists do not have one entry per head, or per layer.
    pub(super) fn of_layer(&self, key: &str, context: &Context) -> Result<Vec<T>> {
        let Context { num_heads, layer, .. } = *context;
        let heads = match self {
            Shares::All(value) => return Ok(vec![*value]),
            Shares::Heads(values) => values,
            Shares::Layers(values) => values.get(layer).ok_or_else(|| {
                Error::config(
                    key,
                    format!("has lists for {} layers, but this is layer {layer} (from 0)", values.len()),
                )
            })?,
        };
        if heads.len() == num_heads {
            return Ok(heads.clone());
        }
        Err(Error::config(
            key,
            format!("expected one value for each of the {num_heads} heads, got {}", heads.len()),
        ))
    }
}
