//! One problem as flat tensors, and what the passes over its edges share.

use tch::{Device, Kind, Tensor};

use super::bias::Bias;
use super::groups::{By, Entries, Group, Rows, groups};
use super::{Arguments, Step};
use crate::error::{Error, Result};
use crate::kernel::{Dropout, MaskedLogits, Shapes, Sizes};
use crate::plan::Plan;
use crate::pool::Interrupt;
use crate::python::tensor::{check_strided, dtype_name};

/// Bytes of the largest temporary tensor, of which a handful exist at a time.
const CHUNK_BYTES: usize = 16 << 20;

/// Tensors of `samples` that share their edges, heads and tokens in one axis.
pub(super) struct Problem<'a> {
    plan: &'a Plan,
    pub sizes: Sizes,
    /// (samples, heads * N, D)
    pub q: Tensor,
    /// (samples, kv heads * S, D)
    pub k: Tensor,
    /// (samples, kv heads * S, Dv)
    pub v: Tensor,
    /// (samples, kv heads * S) bool, True = keep.
    pub key_mask: Option<Tensor>,
    bias: Option<Bias>,
    dropout: Option<Dropout>,
    pub scale: f64,
    pub background: bool,
    /// In what scores and sums are computed.
    pub accumulator: Kind,
    shared: bool,
}

/// The edges of one group of rows on the device.
pub(super) struct Edges {
    /// (rows)
    pub rows: Tensor,
    /// (rows, width)
    pub others: Tensor,
    /// (1, rows, width) bool: padding, where there is any.
    absent: Option<Tensor>,
    /// (rows, width)
    bias_places: Option<Tensor>,
    /// (samples, rows, width)
    pub dropout: Option<Tensor>,
}

/// Scores of a group: (samples, rows, width), -inf where excluded.
pub(super) struct Scores {
    pub values: Tensor,
    /// Padding and keys that `key_mask` drops: nothing of them is used.
    pub hidden: Option<Tensor>,
    /// These, and edges that a bias of -inf removes.
    pub excluded: Option<Tensor>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(arguments: &Arguments<'a>) -> Result<Self> {
        let Arguments { resolved, q, k, v, key_mask, bias, dropout, scale } = *arguments;
        let (plan, kind) = (&resolved.plan, q.kind());
        let background = resolved.masked_logits == MaskedLogits::Zero;
        let accumulator = match kind {
            Kind::Double => Kind::Double,
            // As in the kernels: what is kept is taken from the sum of all, and what is left may be little.
            Kind::Float | Kind::BFloat16 | Kind::Half
                if background && (key_mask.is_some() || plan.keeps_most()) && q.device() != Device::Mps =>
            {
                Kind::Double
            }
            Kind::Float | Kind::BFloat16 | Kind::Half => Kind::Float,
            other => {
                return Err(Error::Dtype(format!(
                    "q: expected torch.float32, torch.float64, torch.bfloat16 or torch.float16, got {}",
                    dtype_name(other)
                )));
            }
        };
        let (q_shape, k_shape, v_shape) =
            (check_strided("q", q, kind)?, check_strided("k", k, kind)?, check_strided("v", v, kind)?);
        let key_mask_shape = key_mask.map(|mask| check_strided("key_mask", mask, Kind::Bool)).transpose()?;
        let full = [q_shape[0], q_shape[1], q_shape[2], k_shape[2]];
        let bias = bias.map(|bias| super::expand_bias(bias, full)).transpose()?;
        let bias_shape = bias.as_ref().map(|bias| check_strided::<4>("bias", bias, kind)).transpose()?;
        let shapes =
            Shapes { q: q_shape, k: k_shape, v: v_shape, key_mask: key_mask_shape, bias: bias_shape };
        let sizes = shapes.check(plan, dropout.as_ref(), resolved.masked_logits)?;

        let shared = plan.num_sets() == 1 || plan.num_sets() == sizes.heads;
        let samples = if shared { sizes.batch } else { 1 } as i64;
        let rows = |heads: usize, tokens: usize| (sizes.batch * heads * tokens) as i64 / samples.max(1);
        let (queries, keys) = (rows(sizes.heads, sizes.queries), rows(sizes.kv_heads, sizes.keys));
        let flat = |tensor: &Tensor, rows: i64, width: usize| tensor.f_reshape([samples, rows, width as i64]);
        let [batch, kv_heads, num_keys] = [sizes.batch, sizes.kv_heads, sizes.keys].map(|side| side as i64);
        Ok(Problem {
            plan,
            sizes,
            q: flat(q, queries, sizes.dim)?,
            k: flat(k, keys, sizes.dim)?,
            v: flat(v, keys, sizes.value_dim)?,
            key_mask: key_mask
                .map(|mask| {
                    let of_heads = mask.f_unsqueeze(1)?.f_expand([batch, kv_heads, num_keys], false)?;
                    of_heads.f_reshape([samples, keys])
                })
                .transpose()?,
            bias: bias.map(|bias| Bias::new(&bias, shared)).transpose()?,
            dropout: dropout.filter(|dropout| dropout.p > 0.0),
            scale,
            background,
            accumulator,
            shared,
        })
    }

    /// `tensor` (B, H, N, width) as (samples, heads * N, width).
    pub(super) fn of_queries(&self, name: &str, tensor: &Tensor, width: usize) -> Result<Tensor> {
        let expected = [self.sizes.batch, self.sizes.heads, self.sizes.queries, width];
        if check_strided(name, tensor, self.q.kind())? != expected {
            return Err(Error::Shape(format!(
                "{name}: expected shape {expected:?}, got {:?}",
                tensor.size()
            )));
        }
        let size = self.q.size();
        Ok(tensor.f_reshape([size[0], size[1], width as i64])?)
    }

    /// A new tensor where the problem's are. (By shape alone: not every device has a name that could be asked for.)
    pub(super) fn full(&self, shape: &[i64], value: f64, kind: Kind) -> Result<Tensor> {
        let one = self.here(Tensor::f_from_slice(&[value])?.f_to_kind(kind)?)?;
        Ok(one.f_reshape(vec![1; shape.len()])?.f_repeat(shape)?)
    }

    /// A host tensor, moved to where the problem's tensors are.
    fn here(&self, tensor: Tensor) -> Result<Tensor> {
        let neighbour = self.q.f_narrow(0, 0, 0)?.f_to_kind(tensor.kind())?;
        Ok(tensor.f_to_other(&neighbour, false, false)?)
    }

    fn indices(&self, values: &[i64], shape: &[i64]) -> Result<Tensor> {
        self.here(Tensor::f_from_slice(values)?.f_reshape(shape)?)
    }

    /// Do `work` for the rows of one kind, group by group.
    pub(super) fn for_each_group(
        &self,
        by: By,
        interrupt: &dyn Interrupt,
        mut work: impl FnMut(&Edges) -> Result<()>,
    ) -> Result<()> {
        let rows =
            Rows { plan: self.plan, sizes: self.sizes, shared: self.shared, by, with_empty: self.background };
        let order = rows.by_degree();
        for group in groups(&order, self.edges_per_chunk()) {
            if interrupt.poll() {
                return Err(Error::Interrupted);
            }
            let Group { range, width } = group;
            let entries = rows.entries(&order[range], width, self.bias.as_ref(), self.dropout.as_ref());
            work(&self.upload(&entries, width as i64)?)?;
        }
        Ok(())
    }

    fn edges_per_chunk(&self) -> usize {
        let samples = if self.shared { self.sizes.batch } else { 1 };
        let bytes = if self.accumulator == Kind::Double { 8 } else { 4 };
        (CHUNK_BYTES / (bytes * samples.max(1) * self.sizes.dim.max(self.sizes.value_dim))).max(1)
    }

    fn upload(&self, entries: &Entries, width: i64) -> Result<Edges> {
        let rows = entries.rows.len() as i64;
        let of_edges = |values: &[i64]| self.indices(values, &[rows, width]);
        let absent = if entries.degrees.is_empty() {
            None
        } else {
            let places = self.indices(&(0..width).collect::<Vec<_>>(), &[1, 1, width])?;
            Some(places.f_ge_tensor(&self.indices(&entries.degrees, &[1, rows, 1])?)?)
        };
        let dropout = if self.dropout.is_none() {
            None
        } else {
            let factors = Tensor::f_from_slice(&entries.dropout)?.f_to_kind(self.accumulator)?;
            Some(self.here(factors.f_reshape([-1, rows, width])?)?)
        };
        Ok(Edges {
            rows: self.indices(&entries.rows, &[rows])?,
            others: of_edges(&entries.others)?,
            absent,
            bias_places: self.bias.as_ref().map(|_| of_edges(&entries.bias)).transpose()?,
            dropout,
        })
    }

    /// The rows of a group, (samples, rows, 1, width), to be multiplied by what their edges lead to.
    pub(super) fn at_rows(&self, flat: &Tensor, edges: &Edges) -> Result<Tensor> {
        Ok(flat.f_index_select(1, &edges.rows)?.f_to_kind(self.accumulator)?.f_unsqueeze(2)?)
    }

    /// The columns of a group in pieces whose gathered vectors fit in a chunk; only a row that is a group of its own has several.
    pub(super) fn steps(&self, edges: &Edges) -> impl Iterator<Item = Step> + use<> {
        let size = edges.others.size();
        let limit = (self.edges_per_chunk() as i64 / size[0].max(1)).max(1);
        let width = size[1];
        (0..width).step_by(limit as usize).map(move |start| Step { start, len: limit.min(width - start) })
    }

    /// What the other ends of a piece of edges hold, (samples, rows, piece, width), zero where `unused`.
    pub(super) fn gather(
        &self,
        flat: &Tensor,
        edges: &Edges,
        step: Step,
        unused: Option<&Tensor>,
    ) -> Result<Tensor> {
        let others = step.of(&edges.others)?;
        let size = others.size();
        let gathered = flat.f_index_select(1, &others.f_reshape(-1)?)?.f_to_kind(self.accumulator)?;
        let mut gathered = gathered.f_view([-1, size[0], size[1], flat.size()[2]])?;
        if let Some(unused) = unused {
            gathered = gathered.f_masked_fill_(&step.of(unused)?.f_unsqueeze(3)?, 0.0)?;
        }
        Ok(gathered)
    }

    /// One number per row at the other end of each edge: (samples, rows, width).
    pub(super) fn gather_numbers(&self, flat: &Tensor, edges: &Edges) -> Result<Tensor> {
        let size = edges.others.size();
        let gathered = flat.f_index_select(1, &edges.others.f_reshape(-1)?)?;
        Ok(gathered.f_view([-1, size[0], size[1]])?)
    }

    /// Dot products of `rows` (from [`Self::at_rows`]) with what their edges lead to in `flat`.
    pub(super) fn dots(
        &self,
        rows: &Tensor,
        flat: &Tensor,
        edges: &Edges,
        unused: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut parts = Vec::new();
        for step in self.steps(edges) {
            let mut products = self.gather(flat, edges, step, unused)?;
            products = products.f_mul_(rows)?;
            parts.push(products.f_sum_dim_intlist(3, false, None)?);
        }
        Ok(Tensor::f_cat(&parts, 2)?)
    }

    /// `sum over edges of weight * vector`, (samples, rows, width of a vector).
    pub(super) fn weighted_sum(
        &self,
        weights: &Tensor,
        flat: &Tensor,
        edges: &Edges,
        unused: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for step in self.steps(edges) {
            let mut products = self.gather(flat, edges, step, unused)?;
            products = products.f_mul_(&step.of(weights)?.f_unsqueeze(3)?)?;
            let part = products.f_sum_dim_intlist(2, false, None)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&part)?,
                None => part,
            });
        }
        sum.ok_or_else(|| Error::Shape("a group of rows without edges".into()))
    }

    /// `scale * dot + bias`, from the dots of a group.
    pub(super) fn scores(&self, dots: Tensor, edges: &Edges, by: By) -> Result<Scores> {
        let mut values = dots.f_mul_scalar(self.scale)?;
        let mut hidden = edges.absent.as_ref().map(Tensor::shallow_clone);
        if let Some(mask) = &self.key_mask {
            let kept = match by {
                By::Query => self.gather_numbers(mask, edges)?,
                By::Key => mask.f_index_select(1, &edges.rows)?.f_unsqueeze(2)?,
            };
            hidden = either(hidden, Some(kept.f_logical_not()?))?;
        }
        let mut excluded = hidden.as_ref().map(Tensor::shallow_clone);
        if let (Some(bias), Some(places)) = (&self.bias, &edges.bias_places) {
            let bias = bias.at(places, self.accumulator)?;
            values = values.f_add(&bias)?;
            excluded = either(excluded, Some(bias.f_eq(f64::NEG_INFINITY)?))?;
        }
        if let Some(excluded) = &excluded {
            values = values.f_masked_fill(excluded, f64::NEG_INFINITY)?;
        }
        Ok(Scores { values, hidden, excluded })
    }

    /// One value per row of q (or of k) for each of its heads: the head that each row of a group belongs to.
    pub(super) fn heads_of(&self, edges: &Edges, rows_per_head: usize) -> Result<Tensor> {
        Ok(edges.rows.f_floor_divide_scalar(rows_per_head as i64)?)
    }
}

/// Where one or the other is true; None is nowhere.
pub(super) fn either(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some(a.f_logical_or(&b)?),
        (a, b) => a.or(b),
    })
}

/// `tensor` with `value` where `mask` is true.
pub(super) fn fill(tensor: Tensor, mask: Option<&Tensor>, value: f64) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => tensor.f_masked_fill(mask, value)?,
        None => tensor,
    })
}
