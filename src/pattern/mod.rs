//! Patterns: named rules that say which keys each query keeps.
//!
//! One mask is one file here and one line in `registry.rs`. A pattern sees only its own tokens (patches, or all tokens) and
//! knows nothing of prefixes, batches, kernels or devices: [`head_edges`] removes the prefix before and adds it back after.

pub mod algebra;
pub mod choice;
mod combination;
pub mod edges;
pub mod grid;
pub mod image;
mod one_or_list;
mod part;
pub mod registry;
mod regular;
pub mod scores;
mod segments;
mod shares;
pub mod user;

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use choice::{Choice, OfHead};
use edges::EdgeSet;
use grid::{Grid, TokenOrder};

registry::masks!(registry::declare_modules);

/// What a pattern may know about where it is used.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// Tokens the pattern speaks about: patches for [`Domain::Patches`], all tokens otherwise.
    pub num_tokens: usize,
    /// Number of query heads H.
    pub num_heads: usize,
    /// Channels of a head, where known.
    pub head_dim: Option<usize>,
    /// Zero-based index of the layer.
    pub layer: usize,
    /// Number of layers in the model, where known.
    pub num_layers: Option<usize>,
    /// Training epoch, for masks that change with it.
    pub epoch: u64,
    /// Shape of the patch grid, `[H, W]` or `[T, H, W]`, where known.
    pub grid: Option<Vec<usize>>,
    /// How the patches of a video grid are laid out.
    pub token_order: TokenOrder,
    /// Leading tokens off the grid. They are among `num_tokens` for [`Domain::Tokens`] and not for [`Domain::Patches`].
    pub prefix: usize,
    /// Whether the prefix is kept dense.
    pub prefix_dense: bool,
}

impl Context {
    /// Leading tokens off the grid that are kept dense.
    pub fn dense_prefix(&self) -> usize {
        if self.prefix_dense { self.prefix } else { 0 }
    }

    /// The patch grid.
    ///
    /// # Errors
    /// [`Error::Config`] at `grid` if it is unknown, because no grid may be guessed, or has no `token_order`.
    pub fn grid(&self) -> Result<Grid> {
        match &self.grid {
            Some(shape) => Grid::new(shape, self.token_order),
            None => Err(Error::config(
                "grid",
                "expected [H, W] or [T, H, W] of the tokens after the prefix, because the mask depends on it; got null",
            )),
        }
    }
}

/// Which tokens a pattern speaks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// The patches: prefix tokens are taken off before and become dense rows and columns after.
    Patches,
    /// All tokens, prefix included; the pattern itself keeps [`Context::dense_prefix()`] dense if it wants to.
    Tokens,
}

/// The edges of every head: one set shared by all, or one per head.
pub type HeadEdges = Vec<Arc<EdgeSet>>;

/// How many edges a head has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeCount {
    /// All of them.
    pub all: usize,
    /// Those between patches, tokens after the prefix.
    pub patches: usize,
}

impl EdgeCount {
    /// What `edges` has, after a prefix of so many tokens.
    pub fn of(edges: &EdgeSet, prefix: usize) -> Self {
        EdgeCount { all: edges.nnz(), patches: edges.nnz_after(prefix) }
    }

    /// One more query with this many keys; `patches` of them are patches as it is itself.
    fn add(&mut self, all: usize, patches: usize) {
        self.all += all;
        self.patches += patches;
    }
}

/// One registered mask. Its fields are the `mask_kwargs` of a configuration; their comments and that of the type itself are the
/// definition that the JSON Schema and the gallery show.
pub trait Pattern: Serialize + DeserializeOwned + JsonSchema + Debug + Send + Sync + 'static {
    /// The name in a configuration, lower case.
    const NAME: &'static str;
    /// Other names for the same mask.
    const ALIASES: &'static [&'static str] = &[];
    /// One sentence for tables and pictures.
    const ABOUT: &'static str;
    /// Keys of the reference system that have no effect here: accepted, and logged at debug level.
    const IGNORED: &'static [&'static str] = &[];
    /// Keys that set how many pairs are kept, whole numbers or (`*_ratio`) shares: what a budget is solved for. One list for each
    /// quantity, with its other names after the preferred one.
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[];
    /// Those of them of which more may well mean fewer pairs. More of any other never does, or hardly ever and hardly fewer, so that
    /// those may be searched by halves.
    const BUDGET_UNORDERED: &'static [&'static str] = &[];
    /// Prefix tokens if neither the configuration nor the model says how many there are; `None` if that depends on the parameters.
    const DEFAULT_PREFIX: Option<usize> = Some(0);
    /// Keys that name files; relative paths are made absolute before the mask sees them.
    const FILES: &'static [&'static str] = &[];

    /// Finish reading, for parameters that are masks themselves.
    ///
    /// # Errors
    /// [`Error::Config`] whose key is the path below `mask_kwargs`.
    fn resolve(&mut self) -> Result<()> {
        Ok(())
    }

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

    /// [`Self::DEFAULT_PREFIX`] with these parameters.
    fn default_prefix(&self) -> usize {
        Self::DEFAULT_PREFIX.unwrap_or(0)
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

    /// Whether the edges depend on the number of channels of a head.
    fn uses_head_dim(&self) -> bool {
        false
    }

    /// Whether the edges depend on the shape of the patch grid.
    fn uses_grid(&self) -> bool {
        false
    }

    /// The grid that the parameters themselves give.
    fn grid(&self) -> Option<&[usize]> {
        None
    }

    /// The seeds of what is drawn at random. One that is `None` is drawn when a mask or module is built, and kept from then on.
    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        Vec::new()
    }

    /// Whether prefix tokens are dense; a pattern over all tokens may be told not to.
    fn keeps_prefix_dense(&self) -> bool {
        true
    }

    /// How keys are chosen in training epoch `epoch`, where that depends on the content of queries and keys. Such a pattern has no
    /// edges of its own.
    fn choice(&self, _epoch: u64) -> Option<Choice> {
        None
    }

    /// With [`Self::choice`]: how much each head chooses in this layer, where heads differ; at most as much as the choice says.
    ///
    /// # Errors
    /// [`Error::Config`] when there is not one number per head.
    fn choice_per_head(&self, _context: &Context) -> Result<Option<Vec<OfHead>>> {
        Ok(None)
    }

    /// How many edges a pattern over all tokens has, where its parameters say so: for all heads, or for each. `None` where the
    /// edges must be made to be counted.
    ///
    /// # Errors
    /// See [`Self::edges`].
    fn count(&self, _context: &Context) -> Result<Option<Vec<EdgeCount>>> {
        Ok(None)
    }

    /// The edges over the pattern's own tokens: one set for all heads, or one per head.
    ///
    /// # Errors
    /// [`Error::Config`] when the parameters do not fit the context (for example a list with the wrong number of heads);
    /// [`Error::Value`] where keys are chosen by content.
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
    /// [`Pattern::uses_head_dim`].
    fn uses_head_dim(&self) -> bool {
        false
    }
    /// [`Pattern::uses_grid`].
    fn uses_grid(&self) -> bool {
        false
    }
    /// [`Pattern::grid`].
    fn grid(&self) -> Option<&[usize]> {
        None
    }
    /// [`Pattern::seeds`].
    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        Vec::new()
    }
    /// [`Pattern::keeps_prefix_dense`].
    fn keeps_prefix_dense(&self) -> bool {
        true
    }
    /// [`Pattern::choice`].
    fn choice(&self, _epoch: u64) -> Option<Choice> {
        None
    }
    /// [`Pattern::choice_per_head`].
    ///
    /// # Errors
    /// See [`Pattern::choice_per_head`].
    fn choice_per_head(&self, _context: &Context) -> Result<Option<Vec<OfHead>>> {
        Ok(None)
    }
    /// [`Pattern::count`].
    ///
    /// # Errors
    /// See [`Pattern::count`].
    fn count(&self, _context: &Context) -> Result<Option<Vec<EdgeCount>>> {
        Ok(None)
    }
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
    fn uses_head_dim(&self) -> bool {
        Pattern::uses_head_dim(self)
    }
    fn uses_grid(&self) -> bool {
        Pattern::uses_grid(self)
    }
    fn grid(&self) -> Option<&[usize]> {
        Pattern::grid(self)
    }
    fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        Pattern::seeds(self)
    }
    fn keeps_prefix_dense(&self) -> bool {
        Pattern::keeps_prefix_dense(self)
    }
    fn choice(&self, epoch: u64) -> Option<Choice> {
        Pattern::choice(self, epoch)
    }
    fn choice_per_head(&self, context: &Context) -> Result<Option<Vec<OfHead>>> {
        Pattern::choice_per_head(self, context)
    }
    fn count(&self, context: &Context) -> Result<Option<Vec<EdgeCount>>> {
        Pattern::count(self, context)
    }
    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        Pattern::edges(self, context)
    }
}

/// The edges of all heads over `context.num_tokens` tokens, of which the first `context.prefix` are off the patch grid.
///
/// Prefix rows and columns are dense if `context.prefix_dense`, otherwise empty apart from what a [`Domain::Tokens`] pattern
/// puts there.
///
/// # Errors
/// [`Error::Value`] when there are fewer tokens than prefix tokens; [`Error::Config`] when the grid does not fit the number of
/// patches; otherwise what the pattern reports. Keys are those of a configuration document.
pub fn head_edges(pattern: &dyn AnyPattern, context: &Context) -> Result<HeadEdges> {
    let Context { num_tokens, prefix, .. } = *context;
    check_prefix(context)?;
    let own = match pattern.domain() {
        Domain::Tokens => num_tokens,
        Domain::Patches => num_tokens - prefix,
    };
    let edges = own_edges(pattern, &Context { num_tokens: own, ..context.clone() })?;
    if own == num_tokens {
        return Ok(edges);
    }
    share(&edges, |edges| {
        let builder = EdgeSet::builder(num_tokens, num_tokens)?.shifted(edges, prefix);
        Ok(Arc::new(builder.global(0..context.dense_prefix()).build()?))
    })
}

/// How many edges [`head_edges`] has, for all heads or for each; made only where they cannot be counted without.
///
/// # Errors
/// See [`head_edges`].
pub fn head_counts(pattern: &dyn AnyPattern, context: &Context) -> Result<Vec<EdgeCount>> {
    if pattern.domain() == Domain::Tokens {
        check_prefix(context)?;
        check_grid(Domain::Tokens, context)?;
        if let Some(counts) = pattern.count(context).map_err(|error| below(error, "mask_kwargs"))? {
            return Ok(counts);
        }
    }
    let heads = head_edges(pattern, context)?;
    Ok(heads.iter().map(|edges| EdgeCount::of(edges, context.prefix)).collect())
}

fn check_prefix(context: &Context) -> Result<()> {
    let Context { num_tokens, prefix, .. } = *context;
    if prefix > num_tokens {
        return Err(Error::Value(format!(
            "num_prefix_tokens: expected at most the {num_tokens} tokens there are, got {prefix}"
        )));
    }
    Ok(())
}

/// The edges over the pattern's own tokens, which `context.num_tokens` counts.
fn own_edges(pattern: &dyn AnyPattern, context: &Context) -> Result<HeadEdges> {
    let grid = pattern.grid().map(<[_]>::to_vec).or_else(|| context.grid.clone());
    let context = Context { grid, ..context.clone() };
    check_grid(pattern.domain(), &context)?;
    pattern.edges(&context).map_err(|error| below(error, "mask_kwargs"))
}

/// The error with its key below `path`, except for the grid and its layout, which are keys of the document for every mask in it.
fn below(error: Error, path: &str) -> Error {
    match &error {
        Error::Config(config) if config.key == "grid" || config.key == "token_order" => error,
        _ => error.below(path),
    }
}

/// A grid that is given must be the grid of these tokens, whether the mask looks at it or not.
fn check_grid(domain: Domain, context: &Context) -> Result<()> {
    let Some(shape) = &context.grid else { return Ok(()) };
    let (tokens, patches) = match domain {
        Domain::Tokens => (context.num_tokens, context.num_tokens - context.prefix),
        Domain::Patches => (context.num_tokens + context.prefix, context.num_tokens),
    };
    match shape.iter().try_fold(1usize, |cells, &side| cells.checked_mul(side)) {
        Some(cells) if cells == patches => Ok(()),
        cells => Err(Error::config(
            "grid",
            format!(
                "{shape:?} has {} cells, but {tokens} tokens with {} prefix tokens leave {patches} patches",
                cells.map_or_else(|| "too many".to_owned(), |cells| cells.to_string()),
                context.prefix,
            ),
        )),
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

/// What a mask answers that is asked for its edges and has none before it sees queries and keys.
fn by_content(name: &str) -> Result<HeadEdges> {
    Err(Error::Value(format!(
        "the mask `{name}` chooses keys by the content of queries and keys, so its edges exist only inside attention; \
         `choose_masks` shows them for given q and k"
    )))
}

thread_local! {
    static TRIED_OUT: Cell<bool> = const { Cell::new(false) };
}

/// Do `work` without [`warn_clamped`]: for masks that are only tried out, at sizes or with values that nobody asked for.
pub fn tried_out<T>(work: impl FnOnce() -> T) -> T {
    struct Restored(bool);
    impl Drop for Restored {
        fn drop(&mut self) {
            TRIED_OUT.set(self.0);
        }
    }
    let _restored = Restored(TRIED_OUT.replace(true));
    work()
}

/// Log, once per process and message, that a parameter acts as another value.
pub(crate) fn warn_clamped(message: String) {
    use std::collections::HashSet;
    use std::sync::Mutex;
    static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    if TRIED_OUT.get() {
        return;
    }
    // A busy or poisoned lock only costs a repeated warning.
    let fresh = SEEN.try_lock().map_or(true, |mut seen| {
        let seen = seen.get_or_insert_with(HashSet::new);
        seen.len() < 1024 && seen.insert(message.clone())
    });
    if fresh {
        log::warn!("{message}");
    }
}
