//! Models of a guest and two VMMs, in memory only.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, RwLock, mpsc};
use std::time::{Duration, Instant};

use migration::cpu::{CpuFeatures, FeatureWord};
use migration::dirty::DirtyBitmap;
use migration::layout::GuestLayout;
use migration::link::Accept;
use migration::traits::{
    Description, DestinationMachine, FreePages, MachineError, ReadPages, SourceMachine,
    StateSection, WritePages,
};
use migration::{DestinationConfig, SourceConfig};
use page_set::{PageRange, PageSet};

pub mod fault;

pub const PAGE: usize = 4096;
pub const MACHINE: &str = "model";

/// The state of the guest across both sides.
#[derive(Debug, Default)]
pub struct World {
    pub source_runs: AtomicBool,
    pub destination_runs: AtomicBool,
    pub ran_there: AtomicBool,
    pub relinquished: AtomicBool,
    /// Owner of an exclusive resource, such as the lock on a disk.
    pub disk: AtomicU8,
}

pub const SOURCE: u8 = 1;
pub const DESTINATION: u8 = 2;
pub const THIRD_PARTY: u8 = 3;

impl World {
    pub fn check(&self) {
        let both =
            self.source_runs.load(Ordering::SeqCst) && self.destination_runs.load(Ordering::SeqCst);
        assert!(!both, "two guests run");
    }

    fn take_disk(&self, who: u8) -> Result<(), MachineError> {
        match self.disk.compare_exchange(0, who, Ordering::SeqCst, Ordering::SeqCst) {
            Err(other) if other != who => Err(format!("{other} has the disk").into()),
            _ => Ok(()),
        }
    }

    fn release_disk(&self, who: u8) {
        let _ = self.disk.compare_exchange(who, 0, Ordering::SeqCst, Ordering::SeqCst);
    }
}

pub fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(start, pages).unwrap()
}

pub fn layout() -> GuestLayout {
    GuestLayout::new(vec![range(0, 200), range(300, 130)]).unwrap()
}

fn features(bits: u64) -> CpuFeatures {
    CpuFeatures { vendor: "model".to_owned(), words: vec![FeatureWord { id: 1, bits }] }
}

pub fn description() -> Description {
    Description {
        layout: layout(),
        cpu: features(3),
        machine: MACHINE.to_owned(),
        config: b"two CPUs".to_vec(),
    }
}

/// Memory by page number, with its dirty log.
#[derive(Debug)]
pub struct TestMemory {
    pub bytes: RwLock<Vec<u8>>,
    log: Mutex<BTreeSet<u64>>,
    /// Writes that the guest still makes, one at each read.
    writes: AtomicU64,
    seed: AtomicU64,
    world: Arc<World>,
}

/// Pages that the guest does not use, with old contents.
pub const FREE: (u64, u64) = (100, 60);
pub const BALLOONED: (u64, u64) = (350, 20);
const ZEROS: (u64, u64) = (40, 30);
pub const POISON: u32 = 0xaaaa_aaaa;

impl TestMemory {
    pub fn empty(world: &Arc<World>) -> Arc<Self> {
        Arc::new(Self {
            bytes: RwLock::new(vec![0; 430 * PAGE]),
            log: Mutex::default(),
            writes: AtomicU64::new(0),
            seed: AtomicU64::new(1),
            world: Arc::clone(world),
        })
    }

    /// Every page has its own contents, except zero pages. Free pages have `pattern` if it is not
    /// 0.
    pub fn full(world: &Arc<World>, writes: u64, pattern: u32) -> Arc<Self> {
        let memory = Self::empty(world);
        memory.writes.store(writes, Ordering::Relaxed);
        {
            let mut bytes = memory.bytes.write().unwrap();
            for (number, page) in bytes.chunks_mut(PAGE).enumerate() {
                let number = number as u64;
                let inside = |(start, pages)| range(start, pages).contains(number);
                if inside(FREE) && pattern != 0 {
                    page.chunks_mut(4)
                        .for_each(|word| word.copy_from_slice(&pattern.to_le_bytes()));
                } else if !inside(ZEROS) {
                    page.chunks_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
                    page[0] = 1;
                }
            }
        }
        memory
    }

    fn random(&self) -> u64 {
        let old = self.seed.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (old ^ old >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    }

    /// The guest writes to one of its pages, if it runs and has writes left. Sometimes it clears a
    /// page, and sometimes it allocates one that it reported as free.
    fn guest_writes(&self) {
        let runs = self.world.source_runs.load(Ordering::SeqCst);
        let left = self.writes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1).filter(|_| runs)
        });
        if left.is_err() {
            return;
        }
        let value = self.random();
        let page = match value % 6 {
            0 => FREE.0 + value / 8 % FREE.1,
            1 => 300 + value / 8 % 40,
            _ => value / 8 % 100,
        };
        let mut bytes = self.bytes.write().unwrap();
        let at = page as usize * PAGE;
        if value.is_multiple_of(5) {
            bytes[at..at + PAGE].fill(0);
        } else {
            bytes[at + 16..at + 24].copy_from_slice(&value.to_le_bytes());
        }
        self.log.lock().unwrap().insert(page);
    }
}

impl ReadPages for TestMemory {
    fn read_pages(&self, pages: PageRange, out: &mut [u8]) -> Result<(), MachineError> {
        self.guest_writes();
        let at = pages.start() as usize * PAGE;
        out.copy_from_slice(&self.bytes.read().unwrap()[at..at + out.len()]);
        self.guest_writes();
        Ok(())
    }
}

impl WritePages for TestMemory {
    fn write_pages(&self, pages: PageRange, bytes: &[u8]) -> Result<(), MachineError> {
        assert_eq!(bytes.len() as u64, pages.pages() * 4096);
        assert!(layout().holds(pages));
        let at = pages.start() as usize * PAGE;
        self.bytes.write().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn zero_pages(&self, pages: PageRange) -> Result<(), MachineError> {
        self.write_pages(pages, &vec![0; pages.pages() as usize * PAGE])
    }
}

/// The source's VMM.
#[derive(Debug)]
pub struct Source {
    pub world: Arc<World>,
    pub memory: Arc<TestMemory>,
    /// Pages written since the dirty log was started.
    pub written: BTreeSet<u64>,
    pub pattern: u32,
    pub logging: bool,
    pub throttle: u8,
    pub state_bytes: usize,
    pub fails_at: Option<&'static str>,
    /// Takes the disk as soon as the source releases it.
    pub thief: bool,
    /// A file that must not exist yet when the guest is resumed.
    pub absent_at_resume: Option<PathBuf>,
    /// A file that another process creates while the guest is paused.
    pub takes: Option<PathBuf>,
    /// Calls of `before_pause` since the last pause.
    pub before_pause_calls: usize,
}

impl Source {
    pub fn new(world: &Arc<World>, writes: u64, pattern: u32) -> Self {
        world.source_runs.store(true, Ordering::SeqCst);
        world.take_disk(SOURCE).unwrap();
        Self {
            world: Arc::clone(world),
            memory: TestMemory::full(world, writes, pattern),
            written: BTreeSet::new(),
            pattern,
            logging: false,
            throttle: 0,
            state_bytes: 300_000,
            fails_at: None,
            thief: false,
            absent_at_resume: None,
            takes: None,
            before_pause_calls: 0,
        }
    }

    pub fn runs(&self) -> bool {
        self.world.source_runs.load(Ordering::SeqCst)
    }

    fn step(&self, what: &'static str) -> Result<(), MachineError> {
        if self.fails_at == Some(what) { Err(format!("{what} fails").into()) } else { Ok(()) }
    }
}

pub fn state(bytes: usize) -> Vec<StateSection> {
    let bytes = (0..bytes).map(|i| (i * 7 / 3) as u8).collect();
    let empty = StateSection { name: "clock".to_owned(), version: 1, bytes: vec![] };
    vec![StateSection { name: "cpu0".to_owned(), version: 3, bytes }, empty]
}

impl SourceMachine for Source {
    fn describe(&self) -> Result<Description, MachineError> {
        self.step("describe").map(|()| description())
    }

    fn memory(&self) -> Arc<dyn ReadPages> {
        Arc::clone(&self.memory) as _
    }

    fn start_dirty_log(&mut self) -> Result<(), MachineError> {
        self.step("log")?;
        self.logging = true;
        self.memory.log.lock().unwrap().clear();
        Ok(())
    }

    fn take_dirty(&mut self, into: &mut DirtyBitmap) -> Result<(), MachineError> {
        self.step("dirty")?;
        assert!(self.logging);
        for page in std::mem::take(&mut *self.memory.log.lock().unwrap()) {
            self.written.insert(page);
            into.insert(range(page, 1));
        }
        Ok(())
    }

    fn stop_dirty_log(&mut self) {
        self.logging = false;
    }

    fn drop_caches(&mut self, _wait: Duration) -> Result<(), MachineError> {
        Ok(())
    }

    fn free_pages(&mut self, _wait: Duration) -> Result<Option<FreePages>, MachineError> {
        self.step("free")?;
        assert!(self.logging, "queried before the dirty log was started");
        let mut pages = PageSet::from_iter([range(FREE.0, FREE.1), range(10_000, 5)]);
        for page in self.written.iter().chain(&*self.memory.log.lock().unwrap()) {
            pages.remove(range(*page, 1));
        }
        Ok(Some(FreePages { pages, pattern: self.pattern }))
    }

    fn free_pages_done(&mut self) {}

    fn ballooned_pages(&mut self) -> Result<PageSet, MachineError> {
        Ok(PageSet::from(range(BALLOONED.0, BALLOONED.1)))
    }

    fn set_throttle(&mut self, percent: u8) {
        self.throttle = percent;
    }

    fn before_connect(&mut self) -> Result<(), MachineError> {
        assert!(self.runs());
        self.step("before connecting")
    }

    fn before_pause(&mut self) -> Result<(), MachineError> {
        assert!(self.runs());
        self.before_pause_calls += 1;
        self.step("before pause")
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.step("pause")?;
        assert!(std::mem::take(&mut self.before_pause_calls) == 1, "before_pause was not called");
        if let Some(path) = &self.takes {
            std::fs::write(path, b"another's")?;
        }
        self.world.source_runs.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<StateSection>, MachineError> {
        assert!(!self.runs());
        self.step("save").map(|()| state(self.state_bytes))
    }

    fn prepare_switchover(&mut self) -> Result<(), MachineError> {
        assert!(!self.runs());
        self.world.release_disk(SOURCE);
        if self.thief {
            self.world.take_disk(THIRD_PARTY).unwrap();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.step("resume")?;
        assert!(
            self.absent_at_resume.as_ref().is_none_or(|path| !path.exists()),
            "the guest waited for the file"
        );
        self.world.take_disk(SOURCE)?;
        assert!(!self.world.ran_there.load(Ordering::SeqCst), "it already ran at the destination");
        assert!(!self.world.relinquished.load(Ordering::SeqCst), "it was relinquished");
        self.world.source_runs.store(true, Ordering::SeqCst);
        self.world.check();
        Ok(())
    }

    fn relinquish(&mut self) {
        assert!(!self.runs());
        self.world.release_disk(SOURCE);
        self.world.relinquished.store(true, Ordering::SeqCst);
    }
}

/// The destination's VMM.
#[derive(Debug)]
pub struct Destination {
    pub world: Arc<World>,
    pub memory: Option<Arc<TestMemory>>,
    pub loaded: bool,
    pub features: u64,
    pub state_bytes: usize,
    pub fails_at: Option<&'static str>,
    /// Blocks until the guest runs at its source again.
    pub dawdles: bool,
}

impl Destination {
    pub fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            memory: None,
            loaded: false,
            features: 7,
            state_bytes: 300_000,
            fails_at: None,
            dawdles: false,
        }
    }

    pub fn runs(&self) -> bool {
        self.world.destination_runs.load(Ordering::SeqCst)
    }

    fn step(&self, what: &'static str) -> Result<(), MachineError> {
        if self.fails_at == Some(what) { Err(format!("{what} fails").into()) } else { Ok(()) }
    }
}

impl DestinationMachine for Destination {
    fn cpu_features(&self) -> CpuFeatures {
        features(self.features)
    }

    fn create(&mut self, description: &Description) -> Result<Arc<dyn WritePages>, MachineError> {
        self.step("create")?;
        assert_eq!(*description, self::description());
        let memory = TestMemory::empty(&self.world);
        self.memory = Some(Arc::clone(&memory));
        Ok(memory)
    }

    fn load_state(&mut self, sections: Vec<StateSection>) -> Result<(), MachineError> {
        self.step("load")?;
        while self.dawdles && !self.world.source_runs.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        assert_eq!(sections, state(self.state_bytes));
        self.loaded = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.step("resume")?;
        assert!(self.loaded && self.memory.is_some());
        self.world.take_disk(DESTINATION)?;
        self.world.destination_runs.store(true, Ordering::SeqCst);
        self.world.ran_there.store(true, Ordering::SeqCst);
        self.world.check();
        Ok(())
    }

    fn destroy(&mut self) {
        assert!(!self.runs(), "destroyed while the guest runs");
        self.world.release_disk(DESTINATION);
        self.memory = None;
        self.loaded = false;
    }
}

/// Checks that the destination has everything that the guest may read.
pub fn compare(source: &Source, destination: &Destination) {
    let (here, there) = (&source.memory, destination.memory.as_ref().expect("memory"));
    let (here, there) = (here.bytes.read().unwrap(), there.bytes.read().unwrap());
    let each = |region: &PageRange| region.start()..region.end();
    for page in layout().regions().iter().flat_map(each) {
        let at = page as usize * PAGE;
        let (was, is) = (&here[at..at + PAGE], &there[at..at + PAGE]);
        let inside = |(start, pages)| range(start, pages).contains(page);
        let skipped = (inside(FREE) && source.pattern == 0) || inside(BALLOONED);
        if skipped && !source.written.contains(&page) {
            assert!(is.iter().all(|byte| *byte == 0), "page {page} was not skipped");
        } else {
            assert!(was == is, "page {page} differs");
        }
    }
}

/// Connections within this process.
pub struct Incoming<L>(pub Receiver<L>);

impl<L: migration::link::Link> Accept for Incoming<L> {
    type Link = L;

    fn accept(&mut self, deadline: Option<Instant>) -> io::Result<L> {
        let time = deadline
            .map_or(Duration::from_secs(20), |end| end.saturating_duration_since(Instant::now()));
        self.0.recv_timeout(time).map_err(|_| io::ErrorKind::TimedOut.into())
    }
}

/// A connector, and the acceptor of the other ends.
pub fn network() -> (impl FnMut() -> io::Result<UnixStream>, Incoming<UnixStream>) {
    let (there, incoming) = mpsc::channel();
    (connector(there), Incoming(incoming))
}

pub fn connector(there: Sender<UnixStream>) -> impl FnMut() -> io::Result<UnixStream> {
    move || {
        let (mine, theirs) = UnixStream::pair()?;
        there.send(theirs).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(mine)
    }
}

/// Long enough for a busy machine.
const STALL: Duration = Duration::from_secs(10);

pub fn quick_source() -> SourceConfig {
    SourceConfig { connections: 2, stall: STALL, stall_paused: STALL, ..SourceConfig::default() }
}

pub fn quick_destination() -> DestinationConfig {
    DestinationConfig {
        stall: STALL,
        stall_paused: STALL,
        deadline: Some(Instant::now() + Duration::from_secs(20)),
        ..DestinationConfig::new(MACHINE)
    }
}
