//! The operator that turns the content of queries and keys into edge lists.

use half::{bf16, f16};
use pyo3::prelude::*;
use tch::Kind;

use super::enter::enter;
use super::error::to_python;
use super::ops::{isa, pool};
use super::tensor::{Output, PyTensor, Stored, TensorRef, dtype_name, view};
use crate::attention::selection::{Content, Rule};
use crate::config::Spec;
use crate::error::{Error, Result};
use crate::kernel::{Element, Run};
use crate::pattern::tried_out;

/// `(a, b)` such that a head of N tokens has at most `N * (min(a, N) + b)` edges, or None for a mask that does not choose by content.
#[pyfunction]
pub(super) fn selection_room(py: Python<'_>, spec: &str) -> PyResult<Option<(usize, usize)>> {
    enter(py, |_| Ok(Rule::of(&Spec::from_text(spec)?)?.map(|rule| rule.room())))
}

/// Edges and patch-to-patch edges of each head; of a mask that chooses by content, how many are expected.
#[pyfunction]
pub(super) fn count_edges(py: Python<'_>, spec: &str, num_tokens: usize) -> PyResult<Vec<(f64, f64)>> {
    enter(py, |_| {
        let spec = Spec::from_text(spec)?;
        if let Some(rule) = Rule::of(&spec)? {
            return rule.expected_edges(num_tokens, spec.heads);
        }
        let counts = tried_out(|| spec.counts(num_tokens))?;
        Ok(counts.into_iter().map(|count| (count.all as f64, count.patches as f64)).collect())
    })
}

/// `row_ptr` (B x H, N + 1) and `col`, whose end is -1 where fewer edges were chosen than there is room for.
#[pyfunction]
#[pyo3(signature = (q, k, spec, key_mask, bias, importance, scale))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn select_edges(
    py: Python<'_>,
    q: PyTensor,
    k: PyTensor,
    spec: &str,
    key_mask: Option<PyTensor>,
    bias: Option<PyTensor>,
    importance: Option<PyTensor>,
    scale: f64,
) -> PyResult<(PyTensor, PyTensor)> {
    let call = Call {
        q: q.as_ref(),
        k: k.as_ref(),
        spec,
        key_mask: key_mask.as_ref().map(PyTensor::as_ref),
        bias: bias.as_ref().map(PyTensor::as_ref),
        importance: importance.as_ref().map(PyTensor::as_ref),
        scale,
    };
    match q.0.kind() {
        Kind::Float => call.run::<f32>(py),
        Kind::Double => call.run::<f64>(py),
        Kind::BFloat16 => call.run::<bf16>(py),
        Kind::Half => call.run::<f16>(py),
        other => Err(to_python(
            py,
            Error::Dtype(format!(
                "q: expected torch.float32, torch.float64, torch.bfloat16 or torch.float16, got {}",
                dtype_name(other)
            )),
        )),
    }
}

struct Call<'a> {
    q: TensorRef<'a>,
    k: TensorRef<'a>,
    spec: &'a str,
    key_mask: Option<TensorRef<'a>>,
    bias: Option<TensorRef<'a>>,
    importance: Option<TensorRef<'a>>,
    scale: f64,
}

impl Call<'_> {
    fn run<T: Element + Stored>(&self, py: Python<'_>) -> PyResult<(PyTensor, PyTensor)> {
        let (isa, pool) = (isa(py)?, pool());
        let (units, queries, room, lists) = enter(py, |interrupt| {
            let [batch, heads, queries, _] = view::<T, 4>("q", &self.q)?.shape();
            let rule = Rule::of(&Spec::from_text(self.spec)?)?;
            let rule = rule.ok_or_else(|| {
                Error::Value(
                    "spec: this mask does not choose by content; its edges are known without it".into(),
                )
            })?;
            let lists = self.with_content::<T, _>([batch, heads, queries], |content| {
                rule.edges(content, &Run { pool, isa, interrupt })
            })?;
            let (chosen, dense) = rule.room();
            let per_query = chosen.min(queries).checked_add(dense);
            let room = per_query.and_then(|room| room.checked_mul(batch * heads * queries));
            let room = room.ok_or(Error::Overflow {
                what: "number of edges",
                size: u128::MAX,
                limit: usize::MAX as u128,
            })?;
            Ok((batch * heads, queries, room, lists))
        })?;
        let mut row_ptr = Output::new(&[units, queries + 1], Kind::Int64)?;
        row_ptr.elements::<i64>().copy_from_slice(&lists.row_ptr);
        let mut col = Output::new(&[room], Kind::Int64)?;
        let (used, unused) = col.elements::<i64>().split_at_mut(lists.col.len());
        used.copy_from_slice(&lists.col);
        unused.fill(-1);
        Ok((row_ptr.finish(), col.finish()))
    }

    fn with_content<T: Element + Stored, R>(
        &self,
        [batch, heads, queries]: [usize; 3],
        work: impl FnOnce(&Content<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let size = [batch, heads, queries, self.k.size().get(2).map_or(0, |&keys| keys as usize)];
        let size = size.map(|side| side as i64);
        // Broadcasting is a matter of strides: an expanded view costs nothing.
        let bias = self.bias.map(|bias| {
            bias.f_expand(size, false).map_err(|_| {
                let got = bias.size();
                Error::Shape(format!("bias: expected a shape that broadcasts to {size:?}, got {got:?}"))
            })
        });
        let bias = bias.transpose()?;
        work(&Content {
            q: view("q", &self.q)?,
            k: view("k", &self.k)?,
            key_mask: self.key_mask.as_ref().map(|mask| view("key_mask", mask)).transpose()?,
            bias: bias.as_ref().map(|bias| view("bias", bias)).transpose()?,
            importance: self.importance.as_ref().map(|given| view("importance", given)).transpose()?,
            scale: self.scale,
        })
    }
}
