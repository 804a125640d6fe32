//! The entries of a cache that forgets: who joins where, and who has to go.

use std::cmp::Ordering;

use super::decode::{Cache, Visible};
use super::matrix::Matrix;
use crate::error::Result;
use crate::kernel::decode::{Slots, Step, Worth};
use crate::kernel::element::{Element, Real};
use crate::kernel::selection::by_score;
use crate::kernel::view::Output;

/// [`Slots`] that tasks use side by side, every unit by one.
pub(super) struct Kept<'a, T: Element> {
    step: &'a Step<'a, T>,
    keys: Output<'a, T>,
    values: Output<'a, T>,
    positions: Output<'a, i64>,
    worths: Output<'a, T::Acc>,
    lengths: Output<'a, i64>,
    starts: &'a [i64],
    /// Slots of one sample.
    room: usize,
}

impl<'a, T: Element> Kept<'a, T> {
    /// Checked by [`Step::check`].
    pub(super) fn new(step: &'a Step<'a, T>, slots: Slots<'a, T>) -> Result<Self> {
        let [batch, kv_heads, _, dim] = step.k.shape();
        let slots_in_all = slots.positions.len();
        let worths = slots.worths.len();
        Ok(Kept {
            step,
            keys: Output::new("keys", slots.keys, &[slots_in_all, dim])?,
            values: Output::new("values", slots.values, &[slots_in_all, step.v.shape()[3]])?,
            positions: Output::new("positions", slots.positions, &[slots_in_all, 1])?,
            worths: Output::new("worths", slots.worths, &[worths, 1])?,
            lengths: Output::new("lengths", slots.lengths, &[batch * kv_heads, 1])?,
            starts: slots.starts,
            room: slots_in_all.checked_div(batch).unwrap_or(0),
        })
    }

    /// Entries of the longest cache that a token can meet.
    pub(super) fn most_entries(&self) -> usize {
        let [_, kv_heads, tokens, _] = self.step.k.shape();
        let spare = self.step.worth.spare();
        (0..self.lengths.rows())
            .map(|unit| {
                // SAFETY: nobody writes yet.
                let length = unsafe { self.lengths.row_mut(unit)[0] } as usize;
                let capacity = self.step.capacities[unit % kv_heads] as usize;
                capacity.saturating_add(spare).min(length + tokens)
            })
            .max()
            .unwrap_or(0)
    }

    fn first_slot(&self, unit: usize) -> usize {
        let kv_heads = self.starts.len() - 1;
        unit / kv_heads * self.room + self.starts[unit % kv_heads] as usize
    }

    fn capacity(&self, unit: usize) -> usize {
        self.step.capacities[unit % (self.starts.len() - 1)] as usize
    }

    fn position(&self, unit: usize, token: usize) -> i64 {
        let [_, kv_heads, tokens, _] = self.step.k.shape();
        self.step.positions[unit / kv_heads * tokens + token]
    }

    /// The slot, from the unit's first one, of the entry worth least when `newest` is the last token.
    ///
    /// # Safety
    /// Nobody else uses the unit, and it has `len >= 1` entries.
    unsafe fn least(&self, unit: usize, len: usize, newest: i64) -> usize {
        let (first, step) = (self.first_slot(unit), self.step);
        // SAFETY: the unit's slots are the caller's.
        let positions = unsafe { self.positions.rows_mut(first..first + len) };
        let worths = match step.worth {
            Worth::Recency => &[][..],
            // SAFETY: as above.
            _ => unsafe { self.worths.rows_mut(first..first + len) },
        };
        let is_safe = |slot: usize| {
            let position = positions[slot];
            position < step.sinks || newest.saturating_sub(position) < step.recent
        };
        // Less means worth more.
        let compare = |a: usize, b: usize| {
            let by_worth = match step.worth {
                Worth::Recency => positions[b].cmp(&positions[a]),
                _ => by_score(worths[a], worths[b]).then(positions[a].cmp(&positions[b])),
            };
            is_safe(b).cmp(&is_safe(a)).then(by_worth)
        };
        (1..len).fold(0, |least, slot| if compare(slot, least) == Ordering::Greater { slot } else { least })
    }

    /// Put token `token` into `slot`.
    ///
    /// # Safety
    /// Nobody else uses the unit, and the slot is one of its own.
    unsafe fn write(&self, unit: usize, token: usize, slot: usize) {
        let kv_heads = self.starts.len() - 1;
        let place = self.first_slot(unit) + slot;
        // SAFETY: the slot is the caller's; the token exists.
        unsafe {
            let mut squares = T::Acc::ZERO;
            let from = Matrix::of(&self.step.k, unit / kv_heads, unit % kv_heads);
            for (d, to) in self.keys.row_mut(place).iter_mut().enumerate() {
                *to = from.at(token, d);
                squares += to.to_acc() * to.to_acc();
            }
            let from = Matrix::of(&self.step.v, unit / kv_heads, unit % kv_heads);
            for (d, to) in self.values.row_mut(place).iter_mut().enumerate() {
                *to = from.at(token, d);
            }
            self.positions.row_mut(place)[0] = self.position(unit, token);
            // The square of a norm orders as the norm does.
            let worth = match self.step.worth {
                Worth::Recency => return,
                Worth::Attention => T::Acc::ZERO,
                Worth::LowNorm => -squares,
                Worth::HighNorm => squares,
            };
            self.worths.row_mut(place)[0] = worth;
        }
    }

    /// Forget the entry in `slot`; that in slot `last` takes its place.
    ///
    /// # Safety
    /// Nobody else uses the unit, and both slots are its own.
    unsafe fn forget(&self, unit: usize, slot: usize, last: usize) {
        if slot == last {
            return;
        }
        let first = self.first_slot(unit);
        // SAFETY: both rows are the caller's, and they differ.
        unsafe {
            self.keys.row_mut(first + slot).copy_from_slice(self.keys.row_mut(first + last));
            self.values.row_mut(first + slot).copy_from_slice(self.values.row_mut(first + last));
            self.positions.row_mut(first + slot)[0] = self.positions.row_mut(first + last)[0];
            if self.step.worth != Worth::Recency {
                self.worths.row_mut(first + slot)[0] = self.worths.row_mut(first + last)[0];
            }
        }
    }
}

impl<T: Element> Cache<T> for Kept<'_, T> {
    unsafe fn arrive(&self, unit: usize, token: usize) -> Option<Visible<'_, T>> {
        let newest = self.position(unit, token);
        if newest < 0 {
            return None;
        }
        // SAFETY: the unit is the caller's; `Step::check` found room for all its tokens.
        unsafe {
            let length = &mut self.lengths.row_mut(unit)[0];
            let full = *length as usize == self.capacity(unit);
            if full && self.step.worth == Worth::Recency {
                // The token that joins counts among the recent ones.
                self.write(unit, token, self.least(unit, *length as usize, newest));
            } else {
                self.write(unit, token, *length as usize);
                *length += 1;
            }
            let (first, len) = (self.first_slot(unit), *length as usize);
            let (keys, values) = (self.keys.view(first..first + len), self.values.view(first..first + len));
            let since = self
                .step
                .window
                .map(|window| (self.positions.read_rows(first..first + len), newest.saturating_sub(window)));
            Some(Visible { keys: Matrix::of(&keys, 0, 0), values: Matrix::of(&values, 0, 0), len, since })
        }
    }

    unsafe fn weights(&self, unit: usize, len: usize) -> Option<&mut [T::Acc]> {
        let first = self.first_slot(unit);
        // SAFETY: the unit is the caller's.
        (self.step.worth == Worth::Attention).then(|| unsafe { self.worths.rows_mut(first..first + len) })
    }

    unsafe fn leave(&self, unit: usize, token: usize) {
        // SAFETY: the unit is the caller's.
        unsafe {
            let length = &mut self.lengths.row_mut(unit)[0];
            let len = *length as usize;
            if len > self.capacity(unit) {
                self.forget(unit, self.least(unit, len, self.position(unit, token)), len - 1);
                *length -= 1;
            }
        }
    }
}
