//! Pictures of a mask at any size, in time proportional to its edges.

use super::edges::EdgeSet;

/// The share of kept entries in each cell of a `side` x `side` raster laid over the mask, row-major, between 0 and 1.
///
/// `side` is at most the larger side of the mask; cell (a, b) covers rows `a * N / side ..` up to the next cell, likewise columns.
pub fn density(edges: &EdgeSet, side: usize) -> Vec<f32> {
    let (num_rows, num_cols) = (edges.num_rows(), edges.num_cols());
    let mut kept = vec![0.0; side * side];
    let mut runs = Vec::new();
    for row in 0..num_rows {
        let cells = &mut kept[row * side / num_rows * side..][..side];
        edges.row(row, &mut runs);
        for run in &runs {
            let mut start = run.start;
            while start < run.end {
                let cell = start * side / num_cols;
                let end = first_of(cell + 1, num_cols, side).min(run.end);
                cells[cell] += (end - start) as f32;
                start = end;
            }
        }
    }
    for (index, value) in kept.iter_mut().enumerate() {
        *value /= (extent(index / side, num_rows, side) * extent(index % side, num_cols, side)).max(1) as f32;
    }
    kept
}

/// The first token of cell `cell`: the least t with t * side / n == cell.
fn first_of(cell: usize, n: usize, side: usize) -> usize {
    (cell * n).div_ceil(side)
}

fn extent(cell: usize, n: usize, side: usize) -> usize {
    first_of(cell + 1, n, side) - first_of(cell, n, side)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_full_size_the_picture_is_the_mask_and_smaller_ones_average_it() {
        let edges =
            EdgeSet::builder(7, 7).unwrap().band((-1, 2, 1), 0..7, 0..7).global(0..1).build().unwrap();
        let full = density(&edges, 7);
        let kept: Vec<usize> = (0..49).filter(|&cell| full[cell] == 1.0).collect();
        assert_eq!(kept, edges.iter().map(|(row, col)| row * 7 + col).collect::<Vec<_>>());
        for side in 1..7 {
            let small = density(&edges, side);
            let total: f32 = (0..side * side)
                .map(|cell| {
                    small[cell] * (extent(cell / side, 7, side) * extent(cell % side, 7, side)) as f32
                })
                .sum();
            assert!((total - edges.nnz() as f32).abs() < 1e-4, "side {side}");
        }
    }
}
