//! Masks that the program registers while it runs, beside the built-in ones of `registry.rs`.

use std::fmt;
use std::sync::{PoisonError, RwLock};

use serde_json::Value;

use super::registry::{ReadError, Registered};
use super::{AnyPattern, Context, Domain, HeadEdges};
use crate::error::{Error, Result};

/// Works out the edges over the patches from the context and the `mask_kwargs`.
pub type EdgesOf = dyn Fn(&Context, &Value) -> Result<HeadEdges> + Send + Sync;

/// A mask whose edges come from the program.
pub struct UserMask {
    /// The names allowed in `mask_kwargs`.
    pub keys: &'static [&'static str],
    /// Those of `keys` without a default.
    pub required: Vec<String>,
    /// Whether the edges change from layer to layer.
    pub uses_layer: bool,
    /// Whether the edges change from epoch to epoch.
    pub uses_epoch: bool,
    /// The edges.
    pub edges: Box<EdgesOf>,
}

impl fmt::Debug for UserMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserMask").field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// Entries live as long as the process, as those of the built-in masks do: configurations point at them.
static MASKS: RwLock<Vec<&'static Registered>> = RwLock::new(Vec::new());

/// Make `mask` known. One of the same name is replaced.
pub fn register(mask: &'static Registered) {
    let mut masks = MASKS.write().unwrap_or_else(PoisonError::into_inner);
    masks.retain(|other| other.name != mask.name);
    masks.push(mask);
}

/// All of them, in the order of registration.
pub fn all() -> Vec<&'static Registered> {
    MASKS.read().unwrap_or_else(PoisonError::into_inner).clone()
}

impl UserMask {
    pub(super) fn read(
        &'static self,
        name: &'static str,
        kwargs: &Value,
    ) -> std::result::Result<Box<dyn AnyPattern>, ReadError> {
        match self.required.iter().find(|key| kwargs.get(key.as_str()).is_none()) {
            Some(key) => Err(ReadError::Range(Error::config(
                key.as_str(),
                "missing: it has no default and must be given",
            ))),
            None => Ok(Box::new(UserPattern { name, mask: self, kwargs: kwargs.clone() })),
        }
    }
}

/// A [`UserMask`] with its parameters.
#[derive(Debug)]
struct UserPattern {
    name: &'static str,
    mask: &'static UserMask,
    kwargs: Value,
}

impl AnyPattern for UserPattern {
    fn name(&self) -> &'static str {
        self.name
    }
    fn kwargs(&self) -> Value {
        self.kwargs.clone()
    }
    fn domain(&self) -> Domain {
        Domain::Patches
    }
    fn default_prefix(&self) -> usize {
        0
    }
    fn forced_prefix(&self) -> Option<usize> {
        None
    }
    fn uses_layer(&self) -> bool {
        self.mask.uses_layer
    }
    fn uses_epoch(&self) -> bool {
        self.mask.uses_epoch
    }
    /// The program is told the grid, so its edges may depend on it.
    fn uses_grid(&self) -> bool {
        true
    }
    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let heads = (self.mask.edges)(context, &self.kwargs)?;
        let n = context.num_tokens;
        let fits = heads.iter().all(|set| (set.num_rows(), set.num_cols()) == (n, n));
        if fits && (heads.len() == 1 || heads.len() == context.num_heads) {
            return Ok(heads);
        }
        let sizes = heads.first().map_or((0, 0), |set| (set.num_rows(), set.num_cols()));
        Err(Error::Shape(format!(
            "mask `{}`: expected edges of 1 or {} heads over {n} patches, got {} over {} x {}",
            self.name,
            context.num_heads,
            heads.len(),
            sizes.0,
            sizes.1
        )))
    }
}
