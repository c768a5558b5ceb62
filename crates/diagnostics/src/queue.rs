//! A queue of log lines whose reader may not read them.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::point::panic_point;

/// Delay before a write is repeated that would block: another process that shares the file may have
/// set O_NONBLOCK.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The longest line, so that one alone cannot fill the queue.
const MAX_LINE_BYTES: usize = 16 << 10;

/// A bounded queue. Adding a line never waits for the reader.
#[derive(Debug)]
pub struct LineQueue {
    state: Mutex<State>,
    changed: Condvar,
    limit_bytes: usize,
}

#[derive(Debug)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The thread that writes is started or being started.
    started: bool,
    /// The thread is writing a line, which is no longer in `lines`.
    busy: bool,
    dropped: u64,
    /// Dropped lines without a notice yet.
    unreported: u64,
}

impl LineQueue {
    /// A queue for `limit_bytes` bytes.
    #[must_use]
    pub const fn new(limit_bytes: usize) -> Self {
        let lines = VecDeque::new();
        let state =
            State { lines, bytes: 0, started: false, busy: false, dropped: 0, unreported: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit_bytes }
    }

    /// Adds a line, which must end with a line feed. Drops it if the queue is full, and truncates
    /// it if it is too long.
    pub fn push(&self, line: &[u8]) {
        let is_whole = line.len() <= MAX_LINE_BYTES;
        let mut line = line.get(..MAX_LINE_BYTES).unwrap_or(line).to_vec();
        if !is_whole {
            line.extend(b" ...\n");
        }
        let mut state = self.state();
        let notice = (state.unreported > 0).then(|| notice(state.unreported));
        let bytes = line.len() + notice.as_ref().map_or(0, Vec::len);
        if state.bytes + bytes > self.limit_bytes {
            state.drop_one();
            return;
        }
        state.bytes += bytes;
        if let Some(notice) = notice {
            state.unreported = 0;
            state.lines.push_back(notice);
        }
        state.lines.push_back(line);
        drop(state);
        self.changed.notify_all();
    }

    /// The number of dropped lines: the queue was full, or the write failed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Waits until all lines are written, at most `limit`. Returns whether they are.
    pub fn flush(&self, limit: Duration) -> bool {
        let is_left = |state: &mut State| state.busy || !state.lines.is_empty();
        let waited = self.changed.wait_timeout_while(self.state(), limit, is_left);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Writes lines as they are added; never returns.
    pub fn write_to(&self, out: &mut impl Write) {
        let mut writable = true;
        let mut state = self.state();
        loop {
            let unreported = state.unreported;
            let line = match state.lines.pop_front() {
                Some(line) => {
                    state.bytes -= line.len();
                    line
                }
                // The queue is empty: write a notice, unless the last write failed.
                None if unreported > 0 && writable => {
                    state.unreported = 0;
                    notice(unreported)
                }
                None => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            state.busy = true;
            drop(state);
            panic_point("log");
            writable = write_whole(out, &line).is_ok();
            state = self.state();
            state.busy = false;
            if !writable {
                state.drop_one();
            }
            self.changed.notify_all();
        }
    }

    /// Claims the right to write; false if another thread has it.
    pub(crate) fn start(&self) -> bool {
        !std::mem::replace(&mut self.state().started, true)
    }

    pub(crate) fn not_started(&self) {
        self.state().started = false;
    }

    /// Counts the current line as lost, after a panic of the thread.
    pub(crate) fn lost_one(&self) {
        let mut state = self.state();
        state.busy = false;
        state.drop_one();
    }

    /// Ignores poisoning: the state is consistent at any time.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drop_one(&mut self) {
        self.dropped = self.dropped.saturating_add(1);
        self.unreported = self.unreported.saturating_add(1);
    }
}

fn notice(lines: u64) -> Vec<u8> {
    format!("host: {lines} log lines were dropped here: they were not read in time\n").into_bytes()
}

fn write_whole(out: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(RETRY_INTERVAL)
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use super::*;

    const TEST_TIMEOUT: Duration = Duration::from_secs(20);

    /// Accepts one write for each permission, and fails if that is an error.
    struct Reader {
        permits: Receiver<io::Result<()>>,
        received: Sender<String>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().unwrap_or(Ok(()))?;
            let _ = self.received.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue(bytes: usize) -> (Arc<LineQueue>, Sender<io::Result<()>>, Receiver<String>) {
        let queue = Arc::new(LineQueue::new(bytes));
        let ((permit, permits), (received, lines)) = (channel(), channel());
        let of_thread = Arc::clone(&queue);
        // Ends with the test process.
        thread::spawn(move || of_thread.write_to(&mut Reader { permits, received }));
        (queue, permit, lines)
    }

    #[test]
    fn a_reader_that_does_not_read_blocks_no_writer_and_gets_a_notice() {
        let (queue, permit, lines) = queue(200);
        for number in 0..100 {
            queue.push(format!("line {number:04}\n").as_bytes());
        }
        assert!(queue.dropped() >= 79, "{}", queue.dropped());
        let began = Instant::now();
        assert!(!queue.flush(Duration::from_millis(20)), "the reader does not read");
        assert!(began.elapsed() < TEST_TIMEOUT);
        let dropped = queue.dropped();
        // From now on it reads.
        drop(permit);
        assert!(queue.flush(TEST_TIMEOUT));
        let lines: Vec<String> = lines.try_iter().collect();
        assert_eq!(lines.first().unwrap(), "line 0000\n");
        let notice = format!("host: {dropped} log lines were dropped here");
        assert!(lines.iter().any(|line| line.starts_with(&notice)), "{lines:?}");
        queue.push(b"the next\n");
        assert!(queue.flush(TEST_TIMEOUT));
        assert_eq!(queue.dropped(), dropped);
    }

    #[test]
    fn failed_writes_lose_lines_and_nothing_else() {
        let (queue, permit, lines) = queue(1000);
        // All lines first: a line after a failed write would be queued with a notice.
        (0..3).for_each(|_| queue.push(b"lost\n"));
        for _ in 0..3 {
            permit.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
        }
        assert!(queue.flush(TEST_TIMEOUT));
        assert_eq!(queue.dropped(), 3);
        // A reader that returns gets one notice.
        drop(permit);
        queue.push(b"received\n");
        assert_eq!(lines.recv_timeout(TEST_TIMEOUT).unwrap(), notice(3).as_slice().to_text());
        assert_eq!(lines.recv_timeout(TEST_TIMEOUT).unwrap(), "received\n");
    }

    #[test]
    fn a_line_that_is_too_long_is_truncated() {
        let (queue, permit, lines) = queue(1 << 20);
        drop(permit);
        queue.push(&[b'x'; 2 * MAX_LINE_BYTES]);
        let line = lines.recv_timeout(TEST_TIMEOUT).unwrap();
        assert!(line.len() < MAX_LINE_BYTES + 10 && line.ends_with("x ...\n"));
    }

    trait ToText {
        fn to_text(&self) -> String;
    }

    impl ToText for [u8] {
        fn to_text(&self) -> String {
            String::from_utf8_lossy(self).into_owned()
        }
    }
}
