//! Masks made of masks by set operations.

use std::fmt::Debug;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::algebra::Operation;
use super::part::{self, Part, as_its_parts};
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// A set operation as a mask.
pub trait Combine: Debug + Send + Sync + 'static {
    /// Name of the mask.
    const NAME: &'static str;
    /// One sentence.
    const ABOUT: &'static str;
    /// What joins the first mask with the second, their result with the third, and so on.
    const OPERATION: Operation;
}

/// The set operation over the patch-to-patch edges of `masks`, from the first to the last; prefix rows and columns stay dense.
///
/// Source: this library's own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(bound = "")]
#[schemars(rename = "Combination", bound = "")]
pub struct Combination<C> {
    /// List of `{mask, mask_kwargs}`.
    #[schemars(length(min = 1), transform = without_heads)]
    masks: Vec<Part>,
    #[serde(skip)]
    operation: PhantomData<C>,
}

/// The schema of a list of masks of which none has `heads`.
fn without_heads(masks: &mut Schema) {
    if let Some(part) = masks.get_mut("items").and_then(Value::as_object_mut) {
        let properties = part.entry("properties").or_insert_with(|| json!({}));
        properties["heads"] = json!({ "type": "null" });
    }
}

impl<C: Combine> Pattern for Combination<C> {
    const NAME: &'static str = C::NAME;
    const ABOUT: &'static str = C::ABOUT;

    fn resolve(&mut self) -> Result<()> {
        if let Some(index) = self.masks.iter().position(|part| part.heads.is_some()) {
            let message = format!("unknown key `heads`: only per_head takes it, not {}", C::NAME);
            return Err(Error::config(format!("masks.{index}.heads"), message));
        }
        part::resolve(&mut self.masks)
    }

    as_its_parts!();

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let mut parts = part::patch_edges(&self.masks, context)?.into_iter();
        let first = parts.next().expect("there is at least one mask");
        parts.try_fold(first, |joined, next| C::OPERATION.apply_per_head(&joined, &next))
    }
}
