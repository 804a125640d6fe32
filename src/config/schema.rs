//! JSON Schema (draft 2020-12) of a configuration, made from the types that read it and from the registries, so that a new mask,
//! key or backend is in it without being listed.
//!
//! It knows names, types, closed choices, the ranges of single values, and which mask takes which parameters, inside another mask
//! too, and which parameters exclude each other. Other conditions between several keys, and those between a key and the size of
//! the input, are the loader's.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::backend::{self, BUILT_IN, CHUNK_SIZE, FLEX, SOFTMAX, UserBackend};
use super::document::{Document, MaskedLogits, OnEmptyRow};
use crate::pattern::registry::{self, MASKS, Registered};
use crate::pattern::user;

const DENSE: &str = "none";

/// What schemars calls the entries of `masks`.
const PART: &str = "Part";

/// The schema of every document that [`AttentionConfig::parse`](super::AttentionConfig::parse) may accept, with lower-case names.
pub fn json_schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let mut document = object(Document::json_schema(&mut generator).to_value());
    let mut layer = document.clone();
    let mut definitions = Map::new();
    let of_masks = mask_conditions(&mut generator, &mut definitions);
    let mut conditions = vec![absent("mask", "mask_kwargs")];
    conditions.extend(of_masks.iter().cloned());
    conditions.extend(backend_conditions(&mut generator, &mut definitions));

    // A layer takes what it does not replace from the document: parameters can be judged where it names mask or backend itself.
    let of_layer: Vec<Value> =
        conditions.iter().filter(|c| c.pointer("/if/not").is_none()).cloned().collect();
    document.insert("allOf".into(), conditions.into());
    layer.insert("allOf".into(), of_layer.into());
    for properties in
        [&mut document, &mut layer].map(|schema| schema["properties"].as_object_mut().expect("an object"))
    {
        // The types know these two only as text, and an entry of `layers` only as some mapping.
        for (key, names) in [("mask", with_null(registry::names())), ("backend", with_null(backend::names()))]
        {
            let about = properties[key]["description"].take();
            properties.insert(key.into(), json!({ "description": about, "enum": names }));
        }
    }
    document["properties"]["layers"]["additionalProperties"] = json!({ "$ref": "#/$defs/layer" });
    for fixed in super::FIXED_FOR_ALL_LAYERS {
        layer["properties"].as_object_mut().expect("an object").shift_remove(*fixed);
    }

    definitions.extend(generator.take_definitions(true));
    let part = definitions.get_mut(PART).and_then(Value::as_object_mut).expect("some mask is made of masks");
    part["properties"]["mask"] = json!({ "enum": registry::names() });
    part.insert("allOf".into(), of_masks.into());
    definitions.insert("document".into(), document.into());
    definitions.insert("layer".into(), layer.into());
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparse_mhsa attention configuration",
        "type": "object",
        "if": { "required": ["attention"] },
        "then": { "properties": { "attention": { "$ref": "#/$defs/document" } }, "additionalProperties": false },
        "else": { "$ref": "#/$defs/document" },
        "$defs": definitions,
    });
    bound_integers(&mut schema);
    schema
}

/// Give every integer the bounds of the type that reads it where it has no narrower ones.
fn bound_integers(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            let (low, high) = match map.get("format").and_then(Value::as_str) {
                Some("int64") => (json!(i64::MIN), json!(i64::MAX)),
                Some("uint" | "uint64") => (json!(u64::MIN), json!(u64::MAX)),
                _ => (Value::Null, Value::Null),
            };
            for (key, bound) in [("minimum", low), ("maximum", high)] {
                if !bound.is_null() {
                    map.entry(key).or_insert(bound);
                }
            }
            map.values_mut().for_each(bound_integers);
        }
        Value::Array(list) => list.iter_mut().for_each(bound_integers),
        _ => {}
    }
}

/// The schema of the `mask_kwargs` of one mask, complete in itself. Its description is the definition of the mask.
pub fn mask_schema(mask: &Registered) -> Value {
    let mut generator =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true).into_generator();
    mask_kwargs(mask, &mut generator)
}

fn object(schema: Value) -> Map<String, Value> {
    match schema {
        Value::Object(map) => map,
        other => panic!("the schema of a struct is a mapping, not {other}"),
    }
}

fn with_null<T: Into<Value>>(names: Vec<T>) -> Vec<Value> {
    names.into_iter().map(Into::into).chain([Value::Null]).collect()
}

fn mask_kwargs(mask: &Registered, generator: &mut SchemaGenerator) -> Value {
    closed(mask.schema(generator), mask.ignored)
}

/// Parameters as a mapping without unknown keys; null where nothing is required.
fn closed(schema: Value, ignored: &[&str]) -> Value {
    let mut schema = object(schema);
    if !is_needed(&schema) {
        schema.insert("type".into(), json!(["object", "null"]));
    }
    let properties =
        schema.entry("properties").or_insert_with(|| json!({})).as_object_mut().expect("an object");
    for key in ignored {
        properties.insert((*key).into(), json!({ "description": "Accepted without effect." }));
    }
    schema.insert("additionalProperties".into(), false.into());
    schema.into()
}

/// Whether some parameter has no default.
fn is_needed(parameters: &Map<String, Value>) -> bool {
    ["required", "oneOf", "anyOf"].iter().any(|key| parameters.contains_key(*key))
}

/// "If `key` is one of `names` (or absent), then `section` looks like `definition`."
fn condition(key: &str, names: &[&str], section: &str, definition: &str, parameters: &Value) -> Value {
    let required = if parameters.as_object().is_some_and(is_needed) { json!([section]) } else { json!([]) };
    json!({
        "if": { "required": [key], "properties": { key: { "enum": names } } },
        "then": { "properties": { section: { "$ref": format!("#/$defs/{definition}") } }, "required": required },
    })
}

/// "If `key` is absent or null, then `section` holds nothing."
fn absent(key: &str, section: &str) -> Value {
    json!({
        "if": { "not": { "required": [key], "properties": { key: { "type": "string" } } } },
        "then": { "properties": { section: { "maxProperties": 0 } } },
    })
}

fn mask_conditions(generator: &mut SchemaGenerator, definitions: &mut Map<String, Value>) -> Vec<Value> {
    let mut conditions = Vec::new();
    for mask in MASKS.iter().chain(user::all()) {
        let definition = format!("mask_{}", mask.name);
        let parameters = mask_kwargs(mask, generator);
        let names: Vec<&str> = std::iter::once(mask.name).chain(mask.aliases.iter().copied()).collect();
        conditions.push(condition("mask", &names, "mask_kwargs", &definition, &parameters));
        definitions.insert(definition, parameters);
    }
    conditions
}

fn backend_conditions(generator: &mut SchemaGenerator, definitions: &mut Map<String, Value>) -> Vec<Value> {
    let mut conditions = vec![absent("backend", "backend_kwargs")];
    let mut add = |names: &[&str], parameters: Value, own_attention: bool, only: &[(&str, Value)]| {
        let definition = format!("backend_{}", names[0]);
        let mut entry = condition("backend", names, "backend_kwargs", &definition, &parameters);
        if own_attention {
            let dense = registry::find(DENSE).expect("registered");
            let names = std::iter::once(dense.name).chain(dense.aliases.iter().copied()).collect();
            entry["then"]["properties"]["mask"] = json!({ "enum": with_null(names) });
            entry["then"]["properties"]["mask_kwargs"] = json!({ "maxProperties": 0 });
        }
        for (key, only) in only {
            entry["then"]["properties"][*key] = json!({ "const": only });
        }
        conditions.push(entry);
        definitions.insert(definition, parameters);
    };
    let of_softmax =
        [("masked_logits", json!(MaskedLogits::NegInf)), ("on_empty_row", json!(OnEmptyRow::Zero))];
    let of_edges = [of_softmax.as_slice(), &[("prefix_dense", json!(true))]].concat();
    let (chunked, plain): (Vec<&str>, Vec<&str>) = SOFTMAX.iter().partition(|name| **name == "vit_qchunk");
    add(&plain, closed(json!({}), &[]), false, &[]);
    add(&[FLEX], closed(json!({}), &[]), false, &of_softmax);
    add(&chunked, closed(json!({}), &[CHUNK_SIZE]), false, &[]);
    for own in backend::MASKS {
        let mask = registry::find(own.mask).expect("registered");
        let ignored: Vec<_> = mask.ignored.iter().chain(own.ignored).copied().collect();
        let mut parameters = closed(mask.schema(generator), &ignored);
        for (key, value) in own.defaults {
            parameters["properties"][*key]["default"] = (*value).into();
        }
        add(&[own.name], parameters, true, &[]);
    }
    for backend in BUILT_IN {
        let mut parameters = closed((backend.schema)(generator).to_value(), backend.ignored);
        parameters["title"] = backend.about.into();
        add(&[backend.name], parameters, true, &of_edges);
    }
    for user in backend::users() {
        add(&[&user.name], of_user(&user), true, &of_edges);
    }
    conditions
}

fn of_user(backend: &UserBackend) -> Value {
    let mut properties = Map::new();
    for parameter in &backend.parameters {
        let mut schema = Map::new();
        if !parameter.types.is_empty() {
            schema.insert("type".into(), json!(parameter.types));
        }
        if let Some(default) = &parameter.default {
            schema.insert("default".into(), default.clone());
        }
        properties.insert(parameter.name.clone(), schema.into());
    }
    let required: Vec<_> =
        backend.parameters.iter().filter(|p| p.default.is_none()).map(|p| p.name.as_str()).collect();
    let mut schema = json!({ "title": backend.about, "type": "object", "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    closed(schema, &[])
}
