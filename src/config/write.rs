//! A plain tree as YAML text that readers of version 1.1, such as PyYAML, and of version 1.2, such as ours, understand alike.

use std::fmt::Write;

use serde_json::{Number, Value};

/// Longest key that stands before its colon without a mark: readers give up on more than 1024 characters.
const MAX_PLAIN_KEY: usize = 128;

/// The YAML text of `value`.
pub(super) fn write(value: &Value) -> String {
    let mut text = String::new();
    block(&mut text, value, 0);
    text
}

/// Append `value`, whose first line is indented already, up to the end of its last line.
fn block(text: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (index, (key, inner)) in map.iter().enumerate() {
                start_line(text, index, indent);
                let key = string(key);
                if key.len() > MAX_PLAIN_KEY {
                    text.push_str("? ");
                    text.push_str(&key);
                    text.push('\n');
                    start_line(text, 1, indent);
                } else {
                    text.push_str(&key);
                }
                text.push(':');
                match inner {
                    Value::Object(map) if !map.is_empty() => below(text, inner, indent + 2),
                    Value::Array(list) if !list.is_empty() => below(text, inner, indent),
                    _ => {
                        text.push(' ');
                        block(text, inner, indent);
                    }
                }
            }
        }
        Value::Array(list) if !list.is_empty() => {
            for (index, inner) in list.iter().enumerate() {
                start_line(text, index, indent);
                text.push_str("- ");
                block(text, inner, indent + 2);
            }
        }
        _ => {
            text.push_str(&scalar(value));
            text.push('\n');
        }
    }
}

fn start_line(text: &mut String, index: usize, indent: usize) {
    if index > 0 {
        text.extend(std::iter::repeat_n(' ', indent));
    }
}

fn below(text: &mut String, value: &Value, indent: usize) {
    text.push('\n');
    start_line(text, 1, indent);
    block(text, value, indent);
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        Value::Number(value) => number(value),
        // null, true, false, [] and {} are written as in JSON.
        other => other.to_string(),
    }
}

/// Version 1.1 reads `1e-5` and `1.0e5` as text: a float has a point, and its exponent a sign.
fn number(value: &Number) -> String {
    let text = value.to_string();
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    let point = if mantissa.contains('.') { "" } else { ".0" };
    let sign = if exponent.starts_with(['+', '-']) { "" } else { "+" };
    format!("{mantissa}{point}e{sign}{exponent}")
}

/// Quoted unless it is a plain name that no reader takes for something else.
fn string(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    if plain && !is_another_type(text) { text.to_owned() } else { quoted(text) }
}

/// The words that one version or the other reads as a boolean or as null.
fn is_another_type(word: &str) -> bool {
    ["y", "yes", "n", "no", "true", "false", "on", "off", "null"].contains(&word.to_lowercase().as_str())
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            // What YAML does not count as printable, and the line breaks of version 1.1.
            '\u{0}'..='\u{1f}'
            | '\u{7f}'..='\u{9f}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{feff}'
            | '\u{fffe}'
            | '\u{ffff}' => {
                write!(quoted, "\\u{:04X}", u32::from(c)).expect("a string takes everything");
            }
            _ => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
