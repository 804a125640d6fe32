//! What the first of several masks keeps and none of the others.

use super::algebra::Operation;
use super::combination::{Combination, Combine};

/// Marks [`Combination`] as this mask.
#[derive(Debug)]
pub struct Marker;

impl Combine for Marker {
    const NAME: &'static str = "difference";
    const ABOUT: &'static str = "what the first of several masks keeps and none of the others";
    const OPERATION: Operation = Operation::Difference;
}

/// What the first of several masks keeps and none of the others, between patches.
pub type Difference = Combination<Marker>;
