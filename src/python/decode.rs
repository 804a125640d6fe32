//! The operators of decoding: attention to a cache, and a cache that new tokens join.

use half::{bf16, f16};
use pyo3::prelude::*;
use tch::Kind;

use super::enter::enter;
use super::error::to_python;
use super::ops::{isa, pool};
use super::tensor::{InPlace, Output, PyTensor, Stored, TensorRef, dtype_name, slice, view};
use crate::error::{Error, Result, unknown_name};
use crate::kernel::{Decode, Element, Run, Slots, Step, Worth};

/// Call a generic method for the dtype of k.
macro_rules! by_dtype {
    ($py:expr, $call:expr) => {
        match $call.k.kind() {
            Kind::Float => $call.run::<f32>($py),
            Kind::Double => $call.run::<f64>($py),
            Kind::BFloat16 => $call.run::<bf16>($py),
            Kind::Half => $call.run::<f16>($py),
            other => Err(to_python(
                $py,
                Error::Dtype(format!(
                    "k: expected torch.float32, torch.float64, torch.bfloat16 or torch.float16, got {}",
                    dtype_name(other)
                )),
            )),
        }
    };
}

/// `out`, `lse` and `weights`, which is empty unless asked for.
#[pyfunction]
#[pyo3(signature = (q, k, v, lengths, causal, needs_weights, scale))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn decode(
    py: Python<'_>,
    q: PyTensor,
    k: PyTensor,
    v: PyTensor,
    lengths: PyTensor,
    causal: bool,
    needs_weights: bool,
    scale: f64,
) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
    let call = DecodeCall {
        q: q.as_ref(),
        k: k.as_ref(),
        v: v.as_ref(),
        lengths: lengths.as_ref(),
        causal,
        needs_weights,
        scale,
    };
    by_dtype!(py, call)
}

struct DecodeCall<'a> {
    q: TensorRef<'a>,
    k: TensorRef<'a>,
    v: TensorRef<'a>,
    lengths: TensorRef<'a>,
    causal: bool,
    needs_weights: bool,
    scale: f64,
}

impl DecodeCall<'_> {
    fn run<T: Element + Stored>(&self, py: Python<'_>) -> PyResult<(PyTensor, PyTensor, PyTensor)>
    where
        T::Acc: Stored,
    {
        let fail = |error| to_python(py, error);
        let [batch, heads, queries, _] = view::<T, 4>("q", &self.q).map_err(fail)?.shape();
        let [_, kv_heads, keys, value_dim] = view::<T, 4>("v", &self.v).map_err(fail)?.shape();
        let mut out = Output::new(&[batch, heads, queries, value_dim], T::KIND)?;
        let mut lse = Output::new(&[batch, heads, queries], Kind::Double)?;
        let of_weights = if self.needs_weights { [batch, kv_heads, keys] } else { [0, 0, 0] };
        let mut weights = Output::new(&of_weights, T::Acc::KIND)?;
        let (pool, isa) = (pool(), isa(py)?);
        let (out_elements, lse_elements) = (out.elements::<T>(), lse.elements::<f64>());
        let weight_elements = self.needs_weights.then(|| weights.elements::<T::Acc>());
        enter(py, |interrupt| {
            let problem = Decode {
                q: view("q", &self.q)?,
                k: view("k", &self.k)?,
                v: view("v", &self.v)?,
                lengths: slice::<i64, 2>("lengths", &self.lengths)?,
                causal: self.causal,
                scale: self.scale,
            };
            let run = Run { pool, isa, interrupt };
            problem.attend(out_elements, lse_elements, weight_elements, &run)
        })?;
        Ok((out.finish(), lse.finish(), weights.finish()))
    }
}

/// `out` and `lse` of tokens that join a cache, which changes in place.
#[pyfunction]
#[pyo3(signature = (
    q, k, v, token_positions, keys, values, positions, worths, lengths, starts, capacities, worth, sinks, recent, scale,
    window=None
))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn cache_step(
    py: Python<'_>,
    q: Option<PyTensor>,
    k: PyTensor,
    v: PyTensor,
    token_positions: PyTensor,
    keys: PyTensor,
    values: PyTensor,
    positions: PyTensor,
    worths: PyTensor,
    lengths: PyTensor,
    starts: PyTensor,
    capacities: PyTensor,
    worth: &str,
    sinks: i64,
    recent: i64,
    scale: f64,
    window: Option<i64>,
) -> PyResult<(PyTensor, PyTensor)> {
    let named = Worth::named(worth)
        .ok_or_else(|| to_python(py, Error::Value(unknown_name("worth", worth, &Worth::NAMES))))?;
    let call = StepCall {
        q: q.as_ref().map(PyTensor::as_ref),
        k: k.as_ref(),
        v: v.as_ref(),
        token_positions: token_positions.as_ref(),
        keys: keys.as_ref(),
        values: values.as_ref(),
        positions: positions.as_ref(),
        worths: worths.as_ref(),
        lengths: lengths.as_ref(),
        starts: starts.as_ref(),
        capacities: capacities.as_ref(),
        worth: named,
        sinks,
        recent,
        scale,
        window,
    };
    by_dtype!(py, call)
}

struct StepCall<'a> {
    q: Option<TensorRef<'a>>,
    k: TensorRef<'a>,
    v: TensorRef<'a>,
    token_positions: TensorRef<'a>,
    keys: TensorRef<'a>,
    values: TensorRef<'a>,
    positions: TensorRef<'a>,
    worths: TensorRef<'a>,
    lengths: TensorRef<'a>,
    starts: TensorRef<'a>,
    capacities: TensorRef<'a>,
    worth: Worth,
    sinks: i64,
    recent: i64,
    scale: f64,
    window: Option<i64>,
}

impl<'a> StepCall<'a> {
    fn run<T: Element + Stored>(&self, py: Python<'_>) -> PyResult<(PyTensor, PyTensor)>
    where
        T::Acc: Stored,
    {
        let fail = |error| to_python(py, error);
        let (out_shape, lse_shape) = match &self.q {
            None => ([0; 4], [0; 3]),
            Some(q) => {
                let [batch, heads, tokens, _] = view::<T, 4>("q", q).map_err(fail)?.shape();
                let [.., value_dim] = view::<T, 4>("v", &self.v).map_err(fail)?.shape();
                ([batch, heads, tokens, value_dim], [batch, heads, tokens])
            }
        };
        let mut out = Output::new(&out_shape, T::KIND)?;
        let mut lse = Output::new(&lse_shape, Kind::Double)?;
        let (pool, isa) = (pool(), isa(py)?);
        let (out_elements, lse_elements) = (out.elements::<T>(), lse.elements::<f64>());
        enter(py, |interrupt| {
            let step = Step {
                q: self.q.as_ref().map(|q| view("q", q)).transpose()?,
                k: view("k", &self.k)?,
                v: view("v", &self.v)?,
                positions: slice::<i64, 2>("token_positions", &self.token_positions)?,
                capacities: slice::<i64, 1>("capacities", &self.capacities)?,
                worth: self.worth,
                sinks: self.sinks,
                recent: self.recent,
                window: self.window,
                scale: self.scale,
            };
            step.run(self.slots::<T>()?, out_elements, lse_elements, &Run { pool, isa, interrupt })
        })?;
        Ok((out.finish(), lse.finish()))
    }

    fn slots<T: Element + Stored>(&self) -> Result<Slots<'a, T>>
    where
        T::Acc: Stored,
    {
        let mut read = vec![
            ("k", self.k),
            ("v", self.v),
            ("token_positions", self.token_positions),
            ("starts", self.starts),
            ("capacities", self.capacities),
        ];
        read.extend(self.q.map(|q| ("q", q)));
        let mut written = InPlace::beside(&read);
        Ok(Slots {
            keys: written.elements::<T, 3>("keys", self.keys)?,
            values: written.elements::<T, 3>("values", self.values)?,
            positions: written.elements::<i64, 2>("positions", self.positions)?,
            worths: written.elements::<T::Acc, 2>("worths", self.worths)?,
            lengths: written.elements::<i64, 2>("lengths", self.lengths)?,
            starts: slice::<i64, 1>("starts", self.starts.tensor())?,
        })
    }
}
