//! What any of several masks keeps.

use super::algebra::Operation;
use super::combination::{Combination, Combine};

/// Marks [`Combination`] as this mask.
#[derive(Debug)]
pub struct Marker;

impl Combine for Marker {
    const NAME: &'static str = "union";
    const ABOUT: &'static str = "what any of several masks keeps";
    const OPERATION: Operation = Operation::Union;
}

/// What any of several masks keeps, between patches.
pub type Union = Combination<Marker>;
