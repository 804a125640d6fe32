//! YAML text to a plain tree, within limits that hold for hostile input, and the way back from a key to its line.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Longest document accepted, in bytes.
pub const MAX_BYTES: usize = 64 << 10;
/// Most values in a document, counting every expansion of an alias.
pub const MAX_NODES: usize = 8192;
/// Deepest nesting.
pub const MAX_DEPTH: usize = 16;

/// A document that could not be read: what, and where (1-based line and column).
pub(super) type ReadFailure = (String, Option<(usize, usize)>);

/// Read one YAML document. Aliases count as what they expand to, so a small text cannot become a large tree.
pub(super) fn read(text: &str) -> Result<Value, ReadFailure> {
    if text.len() > MAX_BYTES {
        return Err((format!("expected at most {MAX_BYTES} bytes of YAML, got {}", text.len()), None));
    }
    let mut nodes = 0;
    Node { nodes: &mut nodes, depth: 0 }.deserialize(serde_yaml::Deserializer::from_str(text)).map_err(
        |error| {
            let position = error.location().map(|at| (at.line(), at.column()));
            (strip_position(&error.to_string()), position)
        },
    )
}

/// The value at `path`.
pub(super) fn at<'a>(root: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(root, |value, key| match value {
        Value::Array(list) => list.get(key.parse::<usize>().ok()?),
        other => other.get(key),
    })
}

/// Line and column of the key (or list item) at `path`, by reading the text again up to there.
pub(super) fn locate(text: &str, path: &[String]) -> Option<(usize, usize)> {
    let find = |path: &[String]| {
        let found = Probe { path }.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
        found.to_string().contains(FOUND).then(|| found.location().map(|at| (at.line(), at.column())))?
    };
    let mut path = path;
    while let Some((key, parent)) = path.split_last() {
        if let Some(position) = find(path) {
            return Some(position);
        }
        // Parameters that are missing altogether: what needs them stands beside the place where they would.
        if let Some(owner) = key.strip_suffix("_kwargs")
            && let Some(position) = find(&[parent, &[owner.to_owned()]].concat())
        {
            return Some(position);
        }
        // A missing key: the mapping that lacks it is the best place to point at.
        path = parent;
    }
    None
}

/// serde_yaml ends its messages with the position, which we report separately.
fn strip_position(message: &str) -> String {
    let end = message.rfind(" at line ").unwrap_or(message.len());
    message[..end].to_owned()
}

/// One value of the tree, counted against the limits.
struct Node<'a> {
    nodes: &'a mut usize,
    depth: usize,
}

impl Node<'_> {
    fn child(&mut self) -> Node<'_> {
        Node { nodes: self.nodes, depth: self.depth + 1 }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        *self.nodes += 1;
        if *self.nodes > MAX_NODES {
            return Err(serde::de::Error::custom(format!(
                "more than {MAX_NODES} values (aliases count as what they repeat)"
            )));
        }
        if self.depth > MAX_DEPTH {
            return Err(serde::de::Error::custom(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, list, string, number, boolean or null")
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<Value, E> {
        Err(E::custom(format!("the integer {value} does not fit 64 bits")))
    }

    fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<Value, E> {
        Err(E::custom(format!("the integer {value} does not fit 64 bits")))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom(format!("{value} is not a finite number")))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self.child())? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key_seed(NewKey { taken: &map })? {
            let value = entries.next_value_seed(self.child())?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _data: A) -> Result<Value, A::Error> {
        Err(serde::de::Error::custom("YAML tags (`!name`) are not accepted"))
    }
}

/// A key that its mapping does not have yet; failing while it is read is what makes the parser report its own position.
struct NewKey<'a> {
    taken: &'a Map<String, Value>,
}

impl<'de> DeserializeSeed<'de> for NewKey<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for NewKey<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<String, E> {
        match self.taken.contains_key(key) {
            true => Err(E::custom(format!("the key `{key}` is given twice"))),
            false => Ok(key.to_owned()),
        }
    }
}

const FOUND: &str = "(the key that was looked for)";

/// Follows `path` through the text and fails on arrival: the parser then says where that was.
struct Probe<'a> {
    path: &'a [String],
}

impl<'de> DeserializeSeed<'de> for Probe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.path.is_empty() {
            return Err(serde::de::Error::custom(FOUND));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Probe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the way to a key")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let last = self.path.len() == 1;
        while let Some(here) = entries.next_key_seed(KeyProbe { key: &self.path[0], stop: last })? {
            if here {
                return entries.next_value_seed(Probe { path: &self.path[1..] });
            }
            entries.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let wanted: Option<usize> = self.path[0].parse().ok();
        let mut index = 0;
        loop {
            if Some(index) == wanted {
                return items.next_element_seed(Probe { path: &self.path[1..] }).map(|_| ());
            }
            if items.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
            index += 1;
        }
    }
}

/// Says whether a key is the wanted one, and fails on it (to learn its position) if the path ends there.
struct KeyProbe<'a> {
    key: &'a str,
    stop: bool,
}

impl<'de> DeserializeSeed<'de> for KeyProbe<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for KeyProbe<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        match key == self.key {
            true if self.stop => Err(E::custom(FOUND)),
            here => Ok(here),
        }
    }
}
