//! The inflight region: shared memory that records each queue's chains in flight, so
//! that a back end that was killed recovers them when it restarts (vhost-user.rst,
//! "Inflight I/O tracking", split virtqueues).
//!
//! The front end owns the memory, so it is untrusted: data is copied once and bounded by
//! the queue's size. It is accessed with system calls, not mapped: if a front end truncates
//! it, the access fails, and no SIGBUS ends this process. The four calls per chain take
//! about two microseconds, and a message takes the guest tens of microseconds.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use balloon_abi::QueueLayout;
use balloon_host::ring::MAX_QUEUE_SIZE;
use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};

use crate::error::{SessionError, Violation};
use crate::wire::Message;

/// Bytes of a queue's header: `features` u64, `version` u16, `desc_num` u16,
/// `last_batch_head` u16, `used_idx` u16.
const HEADER_BYTES: u64 = 16;
const VERSION_AT: u64 = 8;
const DESC_NUM_AT: u64 = 10;
const LAST_HEAD_AT: u64 = 12;
const USED_IDX_AT: u64 = 14;

/// Bytes of a descriptor's state: `inflight` u8, 5 unused, `next` u16, `counter` u64.
const ENTRY_BYTES: u64 = 16;
const NEXT_AT: u64 = 6;
const COUNTER_AT: u64 = 8;

/// The only version of the layout; 0 means that the memory is new.
const VERSION: u16 = 1;

/// Alignment of a queue's part in bytes, as in QEMU's libvhost-user: no two queues share a
/// cache line.
const QUEUE_ALIGN: u64 = 64;

/// The payload of `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Description {
    mmap_size: u64,
    mmap_offset: u64,
    num_queues: u16,
    queue_size: u16,
}

/// The inflight region of all queues.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    file: Arc<File>,
    description: Description,
}

/// The part of one queue.
#[derive(Clone, Debug)]
pub(crate) struct QueueRegion {
    file: Arc<File>,
    at: u64,
    size: u16,
}

/// The chains in flight of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InflightChains {
    /// Their heads, in the order in which they were taken.
    pub(crate) heads: Vec<u16>,
    /// The highest counter among them.
    pub(crate) counter: u64,
}

impl Description {
    pub(crate) fn read(message: &Message) -> Result<Self, SessionError> {
        let mut fields = message.fields();
        let (mmap_size, mmap_offset) = (fields.u64()?, fields.u64()?);
        let (num_queues, queue_size) = (fields.u16()?, fields.u16()?);
        let description = Self { mmap_size, mmap_offset, num_queues, queue_size };
        let queues = usize::from(num_queues);
        if queues == 0 || queues > QueueLayout::MAX_QUEUES {
            return Err(Violation::Inflight.into());
        }
        if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
            return Err(Violation::Inflight.into());
        }
        Ok(description)
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let Self { mmap_size, mmap_offset, num_queues, queue_size } = self;
        let longs = [mmap_size, mmap_offset].map(u64::to_ne_bytes).concat();
        [longs, [num_queues, queue_size].map(u16::to_ne_bytes).concat()].concat()
    }

    /// Bytes of one queue's part.
    fn part_bytes(self) -> u64 {
        (HEADER_BYTES + ENTRY_BYTES * u64::from(self.queue_size)).next_multiple_of(QUEUE_ALIGN)
    }

    fn bytes(self) -> u64 {
        self.part_bytes() * u64::from(self.num_queues)
    }
}

impl Region {
    /// Creates a region for the requested queues, with no chain in flight.
    pub(crate) fn create(requested: Description) -> Result<Self, SessionError> {
        let host = |source: rustix::io::Errno| SessionError::Host {
            what: "memory for inflight tracking",
            source: source.into(),
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("balloon-inflight", flags).map_err(host)?);
        let description = Description { mmap_size: requested.bytes(), mmap_offset: 0, ..requested };
        rustix::fs::ftruncate(&file, description.mmap_size).map_err(host)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(host)?;
        Ok(Self { file: Arc::new(file), description })
    }

    /// Uses a region that the front end kept, from this process or an earlier one.
    pub(crate) fn attach(description: Description, fd: OwnedFd) -> Result<Self, SessionError> {
        let stat = fstat(&fd).map_err(|_| Violation::Inflight)?;
        let len = u64::try_from(stat.st_size).map_err(|_| Violation::Inflight)?;
        let end = description.mmap_offset.checked_add(description.bytes());
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let fits =
            description.mmap_size >= description.bytes() && end.is_some_and(|end| end <= len);
        if !regular || !fits {
            return Err(Violation::Inflight.into());
        }
        Ok(Self { file: Arc::new(File::from(fd)), description })
    }

    pub(crate) const fn description(&self) -> Description {
        self.description
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Returns the part of queue `index`, if it has one.
    pub(crate) fn part(&self, index: usize) -> Option<QueueRegion> {
        let index = u64::try_from(index).ok()?;
        (index < u64::from(self.description.num_queues)).then(|| QueueRegion {
            file: Arc::clone(&self.file),
            at: self.description.mmap_offset + index * self.description.part_bytes(),
            size: self.description.queue_size,
        })
    }
}

impl QueueRegion {
    /// Reads the chains in flight of a vring with these used and available indices, and
    /// corrects the region: chains of the last batch that are in the used ring are not in
    /// flight.
    ///
    /// Clears a region that does not match this vring, such as after a restart of the driver.
    pub(crate) fn recover(&self, used_idx: u16, avail_idx: u16) -> io::Result<InflightChains> {
        let mut bytes = vec![0; self.bytes()];
        self.file.read_exact_at(&mut bytes, self.at)?;
        let word = |at: u64| -> u16 { number(&bytes, at) };
        let old_used_idx = word(USED_IDX_AT);
        let returned = used_idx.wrapping_sub(old_used_idx);
        let known = word(VERSION_AT) == VERSION && word(DESC_NUM_AT) == self.size;
        let mut inflight = InflightChains::default();
        if known && returned <= self.size {
            let mut entries = self.entries(&bytes);
            let mut head = word(LAST_HEAD_AT);
            for _ in 0..returned {
                let Some(entry) = entries.get_mut(usize::from(head)) else { break };
                entry.0 = false;
                head = number(&bytes, self.entry(head) - self.at + NEXT_AT);
            }
            let mut in_flight: Vec<(u64, u16)> = (0..)
                .zip(&entries)
                .filter(|(_, (inflight, _))| *inflight)
                .map(|(head, (_, counter))| (*counter, head))
                .collect();
            in_flight.sort_unstable();
            inflight.counter = in_flight.last().map_or(0, |(counter, _)| *counter);
            inflight.heads = in_flight.into_iter().map(|(_, head)| head).collect();
        }
        // A driver cannot have more chains in flight than are available and not used.
        let left = avail_idx.wrapping_sub(used_idx);
        if inflight.heads.len() > usize::from(left.min(self.size)) {
            inflight = InflightChains::default();
        }
        self.write_back(&inflight, used_idx)?;
        Ok(inflight)
    }

    /// Records that a chain was taken off the queue, the `counter`th.
    pub(crate) fn taken(&self, head: u16, counter: u64) -> io::Result<()> {
        // The chain is not in flight until the second write.
        self.file.write_all_at(&counter.to_ne_bytes(), self.entry(head) + COUNTER_AT)?;
        self.file.write_all_at(&[1], self.entry(head))
    }

    /// Records that a chain will be returned next.
    pub(crate) fn returning(&self, head: u16) -> io::Result<()> {
        self.file.write_all_at(&head.to_ne_bytes(), self.at + LAST_HEAD_AT)
    }

    /// Records that a chain was returned, with the new `used_idx`.
    pub(crate) fn returned(&self, head: u16, used_idx: u16) -> io::Result<()> {
        self.file.write_all_at(&[0], self.entry(head))?;
        self.file.write_all_at(&used_idx.to_ne_bytes(), self.at + USED_IDX_AT)
    }

    /// Returns true if it has entries for a queue of `size`.
    pub(crate) const fn fits(&self, size: u16) -> bool {
        self.size >= size
    }

    fn bytes(&self) -> usize {
        usize::from(self.size) * 16 + 16
    }

    const fn entry(&self, head: u16) -> u64 {
        self.at + HEADER_BYTES + ENTRY_BYTES * head as u64
    }

    /// Returns for each descriptor whether it is in flight, and its counter.
    fn entries(&self, bytes: &[u8]) -> Vec<(bool, u64)> {
        let (_, entries) = bytes.split_at(16);
        let (entries, _) = entries.as_chunks::<16>();
        entries
            .iter()
            .take(usize::from(self.size))
            .map(|entry| (entry[0] == 1, number_u64(entry)))
            .collect()
    }

    /// Rewrites the part with exactly the chains in `inflight`.
    fn write_back(&self, inflight: &InflightChains, used_idx: u16) -> io::Result<()> {
        let mut bytes = vec![0; self.bytes()];
        let mut put = |at: u64, value: &[u8]| {
            if let Some(place) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..)) {
                place.iter_mut().zip(value).for_each(|(to, from)| *to = *from);
            }
        };
        put(VERSION_AT, &VERSION.to_ne_bytes());
        put(DESC_NUM_AT, &self.size.to_ne_bytes());
        put(USED_IDX_AT, &used_idx.to_ne_bytes());
        // Counters restart at 1, in the same order.
        for (counter, head) in (1u64..).zip(&inflight.heads) {
            let at = self.entry(*head) - self.at;
            put(at, &[1]);
            put(at + COUNTER_AT, &counter.to_ne_bytes());
        }
        self.file.write_all_at(&bytes, self.at)
    }
}

fn number(bytes: &[u8], at: u64) -> u16 {
    let two = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.first_chunk());
    two.map_or(0, |two| u16::from_ne_bytes(*two))
}

fn number_u64(entry: &[u8; 16]) -> u64 {
    entry.last_chunk().map_or(0, |counter| u64::from_ne_bytes(*counter))
}
