//! Backends: what turns q, k and v into the output. Softmax over kept edges takes any mask; the others bring attention of their
//! own, computed in the Python layer, and take none. Here stand their names and parameters; users register more.

use std::sync::RwLock;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::document::{Broken, split_path, type_name};
use crate::error::{Error, Result, read_parameters, unknown_name};
use crate::pattern::registry::{check_keys, check_range, field_names};

/// Softmax over the kept edges, under its own name and those of the reference's equivalent backends.
pub(super) const SOFTMAX: &[&str] = &["vit", "softmax", "sparse", "vit_qchunk"];
/// Softmax over the kept edges, computed by PyTorch's FlexAttention instead of by our kernels.
pub(super) const FLEX: &str = "flex";
/// Backends of the reference that are softmax over a mask of their own, whose parameters are the `backend_kwargs`.
pub(super) const MASKS: &[OwnMask] = &[
    OwnMask { name: "fibottention_sparse", mask: "fibottention", defaults: &[], ignored: &[] },
    OwnMask { name: "vit_topk", mask: "topk", defaults: &[("k", 32)], ignored: &[CHUNK_SIZE] },
];

/// A name for softmax over one mask.
#[derive(Debug)]
pub(super) struct OwnMask {
    /// Of the backend.
    pub name: &'static str,
    /// The mask it stands for.
    pub mask: &'static str,
    /// Parameters whose defaults are not those of the mask.
    pub defaults: &'static [(&'static str, i64)],
    /// Keys without effect.
    pub ignored: &'static [&'static str],
}
/// The key that `vit_qchunk` takes without effect: chunking is an implementation detail here.
pub(super) const CHUNK_SIZE: &str = "query_chunk_size";

/// A backend that brings its own attention. Its fields are the `backend_kwargs`.
trait Backend: Serialize + DeserializeOwned + JsonSchema {
    const NAME: &'static str;
    const ABOUT: &'static str;
    /// Keys of the reference system that have no effect here.
    const IGNORED: &'static [&'static str] = &[];

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// softmax_d(q) (softmax_n(k)^T v): queries over their channels, keys over the tokens (Shen et al., 2018, arXiv 1812.01243).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[derive(Default)]
struct Efficient {}

impl Backend for Efficient {
    const NAME: &'static str = "efficient";
    const ABOUT: &'static str = "Efficient Attention: softmax of queries over channels, of keys over tokens";
}

/// Efficient Attention inside blocks of consecutive patches.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
struct EfficientLocal {
    /// Patches in a block; the last block may be shorter.
    #[schemars(range(min = 1))]
    block_size: i64,
    /// Prefix tokens attend to all tokens and are no part of the blocks.
    keep_cls_global: bool,
    /// Over which keys the key softmax runs.
    normalize: Normalize,
}

impl Default for EfficientLocal {
    fn default() -> Self {
        EfficientLocal { block_size: 4, keep_cls_global: true, normalize: Normalize::Reference }
    }
}

/// Over which keys the key softmax of `efficient_local` runs.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Normalize {
    /// Over the whole sequence, as published: the weights of a row do not sum to 1.
    Reference,
    /// Over the block, so that the weights of a row sum to 1.
    Blockwise,
}

impl Backend for EfficientLocal {
    const NAME: &'static str = "efficient_local";
    const ABOUT: &'static str = "Efficient Attention inside blocks of consecutive patches";
    const IGNORED: &'static [&'static str] = &["plot_once"];

    fn check(&self) -> Result<()> {
        check_range("block_size", self.block_size, 1..=i64::MAX)
    }
}

/// softmax(scale q (E_k^T k)^T) (E_v^T v) with trained projections E of the token axis (Wang et al., 2020, arXiv 2006.04768).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
struct Linformer {
    projector: Projector,
}

/// The projections of Linformer.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Projector {
    /// Most tokens of a sequence, prefix included.
    #[schemars(range(min = 1, max = MAX_PROJECTION))]
    max_seq_len: i64,
    /// Keys that are left.
    #[schemars(range(min = 1, max = MAX_PROJECTION))]
    r: i64,
    /// Heads of the layer; null takes what the layer has.
    #[serde(default)]
    #[schemars(range(min = 1, max = super::document::MAX_HEADS))]
    num_heads: Option<i64>,
    /// One projection for all heads.
    #[serde(default = "yes")]
    shared_heads: bool,
    /// One projection for keys and values.
    #[serde(default = "yes")]
    share_kv: bool,
    /// Prefix tokens are kept beside the projected keys instead of being projected.
    #[serde(default = "yes")]
    separate_cls: bool,
}

fn yes() -> bool {
    true
}

/// Largest side of a projection: far beyond any model, small enough to allocate.
const MAX_PROJECTION: i64 = 1 << 24;

impl Backend for Linformer {
    const NAME: &'static str = "linformer";
    const ABOUT: &'static str = "Linformer: keys and values projected to r tokens by trained matrices";

    fn check(&self) -> Result<()> {
        check_range("projector.max_seq_len", self.projector.max_seq_len, 1..=MAX_PROJECTION)?;
        check_range("projector.r", self.projector.r, 1..=MAX_PROJECTION)?;
        self.projector.num_heads.map_or(Ok(()), |heads| {
            check_range("projector.num_heads", heads, 1..=super::document::MAX_HEADS as i64)
        })
    }
}

/// A built-in backend as the loader sees it.
pub(super) struct BuiltIn {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) ignored: &'static [&'static str],
    keys: fn() -> &'static [&'static str],
    /// The parameters, checked and with defaults filled in.
    read: fn(&Value) -> std::result::Result<Value, Broken>,
    pub(super) schema: fn(&mut SchemaGenerator) -> Schema,
}

impl BuiltIn {
    const fn of<B: Backend>() -> Self {
        BuiltIn {
            name: B::NAME,
            about: B::ABOUT,
            ignored: B::IGNORED,
            keys: field_names::<B>,
            read: |value| {
                let backend: B = read_parameters(value)
                    .map_err(|(path, message)| Broken::at(split_path(&path), message))?;
                backend.check()?;
                Ok(serde_json::to_value(&backend).expect("parameters are plain data"))
            },
            schema: B::json_schema,
        }
    }
}

/// All built-in backends besides softmax over edges.
pub(super) static BUILT_IN: &[BuiltIn] =
    &[BuiltIn::of::<Efficient>(), BuiltIn::of::<EfficientLocal>(), BuiltIn::of::<Linformer>()];

/// A backend registered by the user: its parameters, as its signature has them.
#[derive(Debug, Clone, PartialEq)]
pub struct UserBackend {
    /// Lower-case name.
    pub name: String,
    /// One sentence.
    pub about: String,
    /// Parameters in order.
    pub parameters: Vec<Parameter>,
}

/// One keyword of a [`UserBackend`].
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parameter {
    /// Keyword.
    pub name: String,
    /// JSON types that are allowed (`integer`, `number`, `boolean`, `string`, `array`, `object`, `null`); empty for any.
    pub types: Vec<String>,
    /// The value if none is given; `None` makes the parameter required.
    #[serde(default, deserialize_with = "present")]
    pub default: Option<Value>,
}

/// A key that is there, be it null.
fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

static USERS: RwLock<Vec<UserBackend>> = RwLock::new(Vec::new());

/// All backends registered by the user.
pub(super) fn users() -> Vec<UserBackend> {
    USERS.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
}

/// Make `backend` known to configurations.
///
/// # Errors
/// [`Error::Value`] for a name that is taken (by another registration, unless `replace`) or is not lower case.
pub fn register_backend(backend: UserBackend, replace: bool) -> Result<()> {
    let name = &backend.name;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(Error::Value(format!(
            "backend: expected a name of lower-case letters, digits and underscores, got `{name}`"
        )));
    }
    if fixed_names().any(|taken| taken == name) {
        return Err(Error::Value(format!("backend: the name `{name}` belongs to a built-in backend")));
    }
    let mut users = USERS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    match users.iter_mut().find(|user| user.name == *name) {
        Some(user) if replace => *user = backend,
        Some(_) => {
            return Err(Error::Value(format!(
                "backend: the name `{name}` is registered already; replace=True replaces it"
            )));
        }
        None => users.push(backend),
    }
    Ok(())
}

/// Every name that `backend` may have.
pub(super) fn names() -> Vec<String> {
    fixed_names().map(str::to_owned).chain(users().into_iter().map(|user| user.name)).collect()
}

fn fixed_names() -> impl Iterator<Item = &'static str> {
    let own_masks = MASKS.iter().map(|backend| backend.name);
    let built_in = BUILT_IN.iter().map(|backend| backend.name);
    SOFTMAX.iter().copied().chain([FLEX]).chain(own_masks).chain(built_in)
}

/// The canonical name and parameters of a backend that brings its own attention.
pub(super) fn read(
    name: &str,
    mut kwargs: Map<String, Value>,
) -> std::result::Result<(String, Value), Broken> {
    let below = |broken: Broken| broken.below(&["backend_kwargs"]);
    if let Some(backend) = BUILT_IN.iter().find(|backend| backend.name == name) {
        check_keys(&kwargs, (backend.keys)(), backend.ignored).map_err(|error| below(error.into()))?;
        drop_ignored(&mut kwargs, backend.ignored, name);
        let kwargs = (backend.read)(&Value::Object(kwargs)).map_err(below)?;
        return Ok((backend.name.to_owned(), kwargs));
    }
    match users().iter().find(|user| user.name == name) {
        Some(user) => Ok((user.name.clone(), user.read(&kwargs).map_err(below)?)),
        None => {
            let names = names();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            Err(Broken::at(["backend"], unknown_name("backend", name, &names)))
        }
    }
}

/// Take out of `kwargs` what has no effect, and say so in the log.
pub(super) fn drop_ignored(kwargs: &mut Map<String, Value>, ignored: &[&str], owner: &str) {
    for key in ignored {
        if kwargs.shift_remove(*key).is_some() {
            log::debug!("{key} has no effect on `{owner}`");
        }
    }
}

impl UserBackend {
    fn read(&self, kwargs: &Map<String, Value>) -> std::result::Result<Value, Broken> {
        let known: Vec<&str> = self.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        check_keys(kwargs, &known, &[])?;
        let mut read = Map::new();
        for Parameter { name, types, default } in &self.parameters {
            let value = match (kwargs.get(name), default) {
                (Some(value), _) => value,
                (None, Some(default)) => default,
                (None, None) => {
                    return Err(Broken::at([name.as_str()], "missing: it has no default and must be given"));
                }
            };
            if kwargs.contains_key(name) && !types.is_empty() && !types.iter().any(|kind| is_a(value, kind)) {
                let message = format!("expected {}, got {}", types.join(" or "), type_name(value));
                return Err(Broken::at([name.as_str()], message));
            }
            read.insert(name.clone(), value.clone());
        }
        Ok(Value::Object(read))
    }
}

/// Whether `value` has the JSON type `kind`.
fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        _ => false,
    }
}
