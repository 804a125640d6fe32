//! A mask inside another: one entry of the list that composite masks take.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::one_or_list::OneOrList;
use super::{AnyPattern, Context, Domain, HeadEdges, below, own_edges, registry, share};
use crate::error::{Error, Result, unknown_name};

/// One of `masks`: what it is called, its parameters, and (for `per_head`) the heads that take it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping such as {mask, mask_kwargs}")]
pub(super) struct Part {
    mask: String,
    #[serde(default)]
    mask_kwargs: Option<Map<String, Value>>,
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "items" = { "minimum": 0 }))]
    pub(super) heads: Option<OneOrList<i64>>,
    /// Filled by [`resolve`].
    #[serde(skip)]
    pattern: Option<Box<dyn AnyPattern>>,
}

/// In canonical form: the mask's own name and every parameter.
impl Serialize for Part {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("mask", self.pattern().name())?;
        map.serialize_entry("mask_kwargs", &self.pattern().kwargs())?;
        if let Some(heads) = &self.heads {
            map.serialize_entry("heads", heads)?;
        }
        map.end()
    }
}

impl Part {
    /// The mask. Every pattern is resolved before anything else is asked of it.
    pub(super) fn pattern(&self) -> &dyn AnyPattern {
        self.pattern.as_deref().expect("a pattern is resolved when it is read")
    }

    /// The edges between patches, of which there are `context.num_tokens`.
    fn patch_edges(&self, context: &Context) -> Result<HeadEdges> {
        let Context { num_tokens, prefix, .. } = *context;
        let pattern = self.pattern();
        match pattern.domain() {
            Domain::Patches => own_edges(pattern, context),
            Domain::Tokens => {
                let all =
                    own_edges(pattern, &Context { num_tokens: num_tokens + prefix, ..context.clone() })?;
                share(&all, |edges| Ok(Arc::new(edges.after(prefix))))
            }
        }
    }
}

/// Read every part's own parameters.
pub(super) fn resolve(parts: &mut [Part]) -> Result<()> {
    if parts.is_empty() {
        return Err(Error::config("masks", "expected at least one {mask, mask_kwargs}, got an empty list"));
    }
    for (index, part) in parts.iter_mut().enumerate() {
        let registered = registry::find(&part.mask).ok_or_else(|| {
            let message = unknown_name("mask", &part.mask, &registry::names());
            Error::config(format!("masks.{index}.mask"), message)
        })?;
        let kwargs = part.mask_kwargs.take().unwrap_or_default();
        let built =
            registered.build(kwargs).map_err(|error| error.below(&format!("masks.{index}.mask_kwargs")))?;
        if built.choice(0).is_some() {
            let message = format!(
                "`{}` chooses keys by the content of queries and keys, and cannot be a part of another mask",
                part.mask
            );
            return Err(Error::config(format!("masks.{index}.mask"), message));
        }
        part.pattern = Some(built);
    }
    let forced: Vec<_> = parts.iter().filter_map(|part| part.pattern().forced_prefix()).collect();
    if forced.windows(2).any(|pair| pair[0] != pair[1]) {
        let message = format!("the masks demand different numbers of prefix tokens: {forced:?}");
        return Err(Error::config("masks", message));
    }
    Ok(())
}

/// [`Part::patch_edges`] of every part; errors name the part.
pub(super) fn patch_edges(parts: &[Part], context: &Context) -> Result<Vec<HeadEdges>> {
    let edges = |(index, part): (usize, &Part)| {
        part.patch_edges(context).map_err(|error| below(error, &format!("masks.{index}")))
    };
    parts.iter().enumerate().map(edges).collect()
}

/// The methods of [`Pattern`](super::Pattern) that a composite answers as its parts, in `masks`, do.
macro_rules! as_its_parts {
    () => {
        const DEFAULT_PREFIX: Option<usize> = None;

        fn default_prefix(&self) -> usize {
            self.masks.iter().map(|part| part.pattern().default_prefix()).max().unwrap_or(0)
        }

        fn forced_prefix(&self) -> Option<usize> {
            self.masks.iter().find_map(|part| part.pattern().forced_prefix())
        }

        fn uses_layer(&self) -> bool {
            self.masks.iter().any(|part| part.pattern().uses_layer())
        }

        fn uses_epoch(&self) -> bool {
            self.masks.iter().any(|part| part.pattern().uses_epoch())
        }

        fn uses_head_dim(&self) -> bool {
            self.masks.iter().any(|part| part.pattern().uses_head_dim())
        }

        fn uses_grid(&self) -> bool {
            self.masks.iter().any(|part| part.pattern().uses_grid())
        }

        fn seeds(&mut self) -> Vec<&mut Option<i64>> {
            self.masks.iter_mut().flat_map(|part| part.seeds()).collect()
        }
    };
}
pub(super) use as_its_parts;

impl Part {
    /// Those of the mask.
    pub(super) fn seeds(&mut self) -> Vec<&mut Option<i64>> {
        self.pattern.as_mut().map(|pattern| pattern.seeds()).unwrap_or_default()
    }
}
