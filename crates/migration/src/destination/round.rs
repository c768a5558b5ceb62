//! One round at the destination: one thread for each connection receives, decompresses, checks and

//! writes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_set::PageRange;

use crate::error::MigrationError;
use crate::layout::GuestLayout;
use crate::limits::MAX_KEEPALIVES;
use crate::link::{Closer, Link};
use crate::observer::{Observer, Progress};
use crate::traits::WritePages;
use crate::wire::chunk::{Chunk, Decompressor, Fill, PAGE_BYTES};
use crate::wire::control::Control;
use crate::wire::frame::Kind;
use crate::wire::stream::Stream;
use crate::worker_pool::run_pool;

/// Pages that are filled with a pattern at once.
const FILL_PAGES: usize = 16;

/// A round that was announced.
pub(super) struct Round<'a> {
    pub(super) number: u32,
    /// Limit of its pages.
    pub(super) pages: u64,
    pub(super) layout: &'a GuestLayout,
    pub(super) memory: &'a dyn WritePages,
}

/// Pages that arrived in a round: with contents, and all that chunks named.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RoundTotals {
    pub(super) received_pages: u64,
    pub(super) named_pages: u64,
}

/// State that the threads of a round share.
struct Shared {
    failed: AtomicBool,
    pages: AtomicU64,
    wire_bytes: AtomicU64,
    closers: Vec<Closer>,
}

impl Round<'_> {
    /// Receives frames up to the round's end on each stream.
    pub(super) fn receive<L: Link>(
        &self,
        streams: &mut [Stream<L>],
        observer: &mut dyn Observer,
    ) -> Result<RoundTotals, MigrationError> {
        let closers = streams.iter().map(Stream::closer).collect::<Result<_, _>>()?;
        let (failed, pages) = (AtomicBool::new(false), AtomicU64::new(0));
        let wire_bytes = AtomicU64::new(streams.iter().map(|stream| stream.received_bytes).sum());
        let shared = Shared { failed, pages, wire_bytes, closers };
        let mut sum = RoundTotals::default();
        let stop = || {
            shared.failed.store(true, Ordering::Relaxed);
            shared.closers.iter().for_each(|close| close());
        };
        let share = |index, stream: &mut Stream<L>| {
            let outcome = self.receive_share(stream, &shared);
            if let Err(error) = &outcome {
                shared.fail(index, stream, error);
            }
            outcome
        };
        let add = |part: RoundTotals| {
            sum.received_pages += part.received_pages;
            sum.named_pages += part.named_pages;
        };
        let report = || {
            let pages = shared.pages.load(Ordering::Relaxed);
            let wire_bytes = shared.wire_bytes.load(Ordering::Relaxed);
            observer.progress(Progress { pages, of_pages: self.pages, wire_bytes });
        };
        run_pool(streams, share, stop, add, report)?;
        Ok(sum)
    }

    fn receive_share<L: Link>(
        &self,
        stream: &mut Stream<L>,
        shared: &Shared,
    ) -> Result<RoundTotals, MigrationError> {
        let mut decompressor = Decompressor::new()?;
        let mut space = Vec::new();
        let mut done = RoundTotals::default();
        let (mut frames, mut keepalives) = (0, 0);
        loop {
            let before = stream.received_bytes;
            let kind = stream.read()?.kind;
            shared.wire_bytes.fetch_add(stream.received_bytes - before, Ordering::Relaxed);
            let (body, payload) = stream.last();
            let named = match kind {
                Kind::Chunk => {
                    let chunk = Chunk::decode(body, self.layout, self.number)?;
                    let contents = decompressor.decompress(&chunk, payload, &mut space)?;
                    frames += 1;
                    done.received_pages += u64::from(chunk.data.count_ones());
                    write_chunk(self.memory, &chunk, contents)?;
                    u64::from((chunk.data | chunk.zeros).count_ones())
                }
                Kind::Fill if payload.is_empty() => {
                    let fill = Fill::decode(body, self.layout, self.number)?;
                    self.count(shared, fill.pages())?;
                    for range in &fill.ranges {
                        fill_with(self.memory, *range, fill.pattern)?;
                    }
                    continue;
                }
                _ => match Control::decode(kind, body)? {
                    Control::RoundEnd { round, frames: sent, pages } => {
                        let all = round == self.number
                            && sent == frames
                            && pages == done.named_pages
                            && payload.is_empty();
                        let lost = MigrationError::Damaged { what: "a round" };
                        return if all { Ok(done) } else { Err(lost) };
                    }
                    Control::Alive if keepalives < MAX_KEEPALIVES => {
                        keepalives += 1;
                        continue;
                    }
                    Control::Abort { reason } => return Err(MigrationError::Aborted { reason }),
                    _ => return Err(MigrationError::Peer { what: "an unexpected message" }),
                },
            };
            self.count(shared, named)?;
            done.named_pages += named;
            if shared.failed.load(Ordering::Relaxed) {
                return Err(MigrationError::Cancelled);
            }
        }
    }

    /// Fails if the round names more pages than it announced, so that every round ends.
    fn count(&self, shared: &Shared, named: u64) -> Result<(), MigrationError> {
        let before = shared.pages.fetch_add(named, Ordering::Relaxed);
        let more = MigrationError::Peer { what: "more pages than it announced" };
        if before.saturating_add(named) > self.pages { Err(more) } else { Ok(()) }
    }
}

impl Shared {
    /// Sends the error on the stream that failed, and closes the others.
    fn fail<L: Link>(&self, index: usize, stream: &mut Stream<L>, error: &MigrationError) {
        let first = !self.failed.swap(true, Ordering::Relaxed);
        // Before the others are closed: then the source closes all of its connections, this one
        // too.
        let sent = first && stream.send_final(&Control::Abort { reason: error.chain() });
        for (other, close) in self.closers.iter().enumerate() {
            if other != index {
                close();
            }
        }
        if sent {
            stream.wait_closed();
        }
    }
}

/// Writes pages whose checksum matched.
pub(crate) fn write_chunk(
    memory: &dyn WritePages,
    chunk: &Chunk,
    contents: &[u8],
) -> Result<(), MigrationError> {
    let mut rest = contents;
    for run in chunk.data_word().runs() {
        let len = usize::try_from(run.pages()).unwrap_or(0) * PAGE_BYTES;
        let (bytes, behind) = rest.split_at(len.min(rest.len()));
        memory.write_pages(run, bytes).map_err(MigrationError::machine("writing memory"))?;
        rest = behind;
    }
    for run in chunk.zero_word().runs() {
        memory.zero_pages(run).map_err(MigrationError::machine("writing memory"))?;
    }
    Ok(())
}

/// Makes pages read as a pattern.
pub(crate) fn fill_with(
    memory: &dyn WritePages,
    range: PageRange,
    pattern: u32,
) -> Result<(), MigrationError> {
    if pattern == 0 {
        return memory.zero_pages(range).map_err(MigrationError::machine("writing memory"));
    }
    let words = FILL_PAGES * PAGE_BYTES / 4;
    let bytes: Vec<u8> = std::iter::repeat_n(pattern.to_le_bytes(), words).flatten().collect();
    let mut rest = range;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.start() + FILL_PAGES as u64);
        let len = usize::try_from(now.pages()).unwrap_or(0) * PAGE_BYTES;
        let bytes = bytes.get(..len).unwrap_or(&bytes);
        memory.write_pages(now, bytes).map_err(MigrationError::machine("writing memory"))?;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::*;
    use crate::traits::MachineError;
    use crate::wire::frame::HEADER_BYTES;

    struct NoMemory;

    impl WritePages for NoMemory {
        fn write_pages(&self, _: PageRange, _: &[u8]) -> Result<(), MachineError> {
            Ok(())
        }

        fn zero_pages(&self, _: PageRange) -> Result<(), MachineError> {
            Ok(())
        }
    }

    /// Records writes and closes.
    struct RecordingLink(UnixStream, Arc<Mutex<Vec<&'static str>>>);

    impl Read for RecordingLink {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for RecordingLink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.lock().unwrap().push("sent");
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Link for RecordingLink {
        fn set_timeout(&self, time: Duration) -> io::Result<()> {
            self.0.set_timeout(time)
        }

        fn closer(&self) -> io::Result<Closer> {
            let (close, notes) = (self.0.closer()?, Arc::clone(&self.1));
            Ok(Box::new(move || {
                notes.lock().unwrap().push("closed");
                close();
            }))
        }
    }

    /// A source that detects one closed connection closes all of them, and would not read the
    /// reason.
    #[test]
    fn the_error_is_sent_before_any_connection_is_closed() {
        let notes = Arc::new(Mutex::new(Vec::new()));
        let (mut streams, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let (mine, peer) = UnixStream::pair().unwrap();
            let link = RecordingLink(mine, Arc::clone(&notes));
            streams.push(Stream::new(link, Duration::from_secs(20)).unwrap());
            peers.push(peer);
        }
        peers[1].write_all(&[0; HEADER_BYTES]).unwrap();
        let layout = GuestLayout::new(vec![PageRange::new(0, 8).unwrap()]).unwrap();
        let round = Round { number: 0, pages: 8, layout: &layout, memory: &NoMemory };
        let taken = round.receive(&mut streams, &mut crate::observer::Silent);
        assert!(matches!(taken, Err(MigrationError::Damaged { .. })), "{:?}", taken.map(drop));
        assert_eq!(notes.lock().unwrap()[..2], ["sent", "closed"]);
    }
}
