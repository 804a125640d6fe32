//! Products of bfloat16, two at a time and summed in f32: AVX-512 BF16, and the matrix unit (AMX).
//!
//! Both read the same layouts. On the left are rows of bfloat16. On the right are panels in which the two numbers that meet a pair of a
//! row lie next to each other: `[depth / 2][columns][2]`. Numbers too small to be normal count as zero.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use half::bf16;

/// Rows and columns of a square, and columns of a panel that a register, or a tile of the matrix unit, takes at a time.
const SIDE: usize = 16;
/// Rows that a product keeps in registers.
const ROWS: usize = 8;
/// Depth that the matrix unit takes at a time.
pub const DEPTH: usize = 32;

/// What multiplies pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// `vdpbf16ps` of AVX-512 BF16.
    Dots,
    /// Tiles of AMX.
    Tiles,
}

/// A panel, and which halves of the left side's sixteen rows need it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Term {
    /// The first number.
    pub panel: *const bf16,
    /// Of rows that need it not, sums may or may not be computed, and weights are zeros.
    pub halves: [bool; 2],
}

impl Pairs {
    /// Whether this machine has it. Asks the system for the matrix unit, which a process has to do once.
    pub fn is_available(self) -> bool {
        static AVAILABLE: OnceLock<[bool; 2]> = OnceLock::new();
        let [dots, tiles] = AVAILABLE.get_or_init(|| {
            let dots = is_x86_feature_detected!("avx512bf16");
            [dots, dots && may_use_tiles()]
        });
        match self {
            Pairs::Dots => *dots,
            Pairs::Tiles => *tiles,
        }
    }

    /// Get ready on this thread; [`Self::finish`] comes afterwards.
    ///
    /// # Safety
    /// It is available.
    pub unsafe fn begin(self) {
        if self == Pairs::Tiles {
            // SAFETY: the caller's promise; the configuration is one of palette 1, and nobody else uses tiles meanwhile.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(readonly, nostack, preserves_flags))
            };
        }
    }

    /// Leave this thread as it was.
    ///
    /// # Safety
    /// [`Self::begin`] came before.
    pub unsafe fn finish(self) {
        if self == Pairs::Tiles {
            // SAFETY: the caller's promise.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        }
    }

    /// `scores[s][i][j] = sum_d tile[i][d] panel_s[d / 2][j][d % 2]`, squares of sixteen rows and columns.
    ///
    /// # Safety
    /// - Between [`Self::begin`] and [`Self::finish`];
    /// - `width` is a multiple of [`DEPTH`]; there are sixteen rows of it at `tile`, panels of as many pairs, and a square for each
    ///   term at `scores`.
    pub unsafe fn scores(self, tile: *const bf16, width: usize, terms: &[Term], scores: *mut f32) {
        debug_assert!(width.is_multiple_of(DEPTH));
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Pairs::Dots => scores_by_dots(tile, width, terms, scores),
                Pairs::Tiles => scores_by_tiles(tile, width, terms, scores),
            }
        }
    }

    /// `out[i][c] += sum_s sum_j weights[s][i][j] panel_s[j / 2][c][j % 2]` for sixteen rows of `width`.
    ///
    /// # Safety
    /// - Between [`Self::begin`] and [`Self::finish`];
    /// - `width` is a multiple of sixteen; there are sixteen rows of it at `out`, a square of weights for each term, and panels of
    ///   eight pairs of `width` columns.
    pub unsafe fn add_sums(self, weights: *const bf16, terms: &[Term], width: usize, out: *mut f32) {
        debug_assert!(width.is_multiple_of(SIDE));
        if terms.is_empty() {
            return;
        }
        let mut column = 0;
        while column < width {
            let registers = (width - column) / SIDE;
            // SAFETY: the caller's promise; the columns lie inside the width.
            column += SIDE
                * unsafe {
                    match (self, registers) {
                        (Pairs::Dots, 1) => sums_by_dots::<1>(weights, terms, width, column, out),
                        (Pairs::Dots, 2 | 4) => sums_by_dots::<2>(weights, terms, width, column, out),
                        (Pairs::Dots, _) => sums_by_dots::<3>(weights, terms, width, column, out),
                        (Pairs::Tiles, 1) => sums_by_tile(weights, terms, width, column, out),
                        (Pairs::Tiles, 2 | 3) => sums_by_two_tiles(weights, terms, width, column, out),
                        (Pairs::Tiles, _) => sums_by_four_tiles(weights, terms, width, column, out),
                    }
                };
        }
    }
}

/// Round `len` numbers, a multiple of sixteen, to nearest, ties to even.
///
/// # Safety
/// [`Pairs::Dots`] is available, and the numbers exist at both places.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn narrow(from: *const f32, to: *mut bf16, len: usize) {
    debug_assert!(len.is_multiple_of(SIDE));
    for i in (0..len).step_by(SIDE) {
        // SAFETY: the caller's promise.
        unsafe {
            let narrowed: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(from.add(i))));
            _mm256_storeu_si256(to.add(i).cast(), narrowed);
        }
    }
}

/// # Safety
/// As for [`Pairs::scores`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn scores_by_dots(tile: *const bf16, width: usize, terms: &[Term], scores: *mut f32) {
    // Three panels of one register and eight rows are 24 sums, with room for their factors in 32 registers.
    for (group, part) in terms.chunks(3).enumerate() {
        for half in (0..2).filter(|&half| part.iter().any(|term| term.halves[half])) {
            let row = half * ROWS;
            // SAFETY: the tile has sixteen rows, and every term has its square.
            unsafe {
                let tile = tile.add(row * width);
                let out = scores.add((3 * group * SIDE + row) * SIDE);
                match *part {
                    [a, b, c] => scores_of([a.panel, b.panel, c.panel], tile, width, out),
                    [a, b] => scores_of([a.panel, b.panel], tile, width, out),
                    [a] => scores_of([a.panel], tile, width, out),
                    _ => unreachable!("chunks of three"),
                }
            }
        }
    }
}

/// Eight rows of `N` squares.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn scores_of<const N: usize>(
    panels: [*const bf16; N],
    tile: *const bf16,
    width: usize,
    out: *mut f32,
) {
    // SAFETY: the caller says that these places exist.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
        for pair in 0..width / 2 {
            let keys = panels.map(|panel| load_pairs(panel.add(pair * 2 * SIDE)));
            for i in 0..ROWS {
                let query = spread_pair(tile.add(i * width + 2 * pair));
                for j in 0..N {
                    sums[i][j] = _mm512_dpbf16_ps(sums[i][j], keys[j], query);
                }
            }
        }
        for i in 0..ROWS {
            for j in 0..N {
                _mm512_storeu_ps(out.add((j * SIDE + i) * SIDE), sums[i][j]);
            }
        }
    }
}

/// `N` registers of columns, for all rows; gives `N`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn sums_by_dots<const N: usize>(
    weights: *const bf16,
    terms: &[Term],
    width: usize,
    column: usize,
    out: *mut f32,
) -> usize {
    for half in 0..2 {
        // SAFETY: the caller says that these places exist.
        unsafe {
            let out = out.add(half * ROWS * width + column);
            let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
            for i in 0..ROWS {
                for j in 0..N {
                    sums[i][j] = _mm512_loadu_ps(out.add(i * width + j * SIDE));
                }
            }
            for (s, term) in terms.iter().enumerate().filter(|(_, term)| term.halves[half]) {
                let weights = weights.add((s * SIDE + half * ROWS) * SIDE);
                for pair in 0..SIDE / 2 {
                    let mut values =
                        [_mm512_setzero_ps(); N].map(|zero| std::mem::transmute::<__m512, __m512bh>(zero));
                    for j in 0..N {
                        values[j] = load_pairs(term.panel.add((pair * width + column + j * SIDE) * 2));
                    }
                    for i in 0..ROWS {
                        let weight = spread_pair(weights.add(i * SIDE + 2 * pair));
                        for j in 0..N {
                            sums[i][j] = _mm512_dpbf16_ps(sums[i][j], values[j], weight);
                        }
                    }
                }
            }
            for i in 0..ROWS {
                for j in 0..N {
                    _mm512_storeu_ps(out.add(i * width + j * SIDE), sums[i][j]);
                }
            }
        }
    }
    N
}

/// # Safety
/// 32 numbers can be read at `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs(from: *const bf16) -> __m512bh {
    // SAFETY: the caller's promise; both types are 512 bits of any value.
    unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
}

/// # Safety
/// Two numbers can be read at `from`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn spread_pair(from: *const bf16) -> __m512bh {
    // SAFETY: as above.
    unsafe { std::mem::transmute(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
}

/// What `ldtilecfg` reads: bytes per row and rows of each tile.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles 0 to 3 hold sums; 4 rows and 5 a panel of depth 32, for scores; 6 rows and 7 a panel of depth 16, for sums over tokens.
static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 32, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 8, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether [`Pairs::Dots`] multiplies twice as many numbers as f32 would. Intel's processors begin one such product per cycle, and two
/// of f32.
pub fn doubles_products() -> bool {
    let [_, ebx, ecx, edx] = cpuid(0, 0);
    [ebx, edx, ecx].map(u32::to_le_bytes) != [*b"Genu", *b"ineI", *b"ntel"]
}

/// Whether the machine has the matrix unit for bfloat16, and the system lets this process use it.
fn may_use_tiles() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    let [most, ..] = cpuid(0, 0);
    most >= 7 && cpuid(7, 0)[3] & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE && asked_for_tiles()
}

/// `eax`, `ebx`, `ecx` and `edx`.
fn cpuid(leaf: u32, part: u32) -> [u32; 4] {
    // SAFETY: every machine of this architecture has the instruction; older compilers do not know that.
    #[allow(unused_unsafe)]
    let found = unsafe { __cpuid_count(leaf, part) };
    [found.eax, found.ebx, found.ecx, found.edx]
}

#[cfg(target_os = "linux")]
fn asked_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: a system call that allows this process some more state per thread, or says no.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn asked_for_tiles() -> bool {
    false
}

/// Squares of scores whose sums are in tiles at once, and registers of columns likewise.
macro_rules! by_tiles {
    ($scores:ident, $sums:ident, $count:literal: $($tile:literal $panel:ident $offset:literal),+) => {
        /// A square for each of some panels.
        ///
        /// # Safety
        /// As for [`Pairs::scores`].
        unsafe fn $scores(tile: *const bf16, width: usize, terms: &[Term; $count], scores: *mut f32) {
            let [$($panel),+] = terms.map(|term| term.panel);
            // SAFETY: tiles are configured, a depth of 32 after the other is read from rows and panels, and the squares are written.
            unsafe {
                asm!(
                    $(concat!("tilezero tmm", $tile),)+
                    "2:",
                    "tileloadd tmm4, [{rows} + {row_bytes}*1]",
                    $(
                        concat!("tileloadd tmm5, [{", stringify!($panel), "} + {line}*1]"),
                        concat!("tdpbf16ps tmm", $tile, ", tmm4, tmm5"),
                        concat!("add {", stringify!($panel), "}, 1024"),
                    )+
                    "add {rows}, 64",
                    "dec {left}",
                    "jnz 2b",
                    $(concat!("tilestored [{out} + {line}*1 + 16*", $offset, "], tmm", $tile),)+
                    $($panel = inout(reg) $panel => _,)+
                    rows = inout(reg) tile => _,
                    row_bytes = in(reg) width * size_of::<bf16>(),
                    line = in(reg) 64usize,
                    left = inout(reg) width / DEPTH => _,
                    out = in(reg) scores,
                    options(nostack),
                );
            }
        }

        /// Some columns of all rows; gives how many registers of them.
        ///
        /// # Safety
        /// As for [`Pairs::add_sums`], and there is a term.
        unsafe fn $sums(
            weights: *const bf16,
            terms: &[Term],
            width: usize,
            column: usize,
            out: *mut f32,
        ) -> usize {
            let row_bytes = width * size_of::<f32>();
            // SAFETY: tiles are configured, weights and panels of a term after the other are read, and the sums read and written.
            unsafe {
                asm!(
                    $(concat!("tileloadd tmm", $tile, ", [{out} + {row_bytes}*1 + ", $offset, "]"),)+
                    "2:",
                    "mov {panel}, [{terms}]",
                    "add {panel}, {column}",
                    "tileloadd tmm6, [{weights} + {weight_bytes}*1]",
                    $(
                        concat!("tileloadd tmm7, [{panel} + {row_bytes}*1 + ", $offset, "]"),
                        concat!("tdpbf16ps tmm", $tile, ", tmm6, tmm7"),
                    )+
                    "add {weights}, 512",
                    "add {terms}, {term_bytes}",
                    "dec {left}",
                    "jnz 2b",
                    $(concat!("tilestored [{out} + {row_bytes}*1 + ", $offset, "], tmm", $tile),)+
                    out = in(reg) out.add(column),
                    row_bytes = in(reg) row_bytes,
                    panel = out(reg) _,
                    terms = inout(reg) terms.as_ptr() => _,
                    term_bytes = const size_of::<Term>(),
                    column = in(reg) column * 2 * size_of::<bf16>(),
                    weights = inout(reg) weights => _,
                    weight_bytes = in(reg) SIDE * size_of::<bf16>(),
                    left = inout(reg) terms.len() => _,
                    options(nostack),
                );
            }
            $count
        }
    };
}

by_tiles!(score_by_tile, sums_by_tile, 1: 0 a 0);
by_tiles!(scores_by_two_tiles, sums_by_two_tiles, 2: 0 a 0, 1 b 64);
by_tiles!(scores_by_four_tiles, sums_by_four_tiles, 4: 0 a 0, 1 b 64, 2 c 128, 3 d 192);

/// # Safety
/// As for [`Pairs::scores`].
unsafe fn scores_by_tiles(tile: *const bf16, width: usize, terms: &[Term], scores: *mut f32) {
    let (fours, rest) = terms.as_chunks();
    let (twos, ones) = rest.as_chunks();
    let mut out = scores;
    // SAFETY: the caller's promise.
    unsafe {
        for four in fours {
            scores_by_four_tiles(tile, width, four, out);
            out = out.add(4 * SIDE * SIDE);
        }
        for two in twos {
            scores_by_two_tiles(tile, width, two, out);
            out = out.add(2 * SIDE * SIDE);
        }
        for one in ones.as_chunks().0 {
            score_by_tile(tile, width, one, out);
        }
    }
}
