//! Edges that depend on the content of queries and keys: a pattern says how to choose, the kernels choose, and what comes out is
//! an edge list per (batch, head) like any other.

mod expected;
mod slashes;

use std::sync::Arc;

use crate::config::Spec;
use crate::error::{Error, Result};
use crate::kernel::{
    Attention, Element, Gradients, MaskedLogits, NO_KEY, Real, Run, Selection, View, View2, View4, ViewMut4,
    best,
};
use crate::pattern::choice::{Choice, Importance, OfHead, Pool};
use crate::pattern::edges::EdgeSet;
use crate::pattern::warn_clamped;
use crate::plan::Plan;
use slashes::{Slashes, estimate};

/// What is chosen from. Queries and keys belong to the same tokens.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a, T: Element> {
    /// (B, H, N, D)
    pub q: View4<'a, T>,
    /// (B, Hkv, N, D); Hkv divides H
    pub k: View4<'a, T>,
    /// (B, N), non-zero = keep.
    pub key_mask: Option<View2<'a, u8>>,
    /// (B, H, N, N), added to the scaled scores.
    pub bias: Option<View4<'a, T>>,
    /// (B, N), the importance of every token where the caller brings it.
    pub importance: Option<View2<'a, T>>,
    /// Factor on q . k
    pub scale: f64,
}

/// Compressed rows: `row_ptr` (B x H, N + 1) with absolute offsets into `col`, ascending within a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeLists {
    /// Where rows start.
    pub row_ptr: Vec<i64>,
    /// Keys.
    pub col: Vec<i64>,
}

/// A choice with the prefix around it.
#[derive(Debug, Clone)]
pub struct Rule {
    choice: Choice,
    /// What each head chooses, where heads differ.
    per_head: Option<Vec<OfHead>>,
    /// Leading tokens that are not chosen from (blocks and importance) but may be dense.
    prefix: usize,
    /// Leading tokens kept by every query.
    dense: usize,
    /// Patches that the grid of the configuration has, where it gives one.
    patches: Option<u64>,
}

impl Rule {
    /// The rule of a mask that chooses by content; `None` for other masks.
    ///
    /// # Errors
    /// [`Error::Value`] for text that is not a spec.
    pub fn of(spec: &Spec) -> Result<Option<Self>> {
        let pattern = spec.pattern()?;
        let prefix = spec.num_prefix_tokens as usize;
        let dense = if spec.prefix_dense && pattern.keeps_prefix_dense() { prefix } else { 0 };
        let Some(choice) = pattern.choice(spec.epoch) else { return Ok(None) };
        let per_head =
            pattern.choice_per_head(&spec.context(0)).map_err(|error| error.below("mask_kwargs"))?;
        let patches = spec.grid.as_ref().map(|grid| grid.iter().product());
        Ok(Some(Rule { choice, per_head, prefix, dense, patches }))
    }

    /// `(a, b)` such that a head of N tokens has at most `N * (min(a, N) + b)` edges, whatever the content.
    pub fn room(&self) -> (usize, usize) {
        let chosen = match self.choice {
            Choice::TopK { keep, symmetric, .. } => keep.saturating_mul(1 + usize::from(symmetric)),
            Choice::TopBlocks { keep, block_size, .. } => keep.saturating_mul(block_size),
            Choice::VerticalSlash { columns, distances, nearest, .. } => {
                columns.saturating_add(distances).saturating_add(nearest)
            }
            Choice::Keys { keep, .. } => keep,
        };
        (chosen, self.dense.saturating_mul(2))
    }

    /// The edges that the rule keeps for this content.
    ///
    /// # Errors
    /// [`Error::Shape`] naming an argument that does not fit; [`Error::Value`] when importance is asked for and not given;
    /// [`Error::Config`] when the configuration's grid is not that of these tokens;
    /// [`Error::Interrupted`].
    pub fn edges<T: Element>(&self, content: &Content<T>, run: &Run) -> Result<EdgeLists> {
        let [batch, heads, queries, _] = content.q.shape();
        let keys = content.k.shape()[2];
        if queries != keys {
            return Err(Error::Shape(format!(
                "k: a mask that chooses by content relates the tokens of one sequence, but there are {queries} queries and {keys} keys"
            )));
        }
        let mut lists = EdgeLists { row_ptr: Vec::new(), col: Vec::new() };
        lists.row_ptr.reserve_exact(batch * heads * (queries + 1));
        if queries == 0 {
            lists.row_ptr.resize(batch * heads, 0);
            return Ok(lists);
        }
        if self.prefix > queries {
            return Err(Error::Value(format!(
                "num_prefix_tokens: expected at most the {queries} tokens there are, got {}",
                self.prefix
            )));
        }
        if let Some(patches) = self.patches.filter(|&patches| patches != (queries - self.prefix) as u64) {
            return Err(Error::config(
                "grid",
                format!(
                    "has {patches} cells, but {queries} tokens with {} prefix tokens leave {} patches",
                    self.prefix,
                    queries - self.prefix
                ),
            ));
        }
        match self.choice {
            Choice::TopK { keep, causal, symmetric, dense_rows } => {
                let chosen = self.top_keys(content, at_most(keep, queries, "topk", "tokens"), causal, run)?;
                let dense_rows = if dense_rows { self.dense } else { 0 };
                for unit in 0..batch * heads {
                    // One list for all heads, or one per head.
                    let (list, at) = if chosen.len() == 1 { (0, unit) } else { (unit % heads, unit / heads) };
                    let (keep, ref keys) = chosen[list];
                    let of_head = &keys[at * queries * keep..][..queries * keep];
                    let mut rows = rows_of(of_head, queries, keep);
                    if symmetric {
                        add_transposed(&mut rows, of_head, keep);
                    }
                    self.append(&mut lists, causal, dense_rows, queries, |row, out| {
                        out.extend_from_slice(&rows[row]);
                    });
                }
            }
            Choice::TopBlocks { keep, block_size, pool, causal } => {
                let content = content.after(self.prefix);
                let patches = queries - self.prefix;
                let blocks = Blocks::new(&content, block_size, pool)?;
                let count = blocks.count;
                let keep = at_most(keep, count, "block_topk", "blocks");
                let mut chosen = vec![NO_KEY; batch * heads * count * keep];
                blocks.choose(&mut chosen, keep, causal, run)?;
                for unit in 0..batch * heads {
                    let of_head = &chosen[unit * count * keep..][..count * keep];
                    // `causal` speaks of patches: the prefix is outside of their order, and dense as for any mask over patches.
                    self.append(&mut lists, false, self.dense, queries, |row, out| {
                        let Some(patch) = row.checked_sub(self.prefix) else { return };
                        let block = patch / block_size;
                        for &key_block in of_head[block * keep..][..keep].iter().filter(|&&key| key != NO_KEY)
                        {
                            let first = key_block as usize * block_size;
                            let end = patches.min(first + block_size);
                            let end = if causal { end.min(patch + 1) } else { end };
                            out.extend((first..end).map(|key| (key + self.prefix) as u32));
                        }
                    });
                }
            }
            Choice::VerticalSlash { columns, distances, last_queries, nearest } => {
                let content = content.after(self.prefix);
                let of_heads = self.of_heads(heads, OfHead { keys: columns, distances })?;
                for Slashes { columns, distances } in
                    estimate(&content, &of_heads, last_queries, nearest, run)?
                {
                    self.append(&mut lists, false, self.dense, queries, |row, out| {
                        let Some(patch) = row.checked_sub(self.prefix) else { return };
                        let past = columns.iter().copied().take_while(|&key| key as usize <= patch);
                        let near = distances
                            .iter()
                            .rev()
                            .filter_map(|&distance| (patch as u32).checked_sub(distance));
                        out.extend(past.chain(near).map(|key| key + self.prefix as u32));
                    });
                }
            }
            Choice::Keys { keep, by } => {
                let content = content.after(self.prefix);
                let keep = at_most(keep, queries - self.prefix, "importance", "patches");
                for (batch, head) in (0..batch).flat_map(|batch| (0..heads).map(move |head| (batch, head))) {
                    let scores = key_scores(&content, by, batch, head, run)?;
                    let allowed = |key: usize| content.key_mask.is_none_or(|mask| mask.at([batch, key]) != 0);
                    let keys: Vec<u32> = best(&scores, keep, allowed)
                        .into_iter()
                        .map(|key| key + self.prefix as u32)
                        .collect();
                    self.append(&mut lists, false, self.dense, queries, |row, out| {
                        if row >= self.prefix {
                            out.extend_from_slice(&keys);
                        }
                    });
                }
            }
        }
        Ok(lists)
    }

    /// How many keys a query chooses at most, and the keys (B, H, N, that many): of all heads, or one such list per head.
    fn top_keys<T: Element>(
        &self,
        content: &Content<T>,
        most: usize,
        causal: bool,
        run: &Run,
    ) -> Result<Vec<(usize, Vec<u32>)>> {
        let Content { q, k, key_mask, bias, scale, .. } = *content;
        let [batch, heads, queries, _] = q.shape();
        let choose = |selection: Selection<T>| {
            let keep = selection.keep;
            let mut chosen = vec![NO_KEY; selection.q.shape()[1] * batch * queries * keep];
            selection.choose(&mut chosen, run)?;
            Ok((keep, chosen))
        };
        if self.per_head.is_none() {
            return Ok(vec![choose(Selection { q, k, key_mask, bias, scale, keep: most, causal })?]);
        }
        let of_heads = self.of_heads(heads, OfHead { keys: most, distances: 0 })?;
        let kv_heads = k.shape()[1];
        let of_head = |(head, of_head): (usize, OfHead)| {
            let bias = bias.map(|bias| bias.only(1, head));
            let (q, k) = (q.only(1, head), k.only(1, head * kv_heads / heads));
            choose(Selection { q, k, key_mask, bias, scale, keep: of_head.keys.min(queries), causal })
        };
        of_heads.into_iter().enumerate().map(of_head).collect()
    }

    /// What each of `heads` heads chooses; `shared` where they do not differ.
    fn of_heads(&self, heads: usize, shared: OfHead) -> Result<Vec<OfHead>> {
        let Some(per_head) = &self.per_head else { return Ok(vec![shared; heads]) };
        if per_head.len() == heads {
            return Ok(per_head.clone());
        }
        Err(Error::Shape(format!(
            "q: the mask describes {} heads, but the tensor has {heads}",
            per_head.len()
        )))
    }

    /// Add the rows of one head: what `fill` appends, and the dense prefix.
    fn append(
        &self,
        lists: &mut EdgeLists,
        causal: bool,
        dense_rows: usize,
        queries: usize,
        fill: impl Fn(usize, &mut Vec<u32>),
    ) {
        let mut row_keys = Vec::new();
        lists.row_ptr.push(lists.col.len() as i64);
        for row in 0..queries {
            let end = if causal { row + 1 } else { queries };
            row_keys.clear();
            if row < dense_rows {
                row_keys.extend(0..end as u32);
            } else {
                row_keys.extend(0..self.dense.min(end) as u32);
                fill(row, &mut row_keys);
                row_keys.sort_unstable();
                row_keys.dedup();
            }
            lists.col.extend(row_keys.iter().map(|&key| i64::from(key)));
            lists.row_ptr.push(lists.col.len() as i64);
        }
    }
}

impl<T: Element> Content<'_, T> {
    /// Without the first `prefix` tokens.
    fn after(&self, prefix: usize) -> Self {
        Content {
            q: self.q.after(2, prefix),
            k: self.k.after(2, prefix),
            key_mask: self.key_mask.map(|mask| mask.after(1, prefix)),
            bias: self.bias.map(|bias| bias.after(2, prefix).after(3, prefix)),
            importance: self.importance.map(|importance| importance.after(1, prefix)),
            scale: self.scale,
        }
    }
}

/// `keep`, or all `there` are, and then a warning: the mask keeps everything.
fn at_most(keep: usize, there: usize, mask: &str, what: &str) -> usize {
    if keep > there {
        warn_clamped(format!("{mask}: k {keep} is more than the {there} {what} and acts as {there}"));
    }
    keep.min(there)
}

fn rows_of(chosen: &[u32], queries: usize, keep: usize) -> Vec<Vec<u32>> {
    (0..queries)
        .map(|row| chosen[row * keep..][..keep].iter().copied().filter(|&key| key != NO_KEY).collect())
        .collect()
}

fn add_transposed(rows: &mut [Vec<u32>], chosen: &[u32], keep: usize) {
    for (place, &key) in chosen.iter().enumerate() {
        if key != NO_KEY {
            rows[key as usize].push((place / keep) as u32);
        }
    }
}

/// Queries and keys with one vector per block.
struct Blocks<R> {
    q: Vec<R>,
    k: Vec<R>,
    /// Blocks with an allowed token, per batch element.
    key_mask: Vec<u8>,
    sizes: [usize; 4],
    count: usize,
    /// That of the scale of the scores: its size changes no order.
    sign: f64,
}

impl<R: Real> Blocks<R> {
    fn new<T: Element<Acc = R>>(content: &Content<T>, block_size: usize, pool: Pool) -> Result<Self> {
        let [batch, heads, tokens, dim] = content.q.shape();
        let kv_heads = content.k.shape()[1];
        let count = tokens.div_ceil(block_size);
        let allowed =
            |batch: usize, token: usize| content.key_mask.is_none_or(|mask| mask.at([batch, token]) != 0);
        let members = |batch: usize, block: usize| {
            (block * block_size..tokens.min((block + 1) * block_size))
                .filter(move |&token| allowed(batch, token))
        };
        let pooled = |view: &View4<T>, heads: usize| {
            let mut all = Vec::with_capacity(batch * heads * count * dim);
            for (batch, head) in (0..batch).flat_map(|batch| (0..heads).map(move |head| (batch, head))) {
                for block in 0..count {
                    for channel in 0..dim {
                        let values = members(batch, block)
                            .map(|token| view.at([batch, head, token, channel]).to_acc());
                        all.push(pool_values(values, pool));
                    }
                }
            }
            all
        };
        let key_mask = (0..batch)
            .flat_map(|batch| (0..count).map(move |block| (batch, block)))
            .map(|(batch, block)| u8::from(members(batch, block).next().is_some()))
            .collect();
        Ok(Blocks {
            q: pooled(&content.q, heads),
            k: pooled(&content.k, kv_heads),
            key_mask,
            sizes: [batch, heads, kv_heads, dim],
            count,
            sign: content.scale.signum(),
        })
    }

    fn choose(&self, chosen: &mut [u32], keep: usize, causal: bool, run: &Run) -> Result<()> {
        let [batch, heads, kv_heads, dim] = self.sizes;
        Selection {
            q: View::contiguous("pooled q", &self.q, [batch, heads, self.count, dim])?,
            k: View::contiguous("pooled k", &self.k, [batch, kv_heads, self.count, dim])?,
            key_mask: Some(View::contiguous("blocks", &self.key_mask, [batch, self.count])?),
            bias: None,
            scale: self.sign,
            keep,
            causal,
        }
        .choose(chosen, run)
    }
}

fn pool_values<R: Real>(values: impl Iterator<Item = R>, pool: Pool) -> R {
    let (mut count, mut total) = (0usize, R::ZERO);
    for value in values {
        #[expect(clippy::eq_op, reason = "only NaN differs from itself")]
        let larger = if value > total || value != value { value } else { total };
        total = match pool {
            Pool::Mean => total + value,
            Pool::Max if count == 0 => value,
            Pool::Max => larger,
        };
        count += 1;
    }
    if pool == Pool::Mean && count > 0 { total / R::from_f64(count as f64) } else { total }
}

/// How important each token is for a head.
fn key_scores<T: Element>(
    content: &Content<T>,
    by: Importance,
    batch: usize,
    head: usize,
    run: &Run,
) -> Result<Vec<T::Acc>> {
    let [_, heads, tokens, dim] = content.q.shape();
    let kv_head = head * content.k.shape()[1] / heads.max(1);
    match by {
        Importance::KeyNorm => {
            let square = |token: usize| {
                let mut sum = T::Acc::ZERO;
                for channel in 0..dim {
                    let x = content.k.at([batch, kv_head, token, channel]).to_acc();
                    sum += x * x;
                }
                sum
            };
            Ok((0..tokens).map(square).collect())
        }
        Importance::Given => {
            let given = content.importance.as_ref().ok_or_else(|| {
                Error::Value(
                    "importance: `score: embedding_norm` needs the layer's input; use it in a module, or pass the \
                     norms of the tokens as `importance`"
                        .into(),
                )
            })?;
            if given.shape()[1] != tokens {
                return Err(Error::Shape(format!(
                    "importance: expected {tokens} tokens, got {}",
                    given.shape()[1]
                )));
            }
            Ok((0..tokens).map(|token| given.at([batch, token]).to_acc()).collect())
        }
        Importance::Attention => received_attention(content, batch, head, kv_head, run),
    }
}

/// `sum_i softmax_j(scale * q_i . k_j)` for every key j, over the queries i that padding leaves. The gradient of the values for an output gradient of ones is this very
/// sum, so that the streaming kernels compute it without an N x N array.
fn received_attention<T: Element>(
    content: &Content<T>,
    batch: usize,
    head: usize,
    kv_head: usize,
    run: &Run,
) -> Result<Vec<T::Acc>> {
    let tokens = content.q.shape()[2];
    let key_mask = content.key_mask.map(|mask| mask.only(0, batch));
    // Rows of padding have no edges, so that nobody reads them.
    let is_padding = |token: &usize| key_mask.is_some_and(|mask| mask.at([0, *token]) == 0);
    let mut builder = EdgeSet::builder(tokens, tokens)?;
    let mut start = 0;
    for padding in (0..tokens).filter(is_padding).chain([tokens]) {
        builder = builder.rect(start..padding, 0..tokens);
        start = padding + 1;
    }
    let plan = Plan::new(&[Arc::new(builder.build()?)])?;
    let zeros = vec![T::from_acc(T::Acc::ZERO); tokens];
    let ones = vec![T::from_acc(T::Acc::ONE); tokens];
    let column = [1, 1, tokens, 1];
    let attention = Attention {
        plan: &plan,
        q: content.q.only(0, batch).only(1, head),
        k: content.k.only(0, batch).only(1, kv_head),
        v: View::contiguous("v", &zeros, column)?,
        key_mask,
        bias: content.bias.map(|bias| bias.only(0, batch).only(1, head)),
        dropout: None,
        scale: content.scale,
        masked_logits: MaskedLogits::NegInf,
    };
    let dim = content.q.shape()[3];
    let (mut out, mut lse) = (zeros.clone(), vec![0.0; tokens]);
    attention.forward(ViewMut4::contiguous("out", &mut out, column)?, &mut lse, run)?;
    let mut dq = vec![T::from_acc(T::Acc::ZERO); tokens * dim];
    let (mut dk, mut dv) = (dq.clone(), zeros.clone());
    attention.backward(
        View::contiguous("grad_out", &ones, column)?,
        View::contiguous("out", &out, column)?,
        View::contiguous("lse", &lse, [1, 1, tokens])?,
        Gradients {
            dq: ViewMut4::contiguous("dq", &mut dq, [1, 1, tokens, dim])?,
            dk: ViewMut4::contiguous("dk", &mut dk, [1, 1, tokens, dim])?,
            dv: ViewMut4::contiguous("dv", &mut dv, column)?,
        },
        run,
    )?;
    Ok(dv.into_iter().map(Element::to_acc).collect())
}
