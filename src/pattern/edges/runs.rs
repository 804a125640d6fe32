//! What is irregular in a mask: runs of consecutive columns, row by row.

use std::ops::Range;

/// Per-row runs of consecutive columns, in compressed rows. Empty (no `row_ptr`) when nothing is irregular.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runs {
    pub(super) row_ptr: Vec<usize>,
    pub(super) start: Vec<u32>,
    pub(super) end: Vec<u32>,
}

impl Runs {
    /// The runs of `row`, ascending and not touching one another.
    #[inline]
    pub fn row(&self, row: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let range = if self.row_ptr.is_empty() { 0..0 } else { self.row_ptr[row]..self.row_ptr[row + 1] };
        self.start[range.clone()]
            .iter()
            .zip(&self.end[range])
            .map(|(&start, &end)| start as usize..end as usize)
    }

    /// Whether there is no run at all.
    pub fn is_empty(&self) -> bool {
        self.start.is_empty()
    }

    /// Number of runs.
    pub fn len(&self) -> usize {
        self.start.len()
    }

    pub(super) fn nnz(&self) -> usize {
        self.start.iter().zip(&self.end).map(|(&start, &end)| (end - start) as usize).sum()
    }

    pub(super) fn transposed(&self, num_rows: usize, num_cols: usize) -> Self {
        if self.is_empty() {
            return Self::default();
        }
        // A column's run grows while consecutive rows contain it, so two sweeps give exact sizes without an edge list.
        let mut row_ptr = vec![0usize; num_cols + 1];
        let mut next_row = vec![u32::MAX; num_cols];
        let sweep = |visit: &mut dyn FnMut(usize, usize, bool), next_row: &mut [u32]| {
            for row in 0..num_rows {
                for col in self.row(row).flatten() {
                    visit(row, col, next_row[col] == row as u32);
                    next_row[col] = row as u32 + 1;
                }
            }
        };
        sweep(&mut |_, col, grows| row_ptr[col + 1] += usize::from(!grows), &mut next_row);
        for col in 0..num_cols {
            row_ptr[col + 1] += row_ptr[col];
        }
        let (mut start, mut end) = (vec![0; row_ptr[num_cols]], vec![0; row_ptr[num_cols]]);
        let mut fill = row_ptr.clone();
        next_row.fill(u32::MAX);
        sweep(
            &mut |row, col, grows| {
                if !grows {
                    start[fill[col]] = row as u32;
                    fill[col] += 1;
                }
                end[fill[col] - 1] = row as u32 + 1;
            },
            &mut next_row,
        );
        Runs { row_ptr, start, end }
    }

    /// Without the first `prefix` of the `num_rows` rows, and of the columns.
    pub(super) fn after(&self, prefix: usize, num_rows: usize) -> Self {
        if self.is_empty() {
            return Self::default();
        }
        let mut runs = Runs { row_ptr: vec![0], ..Runs::default() };
        for row in prefix..num_rows {
            for run in self.row(row).filter(|run| run.end > prefix) {
                runs.start.push((run.start.max(prefix) - prefix) as u32);
                runs.end.push((run.end - prefix) as u32);
            }
            runs.row_ptr.push(runs.start.len());
        }
        if runs.is_empty() { Self::default() } else { runs }
    }

    /// Bytes of the lists.
    pub(super) fn bytes(&self) -> usize {
        self.row_ptr.len() * size_of::<usize>() + self.start.len() * 2 * size_of::<u32>()
    }
}
