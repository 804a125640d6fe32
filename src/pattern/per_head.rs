//! Different masks for different heads.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::one_or_list::OneOrList;
use super::part::{self, Part, as_its_parts};
use super::{Context, Domain, HeadEdges, Pattern, below, head_edges};
use crate::error::{Error, Result};

/// Head h keeps what head h of its own mask keeps.
///
/// `heads` of a mask is a list of head indices, or how many heads take it: then it gets the lowest ones that no list names and no
/// mask before it took. One mask may leave it out and takes all heads that are left. Every head must take exactly one mask.
///
/// Source: this library's own.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct PerHead {
    /// List of `{mask, mask_kwargs, heads}`.
    #[schemars(length(min = 1))]
    masks: Vec<Part>,
}

impl PerHead {
    /// Which of `masks` each head takes.
    fn assignment(&self, num_heads: usize) -> Result<Vec<usize>> {
        let fail =
            |index: usize, message: String| Err(Error::config(format!("masks.{index}.heads"), message));
        let mut taken: Vec<Option<usize>> = vec![None; num_heads];
        for (index, part) in self.masks.iter().enumerate() {
            let Some(OneOrList::List(heads)) = &part.heads else { continue };
            for &head in heads {
                match usize::try_from(head).ok().and_then(|head| taken.get_mut(head)) {
                    None => return fail(index, format!("expected heads 0 to {}, got {head}", num_heads - 1)),
                    Some(Some(other)) => {
                        return fail(index, format!("head {head} already takes masks.{other}"));
                    }
                    Some(free) => *free = Some(index),
                }
            }
        }
        let mut free: Vec<usize> = (0..num_heads).filter(|&head| taken[head].is_none()).collect();
        for (index, part) in self.masks.iter().enumerate() {
            let Some(OneOrList::One(count)) = part.heads else { continue };
            if count > free.len() as i64 {
                return fail(
                    index,
                    format!("asks for {count} heads, but {} of {num_heads} are left", free.len()),
                );
            }
            free.drain(..count as usize).for_each(|head| taken[head] = Some(index));
        }
        if let Some(index) = self.masks.iter().position(|part| part.heads.is_none()) {
            if free.is_empty() {
                return fail(index, format!("none of the {num_heads} heads are left"));
            }
            free.drain(..).for_each(|head| taken[head] = Some(index));
        }
        match taken.iter().copied().collect() {
            Some(assignment) => Ok(assignment),
            None => Err(Error::config("masks", format!("heads {free:?} of {num_heads} take no mask"))),
        }
    }
}

impl Pattern for PerHead {
    const NAME: &'static str = "per_head";
    const ABOUT: &'static str = "different masks for different heads";

    fn resolve(&mut self) -> Result<()> {
        let mut takes_the_rest = None;
        for (index, part) in self.masks.iter().enumerate() {
            let fail = |message: String| Err(Error::config(format!("masks.{index}.heads"), message));
            match (&part.heads, takes_the_rest) {
                (None, Some(other)) => {
                    return fail(format!("missing: masks.{other} takes the heads that are left already"));
                }
                (None, None) => takes_the_rest = Some(index),
                (Some(heads), _) => {
                    if let Some(negative) = heads.values().iter().find(|head| **head < 0) {
                        return fail(format!("expected at least 0, got {negative}"));
                    }
                }
            }
        }
        part::resolve(&mut self.masks)
    }

    as_its_parts!();

    /// Masks over patches and over all tokens may stand side by side, so every part adds the prefix itself.
    fn domain(&self) -> Domain {
        Domain::Tokens
    }

    fn edges(&self, context: &Context) -> Result<HeadEdges> {
        let assignment = self.assignment(context.num_heads)?;
        let part_edges = |(index, part): (usize, &Part)| {
            head_edges(part.pattern(), context).map_err(|error| below(error, &format!("masks.{index}")))
        };
        let parts: Vec<HeadEdges> = self.masks.iter().enumerate().map(part_edges).collect::<Result<_>>()?;
        let of_head = |(head, index): (usize, usize)| {
            let sets = &parts[index];
            Arc::clone(if sets.len() == 1 { &sets[0] } else { &sets[head] })
        };
        Ok(assignment.into_iter().enumerate().map(of_head).collect())
    }
}
