//! Limits the number of waiting clients, in all and per process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The waiter slots of a server.
#[derive(Debug)]
pub(crate) struct WaiterSlots {
    all: usize,
    each: usize,
    /// Client PID of each slot in use.
    taken: Mutex<Vec<i32>>,
}

/// Why no slot is available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoWaiterSlot {
    /// All are in use.
    All { limit: usize },
    /// This process uses its share.
    Share { limit: usize, process: i32 },
}

/// A slot in use, released on drop.
#[derive(Debug)]
pub(crate) struct WaiterSlot {
    slots: Arc<WaiterSlots>,
    process: i32,
}

impl WaiterSlots {
    pub(crate) fn new(all: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { all, each, taken: Mutex::default() })
    }

    /// Takes a slot for a client of `process`.
    pub(crate) fn take(self: &Arc<Self>, process: i32) -> Result<WaiterSlot, NoWaiterSlot> {
        let mut taken = self.taken();
        if taken.len() >= self.all {
            return Err(NoWaiterSlot::All { limit: self.all });
        }
        if taken.iter().filter(|other| **other == process).count() >= self.each {
            return Err(NoWaiterSlot::Share { limit: self.each, process });
        }
        taken.push(process);
        drop(taken);
        Ok(WaiterSlot { slots: Arc::clone(self), process })
    }

    fn taken(&self) -> MutexGuard<'_, Vec<i32>> {
        // Each change is a single call, so the list is consistent after a panic.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for WaiterSlot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken();
        if let Some(at) = taken.iter().position(|process| *process == self.process) {
            taken.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_cannot_take_more_than_its_share() {
        let slots = WaiterSlots::new(3, 2);
        let mine = [slots.take(7).unwrap(), slots.take(7).unwrap()];
        let refused = slots.take(7).unwrap_err();
        assert_eq!(refused, NoWaiterSlot::Share { limit: 2, process: 7 });
        let other = slots.take(8).unwrap();
        assert_eq!(slots.take(9).unwrap_err(), NoWaiterSlot::All { limit: 3 });
        drop(other);
        drop(mine);
        assert!((0..2).map(|_| slots.take(7)).collect::<Result<Vec<_>, _>>().is_ok());
        assert!(slots.take(7).is_ok(), "a dropped slot is free again");
    }
}
