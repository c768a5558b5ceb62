//! Console output: a buffer between the serial port and the process's standard output.
//!
//! A vCPU must not wait for a reader of the console: it would hold the port's lock, and a pause or
//! SIGTERM would wait for it. So bytes go into a buffer, and a thread writes them. If the buffer
//! fills, the oldest bytes are dropped, since an operator needs the last output before a hang or a
//! panic. A notice in their place has their number.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Maximum buffered bytes: some 15,000 lines. At one exit per byte, a guest needs some seconds to
/// fill it, so a reader that is only scheduled late loses nothing.
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes dropped at once, and how many more at most to reach the end of a line.
const DROP_BYTES: usize = 4096;
const LINE_BYTES: usize = 512;

/// Bytes per write: a pipe takes this many atomically (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;

/// Capacity that an empty buffer keeps.
const KEPT_BYTES: usize = 16 << 10;

/// A guest prints byte by byte: bytes that arrive within this time of the first are written with
/// it.
const GATHER_INTERVAL: Duration = Duration::from_millis(1);

/// Delay before a failed write is repeated: a terminal may return, a disk may have space again, a
/// FIFO may have a reader again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Stack of the thread; its calls are shallow.
const STACK_BYTES: usize = 128 << 10;

/// This process's standard output, without the standard library's buffer and lock.
pub(crate) fn standard_output() -> io::Result<Box<dyn Write + Send>> {
    Ok(Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)))
}

/// The buffer's input. Writing to it never blocks and never fails.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    shared: Arc<Shared>,
    limit_bytes: usize,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes that the thread has taken and not written yet.
    taken: usize,
    /// Those bytes are a notice of dropped output.
    is_notice: bool,
    /// Bytes dropped before the first in `bytes`, without a notice yet.
    unreported: u64,
    dropped: u64,
    /// The last write failed and will be repeated.
    failing: bool,
    /// No more output will arrive.
    over: bool,
}

/// Console output that was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LostOutput {
    /// Bytes dropped because the reader was too slow.
    pub(crate) dropped: u64,
    /// Bytes that were still buffered at the end.
    pub(crate) left: u64,
}

/// Owned by the machine. On drop, the thread writes the rest and ends.
pub(crate) struct OutputEnd(Output);

impl Output {
    /// Starts a thread that writes to `out`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(out: Box<dyn Write + Send>) -> io::Result<OutputEnd> {
        Self::with_limit(out, BUFFER_BYTES)
    }

    fn with_limit(out: Box<dyn Write + Send>, limit_bytes: usize) -> io::Result<OutputEnd> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        // Never joined: it may wait for a reader without end.
        thread::Builder::new()
            .name("console".into())
            .stack_size(STACK_BYTES)
            .spawn(move || of_thread.run(out))?;
        Ok(OutputEnd(Self { shared, limit_bytes }))
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.shared.state();
        for &byte in bytes {
            if state.bytes.len() >= self.limit_bytes {
                state.drop_oldest();
            }
            state.bytes.push_back(byte);
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl OutputEnd {
    /// A handle to write the guest's output to.
    pub(crate) fn input(&self) -> Output {
        self.0.clone()
    }

    /// Waits until all output is written: at most `limit` for a reader that does not read, and not
    /// at all if writing fails.
    pub(crate) fn finish(&self, limit: Duration) -> LostOutput {
        let Output { shared, .. } = &self.0;
        let is_left = |state: &mut State| !state.failing && state.has_more();
        let waited = shared.changed.wait_timeout_while(shared.state(), limit, is_left);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let taken = if state.is_notice { 0 } else { state.taken };
        let left = state.bytes.len().saturating_add(taken) as u64;
        LostOutput { dropped: state.dropped, left }
    }
}

impl Drop for OutputEnd {
    fn drop(&mut self) {
        self.0.shared.state().over = true;
        self.0.shared.changed.notify_all();
    }
}

impl State {
    fn has_more(&self) -> bool {
        self.taken > 0 || self.unreported > 0 || !self.bytes.is_empty()
    }

    /// Drops the oldest bytes, if possible up to the end of a line.
    fn drop_oldest(&mut self) {
        let least = DROP_BYTES.min(self.bytes.len());
        let line_end = self.bytes.iter().skip(least).take(LINE_BYTES).position(|at| *at == b'\n');
        let count = line_end.map_or(least, |at| least + at + 1);
        self.bytes.drain(..count);
        self.unreported = self.unreported.saturating_add(count as u64);
        self.dropped = self.dropped.saturating_add(count as u64);
    }

    /// Takes the next bytes to write: a notice of dropped output, or output.
    fn take(&mut self) -> Vec<u8> {
        let unreported = std::mem::take(&mut self.unreported);
        self.is_notice = unreported > 0;
        if self.is_notice {
            return notice(unreported);
        }
        let count = CHUNK_BYTES.min(self.bytes.len());
        let chunk = self.bytes.drain(..count).collect();
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT_BYTES);
        }
        chunk
    }
}

/// With carriage returns, for a terminal in raw mode.
fn notice(bytes: u64) -> Vec<u8> {
    let what = "of console output were dropped here: they were not read in time";
    format!("\r\n[host: {bytes} bytes {what}]\r\n").into_bytes()
}

impl Shared {
    /// Ignores poisoning: the state is consistent at any time.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: writes until no more output will arrive.
    fn run(&self, mut out: Box<dyn Write + Send>) {
        let mut state = self.state();
        loop {
            if !state.has_more() {
                if state.over {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if !state.over && state.bytes.len() < CHUNK_BYTES && state.unreported == 0 {
                drop(state);
                thread::sleep(GATHER_INTERVAL);
                state = self.state();
            }
            let chunk = state.take();
            state.taken = chunk.len();
            drop(state);
            state = match self.write_whole(&mut *out, &chunk) {
                Some(state) => state,
                None => return,
            };
            self.changed.notify_all();
        }
    }

    /// Writes a chunk, and repeats failed writes; `None` if a write fails and no more output will
    /// arrive.
    fn write_whole(&self, out: &mut dyn Write, chunk: &[u8]) -> Option<MutexGuard<'_, State>> {
        let mut rest = chunk;
        loop {
            let written = out.write(rest);
            let mut state = self.state();
            let error = match written {
                Ok(0) => io::Error::from(ErrorKind::WriteZero),
                Ok(count) => {
                    if std::mem::take(&mut state.failing) {
                        tracing::info!("console output works again");
                    }
                    rest = rest.get(count..).unwrap_or_default();
                    state.taken = rest.len();
                    if rest.is_empty() {
                        return Some(state);
                    }
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            // Another process that shares the file may have set O_NONBLOCK: that is no failure.
            if error.kind() != ErrorKind::WouldBlock && !std::mem::replace(&mut state.failing, true)
            {
                tracing::warn!(
                    %error,
                    "host: cannot write console output; the newest {} KiB are kept",
                    BUFFER_BYTES >> 10
                );
            }
            if state.over && state.failing {
                return None;
            }
            self.changed.notify_all();
            self.wait(state, RETRY_INTERVAL);
        }
    }

    /// Waits for `time`, or until no more output will arrive.
    fn wait(&self, state: MutexGuard<'_, State>, time: Duration) {
        let until = Instant::now() + time;
        let keep_going = |state: &mut State| !state.over && Instant::now() < until;
        drop(self.changed.wait_timeout_while(state, time, keep_going));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;

    use super::*;

    const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

    /// Accepts a write only with a permission from the test.
    struct Gate {
        permits: Receiver<io::Result<()>>,
        seen: Sender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // After the test's end all writes pass.
            self.permits.recv().unwrap_or(Ok(()))?;
            let _ = self.seen.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Fixture {
        end: OutputEnd,
        permits: Option<Sender<io::Result<()>>>,
        seen: Receiver<Vec<u8>>,
    }

    fn fixture(limit_bytes: usize) -> Fixture {
        let ((permits, permitted), (send_seen, seen)) = (channel(), channel());
        let gate = Gate { permits: permitted, seen: send_seen };
        let end = Output::with_limit(Box::new(gate), limit_bytes).unwrap();
        Fixture { end, permits: Some(permits), seen }
    }

    impl Fixture {
        /// Lets all writes pass, and returns the output.
        fn read(mut self) -> Vec<u8> {
            drop(self.permits.take());
            // `finish` does not wait while writing fails.
            while self.end.finish(ANSWER_TIMEOUT).left > 0 {
                thread::yield_now();
            }
            drop(self.end);
            self.seen.iter().flatten().collect()
        }

        /// Waits until the thread has taken bytes and is blocked in the write.
        fn wait_until_taken(&self) {
            while self.end.0.shared.state().taken == 0 {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn a_reader_that_does_not_read_blocks_no_writer() {
        let fixture = fixture(64 << 10);
        let mut input = fixture.end.input();
        let line = [[b'x'; 63].as_slice(), b"\n"].concat();
        input.write_all(&line).unwrap();
        fixture.wait_until_taken();
        (1..10_000).for_each(|_| input.write_all(&line).unwrap());
        let LostOutput { dropped, left } = fixture.end.finish(Duration::from_millis(1));
        assert_eq!(dropped + left, 640_000);
        assert!(left <= (64 << 10) + CHUNK_BYTES as u64, "{left}");
        // The reader gets whole lines, and one notice of the dropped ones.
        let read = String::from_utf8(fixture.read()).unwrap();
        let notice = format!("[host: {dropped} bytes of console output were dropped here");
        assert_eq!(read.matches("[host:").count(), 1);
        let (before, behind) = read.split_once(&notice).unwrap();
        let behind = behind.split_once("]\r\n").unwrap().1;
        assert_eq!((before.trim_end().len() + behind.len()) as u64 / 64, (left - 1) / 64);
        assert!(behind.lines().all(|line| line.len() == 63));
    }

    #[test]
    fn the_last_output_is_kept() {
        let fixture = fixture(8 << 10);
        let mut input = fixture.end.input();
        input.write_all(b"first").unwrap();
        fixture.wait_until_taken();
        input.write_all(&[b'.'; 100 << 10]).unwrap();
        input.write_all(b"last").unwrap();
        let read = fixture.read();
        assert!(read.starts_with(b"first\r\n[host: ") && read.ends_with(b"...last"));
    }

    #[test]
    fn a_reader_that_has_gone_does_not_delay_the_end_and_may_return() {
        let fixture = fixture(1 << 20);
        let permits = fixture.permits.clone().unwrap();
        fixture.end.input().write_all(b"early ").unwrap();
        permits.send(Err(io::Error::from(ErrorKind::BrokenPipe))).unwrap();
        let began = Instant::now();
        assert_eq!(fixture.end.finish(ANSWER_TIMEOUT).left, 6);
        assert!(began.elapsed() < ANSWER_TIMEOUT);
        fixture.end.input().write_all(b"late").unwrap();
        drop(permits);
        assert_eq!(fixture.read(), b"early late");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_reader_gets_all_output_in_order(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 0..8)
        ) {
            let mut fixture = fixture(1 << 20);
            drop(fixture.permits.take());
            let mut input = fixture.end.input();
            parts.iter().for_each(|part| input.write_all(part).unwrap());
            prop_assert_eq!(fixture.read(), parts.concat());
        }
    }
}
