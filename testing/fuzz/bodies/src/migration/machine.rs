//! Two VMMs that check how they are called.

use std::sync::Arc;
use std::time::Duration;

use migration::cpu::{CpuFeatures, FeatureWord};
use migration::dirty::DirtyBitmap;
use migration::layout::GuestLayout;
use migration::traits::{
    Description, DestinationMachine, FreePages, MachineError, ReadPages, SourceMachine,
    StateSection, WritePages,
};
use page_set::{PageRange, PageSet};

/// Memory limit of a guest, in bytes.
pub(super) const MAX_BYTES: u64 = 256 << 12;
pub(super) const MACHINE: &str = "fuzz";

pub(super) fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(start, pages).expect("a small range")
}

pub(super) fn features(bits: u64) -> CpuFeatures {
    CpuFeatures { vendor: "v".to_owned(), words: vec![FeatureWord { id: 1, bits }] }
}

struct Checked(GuestLayout);

impl WritePages for Checked {
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError> {
        assert_eq!(bytes.len() as u64, pages.pages() * 4096);
        assert!(self.0.holds(pages) && !pages.is_empty(), "{pages:?} is outside");
        Ok(())
    }

    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError> {
        assert!(self.0.holds(pages) && !pages.is_empty(), "{pages:?} is outside");
        Ok(())
    }
}

/// Accepts any small guest.
#[derive(Debug, Default)]
pub(super) struct Destination {
    pub(super) made: bool,
    pub(super) loaded: bool,
    pub(super) runs: bool,
    pub(super) cannot_resume: bool,
}

impl DestinationMachine for Destination {
    fn cpu_features(&self) -> CpuFeatures {
        features(0xff)
    }

    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError> {
        assert!(description.layout.pages() * 4096 <= MAX_BYTES);
        assert_eq!(description.machine, MACHINE);
        assert!(!self.made);
        self.made = true;
        Ok(Arc::new(Checked(description.layout.clone())))
    }

    fn load_state(&mut self, _state: Vec<StateSection>) -> Result<(), MachineError> {
        assert!(self.made && !self.loaded);
        self.loaded = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        assert!(self.loaded && !self.runs);
        if self.cannot_resume {
            return Err("it cannot run".into());
        }
        self.runs = true;
        Ok(())
    }

    fn destroy(&mut self) {
        assert!(!self.runs);
        (self.made, self.loaded) = (false, false);
    }
}

/// A guest of a few pages that does nothing.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) runs: bool,
    pub(super) relinquished: bool,
}

struct Some;

impl ReadPages for Some {
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError> {
        assert!(pages.is_within(range(0, 8)));
        out.fill(u8::try_from(pages.start() & 3)?);
        Ok(())
    }
}

impl SourceMachine for Source {
    fn describe(&self) -> Result<Description, MachineError> {
        let layout = GuestLayout::new(vec![range(0, 8)])?;
        Ok(Description { layout, cpu: features(1), machine: MACHINE.to_owned(), config: vec![1] })
    }

    fn memory(&self) -> Arc<dyn ReadPages> {
        Arc::new(Some)
    }

    fn start_dirty_log(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn take_dirty(&mut self, _into: &mut DirtyBitmap) -> Result<(), MachineError> {
        Ok(())
    }

    fn stop_dirty_log(&mut self) {}

    fn drop_caches(&mut self, _wait: Duration) -> Result<(), MachineError> {
        Ok(())
    }

    fn free_pages(&mut self, _wait: Duration) -> Result<Option<FreePages>, MachineError> {
        Ok(Option::Some(FreePages { pages: PageSet::from(range(4, 1)), pattern: 7 }))
    }

    fn free_pages_done(&mut self) {}

    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError> {
        Ok(PageSet::from(range(6, 1)))
    }

    fn set_throttle(&mut self, _percent: u8) {}

    fn pause(&mut self) -> Result<(), MachineError> {
        assert!(self.runs);
        self.runs = false;
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError> {
        assert!(!self.runs);
        Ok(vec![StateSection { name: "cpu0".to_owned(), version: 1, bytes: vec![1, 2, 3] }])
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        assert!(!self.runs && !self.relinquished);
        self.runs = true;
        Ok(())
    }

    fn relinquish(&mut self) {
        assert!(!self.runs && !self.relinquished);
        self.relinquished = true;
    }
}
