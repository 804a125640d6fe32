//! Which pairs of one head are kept.

use std::sync::Arc;

use super::super::edges::EdgeSet;
use super::super::scores::Scores;
use crate::error::Result;
use crate::rng::HeadDraws;

/// The `count` pairs with the smallest |i - j|; of those at the same distance the lower i, then the lower j.
pub(super) fn nearest(n: usize, count: u64) -> Result<Arc<EdgeSet>> {
    let at_distance = |distance: usize| if distance == 0 { n } else { 2 * (n - distance) } as u64;
    let (mut distance, mut left) = (0, count);
    while distance < n && left >= at_distance(distance) {
        left -= at_distance(distance);
        distance += 1;
    }
    let mut builder = EdgeSet::builder(n, n)?;
    if distance > 0 {
        let reach = distance as i64 - 1;
        builder = builder.band((-reach, reach, 1), 0..n, 0..n);
    }
    // The first queries get their pairs at the next distance, the last of them perhaps only the lower key.
    let keys = |query: usize| [query.checked_sub(distance), Some(query + distance).filter(|&key| key < n)];
    let mut end = 0;
    while left > 0 && left >= keys(end).iter().flatten().count() as u64 {
        left -= keys(end).iter().flatten().count() as u64;
        end += 1;
    }
    let offset = distance as i64;
    builder = builder.diagonal(-offset, 0..end, 0..n).diagonal(offset, 0..end, 0..n);
    if left > 0 {
        builder = builder.diagonal(-offset, end..end + 1, 0..n);
    }
    Ok(Arc::new(builder.build()?))
}

/// One key for every query and `count - n` of the other pairs, all equally likely.
pub(super) fn drawn(n: usize, count: u64, draws: HeadDraws) -> Result<Arc<EdgeSet>> {
    let mut rows: Vec<Vec<u32>> = (0..n).map(|query| vec![draws.row(query).below(n as u32)]).collect();
    let others = n as u64 - 1;
    // The draws of a row that no query has.
    for pair in draws.row(n).subset(n as u64 * others, count - n as u64) {
        let row = &mut rows[(pair / others) as usize];
        let key = (pair % others) as u32;
        row.push(key + u32::from(key >= row[0]));
    }
    listed(rows)
}

/// The best key of every query, then the best of all other candidates of the head.
pub(super) fn best(scores: &Scores, layer: usize, head: usize, count: u64) -> Result<Arc<EdgeSet>> {
    let patches = scores.sizes[2];
    let mut rows = Vec::with_capacity(patches);
    let mut others: Vec<(f32, u32, u32)> = Vec::new();
    for patch in 0..patches {
        let better = |a: (u32, f32), b: (u32, f32)| if b.1 > a.1 { b } else { a };
        let (first, _) = scores.row(layer, head, patch).reduce(better).expect("every patch has candidates");
        let rest = scores.row(layer, head, patch).filter(|&(key, _)| key != first);
        others.extend(rest.map(|(key, score)| (score, patch as u32, key)));
        rows.push(vec![first]);
    }
    let count = (count - patches as u64) as usize;
    let order =
        |a: &(f32, u32, u32), b: &(f32, u32, u32)| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2)));
    if 0 < count && count < others.len() {
        others.select_nth_unstable_by(count - 1, order);
    }
    others.truncate(count);
    for (_, patch, key) in others {
        rows[patch as usize].push(key);
    }
    listed(rows)
}

/// The edge set of a list of keys per query, in any order.
fn listed(mut rows: Vec<Vec<u32>>) -> Result<Arc<EdgeSet>> {
    let mut row_ptr = Vec::with_capacity(rows.len() + 1);
    let mut col = Vec::with_capacity(rows.iter().map(Vec::len).sum());
    row_ptr.push(0);
    for row in &mut rows {
        row.sort_unstable();
        col.extend(row.iter().map(|&key| i64::from(key)));
        row_ptr.push(col.len() as i64);
    }
    Ok(Arc::new(EdgeSet::builder(rows.len(), rows.len())?.edge_list(&row_ptr, &col)?.build()?))
}
