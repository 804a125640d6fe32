//! Sliding window, dilated or causal, with a width that may change from layer to layer.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::edges::EdgeSet;
use super::registry::{check_range, exactly_one_of};
use super::{Context, HeadEdges, Pattern};
use crate::error::{Error, Result};

/// Query i keeps key j if |i - j| <= window * dilation and dilation divides i - j.
///
/// With `causal` also j <= i; i = j only with `include_self`. Exactly one of `window` (half width), `window_size` (odd total
/// width) and `window_schedule` (half width by layer) is given.
///
/// Source: local attention, Parmar et al., 2018 (arXiv 1802.05751); dilated as in Longformer, Beltagy et al., 2020 (arXiv 2004.05150).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("oneOf" = exactly_one_of(&["window", "window_size", "window_schedule"])))]
pub struct Local {
    /// Half width: keys on each side.
    #[schemars(range(min = 0, max = MAX_WINDOW))]
    window: Option<i64>,
    /// Odd total width, 2 * window + 1.
    #[schemars(range(min = 1), extend("not" = { "type": "integer", "multipleOf": 2 }))]
    window_size: Option<i64>,
    /// Distance between neighbouring keys of the window.
    #[schemars(range(min = 1, max = MAX_WINDOW))]
    dilation: i64,
    /// Only j <= i.
    causal: bool,
    /// A query keeps its own key.
    include_self: bool,
    /// Half width by layer: `{kind: list, values}`, or `{kind: linear, start, end}` and `geometric` likewise.
    window_schedule: Option<WindowSchedule>,
}

impl Default for Local {
    fn default() -> Self {
        Local {
            window: None,
            window_size: None,
            dilation: 1,
            causal: false,
            include_self: true,
            window_schedule: None,
        }
    }
}

/// Half width as a function of the layer.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum WindowSchedule {
    /// One half width per layer.
    List {
        #[schemars(length(min = 1), inner(range(min = 0, max = MAX_WINDOW)))]
        values: Vec<i64>,
    },
    /// From `start` at the first layer to `end` at the last in equal steps, rounded (halves to even, as Python rounds).
    Linear {
        #[schemars(range(min = 0, max = MAX_WINDOW))]
        start: i64,
        #[schemars(range(min = 0, max = MAX_WINDOW))]
        end: i64,
    },
    /// From `start` to `end` in equal ratios, rounded likewise.
    Geometric {
        #[schemars(range(min = 1, max = MAX_WINDOW))]
        start: i64,
        #[schemars(range(min = 1, max = MAX_WINDOW))]
        end: i64,
    },
}

/// Half widths beyond this can mean nothing at any size accepted.
const MAX_WINDOW: i64 = 1 << 40;

impl WindowSchedule {
    fn check(&self) -> Result<()> {
        let (values, least): (&[i64], i64) = match self {
            WindowSchedule::List { values } if values.is_empty() => {
                return Err(Error::config(
                    "window_schedule.values",
                    "expected one half width per layer, got an empty list",
                ));
            }
            WindowSchedule::List { values } => (values, 0),
            WindowSchedule::Linear { start, end } => (&[*start, *end], 0),
            WindowSchedule::Geometric { start, end } => (&[*start, *end], 1),
        };
        values.iter().try_for_each(|&value| check_range("window_schedule", value, least..=MAX_WINDOW))
    }

    fn window(&self, context: &Context) -> Result<i64> {
        let Context { layer, num_layers, .. } = *context;
        let outside = |layers: usize| {
            Err(Error::config(
                "window_schedule",
                format!("has windows for {layers} layers, but this is layer {layer} (from 0)"),
            ))
        };
        let share = || match num_layers {
            None => Err(Error::config("window_schedule", "a linear or geometric schedule needs num_layers")),
            Some(layers) if layer >= layers => outside(layers).map(|_: i64| 0.0),
            Some(1) => Ok(0.0),
            Some(layers) => Ok(layer as f64 / (layers - 1) as f64),
        };
        match self {
            WindowSchedule::List { values } => {
                values.get(layer).copied().map_or_else(|| outside(values.len()), Ok)
            }
            WindowSchedule::Linear { start, end } => {
                Ok((*start as f64 + (end - start) as f64 * share()?).round_ties_even() as i64)
            }
            WindowSchedule::Geometric { start, end } => {
                Ok((*start as f64 * (*end as f64 / *start as f64).powf(share()?)).round_ties_even() as i64)
            }
        }
    }
}

/// The half width meant by an odd total width.
pub(super) fn half_width(key: &str, window_size: i64) -> Result<i64> {
    if window_size < 1 || window_size % 2 == 0 {
        return Err(Error::config(
            key,
            format!("expected an odd total width (2 * window + 1), got {window_size}"),
        ));
    }
    Ok(window_size / 2)
}

impl Pattern for Local {
    const NAME: &'static str = "local";
    const ABOUT: &'static str =
        "sliding window over patches, optionally dilated or causal, with a width by layer";
    const BUDGET_KEYS: &'static [&'static [&'static str]] = &[&["window", "window_size"]];

    fn check(&self) -> Result<()> {
        let given = [self.window.is_some(), self.window_size.is_some(), self.window_schedule.is_some()];
        if given.into_iter().filter(|given| *given).count() != 1 {
            let message = "give exactly one of window (half width), window_size (odd total width), window_schedule (by layer)";
            return Err(Error::config("", message));
        }
        check_range("dilation", self.dilation, 1..=MAX_WINDOW)?;
        if let Some(window) = self.window {
            check_range("window", window, 0..=MAX_WINDOW)?;
        }
        if let Some(size) = self.window_size {
            half_width("window_size", size)?;
        }
        self.window_schedule.as_ref().map_or(Ok(()), WindowSchedule::check)
    }

    fn uses_layer(&self) -> bool {
        self.window_schedule.is_some()
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let n = context.num_tokens;
        let window = match (&self.window_schedule, self.window_size) {
            (Some(schedule), _) => schedule.window(context)?,
            (None, Some(size)) => half_width("window_size", size)?,
            (None, None) => self.window.unwrap_or_default(),
        };
        let reach = window.saturating_mul(self.dilation);
        let mut builder = EdgeSet::builder(n, n)?;
        let step = self.dilation as usize;
        builder = builder.band((-reach, -self.dilation, step), 0..n, 0..n);
        if self.include_self {
            builder = builder.diagonal(0, 0..n, 0..n);
        }
        if !self.causal {
            builder = builder.band((self.dilation, reach, step), 0..n, 0..n);
        }
        Ok(vec![Arc::new(builder.build()?)])
    }
}
