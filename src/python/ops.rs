//! The operators behind `torch.ops.sparse_mhsa`: tensors to views, dtypes to instances, and outputs back.

use std::sync::Arc;

use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tch::{Device, Kind, Tensor};

use super::aten;
use super::aten::expand_bias;
use super::edge_lists::compressed_rows;
use super::enter::enter;
use super::error::{from_torch, to_python};
use super::tensor::{
    HeadsOutput, Output, PyTensor, Stored, TensorRef, double_tensor, dtype_name, int64_tensor, seed_value,
    slice, view,
};
use crate::attention::{ResolvedMask, resolve, resolve_edge_lists};
use crate::error::{Error, Result, unknown_name};
use crate::kernel::{Attention, Dropout, Element, Gradients, Isa, MaskedLogits, Run};
use crate::pattern::edges::EdgeSet;
use crate::plan::Plan;
use crate::pool::{Interrupt, Pool};

/// What computes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    /// Kernels that read the memory of CPU tensors.
    Cpu,
    /// ATen operators, on any device.
    Aten,
}

impl FromPyObject<'_, '_> for Engine {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match object.extract::<&str>()? {
            "cpu" => Ok(Engine::Cpu),
            "aten" => Ok(Engine::Aten),
            other => Err(PyValueError::new_err(unknown_name("engine", other, &["cpu", "aten"]))),
        }
    }
}

/// Where the edges of a call come from.
#[derive(Clone, Copy)]
enum Edges<'a> {
    Spec(&'a str),
    Lists { row_ptr: TensorRef<'a>, col: TensorRef<'a>, masked_logits: MaskedLogits },
}

impl<'a> Edges<'a> {
    /// With a `background`, visible keys that are not edges keep a logit of 0.
    fn lists(row_ptr: &'a PyTensor, col: &'a PyTensor, background: bool) -> Self {
        let masked_logits = if background { MaskedLogits::Zero } else { MaskedLogits::NegInf };
        Edges::Lists { row_ptr: row_ptr.as_ref(), col: col.as_ref(), masked_logits }
    }

    fn resolve(&self, batch: usize, queries: usize, keys: usize, heads: usize) -> Result<Arc<ResolvedMask>> {
        match self {
            Edges::Spec(text) => resolve(text, queries, keys, heads),
            // One edge set per (batch, head) of an empty batch: there is nothing to attend to, and no list to read.
            Edges::Lists { row_ptr, masked_logits, .. } if batch == 0 && row_ptr.numel() == 0 => {
                let none = EdgeSet::builder(queries, keys)?.build()?;
                Ok(Arc::new(ResolvedMask {
                    plan: Plan::new(&[Arc::new(none)])?,
                    masked_logits: *masked_logits,
                }))
            }
            Edges::Lists { row_ptr, col, masked_logits } => {
                // The lists of a call on another device are read here.
                let (row_ptr, col) = (row_ptr.f_to(Device::Cpu)?, col.f_to(Device::Cpu)?);
                let (row_ptr, col) = (slice::<i64, 2>("row_ptr", &row_ptr)?, slice::<i64, 1>("col", &col)?);
                resolve_edge_lists(row_ptr, col, queries, keys, *masked_logits)
            }
        }
    }
}

/// Call a method of [`Call`] for the dtype of q.
macro_rules! by_dtype {
    ($py:expr, $call:expr, $method:ident($($argument:expr),*)) => {
        match $call.q.kind() {
            Kind::Float => $call.$method::<f32>($($argument),*),
            Kind::Double => $call.$method::<f64>($($argument),*),
            Kind::BFloat16 => $call.$method::<bf16>($($argument),*),
            Kind::Half => $call.$method::<f16>($($argument),*),
            other => Err(to_python($py, Error::Dtype(format!(
                "q: expected torch.float32, torch.float64, torch.bfloat16 or torch.float16, got {}",
                dtype_name(other)
            )))),
        }
    };
}

/// The arguments that every operator shares.
struct Call<'a> {
    q: TensorRef<'a>,
    k: TensorRef<'a>,
    v: TensorRef<'a>,
    edges: Edges<'a>,
    key_mask: Option<TensorRef<'a>>,
    bias: Option<TensorRef<'a>>,
    dropout: Option<Dropout>,
    scale: f64,
}

impl<'a> Call<'a> {
    #[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
    fn new(
        q: &'a PyTensor,
        k: &'a PyTensor,
        v: &'a PyTensor,
        edges: Edges<'a>,
        key_mask: Option<&'a PyTensor>,
        bias: Option<&'a PyTensor>,
        seed: Option<&'a PyTensor>,
        dropout_p: f64,
        scale: f64,
    ) -> PyResult<Self> {
        let dropout = match seed {
            _ if dropout_p == 0.0 => None,
            Some(seed) => Some(Dropout { seed: seed_value(&seed.0)?, p: dropout_p }),
            None => {
                return Err(PyValueError::new_err(format!(
                    "seed: expected a tensor, because dropout_p is {dropout_p}"
                )));
            }
        };
        let (key_mask, bias) = (key_mask.map(PyTensor::as_ref), bias.map(PyTensor::as_ref));
        Ok(Call { q: q.as_ref(), k: k.as_ref(), v: v.as_ref(), edges, key_mask, bias, dropout, scale })
    }

    fn shape<const RANK: usize>(name: &str, tensor: &Tensor) -> PyResult<[usize; RANK]> {
        let size: Vec<usize> = tensor.size().iter().map(|&side| side as usize).collect();
        size.try_into().map_err(|size: Vec<usize>| {
            PyValueError::new_err(format!("{name}: expected {RANK} dimensions, got shape {size:?}"))
        })
    }

    /// Bind the arguments to a plan and hand them to `work`.
    fn attention<T: Element + Stored, R>(
        &self,
        work: impl FnOnce(Attention<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let (q, k, v) = (view("q", &self.q)?, view("k", &self.k)?, view("v", &self.v)?);
        let resolved = self.edges.resolve(q.shape()[0], q.shape()[2], k.shape()[2], q.shape()[1])?;
        let [batch, heads, queries, _] = q.shape();
        let bias =
            self.bias.map(|bias| expand_bias(&bias, [batch, heads, queries, k.shape()[2]])).transpose()?;
        work(Attention {
            plan: &resolved.plan,
            q,
            k,
            v,
            key_mask: self.key_mask.as_ref().map(|mask| view("key_mask", mask)).transpose()?,
            bias: bias.as_ref().map(|bias| view("bias", bias)).transpose()?,
            dropout: self.dropout,
            scale: self.scale,
            masked_logits: resolved.masked_logits,
        })
    }

    /// Bind the arguments to a plan and hand them to `work`, as tensors of any device.
    fn on_any_device<R: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&aten::Arguments<'_>, &dyn Interrupt) -> Result<R> + Send,
    ) -> PyResult<R> {
        let (q, k) = (Self::shape::<4>("q", &self.q)?, Self::shape::<4>("k", &self.k)?);
        enter(py, |interrupt| {
            let resolved = self.edges.resolve(q[0], q[2], k[2], q[1])?;
            let arguments = aten::Arguments {
                resolved: &resolved,
                q: &self.q,
                k: &self.k,
                v: &self.v,
                key_mask: self.key_mask.as_deref(),
                bias: self.bias.as_deref(),
                dropout: self.dropout,
                scale: self.scale,
            };
            work(&arguments, interrupt)
        })
    }

    fn run_forward(&self, py: Python<'_>, engine: Engine) -> PyResult<(PyTensor, PyTensor)> {
        if engine == Engine::Aten {
            let (out, lse) = self.on_any_device(py, aten::forward)?;
            return Ok((PyTensor(out), PyTensor(lse)));
        }
        by_dtype!(py, self, forward(py))
    }

    fn run_backward(
        &self,
        py: Python<'_>,
        engine: Engine,
        [grad_out, out, lse]: [TensorRef<'_>; 3],
    ) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
        if engine == Engine::Aten {
            let gradients = |arguments: &aten::Arguments<'_>, interrupt: &dyn Interrupt| {
                aten::backward(arguments, &grad_out, interrupt)
            };
            let (dq, dk, dv) = self.on_any_device(py, gradients)?;
            return Ok((PyTensor(dq), PyTensor(dk), PyTensor(dv)));
        }
        if matches!(self.q.kind(), Kind::BFloat16 | Kind::Half) {
            return self.backward_widened(py, grad_out);
        }
        by_dtype!(py, self, backward(py, grad_out, out, lse))
    }

    /// The backward pass of half types, in float32 from an output that was never rounded: `delta = dO . O` is a difference of
    /// almost equal numbers where a query has few keys, and half of a rounded output's digits are gone from it.
    fn backward_widened(
        &self,
        py: Python<'_>,
        grad_out: TensorRef<'_>,
    ) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
        let to = |tensor: &Tensor, kind| tensor.f_to_kind(kind).map(PyTensor).map_err(from_torch);
        let (q, k, v) = (to(&self.q, Kind::Float)?, to(&self.k, Kind::Float)?, to(&self.v, Kind::Float)?);
        let bias = self.bias.map(|bias| to(&bias, Kind::Float)).transpose()?;
        let grad_out = to(&grad_out, Kind::Float)?;
        let wide = Call {
            q: q.as_ref(),
            k: k.as_ref(),
            v: v.as_ref(),
            bias: bias.as_ref().map(PyTensor::as_ref),
            edges: self.edges,
            key_mask: self.key_mask,
            dropout: self.dropout,
            scale: self.scale,
        };
        let (out, lse) = wide.forward::<f32>(py)?;
        let (dq, dk, dv) = wide.backward::<f32>(py, grad_out.as_ref(), out.as_ref(), lse.as_ref())?;
        let kind = self.q.kind();
        Ok((to(&dq.0, kind)?, to(&dk.0, kind)?, to(&dv.0, kind)?))
    }

    fn forward<T: Element + Stored>(&self, py: Python<'_>) -> PyResult<(PyTensor, PyTensor)> {
        let [batch, heads, queries, _] = Self::shape("q", &self.q)?;
        let [.., value_dim] = Self::shape::<4>("v", &self.v)?;
        let mut out = HeadsOutput::new([batch, heads, queries, value_dim], T::KIND)?;
        let mut lse = Output::new(&[batch, heads, queries], Kind::Double)?;
        let (pool, isa) = (pool(), isa(py)?);
        let (to_out, to_lse) = (out.heads::<T>("out"), lse.elements::<f64>());
        enter(py, |interrupt| {
            self.attention::<T, _>(|attention| {
                attention.forward(to_out?, to_lse, &Run { pool, isa, interrupt })
            })
        })?;
        Ok((out.finish()?, lse.finish()))
    }

    fn backward<T: Element + Stored>(
        &self,
        py: Python<'_>,
        grad_out: TensorRef<'_>,
        out: TensorRef<'_>,
        lse: TensorRef<'_>,
    ) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
        let like = |name, tensor: TensorRef<'_>| HeadsOutput::new(Self::shape::<4>(name, &tensor)?, T::KIND);
        let (mut dq, mut dk, mut dv) = (like("q", self.q)?, like("k", self.k)?, like("v", self.v)?);
        let (pool, isa) = (pool(), isa(py)?);
        let gradients =
            [("dq", &mut dq), ("dk", &mut dk), ("dv", &mut dv)].map(|(name, to)| to.heads::<T>(name));
        enter(py, |interrupt| {
            self.attention::<T, _>(|attention| {
                let (grad_out, out, lse) =
                    (view("grad_out", &grad_out)?, view("out", &out)?, view("lse", &lse)?);
                let [dq, dk, dv] = gradients;
                let gradients = Gradients { dq: dq?, dk: dk?, dv: dv? };
                attention.backward(grad_out, out, lse, gradients, &Run { pool, isa, interrupt })
            })
        })?;
        Ok((dq.finish()?, dk.finish()?, dv.finish()?))
    }
}

/// As many threads as torch would use here: one inside a DataLoader worker, for example.
pub(super) fn pool() -> Pool {
    Pool::of(usize::try_from(tch::get_num_threads()).unwrap_or(1))
}

pub(super) fn isa(py: Python<'_>) -> PyResult<Isa> {
    Isa::selected().map_err(|error| to_python(py, error))
}

#[pyfunction]
#[pyo3(signature = (engine, q, k, v, spec, key_mask, bias, seed, dropout_p, scale))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn forward(
    py: Python<'_>,
    engine: Engine,
    q: PyTensor,
    k: PyTensor,
    v: PyTensor,
    spec: &str,
    key_mask: Option<PyTensor>,
    bias: Option<PyTensor>,
    seed: Option<PyTensor>,
    dropout_p: f64,
    scale: f64,
) -> PyResult<(PyTensor, PyTensor)> {
    let (key_mask, bias, seed) = (key_mask.as_ref(), bias.as_ref(), seed.as_ref());
    let call = Call::new(&q, &k, &v, Edges::Spec(spec), key_mask, bias, seed, dropout_p, scale)?;
    call.run_forward(py, engine)
}

#[pyfunction]
#[pyo3(signature = (engine, grad_out, q, k, v, out, lse, spec, key_mask, bias, seed, dropout_p, scale))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn backward(
    py: Python<'_>,
    engine: Engine,
    grad_out: PyTensor,
    q: PyTensor,
    k: PyTensor,
    v: PyTensor,
    out: PyTensor,
    lse: PyTensor,
    spec: &str,
    key_mask: Option<PyTensor>,
    bias: Option<PyTensor>,
    seed: Option<PyTensor>,
    dropout_p: f64,
    scale: f64,
) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
    let (key_mask, bias, seed) = (key_mask.as_ref(), bias.as_ref(), seed.as_ref());
    let call = Call::new(&q, &k, &v, Edges::Spec(spec), key_mask, bias, seed, dropout_p, scale)?;
    call.run_backward(py, engine, [grad_out.as_ref(), out.as_ref(), lse.as_ref()])
}

#[pyfunction]
#[pyo3(signature = (engine, q, k, v, row_ptr, col, key_mask, bias, seed, dropout_p, scale, background = false))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn forward_edges(
    py: Python<'_>,
    engine: Engine,
    q: PyTensor,
    k: PyTensor,
    v: PyTensor,
    row_ptr: PyTensor,
    col: PyTensor,
    key_mask: Option<PyTensor>,
    bias: Option<PyTensor>,
    seed: Option<PyTensor>,
    dropout_p: f64,
    scale: f64,
    background: bool,
) -> PyResult<(PyTensor, PyTensor)> {
    let edges = Edges::lists(&row_ptr, &col, background);
    let (key_mask, bias, seed) = (key_mask.as_ref(), bias.as_ref(), seed.as_ref());
    let call = Call::new(&q, &k, &v, edges, key_mask, bias, seed, dropout_p, scale)?;
    call.run_forward(py, engine)
}

#[pyfunction]
#[pyo3(signature = (engine, grad_out, q, k, v, out, lse, row_ptr, col, key_mask, bias, seed, dropout_p, scale, background = false))]
#[expect(clippy::too_many_arguments, reason = "the operator schema has this many")]
pub(super) fn backward_edges(
    py: Python<'_>,
    engine: Engine,
    grad_out: PyTensor,
    q: PyTensor,
    k: PyTensor,
    v: PyTensor,
    out: PyTensor,
    lse: PyTensor,
    row_ptr: PyTensor,
    col: PyTensor,
    key_mask: Option<PyTensor>,
    bias: Option<PyTensor>,
    seed: Option<PyTensor>,
    dropout_p: f64,
    scale: f64,
    background: bool,
) -> PyResult<(PyTensor, PyTensor, PyTensor)> {
    let edges = Edges::lists(&row_ptr, &col, background);
    let (key_mask, bias, seed) = (key_mask.as_ref(), bias.as_ref(), seed.as_ref());
    let call = Call::new(&q, &k, &v, edges, key_mask, bias, seed, dropout_p, scale)?;
    call.run_backward(py, engine, [grad_out.as_ref(), out.as_ref(), lse.as_ref()])
}

/// `row_ptr` (H, N + 1) with absolute offsets into `col`.
#[pyfunction]
pub(super) fn edge_index(
    py: Python<'_>,
    spec: &str,
    num_queries: usize,
    num_keys: usize,
) -> PyResult<(PyTensor, PyTensor)> {
    let (heads, row_ptr, col) = enter(py, |_| {
        let heads = crate::config::Spec::from_text(spec)?.heads;
        let resolved = resolve(spec, num_queries, num_keys, heads)?;
        let sets = (0..heads).map(|head| resolved.plan.head(0, head, heads).by_query());
        let (row_ptr, col) = compressed_rows("edge_index", sets)?;
        Ok((heads, row_ptr, col))
    })?;
    let row_ptr = int64_tensor(&row_ptr, &[heads as i64, num_queries as i64 + 1])?;
    Ok((row_ptr, int64_tensor(&col, &[col.len() as i64])?))
}

/// The factor, 0 or 1 / (1 - p), that the kernels apply to each edge: (batch, edges of all heads).
#[pyfunction]
pub(super) fn dropout_keep(
    py: Python<'_>,
    row_ptr: PyTensor,
    col: PyTensor,
    batch: usize,
    num_heads: usize,
    seed: PyTensor,
    dropout_p: f64,
) -> PyResult<PyTensor> {
    let dropout = Dropout { seed: seed_value(&seed.0)?, p: dropout_p };
    let (row_ptr, col, edges) = (row_ptr.as_ref(), col.as_ref(), col.0.numel());
    let factors = enter(py, |_| {
        let (row_ptr, col) = (slice::<i64, 2>("row_ptr", &row_ptr)?, slice::<i64, 1>("col", &col)?);
        if num_heads == 0 || row_ptr.len() % num_heads != 0 || row_ptr.len() < num_heads {
            let got = row_ptr.len();
            return Err(Error::Shape(format!(
                "row_ptr: expected one row for each of {num_heads} heads, got {got} entries"
            )));
        }
        let rows = row_ptr.len() / num_heads - 1;
        // Checks the lists, so that the loop below cannot leave them.
        let keys = col.iter().max().map_or(0, |&last| last.max(0) as usize + 1);
        resolve_edge_lists(row_ptr, col, rows, keys, MaskedLogits::NegInf)?;
        let mut factors = Vec::with_capacity(batch * edges);
        for unit in 0..batch * num_heads {
            let pointers = &row_ptr[unit % num_heads * (rows + 1)..][..rows + 1];
            for (row, span) in pointers.windows(2).enumerate() {
                let columns = &col[span[0] as usize..span[1] as usize];
                factors.extend(columns.iter().map(|&c| dropout.factor(unit as u64, row, c as usize)));
            }
        }
        Ok(factors)
    })?;
    double_tensor(&factors, &[batch as i64, edges as i64])
}
