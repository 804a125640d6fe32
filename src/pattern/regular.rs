//! Finding the regular parts of an irregular edge set: lists given by a user often are bands and dense tokens in disguise.

use std::collections::HashSet;

use super::edges::EdgeSet;
use crate::error::Result;

impl EdgeSet {
    /// The same edges with full rows, full columns and full diagonals held as such, if that saves at least half of the runs.
    ///
    /// A diagonal is full if every cell of it is kept that lies outside full rows and columns. Time and memory are O(rows + columns + edges).
    ///
    /// # Errors
    /// Never for an existing set: its size was checked when it was built.
    pub fn regularised(self) -> Result<EdgeSet> {
        let (num_rows, num_cols) = (self.num_rows(), self.num_cols());
        if self.runs().is_empty() || !self.repeats_itself() {
            return Ok(self);
        }
        let is_full = |row: usize| self.degree(row) == num_cols;
        let full_rows: Vec<usize> = (0..num_rows).filter(|&row| is_full(row)).collect();
        let mut in_column = vec![0; num_cols];
        self.iter().for_each(|(_, col)| in_column[col] += 1);
        let full_cols: Vec<usize> = (0..num_cols).filter(|&col| in_column[col] == num_rows).collect();

        let mut is_full_row = vec![false; num_rows];
        full_rows.iter().for_each(|&row| is_full_row[row] = true);
        let is_full_col: Vec<bool> = in_column.iter().map(|&count| count == num_rows).collect();
        // Offset o is counted at o + num_rows - 1: its cells outside full rows and columns.
        let mut on_diagonal = vec![0usize; num_rows + num_cols - 1];
        let place = |row: usize, col: usize| col + num_rows - 1 - row;
        let open = |row: usize, col: usize| !is_full_row[row] && !is_full_col[col];
        self.iter()
            .filter(|&(row, col)| open(row, col))
            .for_each(|(row, col)| on_diagonal[place(row, col)] += 1);
        let mut builder = EdgeSet::builder(num_rows, num_cols)?;
        for &row in &full_rows {
            builder = builder.rect(row..row + 1, 0..num_cols);
        }
        for &col in &full_cols {
            builder = builder.rect(0..num_rows, col..col + 1);
        }
        // A candidate is walked only if it holds at least half of its cells, so the walk costs no more than its edges.
        for (index, &count) in on_diagonal.iter().enumerate() {
            let offset = index as i64 - (num_rows as i64 - 1);
            let (start, end) =
                ((-offset).max(0) as usize, (num_cols as i64 - offset).min(num_rows as i64) as usize);
            if count > 0 && 2 * count >= end - start {
                let cells = (start..end).filter(|&row| open(row, (row as i64 + offset) as usize)).count();
                if cells == count {
                    builder = builder.diagonal(offset, start..end, 0..num_cols);
                }
            }
        }
        let regular = builder.build()?;
        let described = regular.union(&self.difference(&regular)?)?;
        Ok(if 2 * described.runs().len() <= self.runs().len() { described } else { self })
    }

    /// Whether neighbouring rows in the middle share at least half of their offsets. Lists that depend on data do not, and are
    /// spared the rest of the work.
    fn repeats_itself(&self) -> bool {
        let offsets = |row: usize| {
            let mut runs = Vec::new();
            self.row(row, &mut runs);
            runs.into_iter().flatten().map(move |col| col as i64 - row as i64)
        };
        let middle = self.num_rows() / 2;
        if middle + 1 >= self.num_rows() {
            return true;
        }
        let (here, next): (HashSet<_>, HashSet<_>) =
            (offsets(middle).collect(), offsets(middle + 1).collect());
        2 * here.intersection(&next).count() >= here.len().max(next.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::edges::tests::{build, piece};
    use super::*;

    proptest! {
        #[test]
        fn the_edges_stay_the_same((rows, cols, pieces) in (1usize..14, 1usize..14).prop_flat_map(|(rows, cols)| {
            (Just(rows), Just(cols), prop::collection::vec(piece(rows, cols), 0..5))
        })) {
            let (set, _) = build(rows, cols, &pieces);
            let expected: Vec<_> = set.iter().collect();
            let (row_ptr, col) = lists(&set);
            let listed = EdgeSet::builder(rows, cols).unwrap().edge_list(&row_ptr, &col).unwrap().build().unwrap();
            let regular = listed.regularised().unwrap();
            prop_assert_eq!(regular.iter().collect::<Vec<_>>(), expected);
        }
    }

    fn lists(set: &EdgeSet) -> (Vec<i64>, Vec<i64>) {
        let row_ptr = (0..=set.num_rows()).scan(0, |sum, row| {
            let before = *sum;
            *sum += if row < set.num_rows() { set.degree(row) as i64 } else { 0 };
            Some(before)
        });
        (row_ptr.collect(), set.iter().map(|(_, col)| col as i64).collect())
    }

    #[test]
    fn bands_and_dense_tokens_are_recognised_in_a_list() {
        let n = 50;
        let described =
            EdgeSet::builder(n, n).unwrap().global(0..1).band((-6, 6, 3), 1..n, 1..n).build().unwrap();
        let (row_ptr, col) = lists(&described);
        let listed = EdgeSet::builder(n, n).unwrap().edge_list(&row_ptr, &col).unwrap().build().unwrap();
        assert_eq!(listed.regularised().unwrap(), described);
    }

    #[test]
    fn blocks_stay_runs() {
        let n = 48;
        let blocks =
            (0..6).fold(EdgeSet::builder(n, n).unwrap(), |b, i| b.rect(i * 8..i * 8 + 8, i * 8..i * 8 + 8));
        let blocks = blocks.build().unwrap();
        assert_eq!(blocks.clone().regularised().unwrap(), blocks);
    }
}
