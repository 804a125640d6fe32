//! What all of several masks keep.

use super::algebra::Operation;
use super::combination::{Combination, Combine};

/// Marks [`Combination`] as this mask.
#[derive(Debug)]
pub struct Marker;

impl Combine for Marker {
    const NAME: &'static str = "intersection";
    const ABOUT: &'static str = "what all of several masks keep";
    const OPERATION: Operation = Operation::Intersection;
}

/// What all of several masks keep, between patches.
pub type Intersection = Combination<Marker>;
