//! What is done with a request: from memory to file and back.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use balloon_host::LogLimit;
use diagnostics::{contain, panic_point};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, Bytes, GuestAddress};

use super::file::{DiskFile, SECTOR_BYTES};
use super::permit::Permit;
use super::request::{Kind, Request, Segment, bytes};
use crate::memory::Ram;

/// What is copied at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Bytes of an identifier (virtio 1.3, 5.2.6), which is padded with zeros.
pub(crate) const ID_BYTES: usize = 20;

/// A range of a discard or of zeros: sector u64, sectors u32, flags u32.
const RANGE_BYTES: usize = 16;

/// Ranges and their sectors of one such request: a file system gives 1 GiB back in one go, but
/// zeros may have to be written, and a pause waits for that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RangeLimits {
    pub(crate) ranges: u32,
    pub(crate) sectors: u32,
}

pub(crate) const DISCARD: RangeLimits = RangeLimits { ranges: 16, sectors: 1 << 21 };
pub(crate) const WRITE_ZEROES: RangeLimits = RangeLimits { ranges: 1, sectors: 16 << 11 };

/// Whose fault it is that a request fails.
#[derive(Debug)]
enum Failure {
    /// The guest's: it asks for what the disk does not have.
    Guest(&'static str),
    /// The guest's, or nobody's: the disk does not know such a thing.
    Unsupported,
    /// The host's.
    Host(io::Error),
    /// Nobody's: it was interrupted, and is as good as not begun. Or its driver has reset the device,
    /// and nobody asks for what became of it.
    Interrupted,
}

/// One who does it, with a buffer.
pub(crate) struct Work {
    memory: Ram,
    buffer: Vec<u8>,
    id: [u8; ID_BYTES],
    log: LogLimit,
    /// What the request under way may still do.
    permit: Arc<Permit>,
}

impl Work {
    pub(crate) fn new(memory: Ram, id: [u8; ID_BYTES]) -> Self {
        let (buffer, log) = (vec![0; BUFFER_BYTES], LogLimit::default());
        Self { memory, buffer, id, log, permit: Arc::default() }
    }

    /// What the request under way may still do.
    pub(crate) fn permit(&self) -> Arc<Permit> {
        Arc::clone(&self.permit)
    }

    /// Does what is asked, writes the status, and tells how many bytes of the chain were written;
    /// `None` where it was interrupted or its permit revoked. Where a driver knows no flush, what was
    /// `written_through` is on the disk first.
    pub(crate) fn carry_out(
        &mut self,
        request: &Request,
        file: &DiskFile,
        writes_through: bool,
    ) -> Option<u32> {
        let done = contain(|| self.attempt_to_the_disk(request, file, writes_through));
        // The guest hears of a panic as it does of a disk that fails, and the next one is served.
        let failed = |panicked| Err(Failure::Host(io::Error::other(panicked)));
        let done = done.unwrap_or_else(failed);
        let is_flush = request.kind == Kind::Flush || writes_through;
        let lost = match &done {
            Err(Failure::Host(error)) if is_flush => error.raw_os_error(),
            _ => None,
        };
        let (status, written) = match done {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Interrupted) => return None,
            Err(failure) => (self.tell(&failure, file), 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        let told = self.permit.touch(|| self.memory.write_obj(status, request.status));
        if let (None, Some(error)) = (&told, lost) {
            // Whoever has reset the device flushes again, and the kernel tells it once.
            file.keep_error(error);
        }
        match told? {
            // At most the request's limit, which is far below 4 GiB.
            Ok(()) if status == 0 => Some(u32::try_from(written + 1).unwrap_or(u32::MAX)),
            // Behind data that were not all written: nothing is promised of the beginning.
            _ => Some(0),
        }
    }

    /// ControlApi before each piece. A request that ended in its middle is done anew from its
    /// beginning, which comes to the same: nobody was told of what was done of it.
    fn goes_on(&self) -> Result<(), Failure> {
        if self.permit.is_interrupted() { Err(Failure::Interrupted) } else { Ok(()) }
    }

    /// From the guest's memory into the first bytes of the buffer.
    fn fetch(&mut self, from: GuestAddress, len: usize) -> Result<(), Failure> {
        let buffer = self.buffer.get_mut(..len).unwrap_or_default();
        let fetched = self.permit.touch(|| self.memory.read_slice(buffer, from));
        fetched.ok_or(Failure::Interrupted)?.map_err(|_| OUTSIDE)
    }

    /// Into the guest's memory.
    fn store(&self, bytes: &[u8], to: GuestAddress) -> Result<(), Failure> {
        let stored = self.permit.touch(|| self.memory.write_slice(bytes, to));
        stored.ok_or(Failure::Interrupted)?.map_err(|_| OUTSIDE)
    }

    fn attempt_to_the_disk(
        &mut self,
        request: &Request,
        file: &DiskFile,
        writes_through: bool,
    ) -> Result<u64, Failure> {
        panic_point("disk");
        let done = self.attempt(request, file)?;
        let writes = matches!(request.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        if writes && writes_through {
            file.flush().map_err(Failure::Host)?;
            return Ok(0);
        }
        Ok(done)
    }

    /// Bytes that were written to the guest.
    fn attempt(&mut self, request: &Request, file: &DiskFile) -> Result<u64, Failure> {
        let writes = !matches!(request.kind, Kind::Read | Kind::Flush | Kind::GetId);
        if writes && file.shape().read_only && request.kind != Kind::Unknown {
            return Err(Failure::Guest("the disk is read-only"));
        }
        match request.kind {
            Kind::Read => self.read(request, file),
            Kind::Write => self.write(request, file).map(|()| 0),
            Kind::Flush => file.flush().map_err(Failure::Host).map(|()| 0),
            Kind::GetId => self.tell_id(request),
            Kind::Discard | Kind::WriteZeroes => self.each_range(request, file).map(|()| 0),
            Kind::Unknown => Err(Failure::Unsupported),
        }
    }

    fn read(&mut self, request: &Request, file: &DiskFile) -> Result<u64, Failure> {
        let total = bytes(&request.into);
        let mut at = place(file, request.sector, total)?;
        for (start, len) in request.into.iter().flat_map(pieces) {
            self.goes_on()?;
            let buffer = self.buffer.get_mut(..len).unwrap_or_default();
            file.read(buffer, at).map_err(Failure::Host)?;
            self.store(self.buffer.get(..len).unwrap_or_default(), start)?;
            at += len as u64;
        }
        Ok(total)
    }

    fn write(&mut self, request: &Request, file: &DiskFile) -> Result<(), Failure> {
        let mut at = place(file, request.sector, bytes(&request.out))?;
        for (start, len) in request.out.iter().flat_map(pieces) {
            self.goes_on()?;
            self.fetch(start, len)?;
            file.write(self.buffer.get(..len).unwrap_or_default(), at).map_err(Failure::Host)?;
            at += len as u64;
        }
        Ok(())
    }

    fn tell_id(&mut self, request: &Request) -> Result<u64, Failure> {
        let mut rest = self.id.as_slice();
        for segment in &request.into {
            let len = rest.len().min(segment.len as usize);
            let (now, later) = rest.split_at(len);
            self.store(now, segment.at)?;
            rest = later;
        }
        if !rest.is_empty() {
            return Err(Failure::Guest("no room for an identifier"));
        }
        Ok(ID_BYTES as u64)
    }

    fn each_range(&mut self, request: &Request, file: &DiskFile) -> Result<(), Failure> {
        let total = bytes(&request.out);
        let limits = if request.kind == Kind::Discard { DISCARD } else { WRITE_ZEROES };
        let most = u64::from(limits.ranges) * RANGE_BYTES as u64;
        if total == 0 || total > most || !total.is_multiple_of(RANGE_BYTES as u64) {
            return Err(Failure::Guest("no list of ranges"));
        }
        // Read once, before anything is done.
        let mut list = Vec::new();
        for (start, len) in request.out.iter().flat_map(pieces) {
            self.fetch(start, len)?;
            list.extend_from_slice(self.buffer.get(..len).unwrap_or_default());
        }
        let ranges = list.as_chunks::<RANGE_BYTES>().0;
        let ranges = ranges.iter().map(|range| range_of(request.kind, range, limits, file));
        for (at, bytes, may_unmap) in ranges.collect::<Result<Vec<_>, _>>()? {
            self.goes_on()?;
            let done = match request.kind {
                Kind::Discard => file.discard(at, bytes),
                _ => file.write_zeroes(at, bytes, may_unmap),
            };
            done.map_err(Failure::Host)?;
        }
        Ok(())
    }

    /// The status for a failure; the host's are logged.
    fn tell(&mut self, failure: &Failure, file: &DiskFile) -> u32 {
        let path = file.path().display();
        match failure {
            Failure::Guest(what) => tracing::debug!(disk = %path, what, "guest: request refused"),
            Failure::Unsupported => return VIRTIO_BLK_S_UNSUPP,
            Failure::Interrupted => {}
            Failure::Host(error) => {
                if let Some(left_out) = self.log.take(Instant::now()) {
                    tracing::error!(disk = %path, %error, left_out, "host: a request failed");
                }
            }
        }
        VIRTIO_BLK_S_IOERR
    }
}

const OUTSIDE: Failure = Failure::Guest("a buffer outside of memory");

/// Where `bytes` from `sector` on are in the file.
fn place(file: &DiskFile, sector: u64, bytes: u64) -> Result<u64, Failure> {
    let end = sector.checked_add(bytes / SECTOR_BYTES);
    if !bytes.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > file.shape().sectors) {
        return Err(Failure::Guest("sectors that the disk does not have"));
    }
    // Below the file's length.
    Ok(sector * SECTOR_BYTES)
}

/// Offset and bytes of a range, and whether it may become a hole.
fn range_of(
    kind: Kind,
    range: &[u8; RANGE_BYTES],
    limits: RangeLimits,
    file: &DiskFile,
) -> Result<(u64, u64, bool), Failure> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let may_unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    // virtio 1.3, 5.2.6.2: reserved flags, and this one for a discard, are not supported.
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (kind == Kind::Discard && may_unmap) {
        return Err(Failure::Unsupported);
    }
    if sectors == 0 || sectors > limits.sectors {
        return Err(Failure::Guest("a range of a size that it may not have"));
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    Ok((place(file, sector, bytes)?, bytes, may_unmap))
}

/// A segment in parts that fit the buffer.
fn pieces(segment: &Segment) -> impl Iterator<Item = (GuestAddress, usize)> + use<> {
    let Segment { at, len } = *segment;
    (0..len).step_by(BUFFER_BYTES).map(move |offset| {
        // One that wraps around is outside of memory as well.
        let start = GuestAddress(at.raw_value().wrapping_add(offset.into()));
        (start, BUFFER_BYTES.min((len - offset) as usize))
    })
}
