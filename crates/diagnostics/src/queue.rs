//! Lines on their way to somebody who may not read them.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::point::panic_point;

/// Between two attempts where the file does not block: another process that has it too may have
/// said so.
const RETRY: Duration = Duration::from_millis(10);

/// The longest line, so that one alone cannot fill the queue.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Bounded. Whoever puts a line in never waits for whoever takes it out.
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
    /// There is, or will be, a thread that writes.
    begun: bool,
    /// It is writing a line, which is not in `lines` any more.
    busy: bool,
    dropped: u64,
    /// Of those, how many no later line has told yet.
    untold: u64,
}

impl LineQueue {
    /// With room for so many bytes.
    #[must_use]
    pub const fn new(limit_bytes: usize) -> Self {
        let lines = VecDeque::new();
        let state = State { lines, bytes: 0, begun: false, busy: false, dropped: 0, untold: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit_bytes }
    }

    /// Adds a line, which has a line feed at its end. It is dropped where there is no room, and cut
    /// where it is too long.
    pub fn push(&self, line: &[u8]) {
        let is_whole = line.len() <= MAX_LINE_BYTES;
        let mut kept = line.get(..MAX_LINE_BYTES).unwrap_or(line).to_vec();
        if !is_whole {
            kept.extend(b" ...\n");
        }
        let mut state = self.state();
        let notice = (state.untold > 0).then(|| notice(state.untold));
        let bytes = kept.len() + notice.as_ref().map_or(0, Vec::len);
        if state.bytes + bytes > self.limit_bytes {
            state.drop_one();
            return;
        }
        state.bytes += bytes;
        if let Some(notice) = notice {
            state.untold = 0;
            state.lines.push_back(notice);
        }
        state.lines.push_back(kept);
        drop(state);
        self.changed.notify_all();
    }

    /// Lines that were dropped: for want of room, or because they could not be written.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Waits until everything is written, at most so long; whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        let is_left = |state: &mut State| state.busy || !state.lines.is_empty();
        let waited = self.changed.wait_timeout_while(self.state(), limit, is_left);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Writes lines as they come, and never returns.
    pub fn write_to(&self, out: &mut impl Write) {
        let mut works = true;
        let mut state = self.state();
        loop {
            let untold = state.untold;
            let line = match state.lines.pop_front() {
                Some(line) => {
                    state.bytes -= line.len();
                    line
                }
                // Told now, unless there is nobody to be told.
                None if untold > 0 && works => {
                    state.untold = 0;
                    notice(untold)
                }
                None => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            state.busy = true;
            drop(state);
            panic_point("log");
            works = write_whole(out, &line).is_ok();
            state = self.state();
            state.busy = false;
            if !works {
                state.drop_one();
            }
            self.changed.notify_all();
        }
    }

    /// True where nobody else writes, who is the caller from now on.
    pub(crate) fn begin(&self) -> bool {
        !std::mem::replace(&mut self.state().begun, true)
    }

    pub(crate) fn not_begun(&self) {
        self.state().begun = false;
    }

    /// Whoever wrote a line did not come to its end.
    pub(crate) fn lost_one(&self) {
        let mut state = self.state();
        state.busy = false;
        state.drop_one();
    }

    /// What is behind it is whole at any moment.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drop_one(&mut self) {
        self.dropped = self.dropped.saturating_add(1);
        self.untold = self.untold.saturating_add(1);
    }
}

fn notice(lines: u64) -> Vec<u8> {
    format!("host: {lines} log lines were dropped here: nobody took them in time\n").into_bytes()
}

fn write_whole(out: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY),
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

    /// Takes a line for each word that it is given, and fails where that is an error.
    struct Reader {
        may: Receiver<io::Result<()>>,
        got: Sender<String>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.may.recv().unwrap_or(Ok(()))?;
            let _ = self.got.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn queue(bytes: usize) -> (Arc<LineQueue>, Sender<io::Result<()>>, Receiver<String>) {
        let queue = Arc::new(LineQueue::new(bytes));
        let ((lets, may), (got, lines)) = (channel(), channel());
        let theirs = Arc::clone(&queue);
        // It ends with the process of the tests.
        thread::spawn(move || theirs.write_to(&mut Reader { may, got }));
        (queue, lets, lines)
    }

    #[test]
    fn a_reader_that_does_not_read_blocks_nobody_and_hears_what_it_missed() {
        let (queue, lets, lines) = queue(200);
        for number in 0..100 {
            queue.push(format!("line {number:04}\n").as_bytes());
        }
        assert!(queue.dropped() >= 79, "{}", queue.dropped());
        let began = Instant::now();
        assert!(!queue.flush(Duration::from_millis(20)), "nobody reads");
        assert!(began.elapsed() < TEST_TIMEOUT);
        let dropped = queue.dropped();
        // From now on it reads.
        drop(lets);
        assert!(queue.flush(TEST_TIMEOUT));
        let lines: Vec<String> = lines.try_iter().collect();
        assert_eq!(lines.first().unwrap(), "line 0000\n");
        let told = format!("host: {dropped} log lines were dropped here");
        assert!(lines.iter().any(|line| line.starts_with(&told)), "{lines:?}");
        queue.push(b"the next\n");
        assert!(queue.flush(TEST_TIMEOUT));
        assert_eq!(queue.dropped(), dropped);
    }

    #[test]
    fn a_reader_that_is_gone_costs_lines_and_nothing_else() {
        let (queue, lets, lines) = queue(1000);
        for _ in 0..3 {
            lets.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
            queue.push(b"lost\n");
        }
        assert!(queue.flush(TEST_TIMEOUT));
        assert_eq!(queue.dropped(), 3);
        // One who comes back hears of it, once.
        drop(lets);
        queue.push(b"heard\n");
        assert_eq!(lines.recv_timeout(TEST_TIMEOUT).unwrap(), notice(3).as_slice().to_text());
        assert_eq!(lines.recv_timeout(TEST_TIMEOUT).unwrap(), "heard\n");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let (queue, lets, lines) = queue(1 << 20);
        drop(lets);
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
