//! The line protocol with the guest's init, and the record of everything the guest prints.
//!
//! The host writes `ID COMMAND ARGUMENT...`. The guest answers with `@lab ID | TEXT` lines and
//! one `@lab ID ok TEXT` or `@lab ID err TEXT`. All else on the console is kernel messages.

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

/// The number under which the guest says that it is ready.
const GUEST_ID: u64 = 0;

/// Lines kept in memory; a longer record needs a log file.
const KEPT_LINES: usize = 20_000;

/// Lines of the record that go into an error.
const TAIL_LINES: usize = 30;

/// The answer to a command that the guest could do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// What the command printed, line by line.
    pub lines: Vec<String>,
    /// Its result in a word: a number of pages, of MiB, or nothing.
    pub text: String,
}

/// A piece of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Line(String),
    Done(String),
    Refused(String),
}

/// Finds an answer in a line, which may begin with a piece of a kernel message.
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

/// Everything the guest printed, shared by the threads that read it.
#[derive(Clone)]
pub(crate) struct Record(Arc<Mutex<RecordState>>);

struct RecordState {
    lines: VecDeque<String>,
    started: Instant,
    file: Option<File>,
}

impl Record {
    /// An empty record that is also written to a file, if one is given.
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
            // A full disk must not end the guest; the record in memory goes on.
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
        // A thread that panicked while it pushed a line has done no harm to the others.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Records the lines of a stream in a thread of its own, until the stream ends.
    ///
    /// `each` gets every line; what it holds is dropped at the end of the stream.
    pub(crate) fn follow(
        &self,
        source: &'static str,
        stream: impl Read + Send + 'static,
        mut each: impl FnMut(&str) + Send + 'static,
    ) {
        let record = self.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while matches!(stream.read_until(b'\n', &mut bytes), Ok(1..)) {
                let line = String::from_utf8_lossy(&bytes);
                let line = line.trim_end_matches(['\r', '\n']);
                record.push(source, line);
                each(line);
                bytes.clear();
            }
        });
    }
}

/// The host's end of the protocol.
pub(crate) struct Console {
    input: Box<dyn Write + Send>,
    answers: Receiver<(u64, Answer)>,
    record: Record,
    last_id: u64,
}

/// Why a command got no answer that ends it.
enum Silence {
    Timeout,
    Closed,
}

impl Console {
    /// Talks over the two streams; `output` is read to its end by a thread.
    pub(crate) fn new(
        input: impl Write + Send + 'static,
        output: impl Read + Send + 'static,
        record: Record,
    ) -> Self {
        let (sender, answers): (Sender<(u64, Answer)>, _) = channel();
        record.follow("console", output, move |line| {
            if let Some(answer) = parse(line) {
                // Nobody listens any more when the guest is being ended.
                let _ = sender.send(answer);
            }
        });
        Self { input: Box::new(input), answers, record, last_id: GUEST_ID }
    }

    /// Waits until the guest says that it is ready.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait(GUEST_ID, "boot", limit, &mut |_| {}).map(drop)
    }

    /// Sends a command and waits for the end of its answer.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<Reply> {
        self.run_telling(command, limit, &mut |_| {})
    }

    /// The same; `tell` hears each line of the answer as it comes.
    pub(crate) fn run_telling(
        &mut self,
        command: &str,
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        self.last_id += 1;
        let id = self.last_id;
        let line = command.replace('\n', " ");
        self.record.push("host", &format!("{id} {line}"));
        let sent = self.input.write_all(format!("{id} {line}\n").as_bytes());
        if sent.and_then(|()| self.input.flush()).is_err() {
            return Err(self.no_answer(command, limit, &Silence::Closed));
        }
        self.wait(id, command, limit, tell)
    }

    fn wait(
        &mut self,
        wanted: u64,
        command: &str,
        limit: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Reply> {
        let deadline = Instant::now() + limit;
        let mut reply = Reply::default();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (id, answer) = self.answers.recv_timeout(left).map_err(|error| {
                let silence = match error {
                    RecvTimeoutError::Timeout => Silence::Timeout,
                    RecvTimeoutError::Disconnected => Silence::Closed,
                };
                self.no_answer(command, limit, &silence)
            })?;
            // Answers to a command that was given up on come late; they are in the record.
            if id != wanted {
                continue;
            }
            match answer {
                Answer::Line(line) => {
                    tell(&line);
                    reply.lines.push(line);
                }
                Answer::Done(text) => return Ok(Reply { text, ..reply }),
                Answer::Refused(reason) => {
                    return Err(LabError::Refused { command: command.to_owned(), reason });
                }
            }
        }
    }

    fn no_answer(&self, command: &str, limit: Duration, silence: &Silence) -> LabError {
        let (command, tail) = (command.to_owned(), self.record.tail(TAIL_LINES));
        match silence {
            Silence::Timeout => LabError::Timeout { command, limit, tail },
            Silence::Closed => {
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
    fn answers_are_found_in_lines() {
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

    /// A guest that answers the first command with these bytes and keeps the console open.
    fn scripted(answer: &'static [u8]) -> (Console, UnixStream) {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(answer).unwrap();
        let record = Record::new(None).unwrap();
        (Console::new(host.try_clone().unwrap(), host, record), guest)
    }

    #[test]
    fn kernel_messages_and_late_answers_are_passed_over() {
        let (mut console, _guest) = scripted(
            b"@lab 0 ok ready\r\n[ 2.0] noise\n@lab 9 ok late\n@lab 1 | one\n[ 3.0] x@lab 1 ok two\n",
        );
        console.wait_ready(LIMIT).unwrap();
        let reply = console.run("anything", LIMIT).unwrap();
        assert_eq!(reply, Reply { lines: vec!["one".into()], text: "two".into() });
    }

    #[test]
    fn silence_is_a_timeout_that_shows_the_console() {
        let (mut console, _guest) = scripted(b"Kernel panic - not syncing\n@lab 5 ok late\n");
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
    fn the_end_of_the_guest_and_its_refusal_are_told_apart() {
        let (mut console, guest) = scripted(b"@lab 1 err no such module\n");
        let error = console.run("rmmod x", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Refused { .. }), "{error}");
        drop(guest);
        let error = console.run("sync", LIMIT).unwrap_err();
        assert!(matches!(error, LabError::Ended { .. }), "{error}");
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
