//! Line protocol with the guest's init, and record of all guest output.
//!
//! The host writes `ID COMMAND ARGUMENT...`. The guest answers with `@lab ID | TEXT` lines and
//! one `@lab ID ok TEXT` or `@lab ID err TEXT`. All other console lines are kernel messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::{Context, LabError, Result};

/// Begins every answer of the guest.
const MARKER: &str = "@lab ";

/// Command id of the guest's ready message.
const GUEST_ID: u64 = 0;

/// Lines kept in memory. A log file keeps all.
const KEPT_LINES: usize = 20_000;

/// Lines of the record quoted in an error.
const TAIL_LINES: usize = 30;

/// The guest's answer to a successful command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// Lines that the command printed.
    pub lines: Vec<String>,
    /// Its result: a number of pages or MiB, or empty.
    pub text: String,
}

/// Timeout for reading the rest of the output of an ended process.
const END_OF_OUTPUT: Duration = Duration::from_secs(10);

/// One line of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Line(String),
    Done(String),
    Refused(String),
}

/// Parses an answer in a line that may begin with a part of a kernel message.
fn parse(line: &str) -> Option<(u64, Answer)> {
    let rest = &line[line.find(MARKER)? + MARKER.len()..];
    let (id, rest) = rest.split_once(' ')?;
    let (verdict, text) = rest.split_once(' ').unwrap_or((rest, ""));
    let text = text.to_owned();
    let answer = match verdict {
        "|" => Answer::Line(text),
        "ok" => Answer::Done(text),
        "err" => Answer::Refused(text),
        _ => return None,
    };
    Some((id.parse().ok()?, answer))
}

/// All output of the guest, shared by the reader threads.
#[derive(Clone)]
pub(crate) struct Record(Arc<Mutex<RecordState>>);

struct RecordState {
    lines: VecDeque<String>,
    started: Instant,
    file: Option<File>,
}

impl Record {
    /// Returns an empty record. It also goes to the file, if given.
    pub(crate) fn new(path: Option<&Path>) -> Result<Self> {
        let file = path.map(|path| File::create(path).context_path("write the log", path));
        let file = file.transpose()?;
        let state = RecordState { lines: VecDeque::new(), started: Instant::now(), file };
        Ok(Self(Arc::new(Mutex::new(state))))
    }

    /// Adds a line with the time since the boot began.
    pub(crate) fn push(&self, source: &str, line: &str) {
        let mut state = self.state();
        let seconds = state.started.elapsed().as_secs_f64();
        let line = format!("[{seconds:9.3}] {source} {line}");
        if let Some(file) = &mut state.file {
            // A full disk must not end the guest. The record in memory continues.
            let _ = writeln!(file, "{line}");
        }
        if state.lines.len() == KEPT_LINES {
            state.lines.pop_front();
        }
        state.lines.push_back(line);
    }

    /// The last `count` lines.
    pub(crate) fn tail(&self, count: usize) -> String {
        let state = self.state();
        let skipped = state.lines.len().saturating_sub(count);
        let lines: Vec<&str> = state.lines.iter().skip(skipped).map(String::as_str).collect();
        lines.join("\n")
    }

    fn state(&self) -> MutexGuard<'_, RecordState> {
        // The state is consistent even after a panic of a thread that pushed a line.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Records the lines of a stream until its end, in a new thread.
    ///
    /// Calls `each` with every line, and whether it is complete: the last one may not be. Drops
    /// `each` at the end of the stream.
    pub(crate) fn follow(
        &self,
        source: &'static str,
        stream: impl Read + Send + 'static,
        mut each: impl FnMut(&str, bool) + Send + 'static,
    ) {
        let record = self.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while matches!(stream.read_until(b'\n', &mut bytes), Ok(1..)) {
                let line = String::from_utf8_lossy(&bytes);
                let whole = line.ends_with('\n');
                let line = line.trim_end_matches(['\r', '\n']);
                record.push(source, line);
                each(line, whole);
                bytes.clear();
            }
        });
    }
}

/// A console line with an answer in it, or an incomplete line.
struct Line {
    text: String,
    whole: bool,
}

/// The host's end of the protocol.
pub(crate) struct Console {
    input: Box<dyn Write + Send>,
    lines: Receiver<Line>,
    record: Record,
    last_id: u64,
    /// Start of a line that the guest had not finished when it migrated.
    half: String,
    /// Command id and lines of an answer whose end is missing.
    unfinished: Option<(u64, Vec<String>)>,
    /// Answers received while no call, or another call, waited for them.
    early: VecDeque<(u64, Answer)>,
}

/// Why a command has no complete answer.
enum NoAnswer {
    Timeout,
    Closed,
}

impl Console {
    /// Uses these two streams. A thread reads `output` to its end.
    pub(crate) fn new(
        input: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
        record: Record,
    ) -> Self {
        let (sender, lines): (Sender<Line>, _) = channel();
        let mut first = true;
        record.follow("console", output, move |text, whole| {
            // The first one may be the second half of an answer that began on the source.
            if first || !whole || text.contains(MARKER) {
                // The receiver is dropped while the guest is being ended.
                let _ = sender.send(Line { text: text.to_owned(), whole });
            }
            first = false;
        });
        let (half, unfinished, early) = (String::new(), None, VecDeque::new());
        Self { input: Box::new(input), lines, record, last_id: GUEST_ID, half, unfinished, early }
    }

    /// Continues with a guest that migrated here from `from`, whose process has ended. Takes over
    /// its command ids, unread answers and unfinished line.
    pub(crate) fn continue_from(&mut self, from: &mut Self) {
        let deadline = Instant::now() + END_OF_OUTPUT;
        let mut early = VecDeque::new();
        while let Ok(answer) = from.next_answer(deadline) {
            early.push_back(answer);
        }
        self.last_id = from.last_id;
        self.half = std::mem::take(&mut from.half);
        self.unfinished = from.unfinished.take();
        self.early = early;
        // Ends a command of which half was typed there. The next command reports an I/O error.
        let _ = self.press_return();
    }

    /// Types an empty line.
    pub(crate) fn press_return(&mut self) -> std::io::Result<()> {
        self.input.write_all(b"\n").and_then(|()| self.input.flush())
    }

    /// Waits until the guest reports that it is ready.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait(GUEST_ID, "boot", limit).map(drop)
    }

    /// Sends a command and waits for the end of its answer.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        self.run_with_lines(command, limit, &mut |_| {})
    }

    /// Sends a command and waits for the end of its answer. Calls `each` with each line at once.
    pub(crate) fn run_with_lines(
        &mut self,
        command: &str,
        limit: Duration,
        each: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let id = self.send(command)?;
        self.wait_with_lines(id, command, limit, each)
    }

    /// Sends a command and returns its id.
    pub(crate) fn send(&mut self, command: &str) -> Result<u64> {
        self.last_id += 1;
        let id = self.last_id;
        let line = command.replace('\n', " ");
        self.record.push("host", &format!("{id} {line}"));
        let sent = self.input.write_all(format!("{id} {line}\n").as_bytes());
        if sent.and_then(|()| self.input.flush()).is_err() {
            return Err(self.no_answer(command, Duration::ZERO, &NoAnswer::Closed));
        }
        Ok(id)
    }

    /// Waits for the end of the answer to the command with this id.
    pub(crate) fn wait(&mut self, wanted: u64, command: &str, limit: Duration) -> Result<Reply> {
        self.wait_with_lines(wanted, command, limit, &mut |_| {})
    }

    /// As [`wait`](Self::wait), and calls `each` with each line at once.
    fn wait_with_lines(
        &mut self,
        wanted: u64,
        command: &str,
        limit: Duration,
        each: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let deadline = Instant::now() + limit;
        let begun = self.unfinished.take().filter(|(id, _)| *id == wanted);
        let mut reply = Reply { lines: begun.unwrap_or_default().1, ..Reply::default() };
        loop {
            let (id, answer) = match self.next_answer(deadline) {
                Ok(answer) => answer,
                Err(reason) => {
                    self.unfinished = Some((wanted, reply.lines));
                    return Err(self.no_answer(command, limit, &reason));
                }
            };
            if id > wanted {
                // The guest answers in order.
                self.early.push_front((id, answer));
                return Err(LabError::CommandLost { command: command.to_owned() });
            }
            // A late answer to a command that timed out. It is in the record.
            if id < wanted {
                continue;
            }
            match answer {
                Answer::Line(line) => {
                    each(&line);
                    reply.lines.push(line);
                }
                Answer::Done(text) => return Ok(Reply { text, ..reply }),
                Answer::Refused(reason) => {
                    return Err(LabError::Refused { command: command.to_owned(), reason });
                }
            }
        }
    }

    fn next_answer(&mut self, deadline: Instant) -> Result<(u64, Answer), NoAnswer> {
        if let Some(answer) = self.early.pop_front() {
            return Ok(answer);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => NoAnswer::Timeout,
                RecvTimeoutError::Disconnected => NoAnswer::Closed,
            })?;
            self.half.push_str(&line.text);
            if line.whole
                && let Some(answer) = parse(&std::mem::take(&mut self.half))
            {
                return Ok(answer);
            }
        }
    }

    fn no_answer(&self, command: &str, limit: Duration, reason: &NoAnswer) -> LabError {
        let (command, tail) = (command.to_owned(), self.record.tail(TAIL_LINES));
        match reason {
            NoAnswer::Timeout => LabError::Timeout { command, limit, tail },
            NoAnswer::Closed => {
                LabError::Ended { command, status: "its console is closed".to_owned(), tail }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn answers_are_parsed_from_lines() {
        let done = |text: &str| Answer::Done(text.to_owned());
        assert_eq!(parse("@lab 7 ok 3400"), Some((7, done("3400"))));
        assert_eq!(parse("@lab 7 ok"), Some((7, done(""))));
        assert_eq!(parse("[ 1.0] half a line@lab 8 ok a b"), Some((8, done("a b"))));
        assert_eq!(
            parse("@lab 1 | MemFree: 1 kB"),
            Some((1, Answer::Line("MemFree: 1 kB".into())))
        );
        assert_eq!(parse("@lab 2 err no: ok"), Some((2, Answer::Refused("no: ok".into()))));
        for noise in ["", "ok", "@lab", "@lab x ok", "@lab 1 maybe", "random: crng init done"] {
            assert_eq!(parse(noise), None, "{noise}");
        }
    }

    /// A guest that prints these bytes and keeps the console open.
    fn scripted(answer: &'static [u8]) -> (Console, UnixStream) {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(answer).unwrap();
        let record = Record::new(None).unwrap();
        (Console::new(host.try_clone().unwrap(), host, record), guest)
    }

    #[test]
    fn kernel_messages_and_late_answers_are_skipped() {
        let (mut console, _guest) = scripted(
            b"@lab 0 ok ready\r\n[ 2.0] noise\n@lab 0 ok late\n@lab 1 | one\n[ 3.0] x@lab 1 ok two\n",
        );
        console.wait_ready(LIMIT).unwrap();
        let reply = console.run("anything", LIMIT).unwrap();
        assert_eq!(reply, Reply { lines: vec!["one".into()], text: "two".into() });
    }

    #[test]
    fn a_timeout_error_shows_the_console() {
        let (mut console, _guest) = scripted(b"Kernel panic - not syncing\n@lab 0 ok late\n");
        let error = loop {
            // The reading thread may not have seen the message at the first attempt.
            let error = console.run("touch 1", Duration::from_millis(50)).unwrap_err();
            if error.to_string().contains("panic") || !matches!(error, LabError::Timeout { .. }) {
                break error;
            }
        };
        assert!(matches!(error, LabError::Timeout { .. }), "{error}");
        assert!(error.to_string().contains("touch 1"), "{error}");
    }

    #[test]
    fn a_refused_command_and_an_ended_guest_are_different_errors() {
        let (mut console, guest) = scripted(b"@lab 1 err no such module\n");
        let error = console.run("rmmod x", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Refused { .. }), "{error}");
        drop(guest);
        let error = console.run("sync", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Ended { .. }), "{error}");
    }

    #[test]
    fn a_console_continues_after_a_migration() {
        for waits in [true, false] {
            continue_after_migration(waits);
        }
    }

    /// With and without a call that waits when the source process ends.
    fn continue_after_migration(waits: bool) {
        let (mut first, mut guest) = scripted(b"@lab 1 | one\n@lab 1 | tw");
        assert_eq!(first.send("anything").unwrap(), 1);
        // A socket that is closed with unread bytes loses its last output.
        guest.read_exact(&mut [0; 11]).unwrap();
        drop(guest);
        if waits {
            let error = first.wait(1, "anything", LIMIT).unwrap_err();
            assert!(matches!(error, LabError::Ended { .. }), "{error}");
        }
        let (mut second, mut guest) = scripted(b"o\n@lab 1 ok three\n@lab 3 ok\n");
        second.continue_from(&mut first);
        let reply = second.wait(1, "anything", LIMIT).unwrap();
        let lines = vec!["one".into(), "two".into()];
        assert_eq!(reply, Reply { lines, text: "three".into() });
        // A command lost in the migration is an error, not a timeout.
        assert_eq!((second.send("lost").unwrap(), second.send("heard").unwrap()), (2, 3));
        let error = second.wait(2, "lost", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::CommandLost { .. }), "{error}");
        assert_eq!(second.wait(3, "heard", LIMIT).unwrap(), Reply::default());
        let mut typed = [0; 16];
        guest.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"\n2 lost\n3 heard\n");
    }

    #[test]
    fn the_record_keeps_the_last_lines_and_writes_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let record = Record::new(Some(file.path())).unwrap();
        for number in 0..=KEPT_LINES {
            record.push("test", &format!("line {number}."));
        }
        assert!(!record.tail(usize::MAX).contains("line 0."));
        assert!(record.tail(1).ends_with(&format!("line {KEPT_LINES}.")));
        assert!(std::fs::read_to_string(file.path()).unwrap().contains("line 0."));
    }
}
