//! Byte-by-byte model of a disk's requests, from the specification (virtio 1.3, 5.2.6). It shares
//! no code with the device, so it shares no bug with it.

use guest_ring::Buffer;

pub(super) const SECTOR: u64 = 512;

/// Sectors of the disk: more than one copy, less than one request may cover.
pub(super) const SECTORS: u64 = 320;

/// Guest memory, start and end addresses.
pub(super) const SPANS: [(u64, u64); 2] = [(0x1_0000, 0x3_8000), (0x4_0000, 0x4_8000)];
const END: usize = 0x4_8000;

/// Maximum data of a request: 126 buffers of 64 KiB, as in the configuration space.
const MOST_BYTES: u64 = 126 << 16;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Guest memory by address.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    /// Ranges of unknown contents.
    pub(super) unknown: Vec<(u64, u64)>,
}

impl Image {
    /// Reads an image. `read` copies memory from an address.
    pub(super) fn of(mut read: impl FnMut(u64, &mut [u8])) -> Self {
        let mut bytes = vec![0; END];
        for (start, end) in SPANS {
            read(start, &mut bytes[index(start)..index(end)]);
        }
        Self { bytes, unknown: Vec::new() }
    }

    fn get(&self, at: u64, len: u64) -> Option<&[u8]> {
        exists(at, len).then(|| &self.bytes[index(at)..index(at + len)])
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> bool {
        let is_there = exists(at, bytes.len() as u64);
        if is_there {
            self.bytes[index(at)..][..bytes.len()].copy_from_slice(bytes);
        }
        is_there
    }

    fn is_known(&self, at: u64, len: u64) -> bool {
        !self.unknown.iter().any(|(start, bytes)| at < start + bytes && *start < at + len)
    }

    /// Marks segments as unknown.
    fn forget(&mut self, segments: &[(u64, u64)]) {
        let there = |at: u64, len: u64| {
            let span = |(start, end): &(u64, u64)| {
                let (from, to) = (at.max(*start), at.saturating_add(len).min(*end));
                (from < to).then(|| (from, to - from))
            };
            SPANS.iter().filter_map(span).collect::<Vec<_>>()
        };
        self.unknown.extend(segments.iter().flat_map(|(at, len)| there(*at, *len)));
    }
}

fn exists(at: u64, len: u64) -> bool {
    SPANS
        .iter()
        .any(|(start, end)| at >= *start && at.checked_add(len).is_some_and(|after| after <= *end))
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("below the end of memory")
}

/// A request, parsed from its chain.
struct Request {
    kind: u32,
    sector: u64,
    out: Vec<(u64, u64)>,
    into: Vec<(u64, u64)>,
    status: u64,
}

impl Request {
    /// `None` if the chain has no status byte.
    fn of(buffers: &[Buffer], memory: &Image) -> Option<Self> {
        let segments = |writable| {
            let some =
                buffers.iter().filter(|buffer| buffer.writable == writable && buffer.len > 0);
            some.map(|buffer| (buffer.addr, u64::from(buffer.len))).collect::<Vec<_>>()
        };
        let (mut out, mut into) = (segments(false), segments(true));
        let first = buffers.iter().position(|buffer| buffer.writable && buffer.len > 0)?;
        let is_ordered = buffers[first..].iter().all(|buffer| buffer.writable);
        let sum = buffers.iter().map(|buffer| u64::from(buffer.len)).sum::<u64>();
        if !is_ordered || buffers.len() > 143 || sum > u64::from(u32::MAX) {
            return None;
        }
        let mut header = Vec::new();
        while header.len() < 16 {
            let (at, len) = *out.first()?;
            let now = len.min(16 - header.len() as u64);
            header.extend(memory.get(at, now)?);
            out[0] = (at.checked_add(now)?, len - now);
            out.retain(|(_, len)| *len > 0);
        }
        let (at, len) = into.pop()?;
        let status = at.checked_add(len - 1)?;
        into.extend((len > 1).then_some((at, len - 1)));
        (bytes(&out).max(bytes(&into)) <= MOST_BYTES).then(|| Self {
            kind: u32::from_le_bytes(header[..4].try_into().expect("four bytes")),
            sector: u64::from_le_bytes(header[8..].try_into().expect("eight bytes")),
            out,
            into,
            status,
        })
    }
}

fn bytes(segments: &[(u64, u64)]) -> u64 {
    segments.iter().map(|(_, len)| len).sum()
}

/// Contents of the disk.
pub(super) struct Model {
    pub(super) disk: Vec<u8>,
    pub(super) read_only: bool,
    /// Discard unit of the host.
    pub(super) unit_bytes: u64,
    /// Sectors of unknown contents, start and end.
    pub(super) unknown: Vec<(u64, u64)>,
}

/// Result of a batch of chains.
pub(super) struct Outcome {
    /// Memory afterwards.
    pub(super) memory: Image,
    /// Used lengths, chain by chain. Later chains depend on unknown contents; then all of memory
    /// and disk is unknown.
    pub(super) written: Vec<u32>,
}

/// The result depends on unknown contents.
struct Unknown;

impl Model {
    /// Chains in the order in which they were made available.
    pub(super) fn carry_out(&mut self, chains: &[Vec<Buffer>], mut memory: Image) -> Outcome {
        // The device parses all chains first, and serves them later.
        let requests: Vec<_> = chains.iter().map(|chain| Request::of(chain, &memory)).collect();
        let mut written = Vec::new();
        for request in &requests {
            let done = match request {
                Some(request) => self.attempt(request, &mut memory),
                None => Ok(None),
            };
            let Ok(done) = done else { break };
            let answer = request.as_ref().zip(done).map(|(request, (status, bytes))| {
                let is_written = memory.put(request.status, &[status]);
                if is_written && status == OK { bytes + 1 } else { 0 }
            });
            written.push(u32::try_from(answer.unwrap_or(0)).expect("far below 4 GiB"));
        }
        Outcome { memory, written }
    }

    /// Status, and bytes written before it.
    fn attempt(&mut self, it: &Request, memory: &mut Image) -> Result<Option<(u8, u64)>, Unknown> {
        let done = match it.kind {
            0 => self.read(it, memory)?,
            1 | 11 | 13 if self.read_only => (IOERR, 0),
            1 => self.write(it, memory)?,
            4 => (OK, 0),
            8 => identify(it, memory),
            11 => self.clear(it, memory, 16, 1 << 21, false)?,
            13 => self.clear(it, memory, 1, 16 << 11, true)?,
            _ => (UNSUPP, 0),
        };
        Ok(Some(done))
    }

    fn sectors(&self, sector: u64, bytes: u64) -> Option<(u64, u64)> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= SECTORS).then_some((sector, end))
    }

    fn read(&mut self, it: &Request, memory: &mut Image) -> Result<(u8, u64), Unknown> {
        let total = bytes(&it.into);
        let Some((sector, end)) = self.sectors(it.sector, total) else { return Ok((IOERR, 0)) };
        if self.unknown.iter().any(|(from, to)| sector < *to && *from < end) {
            return Err(Unknown);
        }
        let mut from = index(sector * SECTOR);
        for &(at, len) in &it.into {
            let len = index(len);
            if !memory.put(at, &self.disk[from..from + len]) {
                memory.forget(&it.into);
                return Ok((IOERR, 0));
            }
            from += len;
        }
        Ok((OK, total))
    }

    fn write(&mut self, it: &Request, memory: &Image) -> Result<(u8, u64), Unknown> {
        let Some((sector, end)) = self.sectors(it.sector, bytes(&it.out)) else {
            return Ok((IOERR, 0));
        };
        let mut to = index(sector * SECTOR);
        for &(at, len) in &it.out {
            let Some(data) = memory.get(at, len) else {
                self.unknown.push((sector, end));
                return Ok((IOERR, 0));
            };
            if !memory.is_known(at, len) {
                return Err(Unknown);
            }
            self.disk[to..to + data.len()].copy_from_slice(data);
            to += data.len();
        }
        Ok((OK, 0))
    }

    /// Discards or zeroes: both read as zeros in a sparse file. Partial units are not discarded.
    fn clear(
        &mut self,
        it: &Request,
        memory: &Image,
        most_ranges: u64,
        most_sectors: u32,
        may_unmap: bool,
    ) -> Result<(u8, u64), Unknown> {
        let total = bytes(&it.out);
        if total == 0 || !total.is_multiple_of(16) || total > 16 * most_ranges {
            return Ok((IOERR, 0));
        }
        let mut list = Vec::new();
        for &(at, len) in &it.out {
            let Some(data) = memory.get(at, len) else { return Ok((IOERR, 0)) };
            if !memory.is_known(at, len) {
                return Err(Unknown);
            }
            list.extend_from_slice(data);
        }
        let mut places = Vec::new();
        for range in list.chunks(16) {
            let sector = u64::from_le_bytes(range[..8].try_into().expect("eight bytes"));
            let count = u32::from_le_bytes(range[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(range[12..].try_into().expect("four bytes"));
            if flags > u32::from(may_unmap) {
                return Ok((UNSUPP, 0));
            }
            match self.sectors(sector, u64::from(count) * SECTOR) {
                Some(place) if (1..=most_sectors).contains(&count) => places.push(place),
                _ => return Ok((IOERR, 0)),
            }
        }
        for (from, to) in places {
            let (mut from, mut to) = (from * SECTOR, to * SECTOR);
            // The unmap flag is only valid for zeroing.
            if !may_unmap {
                from = from.next_multiple_of(self.unit_bytes);
                to = (to / self.unit_bytes * self.unit_bytes).max(from);
            }
            self.disk[index(from)..index(to)].fill(0);
        }
        Ok((OK, 0))
    }
}

fn identify(it: &Request, memory: &mut Image) -> (u8, u64) {
    let mut rest = &b"aerostat-disk0\0\0\0\0\0\0"[..];
    for &(at, len) in &it.into {
        let (now, later) = rest.split_at(rest.len().min(usize::try_from(len).unwrap_or(20)));
        if !now.is_empty() && !memory.put(at, now) {
            memory.forget(&it.into);
            return (IOERR, 0);
        }
        rest = later;
    }
    if rest.is_empty() { (OK, 20) } else { (IOERR, 0) }
}
