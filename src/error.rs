//! The one error type of the crate. `src/python/error.rs` maps each variant to a Python exception.

use std::fmt;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Everything that can go wrong outside of Python itself.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration that cannot be honoured.
    #[error("{0}")]
    Config(Box<ConfigError>),
    /// Arguments whose shapes do not fit together; the text names the argument, the expected and the given shape.
    #[error("{0}")]
    Shape(String),
    /// An argument whose data type is not supported or differs from its companions.
    #[error("{0}")]
    Dtype(String),
    /// A tensor on a device that has no kernels.
    #[error("{0}")]
    Device(String),
    /// An argument with the right type and shape but a value out of range.
    #[error("{0}")]
    Value(String),
    /// A size that does not fit the index type.
    #[error("{what} is too large: {size} exceeds {limit}")]
    Overflow {
        /// What was being counted.
        what: &'static str,
        /// The size that was asked for.
        size: u128,
        /// The largest size accepted.
        limit: u128,
    },
    /// What libtorch reports: that memory ran out, or that a device lacks an operator.
    #[error("{0}")]
    Torch(String),
    /// Stopped on request (Ctrl-C) before the result was complete.
    #[error("interrupted")]
    Interrupted,
}

/// A shorthand used throughout the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where and why a configuration cannot be honoured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigError {
    /// File name, or `None` for text and mappings.
    pub source: Option<String>,
    /// 1-based line and column, when the parser knows them.
    pub position: Option<(usize, usize)>,
    /// Dotted path of the key, for example `mask_kwargs.window`; empty for the document itself.
    pub key: String,
    /// What is wrong, what is allowed, and a suggestion where there is one.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}:")?;
            if let Some((line, column)) = self.position {
                write!(f, "{line}:{column}:")?;
            }
            f.write_str(" ")?;
        } else if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

impl Error {
    /// A configuration error at `key`; the loader adds file and position.
    pub fn config(key: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Config(Box::new(ConfigError {
            key: key.into(),
            message: message.into(),
            ..ConfigError::default()
        }))
    }

    /// `what` is more than memory holds: the error for a `try_reserve` that fails.
    pub fn no_room(what: impl fmt::Display) -> Self {
        Error::Value(format!("{what} does not fit in memory"))
    }

    /// The same error with the key of a configuration error moved below `path`.
    #[must_use]
    pub fn below(mut self, path: &str) -> Self {
        if let Error::Config(error) = &mut self {
            error.key = if error.key.is_empty() { path.to_owned() } else { format!("{path}.{}", error.key) };
        }
        self
    }
}

/// The name in `allowed` that a reader most likely meant by `given`, if one is close.
pub fn did_you_mean<'a>(given: &str, allowed: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    allowed
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&given.to_lowercase(), name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min()
        .map(|(_, name)| name)
}

/// `value` as parameters; else the path to what is wrong with them, and why.
pub fn read_parameters<P: DeserializeOwned>(value: &Value) -> std::result::Result<P, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (path, message) = (error.path().to_string(), error.inner().to_string());
        of_serde(&path, &allowed_instead::<P>(value, &path, &message).unwrap_or(message))
    })
}

/// For a value of the wrong type serde names types of Rust. What would be allowed, it says of a name or a mapping in its place.
fn allowed_instead<P: DeserializeOwned>(value: &Value, path: &str, message: &str) -> Option<String> {
    let find = |words: &str, other: Value| message.find(words).map(|end| (end, other));
    let mapping = || Value::Object(Map::new());
    let (end, other) = find("expected string or map", Value::from(""))
        .or_else(|| find("expected variant identifier", Value::from("")))
        .or_else(|| find("expected internally tagged enum", mapping()))
        .or_else(|| find("expected struct", mapping()))?;
    let mut changed = value.clone();
    let pointer = format!("/{}", path.replace(['.', '['], "/").replace(']', ""));
    *changed.pointer_mut(&pointer)? = other;
    let told = serde_path_to_error::deserialize::<_, P>(&changed).err()?.inner().to_string();
    let before = &message[..end];
    match told.find("expected ") {
        Some(names) => Some(format!("{before}{}", &told[names..])),
        None => Some(format!("{before}expected a mapping with `{}`", told.split('`').nth(1)?)),
    }
}

/// What serde says of a mapping at `path`, with the key that it misses or does not know put into the path.
fn of_serde(path: &str, message: &str) -> (String, String) {
    let below = |key: &str| match path {
        "." | "" => key.to_owned(),
        _ if path.rsplit('.').next() == Some(key) => path.to_owned(),
        _ => format!("{path}.{key}"),
    };
    // Names stand between backquotes, the one that is meant first.
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match names.split_first() {
        Some((key, _)) if message.starts_with("missing field") => {
            (below(key), "missing: it has no default and must be given".to_owned())
        }
        Some((key, allowed)) if message.starts_with("unknown field") => {
            (below(key), unknown_name("key", key, allowed))
        }
        _ => (path.to_owned(), in_words(message)),
    }
}

/// A message of serde with the kinds of numbers in words instead of Rust's names for them.
fn in_words(message: &str) -> String {
    let kinds = [
        ("i64", "an integer"),
        ("u64", "an integer of at least 0"),
        ("usize", "an integer of at least 0"),
        ("f64", "a number"),
    ];
    let of_kind = |(kind, words)| {
        let before = message.strip_suffix(kind)?.strip_suffix("expected ")?;
        Some(format!("{before}expected {words}"))
    };
    kinds.into_iter().find_map(of_kind).unwrap_or_else(|| message.to_owned())
}

/// "unknown … `given`: did you mean …? allowed: …", the wording shared by every closed set of names.
pub fn unknown_name(what: &str, given: &str, allowed: &[&str]) -> String {
    let hint = did_you_mean(given, allowed.iter().copied())
        .map(|name| format!(": did you mean `{name}`?"))
        .unwrap_or_else(|| ";".to_owned());
    let list = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
    format!("unknown {what} `{given}`{hint} allowed: {list}")
}
