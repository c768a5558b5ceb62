//! A random walk: what is done to a guest and its balloon, with a model of what
//! the guest must then hold.

use std::collections::BTreeMap;

use control::ReleaseMode;
use fastrand::Rng;

use crate::bed::{Bed, PAGES_PER_MIB, REPORTED_MIB, bytes, pages};

/// Part of the guest's memory that the walk leaves alone: a guest that runs short
/// of memory takes pages back, which is another test's matter.
const RESERVE_DIVISOR: u64 = 8;

/// Small changes of the target, in pages: within one of the host's huge pages
/// and over a few.
const NUDGE_PAGES: u32 = 2000;

/// A file's size in MiB, and the seed of its pattern.
type File = (u64, u64);

/// One thing that a walk does.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A new target, reached or not before the next step.
    Target,
    /// Up and down again before the host can have released all, and the guest
    /// uses its pages at once.
    Bounce,
    /// A small change.
    Nudge,
    /// A new file takes some of the memory that is left.
    Fill,
    /// A file's memory is freed, and another one's takes its place.
    Refill,
    Drop,
    Verify,
    Mode,
    /// The driver goes, with what it holds, and comes back.
    Reload,
    /// Free memory falls into pieces, or is put together again.
    Fragment,
}

/// Steps with how often each is taken.
const STEPS: [(Step, u32); 10] = [
    (Step::Target, 5),
    (Step::Bounce, 5),
    (Step::Nudge, 3),
    (Step::Fill, 4),
    (Step::Refill, 3),
    (Step::Drop, 3),
    (Step::Verify, 2),
    (Step::Mode, 3),
    (Step::Reload, 1),
    (Step::Fragment, 1),
];

/// A guest with its driver loaded, and what its files hold.
pub(crate) struct Walk<'a, 'b> {
    bed: &'a mut Bed<'b>,
    rng: Rng,
    /// What files and balloon may hold together, in MiB.
    usable_mib: u64,
    /// What the walk leaves alone, in MiB.
    reserve_mib: u64,
    files: BTreeMap<String, File>,
    files_made: u64,
    /// The target.
    target: u32,
    /// The most that the balloon may still hold on its way there.
    peak: u32,
    fragmented: bool,
}

impl<'a, 'b> Walk<'a, 'b> {
    /// A walk that begins with an empty balloon and no files.
    /// `free_mib` of the guest's memory are free when nothing is held for the host,
    /// which may be so at any moment.
    pub(crate) fn new(bed: &'a mut Bed<'b>, seed: u64, free_mib: u64) -> Self {
        let reserve_mib = free_mib / RESERVE_DIVISOR;
        let usable_mib = free_mib - reserve_mib - REPORTED_MIB;
        Self {
            bed,
            rng: Rng::with_seed(seed),
            usable_mib,
            reserve_mib,
            files: BTreeMap::new(),
            files_made: 0,
            target: 0,
            peak: 0,
            fragmented: false,
        }
    }

    /// Does one thing.
    pub(crate) fn step(&mut self) {
        // Room for balloons: files alone are soon all there is.
        while self.files_mib() > self.usable_mib / 2 {
            self.drop_one();
        }
        match self.choose() {
            Step::Target => self.new_target(),
            Step::Bounce => self.bounce(),
            Step::Nudge => self.nudge(),
            Step::Fill => self.fill_some(),
            Step::Refill => self.refill(),
            Step::Drop => self.drop_one(),
            Step::Verify => self.verify_one(),
            Step::Mode => self.switch_mode(),
            Step::Reload => self.reload(),
            Step::Fragment => self.fragment(),
        }
    }

    /// Waits for the balloon and verifies every byte of every file.
    pub(crate) fn check(&mut self) {
        println!("check at {} files, target {}", self.files.len(), self.target);
        self.settle();
        for (name, (mib, seed)) in &self.files {
            self.bed.verify(name, *mib, *seed);
        }
    }

    /// Empties the balloon, verifies everything once more, and frees it.
    pub(crate) fn end(mut self) {
        self.set_target(0);
        self.check();
        for name in self.files.keys() {
            self.bed.run(&format!("drop {name}"));
        }
        if self.fragmented {
            self.bed.defragment();
        }
    }

    fn choose(&mut self) -> Step {
        let mut ticket = self.rng.u32(0..STEPS.iter().map(|(_, share)| share).sum());
        let chosen = STEPS.iter().find(|(_, share)| {
            let hit = ticket < *share;
            ticket = ticket.wrapping_sub(*share);
            hit
        });
        chosen.unwrap().0
    }

    fn new_target(&mut self) {
        let most = self.most_pages();
        let target = if self.rng.u8(0..4) == 0 { 0 } else { self.rng.u32(0..=most) };
        self.set_target(target);
        if self.rng.bool() {
            self.settle();
        }
    }

    fn bounce(&mut self) {
        self.settle();
        // Memory that the host really has takes it time to release.
        let room_mib = self.room_mib();
        self.bed.run(&format!("touch {room_mib}"));
        let most = self.most_pages();
        let high = self.rng.u32(most / 2..=most);
        let (enough, low) = (self.rng.u32(0..=high), self.rng.u32(0..=high / 2));
        self.set_target(high);
        self.bed.until("on its way", |status| status.balloon.actual_pages >= enough);
        self.set_target(low);
        // Not until all is released: the guest does not wait for that either.
        self.bed.until("down again", |status| status.balloon.actual_pages == low);
        self.peak = low;
        // The allocator hands out first what came back last.
        let freed_mib = u64::from((high - low).div_ceil(PAGES_PER_MIB));
        let mib = self.rng.u64(freed_mib / 2..=freed_mib).min(self.room_mib());
        if let Some((name, (mib, seed))) = self.fill(mib) {
            self.bed.verify(&name, mib, seed);
        }
    }

    fn nudge(&mut self) {
        let by = self.rng.u32(1..=NUDGE_PAGES);
        let target = match self.rng.bool() {
            true => (self.target + by).min(self.most_pages()),
            false => self.target.saturating_sub(by),
        };
        self.set_target(target);
    }

    fn fill_some(&mut self) {
        let room = self.room_mib();
        let mib = self.rng.u64(0..=room);
        self.fill(mib);
    }

    fn refill(&mut self) {
        self.drop_one();
        self.fill_some();
    }

    fn drop_one(&mut self) {
        if let Some((name, _)) = self.any_file() {
            println!("drop {name}");
            self.bed.run(&format!("drop {name}"));
            self.files.remove(&name);
        }
    }

    fn verify_one(&mut self) {
        if let Some((name, (mib, seed))) = self.any_file() {
            println!("verify {name}");
            self.bed.verify(&name, mib, seed);
        }
    }

    fn switch_mode(&mut self) {
        let mode = match self.rng.bool() {
            true => ReleaseMode::Background,
            false => ReleaseMode::Immediate,
        };
        println!("{}", mode.as_str());
        self.bed.client.set_release(mode).unwrap();
    }

    fn reload(&mut self) {
        println!("reload");
        self.bed.unload_driver();
        assert_eq!(self.bed.status().balloon.actual_pages, 0, "an unloaded driver holds pages");
        // Memory that the balloon has given back is used before it comes again.
        let (mib, seed) = (self.room_mib(), self.rng.u64(..));
        self.bed.run(&format!("fill interlude {mib} {seed}"));
        self.bed.verify("interlude", mib, seed);
        self.bed.run("drop interlude");
        self.bed.load_driver();
        self.peak = self.target;
    }

    fn fragment(&mut self) {
        // The lab's module takes all that is free for a moment.
        self.settle();
        println!("fragment {}", !self.fragmented);
        match self.fragmented {
            true => self.bed.defragment(),
            false => self.bed.fragment(self.reserve_mib),
        }
        self.fragmented = !self.fragmented;
    }

    fn fill(&mut self, mib: u64) -> Option<(String, File)> {
        if mib == 0 {
            return None;
        }
        self.files_made += 1;
        let (name, seed) = (format!("file{}", self.files_made), self.rng.u64(..));
        println!("fill {name} {mib} {seed}");
        self.bed.run(&format!("fill {name} {mib} {seed}"));
        self.files.insert(name.clone(), (mib, seed));
        Some((name, (mib, seed)))
    }

    fn set_target(&mut self, pages: u32) {
        println!("target {pages}");
        self.bed.set_target(pages);
        self.target = pages;
        self.peak = self.peak.max(pages);
    }

    fn settle(&mut self) {
        let status = self.bed.settle();
        assert_eq!(status.balloon.target_bytes, bytes(self.target));
        self.peak = self.target;
    }

    fn any_file(&mut self) -> Option<(String, File)> {
        let index = self.rng.usize(0..self.files.len().max(1));
        self.files.iter().nth(index).map(|(name, file)| (name.clone(), *file))
    }

    fn files_mib(&self) -> u64 {
        self.files.values().map(|(mib, _)| mib).sum()
    }

    /// What the balloon may hold beside the files.
    fn most_pages(&self) -> u32 {
        pages(self.usable_mib - self.files_mib())
    }

    /// What files may still take beside the balloon.
    fn room_mib(&self) -> u64 {
        let peak_mib = u64::from(self.peak.div_ceil(PAGES_PER_MIB));
        self.usable_mib.saturating_sub(self.files_mib() + peak_mib)
    }
}
