//! Console output: a buffer between the serial port and the process's standard output.
//!
//! A vCPU must not wait for a reader of the console: it would hold the port's lock, and a pause or
//! SIGTERM would wait for it. So bytes go into a buffer, and a thread writes them. When nobody reads,
//! the oldest bytes are dropped, since an operator needs the last output before a hang or a panic. A
//! notice in their place has their number.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that wait for a reader, at most: some 15,000 lines. A guest that prints as fast as it
/// comes out to its VMM fills it in some seconds, so a reader that is merely slow to be scheduled
/// loses nothing.
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes dropped at once, and how many more to the end of their line, if it has one there.
const DROP_BYTES: usize = 4096;
const LINE_BYTES: usize = 512;

/// Bytes written at once: what a pipe takes whole where it has room (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;

/// Capacity that a buffer keeps when it is empty again.
const KEPT_BYTES: usize = 16 << 10;

/// A guest prints byte by byte: bytes that come within this time of the first are written with it.
const GATHER: Duration = Duration::from_millis(1);

/// Between two attempts to write where the last one failed: a terminal may come back, a disk have
/// room again, a FIFO have a reader again.
const RETRY: Duration = Duration::from_millis(100);

/// Stack of the thread, which calls nothing deep.
const STACK_BYTES: usize = 128 << 10;

/// This process's standard output, apart from the standard library's buffer and lock.
pub(crate) fn standard_output() -> io::Result<Box<dyn Write + Send>> {
    Ok(Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)))
}

/// The way in. Writing to it never waits and never fails.
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
    /// Of what the thread has taken, what is not written yet.
    taken: usize,
    /// That is no output, but tells of what was dropped.
    tells: bool,
    /// Bytes dropped before the first in `bytes` of which the reader was not told.
    untold: u64,
    dropped: u64,
    /// Writing failed; it is tried again.
    fails: bool,
    /// Nothing more comes.
    over: bool,
}

/// What came of a console's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Bytes dropped because nobody took them in time.
    pub(crate) dropped: u64,
    /// Bytes that were still waiting at the end.
    pub(crate) left: u64,
}

/// Ends its thread once that has written what is left, when the last machine that has it is gone.
pub(crate) struct OutputEnd(Output);

impl Output {
    /// Writes to `out` from now on, in a thread.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(out: Box<dyn Write + Send>) -> io::Result<OutputEnd> {
        Self::with_limit(out, BUFFER_BYTES)
    }

    fn with_limit(out: Box<dyn Write + Send>, limit_bytes: usize) -> io::Result<OutputEnd> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        // Never joined: it may wait for a reader for ever.
        thread::Builder::new()
            .name("console".into())
            .stack_size(STACK_BYTES)
            .spawn(move || theirs.write_on(out))?;
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
    /// Where the guest's bytes go.
    pub(crate) fn input(&self) -> Output {
        self.0.clone()
    }

    /// Waits until all is written, but for a reader that does not read no longer than `limit`, and
    /// for one that is gone not at all.
    pub(crate) fn finish(&self, limit: Duration) -> Lost {
        let Output { shared, .. } = &self.0;
        let is_left = |state: &mut State| !state.fails && state.has_more();
        let waited = shared.changed.wait_timeout_while(shared.state(), limit, is_left);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let taken = if state.tells { 0 } else { state.taken };
        let left = state.bytes.len().saturating_add(taken) as u64;
        Lost { dropped: state.dropped, left }
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
        self.taken > 0 || self.untold > 0 || !self.bytes.is_empty()
    }

    /// Makes room. The rest begins with a line where it can.
    fn drop_oldest(&mut self) {
        let least = DROP_BYTES.min(self.bytes.len());
        let line_end = self.bytes.iter().skip(least).take(LINE_BYTES).position(|at| *at == b'\n');
        let count = line_end.map_or(least, |at| least + at + 1);
        self.bytes.drain(..count);
        self.untold = self.untold.saturating_add(count as u64);
        self.dropped = self.dropped.saturating_add(count as u64);
    }

    /// What is to be written next: how much is missing, or what there is.
    fn take(&mut self) -> Vec<u8> {
        let untold = std::mem::take(&mut self.untold);
        self.tells = untold > 0;
        if self.tells {
            return notice(untold);
        }
        let count = CHUNK_BYTES.min(self.bytes.len());
        let chunk = self.bytes.drain(..count).collect();
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT_BYTES);
        }
        chunk
    }
}

/// Also for a terminal that moves to the first column for no line feed.
fn notice(bytes: u64) -> Vec<u8> {
    let what = "of the console were dropped here: nobody read them in time";
    format!("\r\n[host: {bytes} bytes {what}]\r\n").into_bytes()
}

impl Shared {
    /// What is behind it is whole at any moment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's work, until nothing more comes.
    fn write_on(&self, mut out: Box<dyn Write + Send>) {
        let mut state = self.state();
        loop {
            if !state.has_more() {
                if state.over {
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if !state.over && state.bytes.len() < CHUNK_BYTES && state.untold == 0 {
                drop(state);
                thread::sleep(GATHER);
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

    /// Writes a chunk however often that fails; `None` where it fails and nothing more comes.
    fn write_whole(&self, out: &mut dyn Write, chunk: &[u8]) -> Option<MutexGuard<'_, State>> {
        let mut rest = chunk;
        loop {
            let written = out.write(rest);
            let mut state = self.state();
            let error = match written {
                Ok(0) => io::Error::from(ErrorKind::WriteZero),
                Ok(count) => {
                    if std::mem::take(&mut state.fails) {
                        tracing::info!("the console is written again");
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
            // Whoever shares the file may have said that it is not to block: that is no failure.
            if error.kind() != ErrorKind::WouldBlock && !std::mem::replace(&mut state.fails, true) {
                let kept =
                    "what the guest prints is kept up to a limit, then the oldest is dropped";
                tracing::warn!(%error, "host: cannot write the console; {kept}");
            }
            if state.over && state.fails {
                return None;
            }
            self.changed.notify_all();
            self.wait(state, RETRY);
        }
    }

    /// Waits for so long, or until nothing more comes.
    fn wait(&self, state: MutexGuard<'_, State>, time: Duration) {
        let until = Instant::now() + time;
        let goes_on = |state: &mut State| !state.over && Instant::now() < until;
        drop(self.changed.wait_timeout_while(state, time, goes_on));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;

    use super::*;

    const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

    /// Takes a write only when it is let.
    struct Gate {
        lets: Receiver<io::Result<()>>,
        seen: Sender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // A test that has ended lets everything pass.
            self.lets.recv().unwrap_or(Ok(()))?;
            let _ = self.seen.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Fixture {
        end: OutputEnd,
        lets: Option<Sender<io::Result<()>>>,
        seen: Receiver<Vec<u8>>,
    }

    fn fixture(limit_bytes: usize) -> Fixture {
        let ((lets, let_in), (sees, seen)) = (channel(), channel());
        let gate = Gate { lets: let_in, seen: sees };
        let end = Output::with_limit(Box::new(gate), limit_bytes).unwrap();
        Fixture { end, lets: Some(lets), seen }
    }

    impl Fixture {
        /// Lets everything pass, and returns it.
        fn read(mut self) -> Vec<u8> {
            drop(self.lets.take());
            // As long as it fails, nobody waits for it.
            while self.end.finish(ANSWER_TIMEOUT).left > 0 {
                thread::yield_now();
            }
            drop(self.end);
            self.seen.iter().flatten().collect()
        }

        /// The thread has taken something, and waits for its reader.
        fn is_taken(&self) {
            while self.end.0.shared.state().taken == 0 {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_who_does_not_read() {
        let fixture = fixture(64 << 10);
        let mut input = fixture.end.input();
        let line = [[b'x'; 63].as_slice(), b"\n"].concat();
        input.write_all(&line).unwrap();
        fixture.is_taken();
        (1..10_000).for_each(|_| input.write_all(&line).unwrap());
        let Lost { dropped, left } = fixture.end.finish(Duration::from_millis(1));
        assert_eq!(dropped + left, 640_000);
        assert!(left <= (64 << 10) + CHUNK_BYTES as u64, "{left}");
        // All of it is there when it is read, whole lines, with one word for what is not.
        let read = String::from_utf8(fixture.read()).unwrap();
        let word = format!("[host: {dropped} bytes of the console were dropped here");
        assert_eq!(read.matches("[host:").count(), 1);
        let (before, behind) = read.split_once(&word).unwrap();
        let behind = behind.split_once("]\r\n").unwrap().1;
        assert_eq!((before.trim_end().len() + behind.len()) as u64 / 64, (left - 1) / 64);
        assert!(behind.lines().all(|line| line.len() == 63));
    }

    #[test]
    fn what_is_said_last_is_kept() {
        let fixture = fixture(8 << 10);
        let mut input = fixture.end.input();
        input.write_all(b"first").unwrap();
        fixture.is_taken();
        input.write_all(&[b'.'; 100 << 10]).unwrap();
        input.write_all(b"last").unwrap();
        let read = fixture.read();
        assert!(read.starts_with(b"first\r\n[host: ") && read.ends_with(b"...last"));
    }

    #[test]
    fn a_reader_who_is_gone_delays_no_end_and_may_come_back() {
        let fixture = fixture(1 << 20);
        let lets = fixture.lets.clone().unwrap();
        fixture.end.input().write_all(b"early ").unwrap();
        lets.send(Err(io::Error::from(ErrorKind::BrokenPipe))).unwrap();
        let began = Instant::now();
        assert_eq!(fixture.end.finish(ANSWER_TIMEOUT).left, 6);
        assert!(began.elapsed() < ANSWER_TIMEOUT);
        fixture.end.input().write_all(b"late").unwrap();
        drop(lets);
        assert_eq!(fixture.read(), b"early late");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn who_reads_gets_everything_in_order(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 0..8)
        ) {
            let mut fixture = fixture(1 << 20);
            drop(fixture.lets.take());
            let mut input = fixture.end.input();
            parts.iter().for_each(|part| input.write_all(part).unwrap());
            prop_assert_eq!(fixture.read(), parts.concat());
        }
    }
}
