//! Patterns: named rules that say which keys each query keeps.
//!
//! One mask is one file here and one line in `registry.rs`. A pattern sees only its own tokens (patches, or all tokens) and
//! knows nothing of prefixes, batches, kernels or devices: [`head_edges`] removes the prefix before and adds it back after.

pub mod edges;
pub mod image;
pub mod registry;
pub(crate) mod segments;

use std::fmt::Debug;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use edges::EdgeSet;

registry::masks!(registry::declare_modules);

/// What a pattern may know about where it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// Tokens the pattern speaks about: patches for [`Domain::Patches`], all tokens otherwise.
    pub num_tokens: usize,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Zero-based index of the layer.
    pub layer: usize,
    /// Number of layers in the model, where known.
    pub num_layers: Option<usize>,
    /// Training epoch, for masks that change with it.
    pub epoch: u64,
    /// Shape of the patch grid, `[H, W]` or `[T, H, W]`, where known.
    pub grid: Option<Vec<usize>>,
    /// Leading tokens off the grid that are kept dense; only meaningful for [`Domain::Tokens`].
    pub dense_prefix: usize,
}

/// Which tokens a pattern speaks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// The patches: prefix tokens are taken off before and become dense rows and columns after.
    Patches,
    /// All tokens, prefix included; the pattern itself keeps [`Context::dense_prefix`] dense if it wants to.
    Tokens,
}

/// The edges of every head: one set shared by all, or one per head.
pub type HeadEdges = Vec<Arc<EdgeSet>>;

/// One registered mask. Its fields are the `mask_kwargs` of a configuration.
pub trait Pattern: Serialize + DeserializeOwned + Debug + Send + Sync + 'static {
    /// The name in a configuration, lower case.
    const NAME: &'static str;
    /// Other names for the same mask.
    const ALIASES: &'static [&'static str] = &[];
    /// One sentence for tables and pictures.
    const ABOUT: &'static str;
    /// Keys of the reference system that have no effect here: accepted, and logged at debug level.
    const IGNORED: &'static [&'static str] = &[];

    /// Range checks that need no sizes.
    ///
    /// # Errors
    /// [`Error::Config`] whose key is the field's name and whose message says what is allowed.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Which tokens the pattern speaks about.
    fn domain(&self) -> Domain {
        Domain::Patches
    }

    /// Prefix tokens if neither the configuration nor the model says how many there are.
    fn default_prefix(&self) -> usize {
        0
    }

    /// Prefix tokens that the parameters themselves demand, whatever the model looks like.
    fn forced_prefix(&self) -> Option<usize> {
        None
    }

    /// Whether the edges change from layer to layer.
    fn uses_layer(&self) -> bool {
        false
    }

    /// Whether the edges change from epoch to epoch.
    fn uses_epoch(&self) -> bool {
        false
    }

    /// The edges over the pattern's own tokens: one set for all heads, or one per head.
    ///
    /// # Errors
    /// [`Error::Config`] when the parameters do not fit the context (for example a list with the wrong number of heads).
    fn edges(&self, context: &Context) -> Result<HeadEdges>;
}

/// [`Pattern`] as an object. Implemented for every pattern; see there for the meaning of each method.
pub trait AnyPattern: Debug + Send + Sync {
    /// [`Pattern::NAME`].
    fn name(&self) -> &'static str;
    /// The parameters, defaults filled in, in the order of declaration.
    fn kwargs(&self) -> serde_json::Value;
    /// [`Pattern::domain`].
    fn domain(&self) -> Domain;
    /// [`Pattern::default_prefix`].
    fn default_prefix(&self) -> usize;
    /// [`Pattern::forced_prefix`].
    fn forced_prefix(&self) -> Option<usize>;
    /// [`Pattern::uses_layer`].
    fn uses_layer(&self) -> bool;
    /// [`Pattern::uses_epoch`].
    fn uses_epoch(&self) -> bool;
    /// [`Pattern::edges`].
    ///
    /// # Errors
    /// See [`Pattern::edges`].
    fn edges(&self, context: &Context) -> Result<HeadEdges>;
}

impl<P: Pattern> AnyPattern for P {
    fn name(&self) -> &'static str {
        P::NAME
    }
    fn kwargs(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("mask parameters are plain data")
    }
    fn domain(&self) -> Domain {
        Pattern::domain(self)
    }
    fn default_prefix(&self) -> usize {
        Pattern::default_prefix(self)
    }
    fn forced_prefix(&self) -> Option<usize> {
        Pattern::forced_prefix(self)
    }
    fn uses_layer(&self) -> bool {
        Pattern::uses_layer(self)
    }
    fn uses_epoch(&self) -> bool {
        Pattern::uses_epoch(self)
    }
    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        Pattern::edges(self, context)
    }
}

/// The edges of all heads over `context.num_tokens` tokens of which the first `prefix` are off the patch grid.
///
/// Prefix rows and columns are dense if `prefix_dense`, otherwise empty apart from what a [`Domain::Tokens`] pattern puts there.
///
/// # Errors
/// [`Error::Value`] when there are fewer tokens than prefix tokens; otherwise what the pattern reports.
pub fn head_edges(
    pattern: &dyn AnyPattern,
    context: &Context,
    prefix: usize,
    prefix_dense: bool,
) -> Result<HeadEdges> {
    let num_tokens = context.num_tokens;
    if prefix > num_tokens {
        return Err(Error::Value(format!(
            "num_prefix_tokens: expected at most the {num_tokens} tokens there are, got {prefix}"
        )));
    }
    let dense_prefix = if prefix_dense { prefix } else { 0 };
    match pattern.domain() {
        Domain::Tokens => pattern.edges(&Context { dense_prefix, ..context.clone() }),
        Domain::Patches if prefix == 0 => pattern.edges(context),
        Domain::Patches => {
            let patches = pattern.edges(&Context {
                num_tokens: num_tokens - prefix,
                dense_prefix: 0,
                ..context.clone()
            })?;
            let with_prefix = |edges: &Arc<EdgeSet>| -> Result<Arc<EdgeSet>> {
                let builder = EdgeSet::builder(num_tokens, num_tokens)?.shifted(edges, prefix);
                Ok(Arc::new(builder.global(0..dense_prefix).build()))
            };
            share(&patches, with_prefix)
        }
    }
}

/// Apply `change` once to each distinct edge set, so that heads which shared one still do.
fn share(sets: &HeadEdges, change: impl Fn(&Arc<EdgeSet>) -> Result<Arc<EdgeSet>>) -> Result<HeadEdges> {
    let mut changed: HeadEdges = Vec::with_capacity(sets.len());
    for (index, set) in sets.iter().enumerate() {
        let earlier = sets[..index].iter().position(|other| Arc::ptr_eq(other, set));
        changed.push(match earlier {
            Some(earlier) => Arc::clone(&changed[earlier]),
            None => change(set)?,
        });
    }
    Ok(changed)
}

/// Log, once per process and message, that a parameter was clamped as the reference system does.
pub(crate) fn warn_clamped(message: String) {
    use std::collections::HashSet;
    use std::sync::Mutex;
    static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    // A busy or poisoned lock only costs a repeated warning.
    let fresh = SEEN.try_lock().map_or(true, |mut seen| {
        let seen = seen.get_or_insert_with(HashSet::new);
        seen.len() < 1024 && seen.insert(message.clone())
    });
    if fresh {
        log::warn!("{message}");
    }
}
