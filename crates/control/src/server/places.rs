//! A limited number of waiting clients, and a limit for each process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So many may wait at a time, and so many of one process.
#[derive(Debug)]
pub(crate) struct Places {
    all: usize,
    each: usize,
    /// Process ids of those who wait, one for each place.
    taken: Mutex<Vec<i32>>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPlace {
    /// All are taken.
    All { limit: usize },
    /// This process has its share.
    Share { limit: usize, process: i32 },
}

/// One place, given back on drop.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    process: i32,
}

impl Places {
    pub(crate) fn new(all: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { all, each, taken: Mutex::default() })
    }

    /// A place for a client of this process.
    pub(crate) fn take(self: &Arc<Self>, process: i32) -> Result<Place, NoPlace> {
        let mut taken = self.taken();
        if taken.len() >= self.all {
            return Err(NoPlace::All { limit: self.all });
        }
        if taken.iter().filter(|other| **other == process).count() >= self.each {
            return Err(NoPlace::Share { limit: self.each, process });
        }
        taken.push(process);
        drop(taken);
        Ok(Place { places: Arc::clone(self), process })
    }

    fn taken(&self) -> MutexGuard<'_, Vec<i32>> {
        // Every change of it is one call.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        if let Some(at) = taken.iter().position(|process| *process == self.process) {
            taken.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_gets_its_share_and_leaves_the_rest_to_others() {
        let places = Places::new(3, 2);
        let mine = [places.take(7).unwrap(), places.take(7).unwrap()];
        let refused = places.take(7).unwrap_err();
        assert_eq!(refused, NoPlace::Share { limit: 2, process: 7 });
        let other = places.take(8).unwrap();
        assert_eq!(places.take(9).unwrap_err(), NoPlace::All { limit: 3 });
        drop(other);
        drop(mine);
        assert!((0..2).map(|_| places.take(7)).collect::<Result<Vec<_>, _>>().is_ok());
        assert!(places.take(7).is_ok(), "what was dropped is free again");
    }
}
