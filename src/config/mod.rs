//! The attention configuration: YAML text in, typed and range-checked values out. Nothing is guessed and nothing is replaced:
//! what cannot be honoured is an error that names file, line, key and what is allowed.

mod backend;
mod document;
mod files;
mod schema;
mod spec;
mod tree;
mod write;

use serde_json::{Map, Value, json};

pub use backend::{Parameter, UserBackend, register_backend};
use document::{Broken, Document, MAX_HEADS, Mechanism, check_shape, resolve, type_name};
pub use document::{MaskedLogits, OnEmptyRow};
pub use schema::{json_schema, mask_schema};
pub use spec::{MaskEdges, Spec};
pub use tree::{MAX_BYTES, MAX_DEPTH, MAX_NODES};

use crate::error::{ConfigError, Error, Result};
use crate::pattern::AnyPattern;
pub use crate::pattern::grid::TokenOrder;

/// Keys that an entry of `layers` cannot replace.
const FIXED_FOR_ALL_LAYERS: &[&str] = &["layers", "embed_dim", "num_heads"];

/// A configuration that can be honoured.
#[derive(Debug, Clone)]
pub struct AttentionConfig {
    document: Document,
    mechanism: Mechanism,
    /// The mapping as it was written, to which layer overrides apply.
    written: Map<String, Value>,
}

impl PartialEq for AttentionConfig {
    fn eq(&self, other: &Self) -> bool {
        // As text, because the order of `layers` has a meaning that maps do not compare.
        let text = |config: &Self| config.canonical().to_string();
        text(self) == text(other)
    }
}

impl AttentionConfig {
    /// Parse YAML (or JSON, which is YAML) text. `source` names the file in messages.
    ///
    /// # Errors
    /// [`Error::Config`] naming source, line, key path, what is wrong and what is allowed.
    pub fn parse(text: &str, source: Option<&str>) -> Result<Self> {
        let fail = |key: String, message: String, position: Option<(usize, usize)>| {
            Err(Error::Config(Box::new(ConfigError {
                source: source.map(str::to_owned),
                position,
                key,
                message,
            })))
        };
        let root = match tree::read(text) {
            Ok(root) => root,
            Err((message, position)) => return fail(String::new(), message, position),
        };
        let hint = |path: &[String]| match tree::at(&root, path) {
            Some(Value::String(text)) if text == "None" => " (`None` is a YAML string; write `null`)",
            _ => "",
        };
        let absolute = files::absolute(root.clone(), source);
        match Self::from_root(absolute) {
            Ok(config) => Ok(config),
            Err(broken) => {
                let message = format!("{}{}", broken.message, hint(&broken.path));
                fail(broken.path.join("."), message, tree::locate(text, &broken.path))
            }
        }
    }

    fn from_root(root: Value) -> std::result::Result<Self, Broken> {
        let top = |message: &str| Err(Broken::at([] as [&str; 0], message));
        match root {
            Value::Null => top("the document is empty; expected a mapping with keys such as `mask`"),
            Value::Object(mut map) if map.contains_key("attention") => {
                if let Some(other) = map.keys().find(|key| *key != "attention") {
                    let message = format!("unknown key `{other}` beside `attention`; allowed: attention");
                    return Err(Broken::at([other.as_str()], message));
                }
                match map.remove("attention") {
                    Some(Value::Object(inner)) => {
                        Self::from_mapping(inner).map_err(|broken| broken.below(&["attention"]))
                    }
                    other => {
                        let got = other.as_ref().map_or("nothing", type_name);
                        Err(Broken::at(["attention"], format!("expected a mapping, got {got}")))
                    }
                }
            }
            Value::Object(map) => Self::from_mapping(map),
            other => top(&format!("expected a mapping with keys such as `mask`, got {}", type_name(&other))),
        }
    }

    fn from_mapping(written: Map<String, Value>) -> std::result::Result<Self, Broken> {
        let config = Self::without_layers(&written)?;
        let mut any_uses_grid = config.pattern().uses_grid();
        // Overrides are checked here, not when a model happens to contain the layer.
        for (pattern, keys) in config.document.layers.iter().flatten() {
            let at = ["layers", pattern.as_str()];
            regex::Regex::new(pattern)
                .map_err(|error| Broken::at(at, format!("not a regular expression: {error}")))?;
            let Value::Object(keys) = keys else {
                return Err(Broken::at(
                    at,
                    format!("expected a mapping of keys to replace, got {}", type_name(keys)),
                ));
            };
            for fixed in FIXED_FOR_ALL_LAYERS {
                if keys.contains_key(*fixed) {
                    return Err(Broken::at([at[0], at[1], *fixed], "cannot be replaced for single layers"));
                }
            }
            let layer =
                Self::without_layers(&overridden(&written, keys)).map_err(|broken| broken.below(&at))?;
            any_uses_grid |= layer.pattern().uses_grid();
        }
        if config.document.token_order != TokenOrder::RowMajor && !any_uses_grid {
            let message =
                format!("has no meaning for the mask `{}`, which does not look at the grid", config.mask());
            return Err(Broken::at(["token_order"], message));
        }
        Ok(config)
    }

    fn without_layers(written: &Map<String, Value>) -> std::result::Result<Self, Broken> {
        let document = Document::read(written)?;
        let mechanism = resolve(&document)?;
        let config = AttentionConfig { document, mechanism, written: written.clone() };
        config.check_grid()?;
        config.check_prefix()?;
        Ok(config)
    }

    /// The grid of the document against that of the mask's parameters and against the layout of tokens.
    fn check_grid(&self) -> std::result::Result<(), Broken> {
        let (own, pattern) = (self.document.grid.as_ref(), self.pattern());
        let of_mask = pattern.grid().map(|grid| grid.iter().map(|&side| side as u64).collect::<Vec<_>>());
        if let Some(of_mask) = &of_mask {
            check_shape(of_mask).map_err(|broken| broken.below(&["mask_kwargs"]))?;
            if let Some(own) = own.filter(|own| *own != of_mask) {
                let message = format!("expected {of_mask:?}, as mask_kwargs.grid says, got {own:?}");
                return Err(Broken::at(["grid"], message));
            }
        }
        let order = self.document.token_order;
        if let Some(grid) =
            own.or(of_mask.as_ref()).filter(|grid| grid.len() != 3 && order == TokenOrder::TFastest)
        {
            let message =
                format!("t_fastest needs a grid [T, H, W], but the grid is {grid:?}; allowed: row_major");
            return Err(Broken::at(["token_order"], message));
        }
        Ok(())
    }

    /// The number of prefix tokens of the document against that which the mask's parameters demand.
    fn check_prefix(&self) -> std::result::Result<(), Broken> {
        match (self.pattern().forced_prefix(), self.document.num_prefix_tokens) {
            (Some(forced), Some(given)) if forced as u64 != given => {
                let message = format!(
                    "expected {forced}, as the parameters of `{}` demand (add_class_token: false), got {given}",
                    self.mask()
                );
                Err(Broken::at(["num_prefix_tokens"], message))
            }
            _ => Ok(()),
        }
    }

    /// The configuration of the layer called `name`: keys of every matching `layers` entry replace the document's, in order.
    ///
    /// # Errors
    /// [`Error::Config`] if the combination of several matching entries cannot be honoured.
    pub fn for_layer(&self, name: &str) -> Result<Self> {
        let mut written = self.written.clone();
        for (pattern, keys) in self.document.layers.iter().flatten() {
            let matches = regex::Regex::new(pattern).is_ok_and(|regex| regex.is_match(name));
            if let (true, Value::Object(keys)) = (matches, keys) {
                written = overridden(&written, keys);
            }
        }
        written.shift_remove("layers");
        Self::without_layers(&written).map_err(|broken| {
            let message =
                format!("{} (in the combination of `layers` entries that match `{name}`)", broken.message);
            Error::config(broken.path.join("."), message)
        })
    }

    /// The `layers` expressions that match none of these module names.
    pub fn unmatched_layers(&self, names: &[String]) -> Vec<&str> {
        let matches_any = |pattern: &&str| {
            regex::Regex::new(pattern).is_ok_and(|regex| names.iter().any(|name| regex.is_match(name)))
        };
        self.layers().filter(|pattern| !matches_any(pattern)).collect()
    }

    /// Every key with defaults filled in and names canonical; equal configurations give equal values.
    pub fn canonical(&self) -> Value {
        let document = &self.document;
        json!({
            "backend": self.mechanism.backend,
            "backend_kwargs": self.mechanism.backend_kwargs,
            "mask": self.mask(),
            "mask_kwargs": self.mechanism.mask_kwargs,
            "scale": document.scale,
            "masked_logits": document.masked_logits,
            "num_prefix_tokens": document.num_prefix_tokens,
            "prefix_dense": document.prefix_dense,
            "grid": document.grid,
            "token_order": document.token_order,
            "on_empty_row": document.on_empty_row,
            "layers": document.layers.clone().unwrap_or_default(),
            "embed_dim": document.embed_dim,
            "num_heads": document.num_heads,
        })
    }

    /// The canonical document as YAML that [`Self::parse`] reads back to an equal configuration, and readers of YAML 1.1 to
    /// the same values.
    pub fn to_yaml(&self) -> String {
        write::write(&json!({ "attention": self.canonical() }))
    }

    /// The canonical text of one layer's mask. What was found in the model (`grid`, `num_prefix_tokens`) yields to the
    /// configuration's own values.
    ///
    /// # Errors
    /// [`Error::Value`] for a head count out of range.
    #[expect(clippy::too_many_arguments, reason = "what a mask may know, which callers name")]
    pub fn spec(
        &self,
        num_heads: usize,
        layer: usize,
        num_layers: Option<usize>,
        epoch: u64,
        grid: Option<Vec<u64>>,
        num_prefix_tokens: Option<u64>,
        head_dim: Option<usize>,
    ) -> Result<String> {
        if num_heads == 0 || num_heads as u64 > MAX_HEADS {
            return Err(Error::Value(format!("num_heads: expected 1 to {MAX_HEADS}, got {num_heads}")));
        }
        let document = &self.document;
        let Mechanism { mask, mask_kwargs, .. } = &self.mechanism;
        let pattern = self.pattern();
        let (by_layer, by_epoch) = (pattern.uses_layer(), pattern.uses_epoch());
        let prefix =
            document.num_prefix_tokens.or(pattern.forced_prefix().map(|p| p as u64)).or(num_prefix_tokens);
        let spec = Spec {
            mask: mask.name.to_owned(),
            mask_kwargs: mask_kwargs.clone(),
            masked_logits: document.masked_logits,
            heads: num_heads,
            head_dim: head_dim.filter(|_| pattern.uses_head_dim()),
            // What a mask does not depend on is left out of its text, so that layers share plans and graphs do not recompile.
            layer: if by_layer { layer } else { 0 },
            num_layers: num_layers.filter(|_| by_layer),
            epoch: if by_epoch { epoch } else { 0 },
            grid: self.grid().or(grid.filter(|_| pattern.uses_grid())),
            token_order: document.token_order,
            num_prefix_tokens: prefix.unwrap_or(pattern.default_prefix() as u64),
            prefix_dense: document.prefix_dense,
        };
        Ok(spec.to_text())
    }

    /// Canonical name of the mask.
    pub fn mask(&self) -> &'static str {
        self.mechanism.mask.name
    }
    /// Whether the mask chooses keys by the content of queries and keys, so that it has no edges without them.
    pub fn by_content(&self) -> bool {
        self.mechanism.mask.read(&self.mechanism.mask_kwargs).is_ok_and(|pattern| pattern.choice(0).is_some())
    }
    /// Canonical name of the backend.
    pub fn backend(&self) -> &str {
        &self.mechanism.backend
    }
    /// Whether attention is softmax over the edges of the mask; otherwise the backend brings its own.
    pub fn uses_edges(&self) -> bool {
        [backend::SOFTMAX[0], backend::FLEX].contains(&self.backend())
    }
    /// The regular expressions of the `layers` overrides, in order.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.document.layers.iter().flat_map(|layers| layers.keys()).map(String::as_str)
    }
    /// Factor on q.k, if not 1 / sqrt(head_dim).
    pub fn scale(&self) -> Option<f64> {
        self.document.scale
    }
    /// What a masked logit counts as.
    pub fn masked_logits(&self) -> MaskedLogits {
        self.document.masked_logits
    }
    /// Leading tokens off the grid, if the configuration says.
    pub fn num_prefix_tokens(&self) -> Option<u64> {
        self.document.num_prefix_tokens
    }
    /// Whether prefix rows and columns are dense.
    pub fn prefix_dense(&self) -> bool {
        self.document.prefix_dense
    }
    /// Shape of the patch grid, if the configuration says: at the top, or among the parameters of the mask.
    pub fn grid(&self) -> Option<Vec<u64>> {
        let of_mask = || self.pattern().grid().map(|grid| grid.iter().map(|&side| side as u64).collect());
        self.document.grid.clone().or_else(of_mask)
    }
    /// The seeds of what the mask draws at random, in the order of its parameters; `None` is yet to be drawn.
    pub fn seeds(&self) -> Vec<Option<i64>> {
        self.pattern().seeds().into_iter().map(|seed| *seed).collect()
    }
    /// The same configuration with every missing seed given: `seed` to the first, `seed + 1` to the next, and so on.
    #[must_use]
    pub fn with_seed(&self, seed: i64) -> Self {
        let mut pattern = self.pattern();
        let missing: Vec<_> = pattern.seeds().into_iter().filter(|seed| seed.is_none()).collect();
        if missing.is_empty() {
            return self.clone();
        }
        missing.into_iter().zip(0..).for_each(|(missing, index)| *missing = Some(seed.wrapping_add(index)));
        let mut config = self.clone();
        config.mechanism.mask_kwargs = pattern.kwargs();
        config.written.insert("mask_kwargs".to_owned(), pattern.kwargs());
        config
    }

    fn pattern(&self) -> Box<dyn AnyPattern> {
        self.mechanism
            .mask
            .read(&self.mechanism.mask_kwargs)
            .expect("parameters were checked when the configuration was read")
    }
    /// What a row without keys gives.
    pub fn on_empty_row(&self) -> OnEmptyRow {
        self.document.on_empty_row
    }
    /// Width of the model, if the configuration says.
    pub fn embed_dim(&self) -> Option<u64> {
        self.document.embed_dim
    }
    /// Number of heads, if the configuration says.
    pub fn num_heads(&self) -> Option<u64> {
        self.document.num_heads
    }
}

/// `base` with `keys` replacing its own. A new mask or backend does not inherit the parameters of the old one.
fn overridden(base: &Map<String, Value>, keys: &Map<String, Value>) -> Map<String, Value> {
    let mut written = base.clone();
    written.shift_remove("layers");
    for (name, parameters) in [("mask", "mask_kwargs"), ("backend", "backend_kwargs")] {
        if keys.contains_key(name) {
            written.shift_remove(parameters);
        }
    }
    written.extend(keys.iter().map(|(key, value)| (key.clone(), value.clone())));
    written
}

#[cfg(test)]
mod tests;
