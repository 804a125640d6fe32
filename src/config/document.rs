//! One document's keys: their types, ranges and names, and the mask they ask for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::backend;
use crate::error::{Error, read_parameters, unknown_name};
use crate::pattern::grid::TokenOrder;
use crate::pattern::registry::{self, Registered, check_keys, field_names};

/// Largest number of heads and of prefix tokens accepted: far beyond any model, small enough to allocate.
pub(super) const MAX_HEADS: u64 = 4096;
const MAX_PREFIX: u64 = 1 << 20;
const MAX_WIDTH: u64 = 1 << 20;

/// What a row without any key gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnEmptyRow {
    /// Output 0, lse -inf, zero gradients.
    Zero,
    /// An error that names the row.
    Error,
}

/// What the logit of a pair that is not kept counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaskedLogits {
    /// Minus infinity: such pairs have no weight.
    NegInf,
    /// Zero, as in published Fibottention checkpoints, which multiply the logits by the mask.
    Zero,
}

/// The keys of a configuration.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Document {
    /// What computes attention; null is softmax over the edges of the mask.
    pub(super) backend: Option<String>,
    /// Parameters of the backend.
    pub(super) backend_kwargs: Option<Map<String, Value>>,
    /// Which keys each query keeps; null keeps all.
    pub(super) mask: Option<String>,
    /// Parameters of the mask.
    pub(super) mask_kwargs: Option<Map<String, Value>>,
    /// Factor of q.k; null is 1 / sqrt(head_dim).
    pub(super) scale: Option<f64>,
    /// What the logit of a pair that is not kept counts as.
    pub(super) masked_logits: MaskedLogits,
    /// Leading tokens off the grid (CLS, registers); null takes what the model tells, else the mask's default.
    #[schemars(range(max = MAX_PREFIX))]
    pub(super) num_prefix_tokens: Option<u64>,
    /// Whether prefix rows and columns are dense.
    pub(super) prefix_dense: bool,
    /// `[H, W]` or `[T, H, W]` of the tokens after the prefix.
    #[schemars(length(min = 2, max = 3), inner(range(min = 1, max = u32::MAX)))]
    pub(super) grid: Option<Vec<u64>>,
    /// How the tokens of a video grid are laid out.
    pub(super) token_order: TokenOrder,
    /// What a query without any key gives.
    pub(super) on_empty_row: OnEmptyRow,
    /// Regular expression on module names -> keys that replace those above in the layers whose name matches.
    pub(super) layers: Option<Map<String, Value>>,
    /// Width of the model.
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub(super) embed_dim: Option<u64>,
    /// Number of heads.
    #[schemars(range(min = 1, max = MAX_HEADS))]
    pub(super) num_heads: Option<u64>,
}

impl Default for Document {
    fn default() -> Self {
        Document {
            backend: None,
            backend_kwargs: None,
            mask: None,
            mask_kwargs: None,
            scale: None,
            masked_logits: MaskedLogits::NegInf,
            num_prefix_tokens: None,
            prefix_dense: true,
            grid: None,
            token_order: TokenOrder::RowMajor,
            on_empty_row: OnEmptyRow::Zero,
            layers: None,
            embed_dim: None,
            num_heads: None,
        }
    }
}

/// A rule that is broken, at a path of keys; the caller knows the text and adds file and line.
pub(super) struct Broken {
    pub(super) path: Vec<String>,
    pub(super) message: String,
}

impl Broken {
    pub(super) fn at(path: impl IntoIterator<Item = impl Into<String>>, message: impl Into<String>) -> Self {
        Broken { path: path.into_iter().map(Into::into).collect(), message: message.into() }
    }

    pub(super) fn below(mut self, prefix: &[&str]) -> Self {
        self.path.splice(0..0, prefix.iter().map(|key| (*key).to_owned()));
        self
    }
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        match error {
            Error::Config(error) => Broken::at(split_path(&error.key), error.message),
            other => Broken::at([] as [&str; 0], other.to_string()),
        }
    }
}

impl Document {
    /// Read the keys of a mapping and check what can be checked without the mask.
    pub(super) fn read(written: &Map<String, Value>) -> std::result::Result<Self, Broken> {
        check_keys(written, field_names::<Document>(), &[])?;
        let document: Document = read_parameters(&Value::Object(written.clone()))
            .map_err(|(path, message)| Broken::at(split_path(&path), message))?;
        check_numbers(&document)?;
        Ok(document)
    }
}

fn check_numbers(document: &Document) -> std::result::Result<(), Broken> {
    let range = |key: &str, value: Option<u64>, low: u64, high: u64| match value {
        Some(value) if value < low || value > high => {
            Err(Broken::at([key], format!("expected {low} to {high}, got {value}")))
        }
        _ => Ok(()),
    };
    range("num_heads", document.num_heads, 1, MAX_HEADS)?;
    range("embed_dim", document.embed_dim, 1, MAX_WIDTH)?;
    range("num_prefix_tokens", document.num_prefix_tokens, 0, MAX_PREFIX)?;
    document.grid.as_deref().map_or(Ok(()), check_shape)
}

/// The shape of a patch grid.
pub(super) fn check_shape(grid: &[u64]) -> std::result::Result<(), Broken> {
    let cells = grid.iter().try_fold(1u64, |cells, side| cells.checked_mul(*side));
    if (2..=3).contains(&grid.len()) && cells.is_some_and(|cells| cells != 0 && cells <= u32::MAX as u64) {
        return Ok(());
    }
    let message = format!(
        "expected [H, W] or [T, H, W], each at least 1 and together at most {} cells, got {grid:?}",
        u32::MAX
    );
    Err(Broken::at(["grid"], message))
}

/// What computes the attention of a document, and over which edges.
#[derive(Debug, Clone)]
pub(super) struct Mechanism {
    /// Canonical name.
    pub(super) backend: String,
    /// Parameters of the backend with every default filled in.
    pub(super) backend_kwargs: Value,
    /// The mask `none` if the backend takes no mask.
    pub(super) mask: &'static Registered,
    /// Parameters of the mask with every default filled in.
    pub(super) mask_kwargs: Value,
}

/// The mechanism that `document` asks for, by `mask` or by a backend that implies one.
pub(super) fn resolve(document: &Document) -> std::result::Result<Mechanism, Broken> {
    let name = document.backend.as_deref().unwrap_or(backend::SOFTMAX[0]).to_lowercase();
    let mut parameters = document.backend_kwargs.clone().unwrap_or_default();
    let softmax = |mask, mask_kwargs| Mechanism {
        backend: backend::SOFTMAX[0].to_owned(),
        backend_kwargs: Value::Object(Map::new()),
        mask,
        mask_kwargs,
    };
    if let Some(own) = backend::MASKS.iter().find(|own| own.name == name) {
        refuse_mask(document, &name)?;
        backend::drop_ignored(&mut parameters, own.ignored, &name);
        for (key, value) in own.defaults {
            parameters.entry(*key).or_insert(Value::from(*value));
        }
        let mask = registry::find(own.mask).expect("registered");
        return Ok(softmax(mask, read_kwargs(mask, "backend_kwargs", parameters)?));
    }
    if backend::SOFTMAX.contains(&name.as_str()) {
        let ignored: &[&str] = if name == "vit_qchunk" { &[backend::CHUNK_SIZE] } else { &[] };
        check_keys(&parameters, &[], ignored)
            .map_err(|error| Broken::from(error).below(&["backend_kwargs"]))?;
        backend::drop_ignored(&mut parameters, ignored, &name);
        let (mask, kwargs) = read_mask(document)?;
        return Ok(softmax(mask, kwargs));
    }
    if name == backend::FLEX {
        check_keys(&parameters, &[], &[]).map_err(|error| Broken::from(error).below(&["backend_kwargs"]))?;
        let (mask, kwargs) = read_mask(document)?;
        if mask.read(&kwargs).is_ok_and(|pattern| pattern.choice(0).is_some()) {
            let message = format!(
                "the backend `{name}` needs edges before it sees queries and keys, and `{}` chooses them by content; \
                 the backend `{}` takes it",
                mask.name,
                backend::SOFTMAX[0]
            );
            return Err(Broken::at(["mask"], message));
        }
        refuse_options(document, &name, "only computes the softmax over kept edges")?;
        return Ok(Mechanism { backend: name, ..softmax(mask, kwargs) });
    }
    let (backend, backend_kwargs) = backend::read(&name, parameters)?;
    refuse_mask(document, &backend)?;
    refuse_options(document, &backend, "has no edges")?;
    if !document.prefix_dense {
        let message =
            format!("the backend `{backend}` has no edges and cannot honour `false`; allowed: true");
        return Err(Broken::at(["prefix_dense"], message));
    }
    let mask = registry::find("none").expect("registered");
    Ok(Mechanism { backend, backend_kwargs, mask, mask_kwargs: Value::Object(Map::new()) })
}

/// A backend that cannot apply a mask must not be given one.
fn refuse_mask(document: &Document, backend: &str) -> std::result::Result<(), Broken> {
    let asked = document.mask.as_deref().unwrap_or("none");
    if registry::find(asked).is_none_or(|mask| mask.name != "none") {
        let message = format!("the backend `{backend}` cannot apply the mask `{asked}`; allowed: none");
        return Err(Broken::at(["mask"], message));
    }
    if document.mask_kwargs.as_ref().is_some_and(|kwargs| !kwargs.is_empty()) {
        let message =
            format!("the backend `{backend}` applies no mask; its own parameters go into backend_kwargs");
        return Err(Broken::at(["mask_kwargs"], message));
    }
    Ok(())
}

/// What only our kernels do with the softmax of a row.
fn refuse_options(document: &Document, backend: &str, because: &str) -> std::result::Result<(), Broken> {
    let refuse = |key: &str, given: &str, allowed: &str| {
        Err(Broken::at(
            [key],
            format!("the backend `{backend}` {because} and cannot honour `{given}`; allowed: {allowed}"),
        ))
    };
    if document.masked_logits != MaskedLogits::NegInf {
        return refuse("masked_logits", "zero", "neg_inf");
    }
    if document.on_empty_row != OnEmptyRow::Zero {
        return refuse("on_empty_row", "error", "zero");
    }
    Ok(())
}

fn read_mask(document: &Document) -> std::result::Result<(&'static Registered, Value), Broken> {
    let asked = document.mask.as_deref().unwrap_or("none");
    let mask = registry::find(asked)
        .ok_or_else(|| Broken::at(["mask"], unknown_name("mask", asked, &registry::names())))?;
    let kwargs = read_kwargs(mask, "mask_kwargs", document.mask_kwargs.clone().unwrap_or_default())?;
    Ok((mask, kwargs))
}

/// The parameters of `mask` under the key `section`, checked and with defaults filled in.
fn read_kwargs(
    mask: &'static Registered,
    section: &str,
    kwargs: Map<String, Value>,
) -> std::result::Result<Value, Broken> {
    let pattern = mask.build(kwargs).map_err(|error| Broken::from(error).below(&[section]))?;
    Ok(pattern.kwargs())
}

/// serde's `a.b[2]` as keys.
pub(super) fn split_path(path: &str) -> Vec<String> {
    path.split(['.', '[', ']']).filter(|key| !key.is_empty() && *key != "?").map(str::to_owned).collect()
}

pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}
