//! Every mask, one line each. A new mask is a file beside this one, a line here, and a YAML in `configs/attention/`.

use schemars::{Schema, SchemaGenerator};
use serde::de::{Deserializer, Visitor, value::Error as NoData};
use serde_json::{Map, Value};

use super::user::{self, UserMask};
use super::{AnyPattern, Pattern};
use crate::error::{Error, Result, read_parameters, unknown_name};

/// Calls `$then!` with `file::Type` of every mask.
macro_rules! masks {
    ($($then:tt)+) => {
        $($then)+! {
            none::None,
            local::Local,
            strided::Strided,
            strided_columns::StridedColumns,
            block::Block,
            global::Global,
            vertical_slash::VerticalSlash,
            sparse::Sparse,
            longformer::Longformer,
            bigbird::BigBird,
            random::Random,
            pruning::Pruning,
            fibottention::Fibottention,
            crossdiag::CrossDiagonal,
            neighborhood::Neighborhood,
            axial::Axial,
            grid_window::GridWindow,
            space_time::SpaceTime,
            union::Union,
            intersection::Intersection,
            difference::Difference,
            per_head::PerHead,
            topk::TopK,
            block_topk::BlockTopK,
            importance::Importance,
        }
    };
}
pub(super) use masks;

/// Declares the module of every mask.
macro_rules! declare_modules {
    ($($module:ident :: $type:ident),+ $(,)?) => { $(pub mod $module;)+ };
}
pub(super) use declare_modules;

/// Builds the table of registered masks.
macro_rules! declare_table {
    ($($module:ident :: $type:ident),+ $(,)?) => {
        /// All registered masks, in the order of the documentation.
        pub static MASKS: &[Registered] = &[$(Registered::of::<super::$module::$type>()),+];
    };
}
masks!(declare_table);

/// A mask as the configuration loader sees it.
#[derive(Debug)]
pub struct Registered {
    /// Canonical name.
    pub name: &'static str,
    /// Other names.
    pub aliases: &'static [&'static str],
    /// One sentence.
    pub about: &'static str,
    /// Keys that are accepted without effect.
    pub ignored: &'static [&'static str],
    /// Where its edges come from.
    pub origin: Origin,
}

/// Where the edges of a mask come from.
#[derive(Debug)]
pub enum Origin {
    /// A [`Pattern`] of this crate.
    BuiltIn {
        /// The names of its fields.
        keys: fn() -> &'static [&'static str],
        /// JSON Schema of `mask_kwargs` from the types, ranges and comments of the fields.
        schema: fn(&mut SchemaGenerator) -> Schema,
        /// Prefix tokens if nobody says how many there are, see [`Pattern::DEFAULT_PREFIX`].
        default_prefix: Option<usize>,
        /// Those of the keys that set how many pairs are kept, see [`Pattern::BUDGET_KEYS`].
        budget_keys: &'static [&'static [&'static str]],
        /// See [`Pattern::BUDGET_UNORDERED`].
        budget_unordered: &'static [&'static str],
        /// Those of the keys that name files.
        files: &'static [&'static str],
        /// The pattern with given parameters.
        read: fn(&Value) -> std::result::Result<Box<dyn AnyPattern>, ReadError>,
    },
    /// The program, at run time.
    User(UserMask),
}

/// Why `mask_kwargs` could not be read.
#[derive(Debug)]
pub enum ReadError {
    /// A value of the wrong type at this path below `mask_kwargs`.
    Type {
        /// Key path.
        path: String,
        /// serde's words.
        message: String,
    },
    /// A value out of range.
    Range(Error),
}

impl Registered {
    const fn of<P: Pattern>() -> Self {
        Registered {
            name: P::NAME,
            aliases: P::ALIASES,
            about: P::ABOUT,
            ignored: P::IGNORED,
            origin: Origin::BuiltIn {
                keys: field_names::<P>,
                schema: P::json_schema,
                default_prefix: P::DEFAULT_PREFIX,
                budget_keys: P::BUDGET_KEYS,
                budget_unordered: P::BUDGET_UNORDERED,
                files: P::FILES,
                read: |value| {
                    let mut pattern: P = read_parameters(value)
                        .map_err(|(path, message)| ReadError::Type { path, message })?;
                    pattern.resolve().and_then(|()| pattern.check()).map_err(ReadError::Range)?;
                    Ok(Box::new(pattern))
                },
            },
        }
    }

    /// The names allowed in `mask_kwargs`.
    pub fn keys(&'static self) -> &'static [&'static str] {
        match &self.origin {
            Origin::BuiltIn { keys, .. } => keys(),
            Origin::User(mask) => mask.keys,
        }
    }

    /// The keys of `mask_kwargs` that set how many pairs are kept, see [`Pattern::BUDGET_KEYS`]; unknown for a mask of the program.
    pub fn budget_keys(&self) -> &'static [&'static [&'static str]] {
        match &self.origin {
            Origin::BuiltIn { budget_keys, .. } => budget_keys,
            Origin::User(_) => &[],
        }
    }

    /// Those of them of which more may mean fewer pairs, see [`Pattern::BUDGET_UNORDERED`].
    pub fn budget_unordered(&self) -> &'static [&'static str] {
        match &self.origin {
            Origin::BuiltIn { budget_unordered, .. } => budget_unordered,
            Origin::User(_) => &[],
        }
    }

    /// The keys of `mask_kwargs` that name files.
    pub fn files(&self) -> &'static [&'static str] {
        match &self.origin {
            Origin::BuiltIn { files, .. } => files,
            Origin::User(_) => &[],
        }
    }

    /// Prefix tokens if nobody says how many there are; `None` if that depends on its parameters.
    pub fn default_prefix(&self) -> Option<usize> {
        match &self.origin {
            Origin::BuiltIn { default_prefix, .. } => *default_prefix,
            Origin::User(_) => Some(0),
        }
    }

    /// JSON Schema of the `mask_kwargs`.
    pub fn schema(&self, generator: &mut SchemaGenerator) -> Value {
        match &self.origin {
            Origin::BuiltIn { schema, .. } => schema(generator).to_value(),
            Origin::User(mask) => {
                let properties: Map<String, Value> =
                    mask.keys.iter().map(|key| ((*key).to_owned(), Value::Object(Map::new()))).collect();
                let mut schema = serde_json::json!({ "type": "object", "properties": properties });
                if !mask.required.is_empty() {
                    schema["required"] = mask.required.clone().into();
                }
                schema
            }
        }
    }

    /// The pattern with these `mask_kwargs` (a mapping whose keys are known).
    ///
    /// # Errors
    /// [`ReadError`] for a wrong type or a number out of range.
    pub fn read(&'static self, kwargs: &Value) -> std::result::Result<Box<dyn AnyPattern>, ReadError> {
        match &self.origin {
            Origin::BuiltIn { read, .. } => read(kwargs),
            Origin::User(mask) => mask.read(self.name, kwargs),
        }
    }

    /// The pattern with the `mask_kwargs` of a document: unknown keys are refused, keys without effect are dropped.
    ///
    /// # Errors
    /// [`Error::Config`] whose key is the path below `mask_kwargs`.
    pub fn build(&'static self, mut kwargs: Map<String, Value>) -> Result<Box<dyn AnyPattern>> {
        check_keys(&kwargs, self.keys(), self.ignored)?;
        for key in self.ignored {
            if kwargs.shift_remove(*key).is_some() {
                log::debug!("{key} has no effect on the mask `{}`", self.name);
            }
        }
        self.read(&Value::Object(kwargs)).map_err(|error| match error {
            ReadError::Type { path, message } => Error::config(path, message),
            ReadError::Range(error) => error,
        })
    }
}

/// The mask called `name` (canonical or alias, any case).
pub fn find(name: &str) -> Option<&'static Registered> {
    let name = name.to_lowercase();
    let matches = |mask: &&'static Registered| mask.name == name || mask.aliases.contains(&name.as_str());
    MASKS.iter().find(matches).or_else(|| user::all().into_iter().find(matches))
}

/// Canonical names and aliases of all masks, those of the program included.
pub fn names() -> Vec<&'static str> {
    MASKS
        .iter()
        .chain(user::all())
        .flat_map(|mask| std::iter::once(mask.name).chain(mask.aliases.iter().copied()))
        .collect()
}

/// The `oneOf` of a JSON Schema: exactly one of these parameters is given.
pub fn exactly_one_of(names: &[&str]) -> Value {
    let given = |name: &&str| serde_json::json!({ "required": [name], "properties": { *name: { "not": { "type": "null" } } } });
    names.iter().map(given).collect()
}

/// The `anyOf` of a schema: at least one of these parameters is given, is not null, and no empty list.
pub fn at_least_one_of(names: &[&str]) -> Value {
    let given = |name: &&str| serde_json::json!({ "required": [name], "properties": { *name: { "not": { "enum": [null, []] } } } });
    names.iter().map(given).collect()
}

/// Refuse keys of `map` that are neither `allowed` nor `ignored`.
///
/// # Errors
/// [`Error::Config`] at the first such key, with a suggestion.
pub fn check_keys(map: &Map<String, Value>, allowed: &[&str], ignored: &[&str]) -> Result<()> {
    match map.keys().find(|key| !allowed.contains(&key.as_str()) && !ignored.contains(&key.as_str())) {
        Some(key) => {
            let all: Vec<_> = allowed.iter().chain(ignored).copied().collect();
            Err(Error::config(key.as_str(), unknown_name("key", key, &all)))
        }
        None => Ok(()),
    }
}

/// The field names of a struct, asked of serde itself so that no list can go stale.
pub fn field_names<T: serde::de::DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // The deserializer below has no data: it notes the names it is asked for and fails.
    let _ = T::deserialize(FieldNames(&mut names));
    names
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = NoData;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> std::result::Result<V::Value, NoData> {
        *self.0 = fields;
        Err(serde::de::Error::custom("names only"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> std::result::Result<V::Value, NoData> {
        Err(serde::de::Error::custom("names only"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// Require `value` to lie in `range`, or say what is allowed.
pub(crate) fn check_range(key: &str, value: i64, range: std::ops::RangeInclusive<i64>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let allowed = match (*range.start(), *range.end()) {
        (low, i64::MAX) => format!("at least {low}"),
        (low, high) => format!("{low} to {high}"),
    };
    Err(Error::config(key, format!("expected {allowed}, got {value}")))
}
