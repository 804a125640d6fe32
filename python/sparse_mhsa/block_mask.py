"""Edges as a FlexAttention `BlockMask`, in memory that grows with the edges.

FlexAttention asks a function, pair by pair, whether a block that keeps some pairs and not all keeps this one. The
answer is a bit, found in three steps: the block, the tile of 8 queries and 32 keys in it, the pair in that. Blocks and
tiles that keep nothing or everything have no bits of their own.

Source: FlexAttention, Dong et al., 2024 (arXiv 2412.05496).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._core import Edges
from .config import integer

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Of a tile: one integer of 32 bits per query.
_QUERIES, _KEYS = 8, 32
# The numbers of blocks and tiles that keep nothing and everything, before those that have bits of their own.
_NOTHING, _EVERYTHING, _FIRST = 0, 1, 2
# Looked at together; each takes about a hundred bytes meanwhile.
_MOST_EDGES = 1 << 20


class _Strip(NamedTuple):
    blocks: Tensor
    """(touched blocks,) int64: where in the B x B blocks each is."""

    numbers: Tensor
    """(touched blocks,) int32: the number of each."""

    tile_at: Tensor
    """(blocks kept in part, tiles of a block) int32: the number of each tile, row by row."""

    bits: Tensor
    """(tiles kept in part, 8) int32: bit k of integer q says whether query q of the tile keeps key k of it."""


def to_block_mask(edges: Edges, block_size: int = 128, device: torch.device | str | None = None) -> "BlockMask":
    """The edges as a FlexAttention `BlockMask`, for `torch.nn.attention.flex_attention.flex_attention`.

    Blocks that keep every pair are full, and of those that keep none nothing is stored. Each of the others takes 4
    bytes per tile of 8 queries and 32 keys in it, and 32 bytes for each of these tiles that is kept in part, once for
    all heads that share their edges. With blocks of 128 that is about 8 bytes per edge along diagonals and at most 324
    per edge of any mask, whatever N. Beside those, memory is one number per pair of blocks, as in any `BlockMask`. A
    query without a key gives zero in FlexAttention too.

    `torch.compile` makes a kernel for each length, also where it is left to choose: its kernels for any length fail to
    compile on the CPU.

    Args:
        edges: of H heads.
        block_size: side of a block in tokens.
        device: where the block mask is used; default is the CPU.

    Returns:
        The block mask for (1, H, N, N), which broadcasts over the batch.

    Raises:
        ValueError: ``block_size`` is not positive, or there are no tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block_size = integer("block_size", block_size, 1)
    n, num_heads = edges.num_tokens, edges.num_heads
    if n == 0:
        raise ValueError("to_block_mask: expected at least one token, got 0")
    side = -(-n // block_size)
    down, across = -(-block_size // _QUERIES), -(-block_size // _KEYS)
    blocks_of_head = torch.full((num_heads, side * side), _NOTHING, dtype=torch.int32)
    # What keeps nothing, and what keeps everything.
    tile_at = [torch.tensor([[_NOTHING], [_EVERYTHING]], dtype=torch.int32).expand(_FIRST, down * across)]
    bits = [torch.tensor([[0], [-1]], dtype=torch.int32).expand(_FIRST, _QUERIES)]
    num_blocks = num_tiles = _FIRST
    for number in range(num_heads):
        same = edges.describe(number)["shared_with"]
        if same is not None:
            blocks_of_head[number] = blocks_of_head[same]
            continue
        (row_ptr,), columns = map(torch.from_numpy, Edges.from_heads([(edges, number)]).to_csr())
        for start, stop in _strips(row_ptr, block_size):
            rows = torch.repeat_interleave(torch.arange(start, stop), row_ptr[start : stop + 1].diff())
            in_strip = columns[row_ptr[start] : row_ptr[stop]]
            strip = _blocks_and_tiles(rows, in_strip, n, block_size, num_blocks, num_tiles)
            blocks_of_head[number, strip.blocks] = strip.numbers
            tile_at.append(strip.tile_at)
            bits.append(strip.bits)
            num_blocks += len(strip.tile_at)
            num_tiles += len(strip.bits)
    most_blocks = num_heads * side**2
    block_of = blocks_of_head.view(num_heads, side, side).to(device)
    tile_of = _with_room(tile_at, _FIRST + most_blocks).view(-1, down, across).to(device)
    bits_of = _with_room(bits, _FIRST + most_blocks * down * across).to(device)
    for table in (block_of, tile_of, bits_of):
        torch._dynamo.mark_static(table)
    by_block, by_queries, by_keys = map(_divided_by, (block_size, _QUERIES, _KEYS))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (block_row, query), (block_column, key) = by_block(query), by_block(key)
        (tile_row, query), (tile_column, key) = by_queries(query), by_keys(key)
        tile = tile_of[block_of[head, block_row, block_column], tile_row, tile_column]
        return (bits_of[tile, query] >> key) & 1 != 0

    def blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Number of chosen blocks in each row of blocks, and their columns, padded with the others."""
        present = chosen.view(1, num_heads, side, side)
        indices = torch.argsort(present.to(torch.int8), dim=-1, descending=True, stable=True)
        return present.sum(-1, dtype=torch.int32).to(device), indices.to(device, torch.int32)

    in_part, full = blocks(blocks_of_head >= _FIRST), blocks(blocks_of_head == _EVERYTHING)
    return BlockMask.from_kv_blocks(*in_part, *full, BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=(n, n))


def _strips(row_ptr: Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """First and last query (exclusive) of whole rows of blocks that have few enough edges to look at together."""
    first_edge = row_ptr[torch.arange(0, len(row_ptr) - 1 + block_size, block_size).clamp(max=len(row_ptr) - 1)]
    start, num_rows = 0, len(first_edge) - 1
    while start < num_rows:
        within = int(torch.searchsorted(first_edge, first_edge[start] + _MOST_EDGES, right=True)) - 1
        stop = min(max(start + 1, within), num_rows)
        yield start * block_size, min(stop * block_size, len(row_ptr) - 1)
        start = stop


def _blocks_and_tiles(
    rows: Tensor, columns: Tensor, num_tokens: int, block_size: int, first_block: int, first_tile: int
) -> _Strip:
    """Of edges in whole rows of blocks.

    Args:
        rows: (edges,) int64, the query of each edge.
        columns: (edges,) int64, its key.
        num_tokens: N.
        block_size: side of a block in tokens.
        first_block: number of the first block that is kept in part.
        first_tile: likewise of tiles.

    Returns:
        The blocks and tiles that have edges.
    """
    side = -(-num_tokens // block_size)
    down, across = -(-block_size // _QUERIES), -(-block_size // _KEYS)
    row, column = rows % block_size, columns % block_size
    block = rows // block_size * side + columns // block_size
    tile = (block * down + row // _QUERIES) * across + column // _KEYS
    tiles, tile_of_edge, edges_in_tile = torch.unique(tile, return_inverse=True, return_counts=True)
    blocks, block_of_tile = torch.unique_consecutive(tiles // (down * across), return_inverse=True)
    edges_in_block = torch.zeros(len(blocks), dtype=torch.int64).index_add_(0, block_of_tile, edges_in_tile)

    block_in_part = edges_in_block < block_size**2
    listed = block_in_part[block_of_tile]
    tile_in_part = listed & (edges_in_tile < _QUERIES * _KEYS)
    own_block, own_tile = block_in_part.cumsum(0) - 1, tile_in_part.cumsum(0) - 1
    numbers = torch.where(block_in_part, first_block + own_block, _EVERYTHING).to(torch.int32)
    tile_at = torch.full((int(block_in_part.sum()), down * across), _NOTHING, dtype=torch.int32)
    tile_numbers = torch.where(tile_in_part, first_tile + own_tile, _EVERYTHING).to(torch.int32)
    tile_at[own_block[block_of_tile[listed]], tiles[listed] % (down * across)] = tile_numbers[listed]

    stored = tile_in_part[tile_of_edge]
    place = own_tile[tile_of_edge[stored]] * _QUERIES + row[stored] % _QUERIES
    bits = torch.zeros(int(tile_in_part.sum()) * _QUERIES, dtype=torch.int32)
    # Every pair comes once, so that the sum of its bits is their union.
    bits.index_add_(0, place, (1 << column[stored] % _KEYS).to(torch.int32))
    return _Strip(blocks, numbers, tile_at, bits.view(-1, _QUERIES))


def _divided_by(size: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Quotient and remainder of numbers from 0, by shifts where they will do: FlexAttention asks twice as fast then."""
    if size & (size - 1) == 0:
        shift = size.bit_length() - 1
        return lambda number: (number >> shift, number & (size - 1))
    return lambda number: (number // size, number % size)


def _with_room(parts: list[Tensor], most: int) -> Tensor:
    """The parts one after another, and zeros behind them, but not more than ``most`` rows.

    FlexAttention is compiled for each length. So that layers whose masks differ a little share a kernel, lengths are
    multiples of a power of two that is at most an eighth of them: eight lengths from one power to the next.
    """
    length = sum(map(len, parts))
    step = 1 << max(0, length.bit_length() - 4)
    room = min(-(-length // step) * step, most)
    return torch.cat([*parts, parts[0].new_zeros(room - length, parts[0].shape[1])])
