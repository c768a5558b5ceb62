//! Executes a request: copies between guest memory and the file.

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

/// Bytes per copy.
const BUFFER_BYTES: usize = 64 << 10;

/// Bytes of the device ID string (virtio 1.3, 5.2.6), padded with zeros.
pub(crate) const ID_BYTES: usize = 20;

/// A range of a discard or write-zeroes request: sector u64, sectors u32, flags u32.
const RANGE_BYTES: usize = 16;

/// Maximum ranges of such a request, and sectors of a range. A file system discards 1 GiB at once,
/// but zeros may have to be written, and a pause waits for that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RangeLimits {
    pub(crate) ranges: u32,
    pub(crate) sectors: u32,
}

pub(crate) const DISCARD: RangeLimits = RangeLimits { ranges: 16, sectors: 1 << 21 };
pub(crate) const WRITE_ZEROES: RangeLimits = RangeLimits { ranges: 1, sectors: 16 << 11 };

/// Why a request fails, and whose fault it is.
#[derive(Debug)]
enum Failure {
    /// The guest's: an invalid request.
    Guest(&'static str),
    /// An unsupported request.
    Unsupported,
    /// The host's: an I/O error.
    Host(io::Error),
    /// None: a pause interrupted the request, which counts as not started, or the driver has reset
    /// the device and gets no answer.
    Interrupted,
}

/// Executes requests, one at a time.
pub(crate) struct Executor {
    memory: Ram,
    buffer: Vec<u8>,
    id: [u8; ID_BYTES],
    log: LogLimit,
    /// What the request in progress may still do.
    permit: Arc<Permit>,
}

impl Executor {
    pub(crate) fn new(memory: Ram, id: [u8; ID_BYTES]) -> Self {
        let (buffer, log) = (vec![0; BUFFER_BYTES], LogLimit::default());
        Self { memory, buffer, id, log, permit: Arc::default() }
    }

    /// What the request in progress may still do.
    pub(crate) fn permit(&self) -> Arc<Permit> {
        Arc::clone(&self.permit)
    }

    /// Executes the request and writes its status. Returns the number of bytes written to the
    /// chain; `None` if the request was interrupted or its permit revoked. With `writes_through`,
    /// for a driver without flush, a write is on the disk before it completes.
    pub(crate) fn execute(
        &mut self,
        request: &Request,
        file: &DiskFile,
        writes_through: bool,
    ) -> Option<u32> {
        let done = contain(|| self.attempt_through(request, file, writes_through));
        // A panic is an I/O error to the guest; the next request is served.
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
            Err(failure) => (self.status_of(&failure, file), 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        let written_status = self.permit.touch(|| self.memory.write_obj(status, request.status));
        if let (None, Some(error)) = (&written_status, lost) {
            // The kernel reports the error only once; the driver's next flush after the reset must
            // report it.
            file.keep_error(error);
        }
        match written_status? {
            // The request's limit is far below 4 GiB.
            Ok(()) if status == 0 => Some(u32::try_from(written + 1).unwrap_or(u32::MAX)),
            // The status lies behind data that were not all written, so no prefix is valid.
            _ => Some(0),
        }
    }

    /// Checked before each piece. An interrupted request is executed again from its beginning, with
    /// the same effect: the guest has not seen any result of it.
    fn check_interrupt(&self) -> Result<(), Failure> {
        if self.permit.is_interrupted() { Err(Failure::Interrupted) } else { Ok(()) }
    }

    /// Copies from guest memory to the start of the buffer.
    fn fetch(&mut self, from: GuestAddress, len: usize) -> Result<(), Failure> {
        let buffer = self.buffer.get_mut(..len).unwrap_or_default();
        let fetched = self.permit.touch(|| self.memory.read_slice(buffer, from));
        fetched.ok_or(Failure::Interrupted)?.map_err(|_| OUTSIDE_MEMORY)
    }

    /// Copies to guest memory.
    fn store(&self, bytes: &[u8], to: GuestAddress) -> Result<(), Failure> {
        let stored = self.permit.touch(|| self.memory.write_slice(bytes, to));
        stored.ok_or(Failure::Interrupted)?.map_err(|_| OUTSIDE_MEMORY)
    }

    /// Executes the request, and flushes a write if `writes_through`.
    fn attempt_through(
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

    /// Returns the number of bytes written to guest memory.
    fn attempt(&mut self, request: &Request, file: &DiskFile) -> Result<u64, Failure> {
        let writes = !matches!(request.kind, Kind::Read | Kind::Flush | Kind::GetId);
        if writes && file.shape().read_only && request.kind != Kind::Unknown {
            return Err(Failure::Guest("the disk is read-only"));
        }
        match request.kind {
            Kind::Read => self.read(request, file),
            Kind::Write => self.write(request, file).map(|()| 0),
            Kind::Flush => file.flush().map_err(Failure::Host).map(|()| 0),
            Kind::GetId => self.get_id(request),
            Kind::Discard | Kind::WriteZeroes => self.each_range(request, file).map(|()| 0),
            Kind::Unknown => Err(Failure::Unsupported),
        }
    }

    fn read(&mut self, request: &Request, file: &DiskFile) -> Result<u64, Failure> {
        let total = bytes(&request.into);
        let mut at = file_offset(file, request.sector, total)?;
        for (start, len) in request.into.iter().flat_map(pieces) {
            self.check_interrupt()?;
            let buffer = self.buffer.get_mut(..len).unwrap_or_default();
            file.read(buffer, at).map_err(Failure::Host)?;
            self.store(self.buffer.get(..len).unwrap_or_default(), start)?;
            at += len as u64;
        }
        Ok(total)
    }

    fn write(&mut self, request: &Request, file: &DiskFile) -> Result<(), Failure> {
        let mut at = file_offset(file, request.sector, bytes(&request.out))?;
        for (start, len) in request.out.iter().flat_map(pieces) {
            self.check_interrupt()?;
            self.fetch(start, len)?;
            file.write(self.buffer.get(..len).unwrap_or_default(), at).map_err(Failure::Host)?;
            at += len as u64;
        }
        Ok(())
    }

    fn get_id(&mut self, request: &Request) -> Result<u64, Failure> {
        let mut rest = self.id.as_slice();
        for segment in &request.into {
            let len = rest.len().min(segment.len as usize);
            let (now, later) = rest.split_at(len);
            self.store(now, segment.at)?;
            rest = later;
        }
        if !rest.is_empty() {
            return Err(Failure::Guest("no space for the device ID"));
        }
        Ok(ID_BYTES as u64)
    }

    fn each_range(&mut self, request: &Request, file: &DiskFile) -> Result<(), Failure> {
        let total = bytes(&request.out);
        let limits = if request.kind == Kind::Discard { DISCARD } else { WRITE_ZEROES };
        let most = u64::from(limits.ranges) * RANGE_BYTES as u64;
        if total == 0 || total > most || !total.is_multiple_of(RANGE_BYTES as u64) {
            return Err(Failure::Guest("an invalid list of ranges"));
        }
        // Read once, and validate all, before executing any.
        let mut list = Vec::new();
        for (start, len) in request.out.iter().flat_map(pieces) {
            self.fetch(start, len)?;
            list.extend_from_slice(self.buffer.get(..len).unwrap_or_default());
        }
        let ranges = list.as_chunks::<RANGE_BYTES>().0;
        let ranges = ranges.iter().map(|range| range_of(request.kind, range, limits, file));
        for (at, bytes, may_unmap) in ranges.collect::<Result<Vec<_>, _>>()? {
            self.check_interrupt()?;
            let done = match request.kind {
                Kind::Discard => file.discard(at, bytes),
                _ => file.write_zeroes(at, bytes, may_unmap),
            };
            done.map_err(Failure::Host)?;
        }
        Ok(())
    }

    /// Returns the status for a failure, and logs it.
    fn status_of(&mut self, failure: &Failure, file: &DiskFile) -> u32 {
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

const OUTSIDE_MEMORY: Failure = Failure::Guest("a buffer outside guest memory");

/// The file offset of `bytes` bytes at `sector`.
fn file_offset(file: &DiskFile, sector: u64, bytes: u64) -> Result<u64, Failure> {
    let end = sector.checked_add(bytes / SECTOR_BYTES);
    if !bytes.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > file.shape().sectors) {
        return Err(Failure::Guest("sectors beyond the end of the disk"));
    }
    // Cannot overflow: it is below the file's length.
    Ok(sector * SECTOR_BYTES)
}

/// Offset and bytes of a range, and whether it may be deallocated.
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
    // virtio 1.3, 5.2.6.2: reserved flags, and unmap for a discard, are unsupported.
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (kind == Kind::Discard && may_unmap) {
        return Err(Failure::Unsupported);
    }
    if sectors == 0 || sectors > limits.sectors {
        return Err(Failure::Guest("a range with an invalid size"));
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    Ok((file_offset(file, sector, bytes)?, bytes, may_unmap))
}

/// Splits a segment into pieces that fit the buffer.
fn pieces(segment: &Segment) -> impl Iterator<Item = (GuestAddress, usize)> + use<> {
    let Segment { at, len } = *segment;
    (0..len).step_by(BUFFER_BYTES).map(move |offset| {
        // An address that wraps around is outside guest memory too.
        let start = GuestAddress(at.raw_value().wrapping_add(offset.into()));
        (start, BUFFER_BYTES.min((len - offset) as usize))
    })
}
