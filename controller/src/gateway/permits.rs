//! How many requests of one key run at once.
//!
//! Soft state: each controller counts for itself, and nothing of it outlives the process. A permit is held until the
//! turn has ended, whatever became of the client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use izar_common::id::KeyId;

/// Counts running requests by key. Holds only keys that have one.
#[derive(Debug, Clone, Default)]
pub struct Permits(Arc<Mutex<HashMap<KeyId, u32>>>);

/// One running request of a key.
#[derive(Debug)]
pub struct Permit {
    key: KeyId,
    permits: Permits,
}

impl Permits {
    /// Takes one of `limit` places, or `None` if all are taken.
    pub fn take(&self, key: &KeyId, limit: u32) -> Option<Permit> {
        let mut counts = self.0.lock().expect("no panic while counts are held");
        match counts.get_mut(key) {
            Some(count) if *count >= limit => return None,
            Some(count) => *count += 1,
            None if limit == 0 => return None,
            None => drop(counts.insert(key.clone(), 1)),
        }
        Some(Permit { key: key.clone(), permits: self.clone() })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.permits.0.lock().expect("no panic while counts are held");
        let count = counts.get_mut(&self.key).expect("a permit is counted");
        *count -= 1;
        if *count == 0 {
            counts.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_its_own_bound_and_leaves_nothing_behind() {
        let permits = Permits::default();
        let (a, b) = (KeyId::new("a").unwrap(), KeyId::new("b").unwrap());
        let first = permits.take(&a, 2).unwrap();
        let second = permits.take(&a, 2).unwrap();
        assert!(permits.take(&a, 2).is_none());
        assert!(permits.take(&b, 1).is_some());
        drop(first);
        assert!(permits.take(&a, 2).is_some());
        drop(second);
        assert!(permits.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_lowered_bound_refuses_until_enough_have_ended() {
        let permits = Permits::default();
        let key = KeyId::new("a").unwrap();
        let held: Vec<_> = (0..3).map(|_| permits.take(&key, 3).unwrap()).collect();
        assert!(permits.take(&key, 1).is_none());
        drop(held);
        assert!(permits.take(&key, 1).is_some());
    }
}
