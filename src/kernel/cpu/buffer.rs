//! Scratch memory that starts where a cache line does, so that no register load of it touches two.

use std::ops::{Deref, DerefMut};

use crate::kernel::element::{Element, Real};

const LINE: usize = 64;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Zeros at first.
#[derive(Debug)]
pub(super) struct Buffer<R> {
    lines: Vec<Line>,
    len: usize,
    kind: std::marker::PhantomData<R>,
}

impl<R: Element> Buffer<R> {
    pub(super) fn zeros(len: usize) -> Self {
        Buffer {
            lines: vec![Line([0; LINE]); (len * size_of::<R>()).div_ceil(LINE)],
            len,
            kind: std::marker::PhantomData,
        }
    }
}

impl<R: Element> Buffer<R> {
    /// Numbers that are written before they are read: NaN in tests, to show when one is not.
    pub(super) fn unset(len: usize) -> Self {
        let mut buffer = Self::zeros(len);
        if cfg!(test) {
            buffer.fill(R::from_acc(R::Acc::from_f64(f64::NAN)));
        }
        buffer
    }
}

impl<R: Element> Deref for Buffer<R> {
    type Target = [R];
    #[inline(always)]
    fn deref(&self) -> &[R] {
        // SAFETY: the lines hold at least `len` numbers, are aligned for them, and any bits make an element.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<R: Element> DerefMut for Buffer<R> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [R] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
