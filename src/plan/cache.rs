//! A bounded, content-keyed cache of plans. It is only an optimisation: a miss rebuilds the same plan.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Plan;
use crate::error::Result;

/// At most this many plans are kept.
const MAX_PLANS: usize = 512;
/// At most this many bytes of edges are kept; a larger single plan is used but not kept.
const MAX_BYTES: usize = 512 << 20;

/// Values that hold a plan, by (canonical mask text, queries, keys); least recently used first out.
#[derive(Debug)]
pub struct PlanCache<T> {
    entries: Mutex<Entries<T>>,
}

type Key = (String, usize, usize);

#[derive(Debug)]
struct Entries<T> {
    plans: HashMap<Key, (Arc<T>, u64)>,
    bytes: usize,
    clock: u64,
}

impl<T> Default for PlanCache<T> {
    fn default() -> Self {
        PlanCache { entries: Mutex::new(Entries { plans: HashMap::new(), bytes: 0, clock: 0 }) }
    }
}

impl<T: AsRef<Plan>> PlanCache<T> {
    /// What `spec` means at this size, built by `build` on a miss.
    ///
    /// # Errors
    /// Whatever `build` returns; failures are not cached.
    pub fn get_or_build(
        &self,
        spec: &str,
        num_queries: usize,
        num_keys: usize,
        build: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let key = (spec.to_owned(), num_queries, num_keys);
        if let Some(plan) = self.lock().get(&key) {
            return Ok(plan);
        }
        // Not under the lock: two threads may build the same plan, but neither waits for another's.
        log::debug!("building a plan for {num_queries} x {num_keys}: {spec}");
        let plan = Arc::new(build()?);
        self.lock().insert(key, &plan);
        Ok(plan)
    }

    /// Forget everything.
    pub fn clear(&self) {
        let mut entries = self.lock();
        entries.plans.clear();
        entries.bytes = 0;
    }

    /// Number of plans held.
    pub fn len(&self) -> usize {
        self.lock().plans.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Entries<T>> {
        // Entries are replaced whole, so a panic elsewhere cannot leave them half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: AsRef<Plan>> Entries<T> {
    fn get(&mut self, key: &Key) -> Option<Arc<T>> {
        self.clock += 1;
        let (plan, used) = self.plans.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(plan))
    }

    fn insert(&mut self, key: Key, plan: &Arc<T>) {
        let bytes = plan.as_ref().as_ref().bytes();
        if bytes > MAX_BYTES {
            return;
        }
        self.clock += 1;
        if let Some((old, _)) = self.plans.insert(key, (Arc::clone(plan), self.clock)) {
            self.bytes -= old.as_ref().as_ref().bytes();
        }
        self.bytes += bytes;
        while self.plans.len() > MAX_PLANS || self.bytes > MAX_BYTES {
            let oldest = self.plans.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            let Some((plan, _)) = oldest.and_then(|key| self.plans.remove(&key)) else { break };
            self.bytes -= plan.as_ref().as_ref().bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::edges::EdgeSet;

    #[derive(Debug)]
    struct Held(Plan);

    impl AsRef<Plan> for Held {
        fn as_ref(&self) -> &Plan {
            &self.0
        }
    }

    fn plan(side: usize) -> Result<Held> {
        Plan::new(&[Arc::new(EdgeSet::builder(side, side)?.diagonal(0, 0..side, 0..side).build().unwrap())])
            .map(Held)
    }

    #[test]
    fn the_same_content_is_built_once_and_sizes_are_told_apart() {
        let cache = PlanCache::default();
        let first = cache.get_or_build("a", 4, 4, || plan(4)).unwrap();
        let again = cache.get_or_build("a", 4, 4, || panic!("must not build")).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        assert_eq!(cache.get_or_build("a", 5, 5, || plan(5)).unwrap().0.num_keys(), 5);
    }

    #[test]
    fn the_cache_is_bounded_and_forgets_the_least_recently_used() {
        let cache = PlanCache::default();
        for index in 0..=MAX_PLANS {
            cache.get_or_build("keep", 2, 2, || plan(2)).unwrap();
            cache.get_or_build(&index.to_string(), 2, 2, || plan(2)).unwrap();
        }
        assert_eq!(cache.len(), MAX_PLANS);
        cache.get_or_build("keep", 2, 2, || panic!("recently used, must be kept")).unwrap();
        let mut rebuilt = false;
        cache
            .get_or_build("0", 2, 2, || {
                rebuilt = true;
                plan(2)
            })
            .unwrap();
        assert!(rebuilt);
        cache.clear();
        assert!(cache.is_empty());
    }
}
